"""The typed schema of the commands, and `build`, which makes objects of config nodes. With the commands, all that knows Hydra."""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import platformdirs
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

ALLOWED = ("fsl_cli.algos", "fsl_cli.models", "fsl_cli.datasets", "torch.optim")
GROUPS = ("model", "dataset", "optimizer", "schedule", "algo")

# What the caller of `build` supplies: a YAML need not, and may not, give it.
GIVEN = {
    "model": ("item_shape",),
    "algo": ("model", "classes", "regression"),
    "optimizer": ("params",),
    "schedule": ("optimizer",),
    "dataset": (),
}


@dataclass
class Task:
    """The shape of an episode, and of a meta-batch, at evaluation and (train_) in training."""

    way: int = MISSING
    shot: int = MISSING
    queries: int = MISSING
    train_way: int = MISSING
    train_shot: int = MISSING
    train_queries: int = MISSING
    tasks: int = MISSING


class Precision(Enum):
    """Of the arithmetic in the embedding; everything else is float32."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


@dataclass
class Device:
    """Where and how a run computes."""

    name: str = MISSING
    threads: Any = None  # a number, auto, or null
    task_chunk: Any = None  # a number, auto, or null
    precision: Precision = Precision.auto
    compile: bool = False
    graph: bool = False
    memory: float | None = None
    processes: int | None = None


@dataclass
class Command:
    """What all commands share."""

    model: Any = MISSING
    dataset: Any = MISSING
    task: Task = MISSING
    device: Device = MISSING
    algo: Any = MISSING
    seed: int = MISSING
    episodes: int = MISSING
    data_dir: str = MISSING
    cache_dir: str = MISSING
    out: str = MISSING


@dataclass
class Train(Command):
    """`fsl train`."""

    optimizer: Any = MISSING
    schedule: Any = MISSING
    steps: int = MISSING
    eval_every: int = MISSING
    val_episodes: int = MISSING
    checkpoint_every: int = MISSING
    log_every: int = MISSING
    clip_norm: float | None = None
    early_stop: int | None = None
    resume: str | None = None


@dataclass
class Evaluate(Command):
    """`fsl evaluate`."""

    checkpoint: str = MISSING
    split: str = MISSING
    norm: str | None = None
    trained: Any = MISSING


def register() -> None:
    """Makes the schema known to Hydra, and `${user_cache:}` to OmegaConf."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Train)
    store.store(name="evaluate_schema", node=Evaluate)
    OmegaConf.register_new_resolver("user_cache", lambda: platformdirs.user_cache_dir("fsl"), replace=True)


def check(cfg: DictConfig) -> None:
    """Refuses unknown keys, wrong types and impossible values of the whole config before anything is built."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} has no value. Give it one: {missing[0]}=...")
    for key, least in (("steps", 1), ("eval_every", 1), ("val_episodes", 2), ("checkpoint_every", 1), ("log_every", 1),
                       ("episodes", 2), ("seed", 0), ("early_stop", 1), ("device.processes", 1)):  # fmt: skip
        value = OmegaConf.select(cfg, key)
        if value is not None and value < least:
            raise ValueError(f"{key} = {value}, but it must be at least {least}.")
    if cfg.get("clip_norm") is not None and cfg.clip_norm <= 0:
        raise ValueError(f"clip_norm = {cfg.clip_norm}, but it must be positive, or null for no clipping.")
    for key in ("threads", "task_chunk"):
        value = cfg.device[key]
        if not (value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)):
            raise ValueError(f"device.{key} = {value}, but it must be a whole number of at least 1, auto, or null for all.")
    if cfg.device.memory is not None and cfg.device.memory < 0:
        raise ValueError(
            f"device.memory = {cfg.device.memory}, but it must be a number of GiB, or null for half of what is free."
        )
    for key in GROUPS:
        if key in cfg:
            arguments(cfg[key], key)


def run_folder() -> Path:
    """The folder of the running job, as the user would type it."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def build(node: Any, key: str, **given: Any) -> Any:
    """Makes the object that config node `key` describes, with the arguments `given` in addition to the node's own."""
    constructor, kwargs = arguments(node, key)
    wanted = {name: value for name, value in given.items() if name in inspect.signature(constructor).parameters}
    try:
        return constructor(**kwargs, **wanted)
    except (ValueError, TypeError) as error:
        message = str(error)
        raise ValueError(message if "." in message.split(" ")[0] else f"{key}: {message}") from error


def arguments(node: Any, key: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The constructor that a config node names and its arguments, checked against names and annotations."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ValueError(f"{key} = {node!r}, but a group is chosen by its name: {key}=NAME with a file configs/{key}/NAME.yaml.")
    plain: Any = OmegaConf.to_container(node, resolve=True)
    constructor = _locate(plain.pop("_target_"), key)
    parameters = {
        name: parameter for name, parameter in inspect.signature(constructor).parameters.items() if name not in GIVEN[key]
    }
    hints = typing.get_type_hints(constructor.__init__)
    for name, value in plain.items():
        if name not in parameters:
            raise ValueError(f"{key}.{name} is not an option of {constructor.__name__}.{suggest(name, parameters)}")
        if not _fits(value, hints.get(name, Any)):
            raise ValueError(f"{key}.{name} = {value!r}, but it must be {_spell(hints[name])}.")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in plain:
            raise ValueError(f"{key}.{name} has no value, and {constructor.__name__} needs one. Give it: {key}.{name}=...")
    return constructor, plain


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` if something known is close, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else f" There are: {', '.join(known)}."


def _locate(target: Any, key: str) -> Callable[..., Any]:
    """The class called `target`, only if it is defined in a module that configs may name."""
    module, _, name = str(target).rpartition(".")
    refusal = ValueError(
        f"{key}._target_ = {target!r}, but it must be a class of {', '.join(ALLOWED)}. "
        "Configs from strangers can name any code; this one was not run."
    )
    if not _allowed(module):
        raise refusal
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}._target_ = {target!r}, but there is no such class.") from error
    if not (isinstance(found, type) and _allowed(found.__module__)):
        raise refusal
    return found


def _allowed(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in ALLOWED)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain config value is what an annotation asks for; an annotation that no YAML could meet admits all."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin in (list, tuple):
        inner = options[0] if options else Any
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (None, types.NoneType):
        return value is None
    return hint is Any


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(option) for option in typing.get_args(hint))
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    return names.get(hint) or str(hint).replace("torch.Tensor", "").strip(" |").replace("None", "null")


def differences(cfg: DictConfig, other: DictConfig) -> dict[str, tuple[Any, Any]]:
    """The keys (`a.b`) at which two resolved configs differ, with both values."""
    one, two = flat(OmegaConf.to_container(cfg, resolve=True)), flat(OmegaConf.to_container(other, resolve=True))
    return {key: (one.get(key), two.get(key)) for key in {**one, **two} if one.get(key) != two.get(key)}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a plain config by their path `a.b`."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {key: value for name in node for key, value in flat(node[name], f"{prefix}.{name}" if prefix else name).items()}


def typed(overrides: Iterable[str]) -> dict[str, str]:
    """What the user typed, by key: `a.b=c` gives `{"a.b": "c"}`; flags of Hydra are left out."""
    pairs = (word.lstrip("+~").partition("=") for word in overrides if "=" in word and not word.startswith("-"))
    return {key: value.strip("'\"") for key, _, value in pairs}
