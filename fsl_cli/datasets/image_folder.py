"""The user's own images: `root/<class>/<image>`.

The classes are split by a file of lists, if one is given; else by three folders, `root/train/<class>/<image>` and so on, if
they exist; else by a hash of each class's name, so that a class stays in its split when others are added or removed.
"""

import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from fsl_cli.datasets import archives, trees
from fsl_cli.datasets.class_splits import Splits, by_hash, check_fractions, from_file
from fsl_cli.datasets.images import hidden, is_image
from fsl_cli.datasets.packed import SPLITS, Packed, Raw, digest
from fsl_cli.datasets.resized import Resized

log = logging.getLogger(__name__)

FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # names -> splits
EDITION = 2  # of the packed form: increase it when the same files give other pixels


@dataclass(kw_only=True)
class ImageFolder(Resized):
    """The user's images, as described in `Resized`.

    Args:
        root: the folder of class folders.
        fractions: of the classes for train, val and test, if there are neither split folders nor lists.
        lists: a JSON file {"train": [class names], "val": [...], "test": [...]}.
    """

    root: str
    fractions: list[float]
    lists: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.fractions)
        self.folder = Path(self.root).expanduser()

    def load(self) -> Packed:
        if not self.folder.is_dir():
            raise ValueError(f"dataset.root = {self.folder} is no folder, expected one with a folder of images for each class.")
        key = digest(EDITION, str(self.folder.resolve()), archives.fingerprint(self.folder))
        found = self.packed("image_folder", key, self._read, self._splits)
        if self.test_only:  # otherwise _splits has checked this
            self._refuse_twice(found.names)
        return found

    def _read(self) -> Raw:
        tree = trees.survey([self.folder], lambda name: PurePosixPath(name).parent.as_posix())
        if "." in tree:
            raise ValueError(
                f"dataset.root = {self.folder} has images in no class ({tree['.'][0].name}), expected root/<class>/<image>. "
                "Move them to folders called after their classes."
            )
        if len(tree) < 2:
            raise ValueError(
                f"dataset.root = {self.folder} has {len(tree)} folders with images, expected two classes or more. Name the "
                "folder that holds the class folders."
            )
        others = [name for name in archives.listing(self.folder) if not is_image(name) and not hidden(name)]
        if others:
            some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            log.info(f"dataset.root: files whose names do not end as those of images are left out: {some}")
        return trees.read([self.folder], tree, self.size, self.channels, self.cache_dir, "dataset.root")

    def _splits(self, names: list[str]) -> Splits:
        if self.lists is not None:
            return from_file(names, Path(self.lists).expanduser(), f"folder below {self.root}")
        folders = {name.split("/")[0] for name in names}
        splits = {folder for folder in folders if _split(folder) and any(name.startswith(f"{folder}/") for name in names)}
        if len(splits) < 2:
            return by_hash(names, self.fractions)
        # A split by hash would ignore these folders, and train on classes of the user's test folder.
        if len(folders) != 3 or {_split(folder) for folder in folders} != set(SPLITS):
            raise ValueError(
                f"dataset.root = {self.folder} has the folders {', '.join(sorted(folders))}, expected {', '.join(SPLITS)} with "
                "other classes in each, and nothing else. Add what is missing and move the rest elsewhere; or put all class "
                "folders straight into one folder and name that."
            )
        stray = sorted(folders & set(names))
        if stray:
            raise ValueError(
                f"dataset.root = {self.folder} has images of no class straight in {stray[0]}. Move them to a class folder in "
                "there, or remove them."
            )
        self._refuse_twice(names)
        places = [_split(name.partition("/")[0]) for name in names]
        return {split: np.array([c for c, place in enumerate(places) if place == split], dtype=np.int64) for split in SPLITS}

    def _refuse_twice(self, names: list[str]) -> None:
        """Refuses a class that is in two split folders."""
        seen: dict[str, str] = {}
        for name in names:
            folder, _, own = name.partition("/")
            if own and _split(folder) and seen.setdefault(own, folder) != folder:
                raise ValueError(
                    f"dataset.root = {self.folder} has class {own!r} in {seen[own]} and in {folder}, expected every class in "
                    f"one of them: the model is tested on classes it has never seen. Move one of the two, or name one folder "
                    f"alone: dataset.root={self.folder / folder}."
                )


def _split(folder: str) -> str | None:
    """The split that a folder's name stands for, if any."""
    return FOLDERS.get(folder.casefold())
