"""The user's own images: `root/<class>/<image>`.

The classes are split by three folders, `root/train/<class>/<image>` and so on, if there are these three and no others; by a
file of lists; or by a hash of each class's name, so that a class stays in its split when others come and go.
"""

from pathlib import Path, PurePosixPath

import numpy as np

from fsl_cli.datasets import archives, trees
from fsl_cli.datasets.augment import Augment
from fsl_cli.datasets.class_splits import Splits, by_hash, check_fractions, from_file, only_test
from fsl_cli.datasets.images import check_shape
from fsl_cli.datasets.packed import SPLITS, Dataset, Packed, Raw, digest, pack

EDITION = 1  # of the packed form: raise it when the same files are to give other pixels


class ImageFolder(Dataset):
    """Images as `[n, channels, size, size]`: the shorter side is scaled to `size`, the middle is kept.

    Args:
        root: the folder of class folders.
        cache_dir: holds the packed form.
        fractions: of the classes for train, val and test, where neither folders nor lists say.
        lists: a JSON file {"train": [class names], "val": [...], "test": [...]}.
        test_only: all classes are test classes, for a model trained on another data set.
        crop, flip, jitter: changes in training, see augment.py.
    """

    def __init__(
        self,
        root: str,
        cache_dir: str,
        fractions: list[float],
        size: int = 84,
        channels: int = 3,
        lists: str | None = None,
        test_only: bool = False,
        crop: int = 0,
        flip: bool = False,
        jitter: float = 0.0,
    ) -> None:
        check_shape(size, channels)
        check_fractions(fractions)
        self.root, self.cache_dir, self.lists = Path(root).expanduser(), cache_dir, lists
        self.fractions = fractions
        self.size, self.channels, self.test_only = size, channels, test_only
        self.augment = Augment(crop, flip, jitter)

    def load(self) -> Packed:
        if not self.root.is_dir():
            raise ValueError(f"dataset.root = {self.root} is no folder, expected one with a folder of images for each class.")
        key = f"image_folder-{self.size}x{self.channels}-{digest(EDITION, archives.fingerprint(self.root))}"
        items, names, counts = pack(self.cache_dir, key, self._read)
        splits = only_test(len(names)) if self.test_only else self._splits(names)
        return Packed("image_folder", items, names, np.asarray(counts), splits, augment=self.augment)

    def _read(self) -> Raw:
        tree = trees.survey([self.root], lambda name: PurePosixPath(name).parent.as_posix())
        if "." in tree:
            raise ValueError(
                f"dataset.root = {self.root} has images in no class ({tree['.'][0].name}), expected root/<class>/<image>. "
                "Move them to folders called after their classes."
            )
        if len(tree) < 2:
            raise ValueError(
                f"dataset.root = {self.root} has {len(tree)} folders with images, expected two classes or more. Name the folder "
                "that holds the class folders."
            )
        return trees.read([self.root], tree, self.size, self.channels, self.cache_dir)

    def _splits(self, names: list[str]) -> Splits:
        if self.lists is not None:
            return from_file(names, Path(self.lists).expanduser(), f"folder below {self.root}")
        if {name.split("/")[0] for name in names} == set(SPLITS) and all("/" in name for name in names):
            return self._from_folders(names)
        return by_hash(names, self.fractions)

    def _from_folders(self, names: list[str]) -> Splits:
        seen: dict[str, str] = {}
        for name in names:
            split, _, own = name.partition("/")
            if seen.setdefault(own, split) != split:
                raise ValueError(
                    f"dataset.root = {self.root} has class {own!r} in {seen[own]} and in {split}, expected every class in "
                    "one of them: the model is tested on classes it has never seen. Move one of the two."
                )
        return {
            split: np.array([c for c, name in enumerate(names) if name.startswith(f"{split}/")], dtype=np.int64)
            for split in SPLITS
        }
