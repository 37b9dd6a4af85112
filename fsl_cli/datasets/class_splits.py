"""Which classes are train, val and test: lists checked in as splits/NAME.json, or a constant rule. Never a run's seed."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np

from fsl_cli.datasets.packed import SPLITS

Splits = dict[str, np.ndarray]  # the class numbers of each split


def listed(name: str) -> dict[str, list[str]]:
    """The class names of each split, from the checked-in list `name`."""
    return json.loads(files("fsl_cli.datasets").joinpath("splits", f"{name}.json").read_text(encoding="utf-8"))


def by_name(names: Sequence[str], lists: Mapping[str, Sequence[str]]) -> Splits:
    """The splits that lists of class names give; a class in none of them is left out."""
    own = {name: split for split in SPLITS for name in lists[split]}
    return {split: np.array([c for c, name in enumerate(names) if own.get(name) == split], dtype=np.int64) for split in SPLITS}


def by_number(classes: int) -> Splits:
    """Every other class trains, and of the rest every other one validates and tests: the rule of Chen et al. 2019 for CUB."""
    numbers = np.arange(classes)
    return {"train": numbers[numbers % 2 == 0], "val": numbers[numbers % 4 == 1], "test": numbers[numbers % 4 == 3]}


def only_test(classes: int) -> Splits:
    """All classes test: for a model that was trained on another data set."""
    none = np.array([], dtype=np.int64)
    return {"train": none, "val": none, "test": np.arange(classes)}
