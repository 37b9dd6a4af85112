"""User requests by intent: CLINC150 (Larson et al. 2019, https://arxiv.org/abs/1909.02027) and Banking77
(Casanueva et al. 2020, https://arxiv.org/abs/2003.04807), from their published files.

A data set is one json file {"train": [[text, label], ...], "val": ..., "test": ...}, or a csv file for each part, named after it.
The class splits are the five of ProtAugment (Dopierre et al. 2021, https://arxiv.org/abs/2105.12995).
"""

import json
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from fsl_cli.datasets import archives
from fsl_cli.datasets.class_splits import by_name, listed, only_test
from fsl_cli.datasets.packed import SPLITS, Dataset, Packed, Raw, digest, pack
from fsl_cli.datasets.texts import Sentence, read_labelled, to_raw

EDITION = 1  # of the packed form: increase it when the same files give other items
PARTS = ("train", "val", "test")  # of the sentences, in the order of the packed form

Parts = dict[str, list[Sentence]]


class Intents(Dataset):
    """Sentences of 150 or 77 intents.

    Args:
        name: of the data set; NAME_foldK.json are its class splits.
        home: where to get the files, for error messages.
        files: a pattern for the end of their paths.
        sentences: the required numbers in the parts train, val and test.
        data_dir: holds the files; cache_dir holds the packed form.
        source: a folder or archive that holds them, as a pattern of paths below `data_dir`, or an absolute one.
        fold: 1 to 5, the class split.
        test_only: all classes are test classes.
        parts: supports come from the official training part, queries from the official test part.
    """

    def __init__(
        self,
        name: str,
        home: str,
        files: list[str],
        sentences: list[int],
        data_dir: str,
        cache_dir: str,
        source: str,
        fold: int = 1,
        test_only: bool = False,
        parts: bool = False,
    ) -> None:
        if fold not in range(1, 6):
            raise ValueError(f"dataset.fold = {fold}, but there are five class splits: it must be 1 to 5.")
        self.sentences: dict[str, int] = dict(zip(PARTS, sentences, strict=True))
        self.name, self.home, self.files = name, home, files
        self.data_dir, self.cache_dir, self.source = Path(data_dir).expanduser(), cache_dir, source
        self.lists = listed(f"{name}_fold{fold}")
        self.names = sorted(name for split in SPLITS for name in self.lists[split])
        self.test_only, self.parts = test_only, parts

    def load(self) -> Packed:
        sources = self._sources()
        key = f"{self.name}-{digest(EDITION, [archives.fingerprint(source) for source in sources])}"
        items, names, counts = pack(self.cache_dir, key, lambda: self._read(sources))
        counts = np.asarray(counts)
        splits = only_test(len(names)) if self.test_only else by_name(names, self.lists)
        if not self.parts:
            return Packed(self.name, items, names, counts, splits)
        held, between = self._each("test"), self._each("val")
        left = np.repeat(counts, counts) - np.concatenate([np.arange(count) for count in counts])  # items to the end of the class
        learned_or_asked = (left > held + between) | (left <= held)
        return Packed(self.name, items[learned_or_asked], names, counts - between, splits, held=held)

    def _each(self, part: str) -> int:
        """The number of sentences of each class in `part`; in `train`, where it varies, the mean."""
        return self.sentences[part] // len(self.names)

    def _sources(self) -> list[Path]:
        """The matches of `source`: folders if there are any, else archives."""
        found = archives.matching(self.data_dir, self.source)
        sources = [path for path in found if path.is_dir()] or [path for path in found if archives.is_archive(path)]
        if not sources:
            what = f"folder or archive with {' and '.join(self.files)} in it"
            raise archives.absent(self.name, self.data_dir, self.source, what, self.home)
        return sources

    def _read(self, sources: list[Path]) -> Raw:
        parts: Parts = {part: [] for part in PARTS}
        for source in sources:
            for name, content in archives.walk(source, lambda name, source=source: self._wanted(source / name)):
                if content is not None:
                    for part, sentences in _content(source / name, content).items():
                        parts[part] += sentences
        self._verify(parts, ", ".join(map(str, sources)))
        classes: dict[str, list[str]] = {name: [] for name in self.names}
        for part in PARTS:
            for sentence in parts[part]:
                classes[sentence.label].append(sentence.text)
        return to_raw(classes)

    def _wanted(self, path: Path) -> bool:
        return any(PurePosixPath(path).match(pattern) for pattern in self.files)

    def _verify(self, parts: Parts, where: str) -> None:
        """Refuses classes or numbers of sentences other than those of the published files."""
        repair = f"Get {' and '.join(self.files)} from {self.home}, or use your own as dataset=text_csv."
        found = {part: len(parts[part]) for part in PARTS}
        if found != self.sentences:
            said, expected = (" + ".join(f"{count:,}" for count in counts.values()) for counts in (found, self.sentences))
            raise ValueError(f"data_dir: {where} has {said} sentences (train + val + test), expected {expected}. {repair}")
        labels = {sentence.label for part in PARTS for sentence in parts[part]}
        strange = sorted(labels ^ set(self.names))
        if strange:
            raise ValueError(
                f"data_dir: {where} has {len(labels)} classes, expected {len(self.names)} (first other: {strange[0]}). {repair}"
            )
        for part in ("val", "test"):
            counts = Counter(sentence.label for sentence in parts[part])
            if any(counts[name] != self._each(part) for name in self.names):
                raise ValueError(f"data_dir: {where} has classes without {self._each(part)} {part} sentences. {repair}")


def _content(path: Path, content: bytes) -> Parts:
    """The sentences of a file by part; leaves out other parts of a json file, such as oos_train (out of scope)."""
    if path.suffix != ".json":
        return {path.stem: read_labelled(path, content)}
    try:
        table = json.loads(content)
        return {part: [Sentence(" ".join(text.split()), label) for text, label in table[part]] for part in PARTS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}), expected lists train, val and test of [text, label].") from error
