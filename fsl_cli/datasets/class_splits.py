"""The class splits: lists checked in as splits/NAME.json, or a constant rule; they never depend on a run's seed."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from fsl_cli.datasets.packed import SPLITS

Splits = dict[str, np.ndarray]  # the class numbers of each split


def listed(name: str) -> dict[str, list[str]]:
    """The class names of each split, from the checked-in list `name`."""
    try:
        return json.loads(files("fsl_cli.datasets").joinpath("splits", f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"dataset.split or name = {name!r}, but there is no such class split. Leave both as they are."
        ) from error


def by_name(names: Sequence[str], lists: Mapping[str, Sequence[str]]) -> Splits:
    """The splits by lists of class names; classes in none of them are left out."""
    own = {name: split for split in SPLITS for name in lists[split]}
    return {split: np.array([c for c, name in enumerate(names) if own.get(name) == split], dtype=np.int64) for split in SPLITS}


def by_number(classes: int) -> Splits:
    """Every second class is for training, and the others alternate between validation and test (Chen et al. 2019, for CUB)."""
    numbers = np.arange(classes)
    return {"train": numbers[numbers % 2 == 0], "val": numbers[numbers % 4 == 1], "test": numbers[numbers % 4 == 3]}


def only_test(classes: int) -> Splits:
    """All classes are test classes, for a model that was trained on another data set."""
    none = np.array([], dtype=np.int64)
    return {"train": none, "val": none, "test": np.arange(classes)}


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuses fractions for train, val and test that are not three, are negative, or do not sum to 1."""
    if len(fractions) != 3 or min(fractions) < 0 or not abs(sum(fractions) - 1) <= 1e-6:
        raise ValueError(f"dataset.fractions = {fractions}, expected three that sum to 1: train, val, test. Use [0.6,0.2,0.2].")


def by_hash(names: Sequence[str], fractions: Sequence[float]) -> Splits:
    """The splits by a hash of each class's name, independent of the other classes."""
    places = [int.from_bytes(hashlib.sha256(_spelt(name).encode()).digest()[:8]) / 2**64 for name in names]
    own = np.searchsorted(np.cumsum(fractions[:2]), places, side="right")
    return {split: np.flatnonzero(own == number) for number, split in enumerate(SPLITS)}


def from_file(names: Sequence[str], path: Path, place: str) -> Splits:
    """The splits by a user's JSON file of lists; `place`: where the class names come from, for messages."""
    try:
        lists = json.loads(path.read_text(encoding="utf-8-sig"))
        if not all(isinstance(lists[split], list) for split in SPLITS):
            raise TypeError("not lists")
        lists = {split: [_spelt(str(name)) for name in lists[split]] for split in SPLITS}  # a number 7 means the class "7"
        members = [name for split in SPLITS for name in lists[split]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'dataset.lists = {path} cannot be used ({error}), expected a JSON file {{"train": [class names], "val": [...], '
            '"test": [...]}.'
        ) from error
    names = [_spelt(name) for name in names]
    strange = sorted(set(members) - set(names))
    twice = sorted({name for name in members if members.count(name) > 1})
    if strange or twice:
        found = f"{twice[0]!r} twice" if twice else f"{strange[0]!r}, which is no {place}"
        raise ValueError(f"dataset.lists = {path} has {found}, expected every class at most once and by its name there.")
    return by_name(names, lists)


def _spelt(name: str) -> str:
    """Normalises accents in a name (NFC), which systems encode differently."""
    return unicodedata.normalize("NFC", name)
