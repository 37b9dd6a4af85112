"""The initial state of a training, and `pretrain=train`: a first stage that trains the network it starts from."""

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fsl_cli import checkpoint, device, parallel, resume
from fsl_cli.algos.base import Algorithm
from fsl_cli.config import arguments, build, composed, flat, run_folder
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.models.norm import freeze, norm_layers
from fsl_cli.overrides import refuse_unread, typed
from fsl_cli.state import Run

log = logging.getLogger(__name__)

# Typed options that also apply to the first stage; its model is copied as composed.
SHARED = ("dataset", "task", "device", "seed", "data_dir", "cache_dir", "episodes", "val_episodes", "train_on_val")


class Job(NamedTuple):
    """A training as requested: the run of this command, or its first stage."""

    choices: dict[str, str]  # the option chosen in each config group, and the seed
    overrides: list[str]  # the overrides it was composed with
    relaunch: list[str]  # the overrides of the whole command; they differ for a first stage
    folder: Path
    again: str  # the command that resumes it


def current_job(cfg: DictConfig) -> Job:
    """The job that Hydra runs."""
    hydra = HydraConfig.get()
    refuse_unread(cfg.algo, typed(hydra.overrides.task), training=True)
    folder = parallel.from_first(run_folder())
    choices = {**hydra.runtime.choices, "seed": str(cfg.seed)}
    # Kept in the checkpoint, so that a resumed run finds the user's own configs.
    own = [f"--config-dir={source.path}" for source in hydra.runtime.config_sources if source.provider == "command-line"]
    again = shlex.join(["fsl", "train", f"resume={folder / 'last.pt'}"])
    if hydra.mode == RunMode.MULTIRUN:
        again += f" (or with the whole sweep: its command, with hydra.sweep.dir={hydra.sweep.dir} resume=auto)"
    words = [*own, *hydra.overrides.task]
    return Job(choices, words, words, folder, again)


def pretrained_checkpoint(cfg: DictConfig, job: Job, run: Callable[[DictConfig, Job], float]) -> str | None:
    """The checkpoint whose network a new training starts from, or None; with `pretrain=train`, `run` trains it now.

    The first stage has the sub-folder `pretrain`. A finished one is reused, and one that was stopped is resumed.
    """
    if cfg.pretrain_with is not None and not (cfg.pretrain == "train" and isinstance(cfg.pretrain_with, DictConfig)):
        raise ValueError(
            f"pretrain_with = {cfg.pretrain_with}, but it must be settings by key, as {{steps:8000,algo.batch:64}}, and go with "
            "pretrain=train. Write it so, or leave it out."
        )
    if cfg.pretrain != "train":
        if "pretrain_algo" in typed(job.overrides):  # otherwise a recipe set it
            raise ValueError(
                f"pretrain_algo = {cfg.pretrain_algo}, but pretrain = {cfg.pretrain or 'null'} trains no first stage. Set "
                "pretrain=train, or leave it out."
            )
        return cfg.pretrain
    if job.choices.get("experiment") is not None:
        raise ValueError(
            f"pretrain = train, but the settings of experiment={job.choices['experiment']} are not those of a first stage. "
            "Train that by itself, and name its checkpoint: pretrain=PATH/best.pt."
        )
    folder = job.folder / resume.STAGE
    stage, first = _first(cfg, job, folder)
    content = resume.source("auto", folder)
    if content is not None and content["step"] >= stage.steps and (folder / "result.json").exists():
        resume.refuse_contradictions(stage, first.choices, first.overrides, content)
        log.info(f"The first stage is finished: it starts from {folder / 'best.pt'}.")
        return str(folder / "best.pt")
    if parallel.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()  # each stage tunes its own number
    run(stage, first)
    torch.set_num_threads(threads)
    return str(folder / "best.pt")


def assemble(cfg: DictConfig, data: Packed | Drawn, classes: int, place: torch.device, name: str) -> Run:
    """Builds the model, the algorithm `name`, the optimizer and the schedule, with initial weights drawn from `seed`."""
    if isinstance(data, Drawn) and not getattr(arguments(cfg.algo, "algo")[0], "regresses", False):
        raise ValueError(f"algo={name} tells classes apart, but dataset={data.name} has values to predict. Choose algo=maml.")
    torch.manual_seed(cfg.seed)
    model = build(cfg.model, "model", item_shape=data.item_shape)
    algo = build(cfg.algo, "algo", model=model, classes=classes, regression=isinstance(data, Drawn))
    algo = device.settle(algo, place, cfg.device.precision.value)
    if cfg.pretrain_frozen:
        if cfg.pretrain is None:
            raise ValueError(
                "pretrain_frozen = true, but pretrain = null names no network to keep. Set pretrain=train or PATH, "
                "or set pretrain_frozen=false."
            )
        if not algo.bulk or algo.wants_pretrained:
            raise ValueError(f"pretrain_frozen = true, but algo={name} adapts the network itself. Set pretrain_frozen=false.")
        freeze(algo.model)
    if not any(weight.requires_grad for weight in algo.parameters()):
        key = "pretrain_frozen" if cfg.pretrain_frozen else "model.frozen"
        raise ValueError(f"{key} = true leaves nothing to train. Set {key}=false, or use the network as it is: fsl predict.")
    optimizer = build(cfg.optimizer, "optimizer", params=algo.parameters())
    return Run(algo, optimizer, build(cfg.schedule, "schedule", optimizer=optimizer))


def start_from(algo: Algorithm, path: str | None, cfg: DictConfig, name: str) -> list[str]:
    """Loads the network of the checkpoint `path`, if any, into `algo`; returns the names of the classes it was trained on."""
    if path is None:
        if algo.wants_pretrained:
            raise ValueError(
                f"pretrain = null, but algo={name} keeps the weights of a network that has been trained. Let "
                "pretrain=train train one first, or name a checkpoint: pretrain=PATH/best.pt."
            )
        return []
    content = checkpoint.load(path, "pretrain")
    checkpoint.load_network(algo, content, "pretrain")
    if cfg.pretrain_frozen and norm_layers(algo.model) and "running" not in checkpoint.trainer(content).norms:
        raise ValueError(
            f"pretrain = {path} was trained by algo={content['choices']['algo']}, which keeps no running statistics, and "
            "pretrain_frozen=true normalises by them. Use the network of a metric or baseline algorithm, or "
            "pretrain_frozen=false."
        )
    return checkpoint.seen(content)


def _first(cfg: DictConfig, job: Job, folder: Path) -> tuple[DictConfig, Job]:
    """The config and the job of the first stage of a job."""
    model = flat({"model": OmegaConf.to_container(cfg.model, resolve=True)})
    settings = {"algo": cfg.pretrain_algo, "model": job.choices["model"]} | model
    if cfg.pretrain_with is not None:
        settings |= flat(OmegaConf.to_container(cfg.pretrain_with))
    words = [
        *(word for word in job.overrides for key in typed([word]) if key.split(".")[0] in SHARED),
        *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items() if key != "model._target_"),
        *(
            f"hydra.searchpath=[{json.dumps('file://' + word.partition('=')[2])}]"
            for word in job.overrides
            if word.startswith("--config-dir=")
        ),
    ]
    stage, choices = composed("train", words)
    refuse_unread(stage.algo, typed(words), training=True)
    stage.out, stage.resume = str(folder), "auto"
    typed_again = [word for word in job.overrides if not {"out", "resume"} & set(typed([word]))]
    again = shlex.join(["fsl", "train", *typed_again, f"out={job.folder}", "resume=auto"])
    return stage, Job({**choices, "seed": str(stage.seed), "stage": resume.STAGE}, words, typed_again, folder, again)
