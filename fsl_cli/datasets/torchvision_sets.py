"""The image classification data sets of torchvision, through one adapter: the YAML names the class and its expected content.

Their train and test parts are joined, because a few-shot split divides classes, not images. The class split is a checked-in
list, or a rule by class numbers in torchvision's order: c % 2 = 0 train, c % 4 = 1 val, c % 4 = 3 test (the rule of Chen et
al. 2019 for CUB).
"""

import contextlib
import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsl_cli.datasets import archives
from fsl_cli.datasets.class_splits import Splits, by_name, by_number, listed
from fsl_cli.datasets.images import to_item
from fsl_cli.datasets.packed import Packed, Raw, digest, locked
from fsl_cli.datasets.resized import Resized

EDITION = 1  # of the packed form: increase it when the same files give other pixels
TIMEOUT_S = 30
# What torchvision raises for truncated or wrong files; not all of its downloads have a checksum.
BROKEN = (*archives.BROKEN, HTTPException, ValueError, LookupError, AssertionError)


@dataclass(kw_only=True)
class Torchvision(Resized):
    """Images that torchvision reads, as described in `Resized`.

    Args:
        name: of the data set in this program.
        kind: the class of torchvision.datasets.
        parts: the constructor's arguments for each part of the data, such as {train: true}; the parts are joined.
        classes: the required number of classes; `images`: of images in total.
        data_dir: torchvision's `root`; missing files are downloaded.
        files: what torchvision downloads, below `data_dir`, for the error message if the download fails.
        split: a checked-in list splits/NAME.json, or null for the rule by numbers.
        transposed: the images are stored transposed (EMNIST).
    """

    name: str
    kind: str
    parts: list[Any]
    classes: int
    images: int
    data_dir: str
    files: list[str]
    split: str | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lists = listed(self.split) if self.split else None

    def load(self) -> Packed:
        # As for Omniglot, the key does not depend on the source: torchvision verifies the files, and there is only one edition.
        key = digest(EDITION, self.kind, self.parts, self.images, self.transposed)
        return self.packed(self.name, key, self._read, self._splits)

    def _splits(self, names: list[str]) -> Splits:
        if self.lists is None:
            return by_number(len(names))
        strange = {name for own in self.lists.values() for name in own} - set(names)
        if strange:
            raise ValueError(f"dataset.split = {self.split} has {min(strange)!r}, no class of {self.name}. Leave it as it is.")
        return by_name(names, self.lists)

    def _read(self) -> Raw:
        # Locked, because data sets that share files (CIFAR-FS and FC100) must not download at the same time.
        with locked(Path(self.cache_dir).expanduser() / f".{self.kind}.lock", self.cache_dir):
            parts = [self._open(part) for part in self.parts]
        total = sum(len(part) for part in parts)
        items = np.empty((total, self.channels, self.size, self.size), np.uint8)
        labels = np.empty(total, np.int64)
        for place, (image, label) in enumerate(pair for part in parts for pair in self._pairs(part)):
            image = image.transpose(Image.Transpose.TRANSPOSE) if self.transposed else image
            items[place], labels[place] = to_item(image, self.size, self.channels), label
        found, counts = np.unique(labels, return_counts=True)
        if (len(found), total) != (self.classes, self.images):
            raise ValueError(
                f"data_dir: {self.data_dir} has {len(found)} classes and {total:,} images of {self.name}, expected "
                f"{self.classes} and {self.images:,}. Delete its files there, so that they are downloaded again."
            )
        given = getattr(parts[0], "classes", None)
        names = [str(given[c]) if given else f"{c:03d}" for c in found]
        return Raw(items[np.argsort(labels, kind="stable")], names, counts.tolist())

    def _pairs(self, part: Any) -> Iterator[tuple[Image.Image, int]]:
        """The images of a part of the data and their class numbers."""
        for number in range(len(part)):
            try:
                image, label = part[number]
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(
                    f"data_dir: image {number} of {self.name} in {self.data_dir} cannot be read ({error}). Delete its files "
                    "there, so that they are downloaded again."
                ) from error
            yield image, int(label)

    def _open(self, part: dict[str, Any]) -> Any:
        """Opens a part of the data with torchvision, and downloads it if necessary."""
        from torchvision import datasets  # here, because its import takes seconds

        kind, folder = getattr(datasets, self.kind), Path(self.data_dir).expanduser()
        try:
            try:
                return kind(str(folder), download=False, **part)
            except RuntimeError:  # missing or damaged
                with patient():
                    folder.mkdir(parents=True, exist_ok=True)
                    return kind(str(folder), download=True, **part)
        except ImportError as error:
            raise ValueError(
                f"dataset = {self.name} needs the package {error.name} to read its files. Install it: pip install {error.name}."
            ) from error
        except BROKEN as error:
            raise ValueError(
                f"data_dir: {self.data_dir} has no whole {self.name}, and it cannot be downloaded ({error}). Put "
                f"{', '.join(self.files)} there, as torchvision.datasets.{self.kind} downloads them; or delete what is there of "
                "it, as a download that was stopped leaves, and run once where there is a network."
            ) from error


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Within it, downloads print nothing, and time out if a firewall drops packets."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
