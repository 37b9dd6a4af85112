"""Checkpoints and classifiers: tensors and plain values only, written atomically, loaded without running foreign code."""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fsl_cli.algos.base import Algorithm
from fsl_cli.config import locate
from fsl_cli.speed import Choice
from fsl_cli.whole import whole

FORMAT = 1
KEYS = {"format", "config", "choices", "overrides", "data", "step", "algo", "optimizer", "schedule", "progress", "fastest"}
CLASSIFIER = {"format", "config", "choices", "data", "algo", "classifier"}  # what `fsl adapt` writes


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint or classifier."""
    content = {"format": FORMAT, **content}
    assert set(content) in (KEYS, CLASSIFIER), f"a checkpoint holds {sorted(KEYS)}"
    with whole(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            full = error.__context__  # torch puts its own error in place of that of a disk
            if isinstance(full, OSError):
                raise OSError(full.errno, full.strerror, str(path)) from error
            raise


def load(path: str | Path, key: str) -> dict[str, Any]:
    """The content of a file on the CPU. `key` is what the user typed it under, for messages: checkpoint, resume, classifier."""
    path = Path(path)
    kind, writer = ("classifier", "fsl adapt") if key == "classifier" else ("checkpoint", "fsl train")
    if path.is_dir():
        file = "that fsl adapt wrote" if kind == "classifier" else f"in it: {key}={path / 'best.pt'}"
        raise ValueError(f"{key} = {path} is a folder. Name the file {file}.")
    if not path.exists():
        what = "a file" if kind == "classifier" else "a best.pt or last.pt"
        raise ValueError(f"{key} = {path}: there is no such file. Name {what} that {writer} wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(
                f"{key} = {path} is damaged: its record {damaged} fails its checksum. Copy it again, or make it with {writer}."
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{key} = {path} is not a whole {kind} ({error}): it is truncated or another kind of file. "
            f"Copy it again, or make it with {writer}."
        ) from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{key} = {path} holds something other than tensors and plain values, and was not loaded, since that could "
            f"run foreign code. Use a {kind} that {writer} wrote."
        ) from error
    found = set(content) if isinstance(content, dict) else set()
    for keys, own in ((KEYS, "checkpoint"), (CLASSIFIER, "classifier")):
        if found == keys and own != kind:
            raise ValueError(f"{key} = {path} is a {own}, and this wants a {kind} that {writer} wrote. Try {own}={path}.")
    if found not in (KEYS, CLASSIFIER) or content["format"] != FORMAT:
        raise ValueError(f"{key} = {path} is not a {kind} of this version of fsl. Use a file that {writer} wrote.")
    return content


def sha256(path: str | Path) -> str:
    """The hash of a file, which says in a result which checkpoint it belongs to."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def trainer(content: dict[str, Any]) -> type[Algorithm]:
    """The class of the algorithm that a checkpoint was trained by."""
    return locate(OmegaConf.create(content["config"]).algo["_target_"], "algo")


def seen(content: dict[str, Any]) -> list[str]:
    """The names of the classes that a checkpoint was trained on."""
    return content["data"]["seen"]


def fastest(content: dict[str, Any] | None, device: torch.device) -> Choice | None:
    """How the steps of a checkpoint were computed, if there is one and it was on such a device."""
    if content is None or OmegaConf.create(content["config"]).device.name != device.type:
        return None
    return content["fastest"]


def load_network(algo: Algorithm, content: dict[str, Any], key: str) -> None:
    """Puts the embedding network of a checkpoint, whatever algorithm trained it, into `algo`."""
    saved, own = trainer(content).network(content["algo"]), algo.model.state_dict()
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in own.items()}:
        raise ValueError(
            f"{key}: the network of the checkpoint is another one (model={content['choices']['model']}, "
            f"dataset={content['choices']['dataset']}). Train with the same model, model options and item size."
        )
    algo.take(saved)


def load_weights(algo: torch.nn.Module, content: dict[str, Any], key: str) -> None:
    """Puts a checkpoint's weights into `algo`; says what does not fit."""
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
    if "head" in name:
        return (
            "The head is as wide as the task: keep the task.way that it was trained with, or train an algorithm "
            "without a fixed head, such as algo=protonet."
        )
    kept = "the data set's item size, the classes and the model"
    if name.startswith("model."):
        return f"Keep {kept} that it was trained with."
    return (
        f"Keep {kept}, task.way, task.shot and the options of algo that it was trained with, for its layers follow from them; or "
        "train an algorithm without layers of its own, such as algo=protonet."
    )
