"""Checkpoints: tensors and plain values only, written atomically, verified and loaded without running foreign code."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
UNMEASURED = {"threads": None, "task_chunk": None, "channels_last": False}
KEYS = {"format", "config", "choices", "overrides", "data", "step", "algo", "optimizer", "schedule", "progress", "fastest"}


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, flushes it to disk, and renames it."""
    content = {"format": FORMAT, **content}
    assert set(content) == KEYS, f"a checkpoint holds {sorted(KEYS)}"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | Path, key: str) -> dict[str, Any]:
    """The content of a checkpoint on the CPU. `key` is what the user typed it under, for messages: checkpoint or resume."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{key} = {path} is a folder. Name the file in it: {key}={path / 'best.pt'}.")
    if not path.exists():
        raise ValueError(f"{key} = {path}: there is no such file. Name a best.pt or last.pt that fsl train wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{key} = {path} is damaged: its record {damaged} fails its checksum. Copy or train it again.")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{key} = {path} is not a whole checkpoint ({error}): it is truncated or another kind of file. "
            "Copy or train it again."
        ) from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{key} = {path} holds something other than tensors and plain values, and was not loaded, since that could "
            "run foreign code. Use a checkpoint that fsl train wrote."
        ) from error
    if isinstance(content, dict):
        content["fastest"] = UNMEASURED | (content.get("fastest") or {})  # what runs of older versions did not choose
    if not isinstance(content, dict) or set(content) != KEYS or content["format"] != FORMAT:
        raise ValueError(f"{key} = {path} is not a checkpoint of this version of fsl. Use a file that fsl train wrote.")
    return content


def sha256(path: str | Path) -> str:
    """The hash of a file, which says in a result which checkpoint it belongs to."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_network(algo: torch.nn.Module, content: dict[str, Any], key: str) -> None:
    """Puts the embedding network of a checkpoint, whatever algorithm trained it, into `algo`."""
    network = algo.get_submodule("model")
    saved = {name.removeprefix("model."): value for name, value in content["algo"].items() if name.startswith("model.")}
    own = network.state_dict()
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in own.items()}:
        raise ValueError(
            f"{key}: the network of the checkpoint is another one (model={content['choices']['model']}, "
            f"dataset={content['choices']['dataset']}). Train with the same model, model options and item size."
        )
    network.load_state_dict(saved)


def load_weights(algo: torch.nn.Module, content: dict[str, Any], key: str) -> None:
    """Puts a checkpoint's weights into `algo`; says what does not fit."""
    saved, own = content["algo"], algo.state_dict()
    strange = sorted(set(saved) ^ set(own))
    if strange:
        raise ValueError(
            f"{key}: the checkpoint was written by algo={content['choices']['algo']} with "
            f"model={content['choices']['model']} and does not fit the algorithm here (first difference: {strange[0]}). "
            "Leave algo and model as they were trained."
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
    return "Keep the data set's item size, the classes and the model that it was trained with."
