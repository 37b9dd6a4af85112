"""The typed schema of the commands: a misspelt key or a wrong type is refused before anything is built."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import platformdirs
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


@dataclass
class Task:
    """The shape of an episode at evaluation and (`train_` options) in training, and the tasks of a meta-batch."""

    way: int = MISSING
    shot: int = MISSING
    queries: int = MISSING
    train_way: Any = MISSING  # a number, or a range of two
    train_shot: Any = MISSING
    train_queries: int = MISSING
    tasks: int = MISSING


class Precision(Enum):
    """bf16: the embedding in bfloat16; tf32: matrix products in TF32; everything else is float32."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


@dataclass
class Device:
    """Where and how a run computes."""

    name: str = MISSING
    threads: Any = MISSING  # a number, auto, or null
    workers: Any = MISSING  # a number, or auto
    task_chunk: Any = MISSING  # a number, auto, or null
    channels_last: Any = MISSING  # true, false or auto
    precision: Precision = MISSING
    compile: bool = MISSING
    graph: bool = MISSING
    memory: float | None = MISSING
    processes: int | None = MISSING


@dataclass
class Command:
    """Options of all commands that compute."""

    model: Any = MISSING
    device: Device = MISSING
    algo: Any = MISSING
    out: str = MISSING


@dataclass
class Episodic(Command):
    """Options of the commands that draw episodes from a data set."""

    dataset: Any = MISSING
    task: Task = MISSING
    seed: int = MISSING
    episodes: int = MISSING
    data_dir: str = MISSING
    cache_dir: str = MISSING


@dataclass
class Train(Episodic):
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
    train_on_val: bool = False
    pretrain: str | None = None
    pretrain_algo: str = "finetune"
    pretrain_with: Any = None  # settings by key
    pretrain_frozen: bool = False
    resume: str | None = None


@dataclass
class Evaluate(Episodic):
    """`fsl evaluate`."""

    checkpoint: str | None = None
    split: str = MISSING
    norm: str | None = None
    trained: Any = MISSING


@dataclass
class Recognition(Command):
    """Options of both `fsl adapt` and `fsl predict`."""

    task: Any = None
    checkpoint: str | None = None
    support: str | None = None
    size: int | None = None
    norm: str | None = None
    leave_one_out: bool = False


@dataclass
class Adapt(Recognition):
    """`fsl adapt`."""

    output: str | None = None


@dataclass
class Predict(Recognition):
    """`fsl predict`."""

    classifier: str | None = None
    query: str | None = None
    reject_below: Any = None  # a number, auto, or null


@dataclass
class Data:
    """`fsl data`."""

    action: str = MISSING
    model: Any = None
    dataset: Any = MISSING
    task: Task = MISSING
    split: str = MISSING
    episode: int = MISSING
    seed: int = MISSING
    data_dir: str = MISSING
    cache_dir: str = MISSING
    out: str = MISSING


class Format(Enum):
    """The format of an exported file."""

    torch = "torch"
    onnx = "onnx"


@dataclass
class Export:
    """`fsl export`."""

    classifier: str | None = None
    format: Format = Format.torch
    output: str | None = None
    out: str = MISSING


@dataclass
class Report:
    """`fsl report`."""

    runs: str = MISSING
    out: str = MISSING


COMMANDS = (Train, Evaluate, Report, Data, Predict, Adapt, Export)


def register() -> None:
    """Registers the schema with Hydra, and `${user_cache:}` with OmegaConf."""
    store = ConfigStore.instance()
    for command in COMMANDS:
        store.store(name=f"{command.__name__.lower()}_schema", node=command)
    OmegaConf.register_new_resolver("user_cache", lambda: platformdirs.user_cache_dir("fsl"), replace=True)
