"""Photographs with a published split of classes: mini- and tieredImageNet, CUB, Caltech-101, from the files that people have.

Those are folders `<class>/<image>` at any depth (also within train, val and test), archives of them, a folder of images with
csv files of `filename,label`, or the arrays of `tables.py`. What is not of a listed class is left out.
"""

import csv
import glob
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from fsl_cli.datasets import archives, tables, trees
from fsl_cli.datasets.augment import Augment
from fsl_cli.datasets.class_splits import by_name, listed, only_test
from fsl_cli.datasets.images import check_shape
from fsl_cli.datasets.packed import SPLITS, Dataset, Packed, Raw, digest, pack

EDITION = 1  # of the packed form: raise it when the same files are to give other pixels


class Photos(Dataset):
    """Images as `[n, channels, size, size]`: the shorter side is scaled to `size`, the middle is kept.

    Args:
        name: of the checked-in class split, splits/NAME.json.
        home: where the files can be had, for the message that they are missing.
        data_dir: holds the files; cache_dir holds the packed form.
        source: the folder, archive or archives, or arrays, as a pattern of paths below `data_dir`, or an absolute one.
        images: how many there must be in all; null: any number.
        test_only: all classes are test classes, for a model trained on another data set.
        crop, flip, jitter: changes in training, see augment.py.
    """

    def __init__(
        self,
        name: str,
        home: str,
        data_dir: str,
        cache_dir: str,
        source: str,
        size: int = 84,
        channels: int = 3,
        images: int | None = None,
        test_only: bool = False,
        crop: int = 0,
        flip: bool = False,
        jitter: float = 0.0,
    ) -> None:
        check_shape(size, channels)
        self.augment = Augment(crop, flip, jitter)
        self.name, self.home, self.source = name, home, source
        self.data_dir, self.cache_dir = Path(data_dir).expanduser(), cache_dir
        self.size, self.channels, self.images, self.test_only = size, channels, images, test_only
        self.lists = listed(name)
        self.known = {where for split in SPLITS for where in self.lists[split]}

    def load(self) -> Packed:
        sources = self._sources()
        files = [archives.fingerprint(source) for source in sources]
        key = f"{self.name}-{self.size}x{self.channels}-{digest(EDITION, self.lists, files)}"
        items, names, counts = pack(self.cache_dir, key, lambda: self._read(sources))
        self._verify(dict(zip(names, counts, strict=True)), sources)
        splits = only_test(len(names)) if self.test_only else by_name(names, self._lists(names))
        return Packed(self.name, items, names, np.asarray(counts), splits, augment=self.augment)

    def _sources(self) -> list[Path]:
        """What matches `source`: folders if there are any, else archives, else arrays."""
        pattern = os.path.join(glob.escape(str(self.data_dir)), os.path.expanduser(self.source))  # noqa: PTH111, PTH118 - a pattern
        found = sorted(Path(path) for path in glob.glob(pattern))  # noqa: PTH207 - it may be absolute
        folders = [path for path in found if path.is_dir()]
        inner = [path for folder in folders for path in sorted(folder.iterdir()) if tables.is_table(path)]
        for sources in (
            inner or folders,
            *([path for path in found if kind(path)] for kind in (archives.is_archive, tables.is_table)),
        ):
            if sources:
                return sources
        raise ValueError(
            f"data_dir: {self.data_dir} has no {self.source} (a folder of class folders, or zip, tar, pickle or npz). "
            f"Get {self.name} from {self.home} and put it there, or say where it is with dataset.source=PATH."
        )

    def _read(self, sources: list[Path]) -> Raw:
        if tables.is_table(sources[0]):
            return tables.read(sources, self.known, self.size, self.channels, self.cache_dir)
        tree = trees.survey(sources, lambda name: self._folder(PurePosixPath(name)))
        if not tree:
            labels = self._csv_labels(sources)
            tree = trees.survey(sources, lambda name: labels.get(PurePosixPath(name).name))
        self._verify({where: len(images) for where, images in tree.items()}, sources)
        return trees.read(sources, tree, self.size, self.channels, self.cache_dir)

    def _folder(self, path: PurePosixPath) -> str | None:
        """The listed class that an image's folder, or one above it, is called after."""
        return next((part for part in reversed(path.parts[:-1]) if part in self.known), None)

    def _csv_labels(self, sources: list[Path]) -> dict[str, str]:
        """The class of each file that csv files with `filename,label` lines name."""
        labels = {}
        for source in sources:
            for _, content in archives.walk(source, lambda name: name.lower().endswith(".csv")):
                rows = csv.reader((content or b"").decode("utf-8", "replace").splitlines())
                labels |= {row[0]: row[1] for row in rows if len(row) == 2 and row[1] in self.known}
        return labels

    def _lists(self, names: list[str]) -> dict[str, list[str]]:
        """The class names of each split; arrays without names have names that begin with it."""
        return {split: [*self.lists[split], *(name for name in names if name.startswith(f"{split}/"))] for split in SPLITS}

    def _verify(self, counts: dict[str, int], sources: list[Path]) -> None:
        """Refuses another number of classes or images than the split has."""
        where = ", ".join(map(str, sources))
        own = Counter(split for split, names in self._lists(list(counts)).items() for name in names if name in counts)
        for split in SPLITS:
            if own[split] != len(self.lists[split]):
                missing = [name for name in self.lists[split] if name not in counts]
                raise ValueError(
                    f"data_dir: {where} has {own[split]} {split} classes, expected the {len(self.lists[split])} of {self.name} "
                    f"(first missing: {missing[0] if missing else 'none'}). Get the missing files from {self.home}."
                )
        total = sum(counts.values())
        if self.images is not None and total != self.images:
            few, many = min(counts, key=lambda c: counts[c]), max(counts, key=lambda c: counts[c])
            raise ValueError(
                f"data_dir: {where} has {total:,} images, expected {self.images:,} (class {few} has {counts[few]}, class {many} "
                f"has {counts[many]}). Get the missing files from {self.home}, or set dataset.images={total} to use it as it is."
            )
