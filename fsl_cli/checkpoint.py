"""Checkpoints and classifiers: tensors and plain values only, written atomically, loaded without running foreign code."""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fsl_cli.algos.base import Algorithm
from fsl_cli.config import locate
from fsl_cli.speed import UNMEASURED, Choice
from fsl_cli.whole import whole

FORMAT = 1
AGAIN = "Start a new run in another folder, from the best checkpoint beside it if there is one: pretrain=PATH/best.pt."
NAMES = dict.fromkeys(("algo", "model", "dataset"), str) | {"task": (str, NoneType)}  # None: a network that comes with weights
MADE = {"_target_": str}
MAYBE = (dict, NoneType)
# The required content of a file by key: a type, a dict with at least these keys, or a list of one kind.
LEARNED = {
    "format": int,
    "config": {"algo": MADE, "model": MADE, "dataset": MAYBE, "task": MAYBE},
    "choices": NAMES,
    "data": {"item_shape": [int], "classes": int},
    "algo": dict,
}
KEYS = LEARNED | {
    "config": {"algo": MADE, "model": MADE, "dataset": MADE, "task": dict, "schedule": dict, "device": dict}
    | dict.fromkeys(("steps", "episodes", "train_on_val"), object),
    "choices": NAMES | {"seed": str},
    "overrides": [str],
    "data": {"item_shape": [int], "classes": int, "seen": [str]},
    "step": int,
    "optimizer": {"state": dict, "param_groups": [dict]},
    "schedule": dict,
    "progress": dict.fromkeys(("best", "best_step", "misses", "seconds", "wall"), (int, float))
    | {"failures": list, "window": [[float]]},
    "fastest": dict.fromkeys(UNMEASURED, object),
}
# The same for a classifier, which `fsl adapt` writes.
CLASSIFIER = LEARNED | {
    "classifier": {"inputs": torch.Tensor, "slots": torch.Tensor, "names": [str], "temperature": float, "norm": str}
}


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint or classifier."""
    content = {"format": FORMAT, **content}
    assert content.keys() in (KEYS.keys(), CLASSIFIER.keys()), f"a checkpoint holds {sorted(KEYS)}"
    with whole(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            full = error.__context__  # torch hides the error of a full disk behind its own
            if isinstance(full, OSError):
                raise OSError(full.errno, full.strerror, str(path)) from error
            raise


def load(path: str | Path, key: str) -> dict[str, Any]:
    """Loads a file on the CPU; `key` is the option that named it (checkpoint, resume, classifier), for error messages."""
    path = Path(path)
    kind, writer = ("classifier", "fsl adapt") if key == "classifier" else ("checkpoint", "fsl train")
    if path.is_dir():
        inner = kind == "checkpoint" and (path / "best.pt").exists()
        file = f"the file in it: {key}={path / 'best.pt'}" if inner else f"a file that {writer} wrote"
        raise ValueError(f"{key} = {path} is a folder. Name {file}.")
    if not path.exists():
        what = "a file" if kind == "classifier" else "a best.pt or last.pt"
        raise ValueError(f"{key} = {path}: there is no such file. Name {what} that {writer} wrote.")
    if not path.is_file():  # reading one without end would fill the memory
        raise ValueError(f"{key} = {path} is a device or a pipe. Name a file that {writer} wrote.")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{key} = {path} is there, but you may not read it. Allow it, or name another.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(
                f"{key} = {path} is damaged: its record {damaged} fails its checksum. "
                + (f"Copy it again, or make it with {writer}." if key != "resume" else AGAIN)
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{key} = {path} is not a whole {kind} ({error}): it is truncated or another kind of file. "
            + (f"Copy it again, or make it with {writer}." if key != "resume" else AGAIN)
        ) from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{key} = {path} holds something other than tensors and plain values, and was not loaded, since that could "
            f"run foreign code. Use a {kind} that {writer} wrote."
        ) from error
    kinds = {"checkpoint": KEYS, "classifier": CLASSIFIER}
    for own, keys in kinds.items():
        if own != kind and isinstance(content, dict) and content.keys() == keys.keys():
            other = "fsl adapt" if own == "checkpoint" else "fsl export"
            raise ValueError(
                f"{key} = {path} is a {own}, and this wants a {kind} that {writer} wrote. Give it to fsl predict or {other}, as "
                f"{own}={path}."
            )
    if not _is_whole(content, kinds[kind]):
        raise ValueError(f"{key} = {path} is not a {kind} of this version of fsl. Use a file that {writer} wrote.")
    return content


def _is_whole(content: Any, keys: dict[str, Any]) -> bool:
    """Whether a file has the current format, and under each key the kind of value that is read from it."""
    if not (isinstance(content, dict) and content.keys() == keys.keys() and content["format"] == FORMAT):
        return False
    if not (isinstance(content["config"], str) and isinstance(content["algo"], dict)):
        return False
    try:
        config = OmegaConf.to_container(OmegaConf.create(content["config"]))
    except (ValueError, YAMLError, OmegaConfBaseException):
        return False
    weights = all(isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in content["algo"].items())
    return weights and _fits({**content, "config": config}, keys)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, written as in KEYS."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(name in value and _fits(value[name], part) for name, part in kind.items())
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    return isinstance(value, kind)


def sha256(path: str | Path) -> str:
    """The hash of a file, by which a result names its checkpoint."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def trainer(content: dict[str, Any]) -> type[Algorithm]:
    """The class of the algorithm that a checkpoint was trained by."""
    return locate(OmegaConf.create(content["config"]).algo["_target_"], "algo")


def seen(content: dict[str, Any]) -> list[str]:
    """The names of the classes that a checkpoint was trained on."""
    return content["data"]["seen"]


def fastest(content: dict[str, Any] | None, device: torch.device) -> Choice | None:
    """The Choice by which a checkpoint's steps were computed, or None if there is none for this kind of device."""
    if content is None or OmegaConf.create(content["config"]).device.name != device.type:
        return None
    return content["fastest"]


def groups(content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The config groups that a checkpoint was trained with, as options for Hydra."""
    config = OmegaConf.create(content["config"])
    if "shot" in config.algo:
        config.algo.shot = config.algo.shot  # in place of `${task.shot}`: typing task.shot must not rebuild the trained layers
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return {name: plain[name] or {} for name in names}


def load_network(algo: Algorithm, content: dict[str, Any], key: str) -> None:
    """Loads the embedding network of a checkpoint of any algorithm into `algo`."""
    saved, own = trainer(content).network(content["algo"]), algo.model.state_dict()
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in own.items()}:
        raise ValueError(
            f"{key}: the network of the checkpoint is another one (model={content['choices']['model']}, "
            f"dataset={content['choices']['dataset']}). Train with the same model, model options and item size."
        )
    algo.take(saved)


def load_weights(algo: torch.nn.Module, content: dict[str, Any], key: str) -> None:
    """Loads the weights of a checkpoint into `algo`; refuses weights that do not fit, by name."""
    saved, own = content["algo"], algo.state_dict()
    strange = sorted(set(saved) ^ set(own))
    if strange:
        raise ValueError(
            f"{key}: the checkpoint was written by algo={content['choices']['algo']} with "
            f"model={content['choices']['model']} and does not fit the algorithm here (first difference: {strange[0]}). "
            "Leave algo, model, task.way and task.shot as they were trained. (If they are, an earlier version wrote it: "
            "train again.)"
        )
    for name, value in own.items():
        if saved[name].shape != value.shape:
            raise ValueError(
                f"{key}: {name} has shape {list(saved[name].shape)} in the checkpoint and {list(value.shape)} here. "
                + _repair(name)
            )
    algo.load_state_dict(saved)


def _repair(name: str) -> str:
    kept = "the data set's item size, the classes and the model"
    if name.startswith("model."):
        return f"Keep {kept} that it was trained with."
    return (
        f"Keep {kept}, task.way, task.shot and the options of algo that it was trained with, for its layers follow from them; or "
        "train an algorithm without layers of its own, such as algo=protonet."
    )
