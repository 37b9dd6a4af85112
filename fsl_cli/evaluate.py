"""`fsl evaluate checkpoint=PATH`: rebuilds a trained algorithm, scores fixed episodes, and reports accuracy or error.

Without a checkpoint, `fsl evaluate model=NAME dataset=NAME` scores a network that comes with weights.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fsl_cli import checkpoint, device, parallel, speed, tuning
from fsl_cli.algos.base import Algorithm
from fsl_cli.config import build, check, offer, run_folder
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.errors import run_and_report
from fsl_cli.loading import rebuild, refuse_untrained
from fsl_cli.metrics import details, headline
from fsl_cli.overrides import asks_help, typed
from fsl_cli.results import line, protocol, refuse_used, source, warn_of_seen, write
from fsl_cli.schema import Precision, register
from fsl_cli.scoring import score
from fsl_cli.sources import evaluation_sampler, open_store

log = logging.getLogger(__name__)

TRAINED = ("algo", "dataset", "model", "task")
UNTRAINED = {"algo": "refined_centroid", "task": "5way1shot", "seed": "0"}  # the defaults without a checkpoint
TRIED = 2  # episodes scored to choose the number of threads

register()


def prepare(overrides: list[str]) -> list[str]:
    """Opens `checkpoint=`, and offers its settings to Hydra as option `trained` of each config group."""
    words = typed(overrides)
    asked = asks_help(overrides)
    groups: dict[str, Any] = {group: {} for group in TRAINED}
    names, stay = dict.fromkeys((*TRAINED, "seed"), "trained"), []
    if words.get("checkpoint", "null") != "null":
        content = checkpoint.load(words["checkpoint"], "checkpoint")
        groups, names = checkpoint.groups(content, TRAINED), content["choices"]
        # A data set may select a model and a task; here those of the training stay, unless others are typed.
        stay = [f"{group}=trained" for group in ("model", "task") if "dataset" in words and group not in words]
        stay += [f"episodes={OmegaConf.create(content['config']).episodes}"] if "episodes" not in words else []
    elif {"model", "dataset"} <= set(words):
        names = UNTRAINED | {name: words[name] for name in TRAINED if name in words}
        stay = [f"{group}={UNTRAINED[group]}" for group in ("algo", "task") if group not in words]
    elif not asked:
        raise ValueError(
            "checkpoint has no value. Name one: fsl evaluate checkpoint=runs/train/.../best.pt. Or name a network that comes "
            "with weights, and a data set: fsl evaluate model=efficientnet_lite0 dataset=caltech101."
        )
    ConfigStore.instance().store(name="trained", node={name: names[name] for name in (*TRAINED, "seed")})
    offer(groups)
    return [*stay, *overrides]


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Runs one evaluation; returns its accuracy, or mean squared error."""
    return run_and_report(run, cfg)


def run(cfg: DictConfig) -> float:
    """Rebuilds the trained algorithm, scores the episodes, and writes result.json and episodes.csv."""
    start = time.perf_counter()
    check(cfg)
    place = device.choose(cfg.device.name)
    parallel.join(place)
    chief = parallel.rank() == 0
    folder = parallel.from_first(run_folder())
    parallel.all_or_none(lambda: refuse_used(folder) if chief else None)
    content = checkpoint.load(cfg.checkpoint, "checkpoint") if cfg.checkpoint is not None else None
    if content is not None:
        trained = OmegaConf.create(content["config"]).device.precision
        if cfg.device.precision == Precision.auto and (place.type == "cuda" or trained != "tf32"):
            cfg.device.precision = trained
        follow(cfg.dataset, content["data"]["item_shape"], typed(HydraConfig.get().overrides.task))
    data = build(cfg.dataset, "dataset").load()
    algo = restore(cfg, data, place, content)
    sampler = evaluation_sampler(cfg, data, cfg.split, cfg.seed)
    # Without a checkpoint, the classes that the network was trained on are unknown.
    seen = warn_of_seen(checkpoint.seen(content), data, cfg.split) if content is not None else None
    store = open_store(data, place, device.data_budget(place, cfg.device.memory), algo.model)
    speed.use(algo, choose_speed(cfg, content, algo, place, lambda: score(algo, store, sampler, TRIED)))
    scores = score(algo, store, sampler, cfg.episodes)
    chosen = HydraConfig.get().runtime.choices
    origin = content["choices"] if content is not None else chosen
    names = {group: origin[group] if chosen[group] == "trained" else chosen[group] for group in TRAINED}
    wall = time.perf_counter() - start
    result = headline(scores) | protocol(cfg, algo, names, sampler, data, cfg.split) | source(cfg.checkpoint, content) | {
        "classes_seen": seen,
        "wall_time_s": round(wall, 3),
        "episodes_per_s": round(cfg.episodes / wall, 3),
    }  # fmt: skip
    log.info(line(result))  # before the details, which take seconds to compute
    if chief:
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        write(folder, result | details(scores), scores)
    return result[algo.measure.name]


def restore(cfg: DictConfig, data: Packed | Drawn, place: torch.device, content: dict[str, Any] | None) -> Algorithm:
    """The algorithm under its norm protocol, with the weights of the checkpoint or of its pretrained network."""
    if content is not None and list(data.item_shape) != content["data"]["item_shape"]:
        raise ValueError(
            f"dataset: its items are {_shape(data.item_shape)}, but those of the checkpoint were "
            f"{_shape(content['data']['item_shape'])}. Choose a data set, or its size option, with the same items."
        )
    job = HydraConfig.get()
    choices, words = job.runtime.choices, job.overrides.task
    if content is None:
        refuse_untrained(cfg, choices)
    algo = rebuild(cfg, choices, words, content, "checkpoint", data.item_shape, place, regression=isinstance(data, Drawn))
    if cfg.norm is not None:
        algo.use_norm(cfg.norm)
    return algo


def choose_speed(
    cfg: DictConfig, content: dict[str, Any] | None, algo: Algorithm, place: torch.device, trial: Callable[[], object]
) -> speed.Choice:
    """The Choice for the episodes: as typed, else as in training, and on the number of CPU threads that a trial finds fastest."""
    trained = checkpoint.fastest(content, place) or speed.UNMEASURED
    chosen = {name: trained[name] if cfg.device[name] == "auto" else cfg.device[name] for name in trained}
    if algo.bulk and cfg.device.channels_last == "auto":
        chosen["channels_last"] = True
    if cfg.device.threads == "auto":  # the training may have run on another machine, or a busy one
        chosen["threads"] = tuning.threads(trial) if place.type == "cpu" and parallel.world() == 1 else None
    return chosen


def _shape(item_shape: Sequence[int]) -> str:
    return f"of shape {list(item_shape)}" if item_shape else "texts"


def follow(dataset: DictConfig, item_shape: list[int], words: dict[str, str]) -> None:
    """Sets `channels` and `size` of the data set, unless typed, to those that the model was trained on."""
    sides = (("channels", item_shape[0]), ("size", item_shape[-1])) if len(item_shape) == 3 else ()
    for option, value in sides:
        if option in dataset and f"dataset.{option}" not in words:
            dataset[option] = value
