"""Strokes: characters of a few random pen strokes, drawn by a program; the data set that needs no files.

Each class is a small random program (see pens.py), and each drawing runs it with an unsteady hand. All of it comes from a
constant of this file: neither a run's seed nor the number of classes changes what class c of a split looks like. By default
there are 1,200 train, 200 val and 400 test classes.
"""

import numpy as np
from PIL import Image

from fsl_cli.datasets.drawings import to_drawing
from fsl_cli.datasets.packed import SPLITS, Dataset, Packed, Raw, digest, pack, with_channels
from fsl_cli.datasets.pens import BLOCK, STROKES, draw, invent

SEED = 2_015_1211
EDITION = 1  # of the packed form: increase it when this file or pens.py draws differently


class Strokes(Dataset):
    """Random pen strokes as `[classes * drawings, channels, size, size]`, two-valued, ink = 255.

    Args:
        cache_dir: holds the packed form.
        train_classes: number of classes to train on; likewise `val_classes` and `test_classes`.
        drawings: number of items of each class.
        strokes: how many a class has at most, 1 to 4; with fewer, classes are harder to tell apart.
        tremor: how unsteady the hand is; 0: all drawings of a class are equal, 2: twice as unsteady.
        noise: the share of pixels that are flipped between ink and paper.
        size: side of the images in pixels.
        channels: 1, or 3 equal ones.
    """

    def __init__(
        self,
        cache_dir: str,
        train_classes: int = 1200,
        val_classes: int = 200,
        test_classes: int = 400,
        drawings: int = 20,
        size: int = 28,
        channels: int = 1,
        strokes: int = STROKES,
        tremor: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        self.classes = dict(zip(SPLITS, (train_classes, val_classes, test_classes), strict=True))
        for split, number in self.classes.items():
            if not 1 <= number <= 100_000:
                raise ValueError(f"dataset.{split}_classes = {number}, expected 1 to 100000. Use 200 or more.")
        if not 2 <= drawings <= 1000:
            raise ValueError(f"dataset.drawings = {drawings}, expected 2 to 1000. Use 20, as Omniglot has.")
        if not 8 <= size <= 224:
            raise ValueError(f"dataset.size = {size}, expected 8 to 224 pixels. Use 28, as for Omniglot.")
        if not 1 <= strokes <= STROKES:
            raise ValueError(f"dataset.strokes = {strokes}, expected 1 to {STROKES}. Use {STROKES}, or fewer for a harder task.")
        if not 0 <= tremor <= 5:
            raise ValueError(f"dataset.tremor = {tremor}, expected 0 to 5. Use 1, or more for a harder task.")
        if not 0 <= noise <= 0.5:
            raise ValueError(
                f"dataset.noise = {noise}, expected 0 to 0.5, a share of the pixels. Use 0, or 0.1 for a harder task."
            )
        self.cache_dir, self.drawings, self.size, self.channels = cache_dir, drawings, size, channels
        self.strokes, self.tremor, self.noise = strokes, tremor, noise

    def load(self) -> Packed:
        harder = (self.strokes, float(self.tremor), float(self.noise))
        options = [harder] if harder != (STROKES, 1.0, 0.0) else []  # the default drawings keep their key
        key = f"strokes-{self.size}-{digest(SEED, EDITION, self.classes, self.drawings, *options)}"
        items, names, counts = pack(self.cache_dir, key, self._draw)
        ends = np.cumsum(list(self.classes.values()))
        splits = {split: np.arange(end - self.classes[split], end) for split, end in zip(SPLITS, ends, strict=True)}
        return Packed("strokes", with_channels(items, self.channels), names, np.asarray(counts), splits)

    @staticmethod
    def item(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
        return to_drawing(image, shape)

    def _draw(self) -> Raw:
        items = np.empty((sum(self.classes.values()), self.drawings, 1, self.size, self.size), np.uint8)
        names: list[str] = []
        for which, (split, number) in enumerate(self.classes.items()):
            for start in range(0, number, BLOCK):  # in whole blocks, so that class c does not depend on the number of classes
                key = [SEED, which, start // BLOCK]
                program = invent(np.random.default_rng(key), self.strokes)
                end = min(start + BLOCK, number)
                block = items[len(names) : len(names) + end - start]
                for drawing in range(self.drawings):
                    hand = np.random.default_rng([*key, 1 + drawing])
                    block[:, drawing, 0] = draw(program, hand, self.size, self.tremor, self.noise)[: len(block)]
                names += [f"{split}/character{c + 1:04d}" for c in range(start, end)]
        return Raw(items.reshape(-1, 1, self.size, self.size), names, [self.drawings] * len(names))
