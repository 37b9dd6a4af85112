"""Photographs with a listed split of classes: ImageNet and parts of it, CUB, Caltech-101, from the files that people have.

Those are folders `<class>/<image>` at any depth (also within train, val and test), archives of them, a folder of images with
csv files of `filename,label`, or the arrays of `tables.py`. Images of no listed class are left out. If the classes have more
images than the data set, csv files beside the class folders, if there are any, name those that belong to it.
"""

import csv
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fsl_cli.datasets import archives, tables, trees
from fsl_cli.datasets.class_splits import by_name, listed
from fsl_cli.datasets.packed import SPLITS, Packed, Raw, digest
from fsl_cli.datasets.resized import Resized

EDITION = 1  # of the packed form: increase it when the same files give other pixels


@dataclass(kw_only=True)
class Photos(Resized):
    """Images of the listed classes, as described in `Resized`.

    Args:
        name: of the checked-in class split, splits/NAME.json.
        home: where to get the files, for error messages.
        data_dir: holds the files.
        source: the folder, archive or archives, or arrays, as a pattern of paths below `data_dir`, or an absolute one.
        images: the required number in total; null: any.
    """

    name: str
    home: str
    data_dir: str
    source: str
    images: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lists = listed(self.name)
        self.known = {where for split in SPLITS for where in self.lists[split]}

    def load(self) -> Packed:
        sources = self._sources()
        edition = tables.EDITION if tables.is_table(sources[0]) else EDITION
        key = digest(edition, self.lists, self.images, [archives.fingerprint(source) for source in sources])
        found = self.packed(self.name, key, lambda: self._read(sources), lambda names: by_name(names, self._lists(names)))
        self._verify(dict(zip(found.names, found.counts.tolist(), strict=True)), sources)
        return found

    def _sources(self) -> list[Path]:
        """The matches of `source`: folders if there are any, else archives, else arrays."""
        found = archives.matching(self.data_dir, self.source)
        folders = [path for path in found if path.is_dir()]
        inner = [path for folder in folders for path in sorted(folder.iterdir()) if tables.is_table(path)]
        for sources in (
            inner or folders,
            *([path for path in found if kind(path)] for kind in (archives.is_archive, tables.is_table)),
        ):
            if sources:
                return sources
        what = "folder of class folders, or zip, tar, pickle or npz"
        raise archives.absent(self.name, self.data_dir, self.source, what, self.home)

    def _read(self, sources: list[Path]) -> Raw:
        if tables.is_table(sources[0]):
            return tables.read(sources, self.known, self.size, self.channels, self.cache_dir)
        tree = self._survey(sources)
        inner = [] if tree else self._within(sources)
        if inner:
            sources = [*sources, *inner]
            tree = self._survey(sources)
        if self.images is not None and sum(map(len, tree.values())) > self.images:
            labels = self._csv_labels(sources)
            tree = trees.named(tree, labels) if labels else tree
        self._verify({where: len(images) for where, images in tree.items()}, sources)
        return trees.read(sources, tree, self.size, self.channels, self.cache_dir, "dataset.source")

    def _survey(self, sources: list[Path]) -> trees.Tree:
        """The images by class, which is the name of a folder, or else given by csv files."""
        tree = trees.survey(sources, lambda name: self._folder(PurePosixPath(name)))
        if not tree:
            labels = self._csv_labels(sources)
            tree = trees.survey(sources, lambda name: labels.get(PurePosixPath(name).name))
        return tree

    def _within(self, sources: list[Path]) -> list[Path]:
        """The archives directly in folders; if there are none, refuses archives and arrays inside the sources."""
        found = [path for source in sources if source.is_dir() for path in sorted(source.iterdir()) if archives.is_archive(path)]
        for source in [] if found else sources:
            for name, _ in archives.walk(source, lambda _: False):
                own = PurePosixPath(name).name
                if own.lower().endswith((*archives.SUFFIXES, *tables.SUFFIXES)) and not own.startswith("."):
                    repair = f"{'Set' if source.is_dir() else f'Unpack {source.name}, and set'} dataset.source to its folder."
                    raise ValueError(f"dataset.source: {source / name} is not read where it is. {repair}")
        return found

    def _folder(self, path: PurePosixPath) -> str | None:
        """The listed class whose name an image's folder, or one above it, has."""
        return next((part for part in reversed(path.parts[:-1]) if part in self.known), None)

    def _csv_labels(self, sources: list[Path]) -> dict[str, str]:
        """The class of each file, from csv files with lines `filename,label`."""
        labels = {}
        for source in sources:
            for _, content in archives.walk(source, lambda name: name.lower().endswith(".csv")):
                rows = csv.reader((content or b"").decode("utf-8-sig", "replace").splitlines())
                with suppress(csv.Error):  # some other csv file
                    labels |= {row[0]: row[1] for row in rows if len(row) == 2 and row[1] in self.known}
        return labels

    def _lists(self, names: list[str]) -> dict[str, list[str]]:
        """The class names of each split, including split/number, the names of classes in arrays without names."""
        return {split: [*self.lists[split], *(name for name in names if name.startswith(f"{split}/"))] for split in SPLITS}

    def _verify(self, counts: dict[str, int], sources: list[Path]) -> None:
        """Refuses wrong numbers of classes or images."""
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
            repair = f"Get the missing files from {self.home}"
            if total > self.images:
                repair = f"Remove what is not of it, or put csv files that name what is beside the class folders ({self.home})"
            raise ValueError(
                f"data_dir: {where} has {total:,} images, expected {self.images:,} (class {few} has {counts[few]}, class {many} "
                f"has {counts[many]}). {repair}, or set dataset.images={total} to use it as it is."
            )
