"""The user's own images: `root/<class>/<image>`.

The classes are split by three folders, `root/train/<class>/<image>` and so on, if there are these three and no others; by a
file of lists; or by a hash of each class's name, so that a class stays in its split when others come and go.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from fsl_cli.datasets import archives, trees
from fsl_cli.datasets.class_splits import Splits, by_name
from fsl_cli.datasets.packed import SPLITS, Packed, Raw, digest
from fsl_cli.datasets.resized import Resized

EDITION = 1  # of the packed form: raise it when the same files are to give other pixels


@dataclass(kw_only=True)
class ImageFolder(Resized):
    """The images of a user, as `Resized` has them.

    Args:
        root: the folder of class folders.
        fractions: of the classes for train, val and test, where neither folders nor lists say.
        lists: a JSON file {"train": [class names], "val": [...], "test": [...]}.
    """

    root: str
    fractions: list[float]
    lists: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"dataset.fractions = {self.fractions}, expected three that sum to 1: train, val, test. Use [0.6,0.2,0.2]."
            )
        self.folder = Path(self.root).expanduser()

    def load(self) -> Packed:
        if not self.folder.is_dir():
            raise ValueError(f"dataset.root = {self.folder} is no folder, expected one with a folder of images for each class.")
        return self.packed("image_folder", digest(EDITION, archives.fingerprint(self.folder)), self._read, self._splits)

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
        return trees.read([self.folder], tree, self.size, self.channels, self.cache_dir)

    def _splits(self, names: list[str]) -> Splits:
        if self.lists is not None:
            return self._from_lists(names, Path(self.lists).expanduser())
        if {name.split("/")[0] for name in names} == set(SPLITS) and all("/" in name for name in names):
            return self._from_folders(names)
        own = np.array([self._hashed(name) for name in names])
        return {split: np.flatnonzero(own == number) for number, split in enumerate(SPLITS)}

    def _from_folders(self, names: list[str]) -> Splits:
        seen: dict[str, str] = {}
        for name in names:
            split, _, own = name.partition("/")
            if seen.setdefault(own, split) != split:
                raise ValueError(
                    f"dataset.root = {self.folder} has class {own!r} in {seen[own]} and in {split}, expected every class in "
                    "one of them: the model is tested on classes it has never seen. Move one of the two."
                )
        return {
            split: np.array([c for c, name in enumerate(names) if name.startswith(f"{split}/")], dtype=np.int64)
            for split in SPLITS
        }

    def _from_lists(self, names: list[str], path: Path) -> Splits:
        try:
            lists = json.loads(path.read_text(encoding="utf-8"))
            members = [str(name) for split in SPLITS for name in lists[split]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'dataset.lists = {path} cannot be used ({error}), expected a JSON file {{"train": [class names], "val": [...], '
                '"test": [...]}.'
            ) from error
        strange = sorted(set(members) - set(names))
        twice = sorted({name for name in members if members.count(name) > 1})
        if strange or twice:
            found = f"{twice[0]!r} twice" if twice else f"{strange[0]!r}, which is no folder below {self.folder}"
            raise ValueError(f"dataset.lists = {path} has {found}, expected every class at most once and by its folder's name.")
        return by_name(names, lists)

    def _hashed(self, name: str) -> int:
        """The number of the split that a class belongs to, whatever other classes there are."""
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
        return int(np.searchsorted(np.cumsum(self.fractions[:2]), place, side="right"))
