"""Checks configs, and builds the objects that their nodes describe."""

import difflib
import importlib
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

ALLOWED = ("fsl_cli.algos", "fsl_cli.models", "fsl_cli.datasets", "torch.optim")
OWN = "FSL_MODULES"  # an environment variable: further modules that configs may name, separated by commas
GROUPS = ("model", "dataset", "optimizer", "schedule", "algo")

PLACES = ("out", "resume", "data_dir", "cache_dir", "dataset.data_dir", "dataset.cache_dir")  # keys of files and folders
RECIPES = ("recipe", "recipe/task", "recipe/model")  # groups whose options are chosen by the names of others

EXAMPLES = {"a whole number": 10, "a number": 0.1}  # for messages; the names of other kinds explain themselves

# Arguments that the caller of `build` supplies, and a YAML must not.
GIVEN = {
    "model": ("item_shape", "blank"),  # blank: skip pretrained weights, those of a checkpoint follow
    "algo": ("model", "classes", "regression"),
    "optimizer": ("params",),
    "schedule": ("optimizer",),
    "dataset": (),
}


def check(cfg: DictConfig) -> None:
    """Refuses unknown keys, wrong types and impossible values of the whole config before anything is built."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} has no value. Give it one: {missing[0]}=...")
    for node, prefix in ((cfg, ""), (cfg.get("task"), "task."), (cfg.get("device"), "device.")):
        kind = OmegaConf.get_type(node) if node is not None else None
        known = [field.name for field in fields(kind)] if is_dataclass(kind) else node or ()
        for name in node or ():
            if name not in known:  # with +key=value, Hydra adds keys that nothing reads
                raise ValueError(f"There is no key {prefix}{name}.{suggest(str(name), known)}")
    for key, least in (("steps", 1), ("eval_every", 1), ("val_episodes", 2), ("checkpoint_every", 1), ("log_every", 1),
                       ("episodes", 2), ("episode", 0), ("seed", 0), ("early_stop", 1), ("device.processes", 1),
                       ("task.way", 1), ("task.shot", 1), ("task.tasks", 1), ("algo.way", 1), ("schedule.T_max", 1),
                       ("schedule.step_size", 1)):  # fmt: skip
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int | float) and value < least:
            raise ValueError(f"{key} = {value}, but it must be at least {least}.")
    for key in ("optimizer.lr", "optimizer.weight_decay"):
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{key} = {value}, but it must not be negative. Set it to 0 or more.")
    for key, value in flat(OmegaConf.to_container(cfg)).items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{key} = nan, but it must be a number. Give it one.")
    if cfg.get("clip_norm") is not None and cfg.clip_norm <= 0:
        raise ValueError(f"clip_norm = {cfg.clip_norm}, but it must be positive, or null for no clipping.")
    most = max(64, 4 * (os.cpu_count() or 1))
    for key in ("threads", "task_chunk", "workers") if cfg.get("device") is not None else ():
        value, others = cfg.device[key], "or auto" if key == "workers" else "auto, or null for all"
        number = value if isinstance(value, int) and not isinstance(value, bool) else 0
        if number < 1 and not (value == "auto" or (value is None and key != "workers")):
            raise ValueError(f"device.{key} = {value}, but it must be a whole number of at least 1, {others}.")
        if number > most and key != "task_chunk":
            raise ValueError(f"device.{key} = {value}, but this machine has {os.cpu_count()} cores: use at most {most}.")
    if OmegaConf.select(cfg, "device.channels_last") not in (None, True, False, "auto"):
        raise ValueError(f"device.channels_last = {cfg.device.channels_last}, but it must be true, false or auto.")
    memory = OmegaConf.select(cfg, "device.memory")
    if memory is not None and not 0 <= memory < math.inf:
        raise ValueError(f"device.memory = {memory}, but it must be a number of GiB, or null for half of what is free.")
    if (cfg.get("seed") or 0) >= 2**63:
        raise ValueError(f"seed = {cfg.seed}, but it must be below 2^63.")
    for key in GROUPS:
        if cfg.get(key) is not None:
            arguments(cfg[key], key)


def composed(command: str, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """Composes the config of a command from Python, also inside a Hydra program; returns it with the choice of each group."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("fsl_cli.configs", job_name=command, version_base="1.3"):
            cfg = compose(command, overrides=["out=unused", *overrides], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
    with open_dict(cfg):
        return cfg, dict(cfg.pop("hydra").runtime.choices)


def offer(groups: Mapping[str, Any]) -> None:
    """Registers the settings of a checkpoint with Hydra, as option `trained` of each group."""
    for group, node in groups.items():
        ConfigStore.instance().store(group=group, name="trained", node=node)


def run_folder() -> Path:
    """The folder of the running job, relative to the working directory if it is below that."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def recipes(choices: Mapping[str, str]) -> list[str]:
    """The recipes that apply to a job; recipes are optional, so Hydra ignores those that do not exist."""
    sources = [source for source in HydraConfig.get().runtime.config_sources if source.path]
    folders = [files(source.path) if source.schema == "pkg" else Path(source.path) for source in sources]
    names = [(group, choices[group]) for group in RECIPES if choices.get(group)]
    return [name for group, name in names if any(folder.joinpath(group, f"{name}.yaml").is_file() for folder in folders)]


def build(node: Any, key: str, **given: Any) -> Any:
    """Builds the object that config node `key` describes, from its own arguments and those `given`."""
    constructor, kwargs = arguments(node, key)
    wanted = {name: value for name, value in given.items() if name in inspect.signature(constructor).parameters}
    try:
        return constructor(**kwargs, **wanted)
    except (ValueError, TypeError) as error:
        message = str(error)
        named = message.startswith(key) or "." in message.split(" ")[0]  # it starts with a key, as algo.inner_lr
        raise ValueError(message if named else f"{key}: {message}") from error


def arguments(node: Any, key: str) -> tuple[type, dict[str, Any]]:
    """The constructor that a config node names, and its arguments, checked against the names and annotations of parameters."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ValueError(f"{key} = {node!r}, but a group is chosen by its name: {key}=NAME with a file configs/{key}/NAME.yaml.")
    plain: Any = OmegaConf.to_container(node, resolve=True)
    constructor = locate(plain.pop("_target_"), key)
    parameters = {
        name: parameter for name, parameter in inspect.signature(constructor).parameters.items() if name not in GIVEN[key]
    }
    hints = typing.get_type_hints(constructor.__init__)
    for name, value in plain.items():
        if name not in parameters:
            raise ValueError(f"{key}.{name} is not an option of {constructor.__name__}.{suggest(name, parameters)}")
        if not _fits(value, hints.get(name, Any)):
            raise ValueError(must_be(f"{key}.{name}", repr(value), _spell(hints[name])))
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in plain:
            raise ValueError(f"{key}.{name} has no value, and {constructor.__name__} needs one. Give it: {key}.{name}=...")
    return constructor, plain


def head_width(algo: DictConfig) -> int | None:
    """The number of classes that an algorithm has a fixed head for; None if it takes any number."""
    kind, options = arguments(algo, "algo")
    made: Any = kind  # an Algorithm, not imported here because every command would wait for torch
    return None if "way" in made.idle(options, training=False) else options.get("way")


def must_be(key: str, value: str, kind: str) -> str:
    """The message for a value of the wrong kind."""
    example = f" Write one, such as {key}={EXAMPLES[kind]}." if kind in EXAMPLES else ""
    if re.search(r"\d\.\.\.?\d", value):  # a range, as in a shell
        example = f" To run several, add -m and list them: {key}=0,1,2."
    return f"{key} = {value}, but it must be {kind}.{example}"


def suggest(name: str, known: Iterable[str]) -> str:
    """`Did you mean ...?` if a known name is close, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else f" There are: {', '.join(known)}."


def locate(target: Any, key: str) -> type:
    """Imports the class `target`, if configs may name its module."""
    module, _, name = str(target).rpartition(".")
    refusal = ValueError(
        f"{key}._target_ = {target!r}, but it must be a class of {', '.join(ALLOWED)}. Configs from strangers can name any code; "
        f"this one was not run. If it is yours, allow its module: {OWN}={module or 'MODULE'}."
    )
    if not _allowed(module):
        raise refusal
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{key}._target_ = {target!r}, but that class cannot be imported ({error}). Mend its module.") from error
    if not (isinstance(found, type) and _allowed(found.__module__)):
        raise refusal
    return found


def _allowed(module: str) -> bool:
    own = [name.strip() for name in os.environ.get(OWN, "").split(",") if name.strip()]
    return any(module == name or module.startswith(name + ".") for name in (*ALLOWED, *own))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain config value matches an annotation; `Any` accepts everything, a kind not listed here nothing."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is tuple and Ellipsis not in options:
        return isinstance(value, list) and len(value) == len(options) and all(map(_fits, value, options))
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
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
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(str(option) for option in options)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in options if getattr(option, "__name__", "") != "Tensor")
    if origin in (list, tuple):
        number = f"{len(options)} " if origin is tuple and Ellipsis not in options else ""
        return f"a list of {number}{_spell(options[0]).removeprefix('a ')}s in brackets"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return names.get(hint) or str(hint)


def differences(cfg: DictConfig, other: DictConfig) -> dict[str, tuple[Any, Any]]:
    """The keys (`a.b`) at which two resolved configs differ, with both values."""
    one, two = flat(OmegaConf.to_container(cfg, resolve=True)), flat(OmegaConf.to_container(other, resolve=True))
    return {key: (one.get(key), two.get(key)) for key in {**one, **two} if one.get(key) != two.get(key)}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a plain config by their path `a.b`."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {key: value for name in node for key, value in flat(node[name], f"{prefix}.{name}" if prefix else name).items()}
