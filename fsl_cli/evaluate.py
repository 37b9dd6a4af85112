"""`fsl evaluate checkpoint=PATH`: rebuild what was trained, score fixed episodes, report accuracy or error with its interval.

Without a checkpoint, `fsl evaluate model=NAME dataset=NAME` does so with a network that comes with weights.
"""

import csv
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fsl_cli import checkpoint, device, parallel, speed, tuning
from fsl_cli.algos.base import Algorithm
from fsl_cli.config import build, check, offer, run_folder, typed
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.episodes import EVALUATION
from fsl_cli.errors import told
from fsl_cli.loading import rebuild, refuse_untrained
from fsl_cli.metrics import ACCURACY, MSE, Errors, Scores, details, headline
from fsl_cli.schema import Precision, register
from fsl_cli.scoring import score
from fsl_cli.sources import Sampler, open_sampler, open_store

log = logging.getLogger(__name__)

TRAINED = ("algo", "dataset", "model", "task")
UNTRAINED = {"algo": "centroid", "task": "5way1shot", "seed": "0"}  # without a checkpoint, unless others are typed
TRIED = 2  # episodes that are scored to see how many threads are fastest

register()


def prepare(overrides: list[str]) -> list[str]:
    """Looks `checkpoint=` up and makes what it was trained with known to Hydra as option `trained` of each group."""
    words = typed(overrides)
    asked = bool({"--help", "-h", "--hydra-help"} & set(overrides))
    config: Any = {group: {} for group in TRAINED}
    names, stay = dict.fromkeys((*TRAINED, "seed"), "trained"), []
    if "checkpoint" in words:
        content = checkpoint.load(words["checkpoint"], "checkpoint")
        config, names = OmegaConf.to_container(OmegaConf.create(content["config"])), content["choices"]
        # A data set may choose a model and a task; here those of the training stay unless others are typed.
        stay = [f"{group}=trained" for group in ("model", "task") if "dataset" in words and group not in words]
    elif {"model", "dataset"} <= set(words):
        names = UNTRAINED | {name: words[name] for name in TRAINED if name in words}
        stay = [f"{group}={UNTRAINED[group]}" for group in ("algo", "task") if group not in words]
    elif not asked:
        raise ValueError(
            "checkpoint has no value. Name one: fsl evaluate checkpoint=runs/train/.../best.pt. Or name a network that comes "
            "with weights, and a data set: fsl evaluate model=efficientnet_lite0 dataset=caltech101."
        )
    ConfigStore.instance().store(name="trained", node={name: names[name] for name in (*TRAINED, "seed")})
    offer({group: config[group] for group in TRAINED})
    return [*stay, *overrides]


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Runs one evaluation; returns its accuracy, or mean squared error."""
    return told(run, cfg)


def run(cfg: DictConfig) -> float:
    """Rebuilds the trained algorithm, scores the episodes, and writes result.json and episodes.csv."""
    start = time.perf_counter()
    check(cfg)
    place = device.choose(cfg.device.name)
    parallel.join(place)
    chief = parallel.rank() == 0
    folder = parallel.same(run_folder())
    if chief and any((folder / name).exists() for name in ("result.json", "last.pt", "best.pt")):
        raise ValueError(f"out = {folder} already holds a run or a result. Choose another folder.")
    content = checkpoint.load(cfg.checkpoint, "checkpoint") if cfg.checkpoint is not None else None
    if content is not None:
        trained = OmegaConf.create(content["config"]).device.precision
        if cfg.device.precision == Precision.auto and (place.type == "cuda" or trained != "tf32"):
            cfg.device.precision = trained
        follow(cfg.dataset, content["data"]["item_shape"], typed(HydraConfig.get().overrides.task))
    data = build(cfg.dataset, "dataset").load()
    algo = restore(cfg, data, place, content)
    sampler = evaluation_sampler(cfg, data, cfg.split, cfg.seed)
    # What a network that comes with weights was trained on is not known here.
    seen = warn_of_seen(checkpoint.seen(content), data, cfg.split) if content is not None else None
    store = open_store(data, place, device.data_budget(place, cfg.device.memory), algo.model)
    speed.use(algo, choose_speed(cfg, content, algo, place, lambda: score(algo, store, sampler, TRIED)))
    scores = score(algo, store, sampler, cfg.episodes)
    chosen = HydraConfig.get().runtime.choices
    origin = content["choices"] if content is not None else chosen
    names = {group: origin[group] if chosen[group] == "trained" else chosen[group] for group in TRAINED}
    wall = time.perf_counter() - start
    result = headline(scores) | protocol(cfg, algo, names, sampler, cfg.split) | source(cfg.checkpoint, content) | {
        "seed": cfg.seed,
        "classes_seen": seen,
        "wall_time_s": round(wall, 3),
        "tasks_per_s": round(cfg.episodes / wall, 3),
    }  # fmt: skip
    log.info(line(result))  # before the details, which take seconds to come by
    if chief:
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        write(folder, result | details(scores), scores)
    return result[algo.measure.name]


def restore(cfg: DictConfig, data: Packed | Drawn, place: torch.device, content: dict[str, Any] | None) -> Algorithm:
    """The algorithm under its norm protocol, with the weights of the checkpoint, or those that its network comes with."""
    if content is not None and list(data.item_shape) != content["data"]["item_shape"]:
        raise ValueError(
            f"dataset: its items are {list(data.item_shape)}, but the checkpoint was trained on {content['data']['item_shape']}. "
            "Choose a data set, or its size option, with the same item shape."
        )
    choices = HydraConfig.get().runtime.choices
    if content is None:
        refuse_untrained(cfg, choices)
    algo = rebuild(cfg, choices, content, "checkpoint", data.item_shape, place, regression=isinstance(data, Drawn))
    if cfg.norm is not None:
        algo.use_norm(cfg.norm)
    return algo


def warn_of_seen(seen: list[str], data: Packed | Drawn, split: str) -> int:
    """How many classes of a split have the names of classes that were trained on; if there are any, the log says so."""
    asked = data.class_names(split)
    both = len(set(seen) & set(asked))
    if both:
        log.warning(
            f"{both} of the {len(asked)} {split} classes of {data.name} have the names of classes that were trained on: the "
            "accuracy on them is not one on new classes."
        )
    return both


def choose_speed(
    cfg: DictConfig, content: dict[str, Any] | None, algo: Algorithm, place: torch.device, trial: Callable[[], object]
) -> speed.Choice:
    """How the episodes are computed: as typed, else as they were in training, on the threads that a trial is fastest with."""
    trained = content["fastest"] if content is not None else speed.UNMEASURED
    chosen = {name: trained[name] if cfg.device[name] == "auto" else cfg.device[name] for name in trained}
    if algo.bulk and cfg.device.channels_last == "auto":
        chosen["channels_last"] = True
    if cfg.device.threads == "auto":  # those of the training may have been another machine's, or a busy one's
        chosen["threads"] = tuning.threads(trial) if place.type == "cpu" and parallel.world() == 1 else None
    return chosen


def follow(dataset: DictConfig, item_shape: list[int], words: dict[str, str]) -> None:
    """Sets the data set's `channels` and `size`, where it has them and the user typed none, to what the model was trained on."""
    sides = (("channels", item_shape[0]), ("size", item_shape[-1])) if len(item_shape) == 3 else ()
    for option, value in sides:
        if option in dataset and f"dataset.{option}" not in words:
            dataset[option] = value


def evaluation_sampler(cfg: DictConfig, data: Packed | Drawn, split: str, seed: int) -> Sampler:
    """The fixed episodes of a split."""
    if split not in EVALUATION:
        raise ValueError(f"split = {split!r}, but {data.name} has {', '.join(EVALUATION)}. Choose one of them.")
    if cfg.task.queries < 1:
        raise ValueError(f"task.queries = {cfg.task.queries}, but an episode is scored on its queries: it must be at least 1.")
    shape = (cfg.task.way, cfg.task.shot, cfg.task.queries, 1)
    return open_sampler(data, split, shape, seed, EVALUATION[split])


def protocol(cfg: DictConfig, algo: Algorithm, names: dict[str, str], sampler: Sampler, split: str) -> dict[str, Any]:
    """Everything that an accuracy must be read with."""
    options: Any = OmegaConf.to_container(cfg.dataset, resolve=True)
    return {
        "episodes": cfg.episodes,
        "way": sampler.way,
        "shot": sampler.shot,
        "queries": sampler.queries,
        "split": split,
        "classes": len(sampler.classes) or None,
        "norm": algo.norm,
        "precision": algo.precision,
        "inner_steps": getattr(algo, "eval_inner_steps", None),
        "episode_seed": sampler.seed,
        **{group: names[group] for group in ("algo", "dataset", "model")},
        "dataset_options": {k: v for k, v in options.items() if k not in ("_target_", "data_dir", "cache_dir")},
    }


def source(path: str | None, content: dict[str, Any] | None) -> dict[str, Any]:
    """Which checkpoint an accuracy belongs to, if any."""
    if path is None or content is None:
        return {"trained_by": None, "train_seed": None, "train_on_val": None, "step": None, "checkpoint": None}
    choices, step = content["choices"], content["step"]
    # An older fsl did not have the option.
    on_val = OmegaConf.select(OmegaConf.create(content["config"]), "train_on_val", default=False)
    trained = {"trained_by": choices["algo"], "train_seed": int(choices["seed"]), "train_on_val": on_val, "step": step}
    return {**trained, "checkpoint": path, "checkpoint_sha256": checkpoint.sha256(path)}


def line(result: dict[str, Any]) -> str:
    """One line for an evaluation, with its whole protocol."""
    where = f"{result['algo']} on {result['dataset']} {result['split']}"
    listed = f"{result['episodes']} episodes of seed {result['episode_seed']}, {result['queries']} queries"
    by = "" if result["trained_by"] in (None, result["algo"]) else f" by {result['trained_by']}"
    on = " on train and val" if result["train_on_val"] else ""
    trained = f"trained{by}{on} with seed {result['train_seed']} for {result['step']} steps"
    trained = "not trained" if result["step"] is None else trained
    if "mse" in result:
        return f"{where}, {result['shot']}-shot: mse {_errors(result)} ({listed}, {trained})"
    return (
        f"{where} ({result['classes']} classes), {result['way']}-way {result['shot']}-shot: "
        f"{ACCURACY.text(result['accuracy'], result['ci95'])} ({listed} a class, norm {result['norm']}, {trained})"
    )


def _errors(result: dict[str, Any]) -> str:
    """The error, for algorithms with inner steps after some of them."""
    if "adaptation_ci95" not in result:
        return MSE.text(result["mse"], result["ci95"])
    pairs = list(zip(result["adaptation_curve"], result["adaptation_ci95"], strict=True))
    named = sorted(step for step in {0, 1, 5, 10, len(pairs) - 1} if step < len(pairs))
    return ", ".join(f"{MSE.text(*pairs[step])} after {step}" for step in named) + " inner steps"


def write(folder: Path, result: dict[str, Any], scores: Scores | Errors) -> None:
    """Writes result.json and what every episode came to."""
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    with (folder / "episodes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["episode", *scores.columns])
        columns = [column.tolist() for column in scores.columns.values()]
        table.writerows(zip(range(len(scores.measured)), *columns, strict=True))
