"""The report of an evaluation: its protocol, the printed line, result.json and episodes.csv."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fsl_cli import checkpoint
from fsl_cli.algos.base import Algorithm
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.metrics import ACCURACY, MSE, Errors, Scores
from fsl_cli.sources import Sampler, contents
from fsl_cli.whole import whole

log = logging.getLogger(__name__)


def set_aside(folder: Path, step: int) -> None:
    """Renames the result of a run that is extended from `step`, since it no longer describes the run."""
    path = folder / "result.json"
    if path.exists():
        path.rename(folder / f"result_of_{step}_steps.json")


def refuse_used(folder: Path) -> None:
    """Refuses a folder that already holds a run or a result."""
    if any((folder / name).exists() for name in ("result.json", "last.pt", "best.pt")):
        raise ValueError(f"out = {folder} already holds a run or a result. Choose another folder.")


def warn_of_seen(seen: list[str], data: Packed | Drawn, split: str) -> int:
    """Returns how many classes of a split have names of trained classes; logs it if there are any."""
    asked = data.class_names(split)
    both = len(set(seen) & set(asked))
    if both:
        log.warning(
            f"{both} of the {len(asked)} {split} classes of {data.name} have the names of classes that were trained on: the "
            "accuracy on them is not one on new classes."
        )
    return both


def protocol(
    cfg: DictConfig, algo: Algorithm, names: dict[str, str], sampler: Sampler, data: Packed | Drawn, split: str
) -> dict[str, Any]:
    """Everything needed to interpret an accuracy."""
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
        "data": contents(data, split),
        "dataset_options": {k: v for k, v in options.items() if k not in ("_target_", "data_dir", "cache_dir")},
    }


def source(path: str | None, content: dict[str, Any] | None) -> dict[str, Any]:
    """The checkpoint that an accuracy belongs to, if any."""
    if path is None or content is None:
        return {"trained_by": None, "train_seed": None, "train_on_val": None, "step": None, "checkpoint": None}
    choices, step = content["choices"], content["step"]
    on_val = OmegaConf.create(content["config"]).train_on_val
    trained = {"trained_by": choices["algo"], "train_seed": int(choices["seed"]), "train_on_val": on_val, "step": step}
    return {**trained, "checkpoint": str(Path(path).expanduser().absolute()), "checkpoint_sha256": checkpoint.sha256(path)}


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
    """The mean squared error; for algorithms with inner steps, after some of them."""
    if "adaptation_ci95" not in result:
        return MSE.text(result["mse"], result["ci95"])
    pairs = list(zip(result["adaptation_curve"], result["adaptation_ci95"], strict=True))
    named = sorted(step for step in {0, 1, 5, 10, len(pairs) - 1} if step < len(pairs))
    return ", ".join(f"{MSE.text(*pairs[step])} after {step}" for step in named) + " inner steps"


def write(folder: Path, result: dict[str, Any], scores: Scores | Errors) -> None:
    """Writes episodes.csv, and then result.json, which marks the run as finished."""
    with whole(folder / "episodes.csv", newline="") as file:
        table = csv.writer(file)
        table.writerow(["episode", *scores.columns])
        columns = [column.tolist() for column in scores.columns.values()]
        table.writerows(zip(range(len(scores.measured)), *columns, strict=True))
    with whole(folder / "result.json") as file:
        file.write(json.dumps(result, indent=2) + "\n")
