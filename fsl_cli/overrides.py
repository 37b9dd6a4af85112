"""What was typed: words `key=value`, as Hydra takes them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from fsl_cli.config import arguments

# Names of files among what can be typed.
PATHS = ("checkpoint", "classifier", "support", "query", "output", "out", "resume", "pretrain", "data_dir", "cache_dir", "runs",
         "dataset.root", "dataset.file", "dataset.lists", "dataset.source", "model.weights", "model.name",
         "hydra.sweep.dir")  # fmt: skip


def typed(overrides: Iterable[str]) -> dict[str, str]:
    """What the user typed, by key: `a.b=c` gives `{"a.b": "c"}`; flags of Hydra are left out."""
    pairs = (word.lstrip("+~").partition("=") for word in overrides if "=" in word and not word.startswith("-"))
    return {key: _unquoted(value) for key, _, value in pairs}


def sweeps(words: Iterable[str]) -> bool:
    """Whether several jobs are asked for."""
    return bool({"-m", "--multirun"} & {*words})


def asks_help(words: Iterable[str]) -> bool:
    """Whether the options are asked for, and nothing is to run."""
    return bool({"-h", "--help", "--hydra-help"} & {*words})


def refuse_unread(algo: DictConfig, words: Mapping[str, str], training: bool, learned: bool = False) -> None:
    """Refuses what was typed of an algorithm and nothing would read; `learned`: a checkpoint says what it has learned."""
    made, options = arguments(algo, "algo")
    kind: Any = made  # an Algorithm: to import that would make every command wait for torch
    instead = {} if training else kind.only_training
    reasons = kind.idle(options, training) | dict.fromkeys(instead, "only fsl train reads it")
    if learned:
        reasons |= dict.fromkeys(kind.starts, "what is learned from there on comes from the checkpoint")
    for name, reason in reasons.items():
        if f"algo.{name}" in words:
            value = words[f"algo.{name}"]
            repair = f"Write algo.{instead[name]}={value}" if instead.get(name) else "Leave it out"
            raise ValueError(f"algo.{name} = {value}, but {reason}. {repair}.")


def quoted(overrides: Iterable[str]) -> list[str]:
    """Overrides in which names of files are quoted, so that they may hold spaces, brackets, commas and accents; `~` is home."""
    words = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if equals and key in PATHS:
            if not value:
                raise ValueError(f"{key} has no value. Give it one, {key}=PATH, or leave it out.")
            word = expanded(word)
            value = word.partition("=")[2]
            if value != "null" and _unquoted(value) == value and "${" not in value:
                word = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
        words.append(word)
    return words


def expanded(word: str) -> str:
    """An override in which `~` at the beginning of the name of a file is home."""
    key, _, value = word.partition("=")
    if key not in PATHS or not value.startswith("~"):
        return word
    try:
        return f"{key}={Path(value).expanduser()}"
    except RuntimeError as error:
        raise ValueError(
            f"{key} = {value}, but there is no user of that name. Give the whole path of what is called so."
        ) from error


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] not in "'\"" or value[-1] != value[0]:
        return value
    return re.sub(r"(\\*)(\\['\"]|$)", lambda found: found[1][: len(found[1]) // 2] + found[2][1:], value[1:-1])
