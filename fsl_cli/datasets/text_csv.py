"""The user's own texts: a csv or tsv file of text,label.

The classes are split by a file of lists, or by a hash of each class's name, so that a class stays in its split when others are
added or removed.
"""

from pathlib import Path

import numpy as np

from fsl_cli.datasets import archives
from fsl_cli.datasets.class_splits import Splits, by_hash, check_fractions, from_file, only_test
from fsl_cli.datasets.packed import Dataset, Packed, Raw, digest, pack
from fsl_cli.datasets.texts import read_labelled, to_raw

EDITION = 1  # of the packed form: increase it when the same file gives other items


class TextCsv(Dataset):
    """Texts with their labels.

    Args:
        file: the table.
        cache_dir: holds the packed form.
        fractions: of the classes for train, val and test, if there are no lists.
        lists: a JSON file {"train": [labels], "val": [...], "test": [...]}.
        test_only: all classes are test classes, for a model trained on another data set.
    """

    def __init__(
        self, file: str, cache_dir: str, fractions: list[float], lists: str | None = None, test_only: bool = False
    ) -> None:
        check_fractions(fractions)
        self.file, self.cache_dir = Path(file).expanduser(), cache_dir
        self.fractions, self.lists, self.test_only = fractions, lists, test_only

    def load(self) -> Packed:
        if not self.file.is_file():
            raise ValueError(f"dataset.file = {self.file}: there is no such file. Name a csv or tsv file of text,label.")
        key = f"text_csv-{digest(EDITION, str(self.file.resolve()), archives.fingerprint(self.file))}"
        items, names, counts = pack(self.cache_dir, key, self._read)
        return Packed("text_csv", items, names, np.asarray(counts), self._splits(names))

    def _read(self) -> Raw:
        classes: dict[str, list[str]] = {}
        for sentence in read_labelled(self.file):
            classes.setdefault(sentence.label, []).append(sentence.text)
        return to_raw(classes)

    def _splits(self, names: list[str]) -> Splits:
        if self.test_only:
            return only_test(len(names))
        if self.lists is not None:
            return from_file(names, Path(self.lists).expanduser(), f"label in {self.file}")
        return by_hash(names, self.fractions)
