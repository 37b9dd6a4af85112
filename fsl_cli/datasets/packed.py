"""The common form of all data sets, on disk and in memory.

A packed data set is a folder of the cache with `items.npy` (images uint8 `[n, C, H, W]` or texts as bytes `[n]`, sorted by
class) and `classes.json` (name and number of items of each class). It is written once, atomically, and memory-mapped afterwards.
"""

import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from fsl_cli.datasets.augment import Augment
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.images import to_item

SPLITS = ("train", "val", "test")


class Raw(NamedTuple):
    """The content of raw files: items sorted by class (images uint8 `[n, C, H, W]` or texts as bytes `[n]`), and the name and
    size of each class.
    """

    items: np.ndarray
    names: list[str]
    counts: list[int]


# The names of turns, by number, for turned copies of a class that count as classes of their own.
LYING = (
    "",
    " turned 90",
    " turned 180",
    " turned 270",
    " mirrored",
    " mirrored, turned 90",
    " mirrored, turned 180",
    " mirrored, turned 270",
)


@dataclass(frozen=True)
class Classes:
    """The classes of one split: class `c` has the items `starts[c] : starts[c] + counts[c]`, turned by `turns[c]`."""

    names: list[str]
    starts: np.ndarray  # [classes]
    counts: np.ndarray  # [classes]
    turns: np.ndarray  # [classes] 0 to 3: quarter turns; 4 to 7: those of the mirror image
    held: int = 0  # number of last items of each class that are held out for queries; 0: none
    split: str = "chosen"

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Packed:
    """A data set ready for use.

    `splits`: the class numbers of each split; `turns`: the turns that count as classes there (default: none); `augment`: the
    augmentation in training (default: none); `held`: the number of items of each class that are held out for queries.
    """

    name: str
    items: np.ndarray  # images uint8 [n, C, H, W] or texts as bytes [n], memory-mapped
    names: list[str]  # [classes]
    counts: np.ndarray  # [classes]
    splits: dict[str, np.ndarray]
    turns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    augment: Augment = field(default_factory=Augment)
    held: int = 0

    @property
    def item_shape(self) -> tuple[int, ...]:
        return self.items.shape[1:]

    def class_names(self, split: str) -> list[str]:
        """The names of the classes of `split`, without their turns."""
        return [self.names[number] for number in self.splits.get(split, ())]

    def with_val_in_training(self) -> "Packed":
        """The same data with the validation classes as training classes too."""
        return replace(self, splits={**self.splits, "train": np.concatenate([self.splits["train"], self.splits["val"]])})

    def classes(self, split: str) -> Classes:
        """The classes of `split`, where each turn of a class is a class of its own."""
        if split not in self.splits:
            raise ValueError(f"split = {split!r}, but {self.name} has {', '.join(self.splits)}. Choose one of them.")
        if len(self.splits[split]) == 0:
            raise ValueError(
                f"dataset: of the {len(self.names)} classes of {self.name} none is a {split} class as they are split here. Give "
                "it more classes, or split them otherwise (dataset.lists, dataset.fractions, dataset.test_only)."
            )
        base = np.asarray(self.splits[split], dtype=np.int64)
        turns = np.asarray(self.turns.get(split, (0,)), dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)
        chosen = np.repeat(base, len(turns))
        turned = np.tile(turns, len(base))
        names = [self.names[c] + LYING[t] for c, t in zip(chosen, turned, strict=True)]
        return Classes(names, starts[chosen], np.asarray(self.counts, dtype=np.int64)[chosen], turned, self.held, split)


class Dataset(ABC):
    """A data set as named by `configs/dataset/NAME.yaml`: the constructor takes its options, and `load` returns the data."""

    @abstractmethod
    def load(self) -> Packed | Drawn:
        """Opens the packed form, after reading, verifying and packing the raw files if necessary; or returns a Drawn."""

    @staticmethod
    def item(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
        """Converts a user's picture, in mode L or RGB, to an item uint8 `[C, H, W]` like those of this data set."""
        return to_item(image, shape[-1], shape[0])


def digest(*parts: object) -> str:
    """A short key for a cache folder: a hash of `parts`, everything that its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def blank(cache_dir: str, shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array of zeros in an anonymous file of the cache, so that it may be larger than memory."""
    try:
        folder = Path(cache_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # writing to a mapping on a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            return np.memmap(file, np.uint8, "w+", shape=shape)  # the mapping keeps the file alive
    except OSError as error:
        raise unwritable(cache_dir, error) from error


def unwritable(cache_dir: str, error: OSError) -> ValueError:
    """The error for a cache that cannot be written."""
    return ValueError(
        f"cache_dir = {cache_dir}: packed data cannot be written there ({error.strerror or error}). "
        "Set cache_dir=PATH or FSL_CACHE_DIR to a writable folder with enough space."
    )


def with_channels(items: np.ndarray, channels: int) -> np.ndarray:
    """Repeats grey items `[n, 1, H, W]` as a view `[n, channels, H, W]`, for a model that takes colour."""
    if channels not in (1, 3):
        raise ValueError(f"dataset.channels = {channels}, expected 1, or 3 for a model trained on colours. Choose one of them.")
    return np.broadcast_to(items, (len(items), channels, *items.shape[2:]))


def pack(cache_dir: str, key: str, read: Callable[[], Raw]) -> Raw:
    """Opens `cache_dir/key`; if it is absent or damaged, calls `read` and writes it first. Items come memory-mapped.

    If several processes do so, one reads, and the others wait for it.
    """
    folder = Path(cache_dir).expanduser() / key
    found = _open(folder)
    if found is not None:
        return found
    with locked(folder.with_name(f".{key}.lock"), cache_dir) as alone:
        found = _open(folder)
        if found is None:
            for left in folder.parent.glob(f".{glob.escape(key)}-*") if alone else ():  # left by a killed process
                shutil.rmtree(left, ignore_errors=True)
            _make(folder, read(), cache_dir)
            found = _open(folder)
    assert found is not None, f"{folder} was just written"
    return found


@contextmanager
def locked(path: Path, cache_dir: str) -> Iterator[bool]:
    """Lets one process in at a time; yields whether the file system has locks."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        raise unwritable(cache_dir, error) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _make(folder: Path, raw: Raw, cache_dir: str) -> None:
    try:
        draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        draft.mkdir(parents=True)
        try:
            _write(draft, raw)
            try:
                draft.rename(folder)
            except OSError:
                if _open(folder) is None:  # it is damaged; otherwise a process without locks has packed the same data
                    shutil.rmtree(folder)
                    draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise unwritable(cache_dir, error) from error


def _write(folder: Path, raw: Raw) -> None:
    with open(folder / "items.npy", "wb") as file:
        np.save(file, np.ascontiguousarray(raw.items), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    text = json.dumps({"names": raw.names, "counts": [int(count) for count in raw.counts]})
    (folder / "classes.json").write_text(text, encoding="utf-8")


def _open(folder: Path) -> Raw | None:
    try:
        items = np.load(folder / "items.npy", mmap_mode="r", allow_pickle=False)
        table = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        names, counts = table["names"], table["counts"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    known = (items.dtype.kind, items.ndim) in (("u", 4), ("S", 1))
    whole = known and len(items) == sum(counts) and len(names) == len(counts)
    return Raw(items, names, counts) if whole else None
