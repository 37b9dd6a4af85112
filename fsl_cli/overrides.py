"""The command line: words `key=value` in the syntax of Hydra."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from fsl_cli.config import arguments

# Keys whose values are file names.
PATHS = ("checkpoint", "classifier", "support", "query", "output", "out", "resume", "pretrain", "data_dir", "cache_dir", "runs",
         "dataset.root", "dataset.file", "dataset.lists", "dataset.source", "model.weights", "model.name",
         "hydra.sweep.dir")  # fmt: skip


def typed(overrides: Iterable[str]) -> dict[str, str]:
    """The typed values by key, `a.b=c` as `{"a.b": "c"}`, without Hydra's flags."""
    pairs = (word.lstrip("+~").partition("=") for word in overrides if "=" in word and not word.startswith("-"))
    return {key: _unquoted(value) for key, _, value in pairs}


def sweeps(words: Iterable[str]) -> bool:
    """Whether the command is a sweep."""
    return bool({"-m", "--multirun"} & {*words})


def asks_help(words: Iterable[str]) -> bool:
    """Whether the command only prints help."""
    return bool({"-h", "--help", "--hydra-help"} & {*words})


def refuse_unread(algo: DictConfig, words: Mapping[str, str], training: bool, learned: bool = False) -> None:
    """Refuses typed options of an algorithm that nothing would read; `learned`: its weights come from a checkpoint."""
    made, options = arguments(algo, "algo")
    kind: Any = made  # an Algorithm, not imported here because every command would wait for torch
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
    """Quotes file names in overrides, so that they may hold spaces, brackets, commas and accents; expands `~`."""
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
    """Expands `~` at the start of a file name in an override."""
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
