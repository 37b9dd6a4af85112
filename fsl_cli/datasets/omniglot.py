"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each (Lake et al., Science 2015; MIT licence).

The classes are in the order background (964), then evaluation (659), each sorted by alphabet and character. The splits
are constants: `lake` train 792 / val 172 / test 659 and `vinyals` train 1,028 / val 172 / test 423 characters, whose
test alphabets are new (Snell et al., 2017), and `shuffled` train 1,100 / val 100 / test 423, drawn from all alphabets, as in
the code of MAML, Reptile and relation networks; this is easier, because the test alphabets were seen in training.
"""

import contextlib
import io
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fsl_cli.datasets import images
from fsl_cli.datasets.drawings import to_drawing
from fsl_cli.datasets.packed import SPLITS, Dataset, Packed, Raw, digest, pack, with_channels
from fsl_cli.datasets.torchvision_sets import patient

CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWINGS = 20
SIDE = 105
VAL_ALPHABETS = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
TEST_CHARACTERS = {"lake": 659, "vinyals": 423, "shuffled": 423}  # the last ones in the order of classes
SHUFFLED_VAL = 100  # characters
TURNS = {"all": SPLITS, "train": ("train",), "none": ()}  # the splits in which quarter turns count as classes
LARGEST = 65_536  # bytes; a real drawing has about 500
SOURCE = "https://github.com/brendenlake/omniglot/tree/master/python"
WHOLE = "{} characters with {} drawings each"
EDITION = 1  # of the packed form: increase it when the same files give other pixels
BROKEN = (*images.BROKEN, zipfile.BadZipFile)


class Omniglot(Dataset):
    """Omniglot as `[32460, channels, size, size]`, two-valued, ink = 255; quarter turns of a character can be classes.

    Args:
        data_dir: holds `omniglot-py/` with both archives or their unpacked folders; if absent, they are downloaded.
        cache_dir: holds the packed form.
        split: which characters are train, val and test; see the top of the file.
        rotations: the splits in which quarter turns are classes: `all`, `train` (that split only) or `none`.
        mirrored: whether mirror images of the training characters (and of their quarter turns) are classes too.
        size: side of the images in pixels.
        channels: 1, or 3 equal ones.
    """

    def __init__(
        self,
        data_dir: str,
        cache_dir: str,
        split: Literal["lake", "vinyals", "shuffled"] = "lake",
        rotations: Literal["all", "train", "none"] = "all",
        mirrored: bool = False,
        size: int = 28,
        channels: int = 1,
    ) -> None:
        if not 8 <= size <= 224:
            raise ValueError(f"dataset.size = {size}, expected 8 to 224 pixels. Use 28 for the published protocols.")
        self.folder, self.cache_dir = Path(data_dir).expanduser() / "omniglot-py", cache_dir
        self.split, self.rotations, self.mirrored, self.size, self.channels = split, rotations, mirrored, size, channels

    def load(self) -> Packed:
        # The key does not depend on the source: all files are checked before packing, and there is only one edition of
        # Omniglot, so archive, folder and download give the same array, which is used even when they are gone.
        key = f"omniglot-{self.size}-{digest(CHARACTERS, DRAWINGS, EDITION)}"
        items, names, counts = pack(self.cache_dir, key, self._read)
        items = with_channels(items, self.channels)
        turns: dict[str, tuple[int, ...]] = dict.fromkeys(TURNS[self.rotations], (0, 1, 2, 3))
        if self.mirrored:
            own = turns.get("train", (0,))
            turns["train"] = (*own, *(4 + turn for turn in own))
        return Packed("omniglot", items, names, np.asarray(counts), class_splits(names, self.split), turns)

    @staticmethod
    def item(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
        return to_drawing(image, shape)

    def _read(self) -> Raw:
        items = np.empty((sum(CHARACTERS.values()) * DRAWINGS, 1, self.size, self.size), np.uint8)
        names: list[str] = []
        for part in CHARACTERS:
            with find(self.folder, part) as (path, files, read):
                for index, file in enumerate(files, DRAWINGS * len(names)):
                    items[index, 0] = self._decode(path, file, read)
                names += [file.removeprefix(f"{part}/").rpartition("/")[0] for file in files[::DRAWINGS]]
        return Raw(items, names, [DRAWINGS] * len(names))

    def _decode(self, path: Path, file: str, read: Callable[[str], bytes]) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(read(file)), formats=["PNG"]) as image:
                if (image.mode, image.size) != ("1", (SIDE, SIDE)):
                    raise ValueError(f"mode {image.mode}, {image.width}x{image.height} pixels")
                # Nearest-neighbour, as in the published protocols: Pillow resizes two-valued images (mode 1) in no other way.
                paper = np.asarray(image.resize((self.size, self.size), Image.Resampling.NEAREST))
        except BROKEN as error:
            found, expected = f"{file} ({error})", f"a two-valued PNG of {SIDE}x{SIDE} pixels"
            raise refusal(path, found, expected) from error
        return np.where(paper, 0, 255)


def class_splits(names: list[str], split: str) -> dict[str, np.ndarray]:
    """The class numbers of train, val and test, given the names of all classes in order."""
    order = np.arange(len(names))
    val = np.array([name.split("/")[0] in VAL_ALPHABETS for name in names])
    if split == "shuffled":
        order = np.argsort(np.argsort([digest(split, name) for name in names]))  # the position of each in a constant shuffle
        val = order < SHUFFLED_VAL
    test = order >= len(names) - TEST_CHARACTERS[split]
    assert not (test & val).any(), "the validation characters stand before those of the test"
    return {"train": np.flatnonzero(~test & ~val), "val": np.flatnonzero(val), "test": np.flatnonzero(test)}


@contextlib.contextmanager
def find(folder: Path, part: str) -> Iterator[tuple[Path, list[str], Callable[[str], bytes]]]:
    """The place of `part`, its verified files in order, and a function to read one: from its folder if that is complete, else
    from its archive, which is downloaded if neither is there. Nothing is unpacked on disk."""
    unpacked, archive = folder / part, folder / f"{part}.zip"
    if unpacked.is_dir():
        found = {file.relative_to(folder).as_posix(): file.stat().st_size for file in unpacked.glob("*/*/*.png")}
        files, fault = check(part, found)
        if not fault:
            yield unpacked, files, lambda file: (folder / file).read_bytes()
            return
        if not archive.exists():
            raise refusal(unpacked, fault, WHOLE.format(CHARACTERS[part], DRAWINGS))
    if not archive.exists():
        download(folder, part)
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        page = archive.read_bytes()[:64].lstrip().startswith(b"<")
        fault = "a web page" if page else f"a broken archive of {archive.stat().st_size} bytes ({error})"
        raise refusal(archive, fault, WHOLE.format(CHARACTERS[part], DRAWINGS)) from error
    with opened:
        files, fault = check(part, {info.filename: info.file_size for info in opened.infolist()})
        if fault:
            raise refusal(archive, fault, WHOLE.format(CHARACTERS[part], DRAWINGS))
        yield archive, files, opened.read


def check(part: str, found: dict[str, int]) -> tuple[list[str], str]:
    """The drawings among the files `found` (name -> bytes), in order, and what is wrong with them, or ''."""
    pattern = re.compile(rf"{part}/[^/]+/character\d\d/\d{{4}}_\d\d\.png")  # not __MACOSX, folders, hidden files
    files = sorted(filter(pattern.fullmatch, found), key=lambda file: file.split("/"))
    counts = Counter(file.rpartition("/")[0] for file in files)
    for file in files:
        if found[file] > LARGEST:
            return files, f"{file} with {found[file]} bytes"
    for character, count in counts.items():
        if count != DRAWINGS:
            return files, f"{character} with {count} drawings"
    return files, "" if len(counts) == CHARACTERS[part] else f"{len(counts)} characters"


def refusal(path: Path, found: str, expected: str) -> ValueError:
    """The error for wrong raw files."""
    return ValueError(
        f"data_dir: {path} has {found}, expected {expected}. "
        f"Delete it, and run again with a network or put {path.stem}.zip from {SOURCE} in its place."
    )


def download(folder: Path, part: str) -> None:
    """Downloads the archive of `part` to `folder`, checked against the official MD5, or leaves nothing there."""
    from torchvision.datasets import Omniglot as Source  # here, because its import takes seconds

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft, patient():
            source = Source(draft, background=part == "images_background", download=True)
            Path(source.root, f"{part}.zip").replace(folder / f"{part}.zip")
    except (OSError, RuntimeError, HTTPException) as error:
        raise ValueError(
            f"data_dir: {folder} has no {part}.zip, and it cannot be downloaded ({error}). Put images_background.zip "
            f"and images_evaluation.zip from {SOURCE} into that folder, or use dataset=strokes, which needs no files."
        ) from error
