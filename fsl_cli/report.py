"""`fsl report runs=FOLDER`: a table of finished runs for each test, seeds merged, each row compared with the best."""

import csv
import json
import logging
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from fsl_cli.config import PLACES, check, flat, run_folder
from fsl_cli.errors import run_and_report
from fsl_cli.metrics import ACCURACY, MSE, Measure, interval
from fsl_cli.results import refuse_used
from fsl_cli.schema import register
from fsl_cli.whole import whole

log = logging.getLogger(__name__)

TEST = ("dataset", "dataset_options", "split", "way", "shot", "queries", "episodes", "episode_seed")
METHOD = ("algo", "model", "norm", "trained_by", "train_on_val", "inner_steps")
CHECKPOINT = "checkpoint"
# Keys that do not tell methods apart: the seed, paths, and what does not change the training.
FREE = (*PLACES, "seed", CHECKPOINT, "trained", "episodes", "checkpoint_every", "log_every")
FOLLOWS = ("schedule.T_max", "steps")  # the first equals the second unless typed
# The types of values that the tables rely on.
KINDS = {"dataset_options": dict, "train_seed": int | None, CHECKPOINT: str | None} | dict.fromkeys(
    ("algo", "dataset", "model", "norm"), str
)
TARGETS = ("optimizer._target_", "schedule._target_")  # shown by class name; algo, model and data set by config name
COLUMNS = ("algo", "model", "norm", "settings", "seeds", "score", "over seeds", "std over seeds", "behind the first")

register()


class Finished(NamedTuple):
    """A finished run: one with a result."""

    result: dict[str, Any]
    settings: dict[str, Any]  # of its training, by key (`a.b`)
    scores: np.ndarray  # [episodes]

    @property
    def test(self) -> str:
        """Identifies the test: results of the same test are of the same episodes."""
        return json.dumps([*(self.result[key] for key in TEST if key != "dataset_options"), tested(self.result)], sort_keys=True)

    @property
    def method(self) -> str:
        """Identifies the method: everything but the training seed."""
        return json.dumps([[self.result[key] for key in METHOD], self.settings], sort_keys=True)

    @property
    def measure(self) -> Measure:
        """Its measure: accuracy, or mean squared error."""
        return MSE if "mse" in self.result else ACCURACY


class Row(NamedTuple):
    """The runs of one method on one test."""

    runs: list[Finished]
    scores: np.ndarray  # [episodes], means over the runs

    @property
    def means(self) -> list[float]:
        """The mean of each run."""
        return [float(one.scores.mean()) for one in self.runs]

    @property
    def spread(self) -> float | None:
        """The sample standard deviation of the means of several runs."""
        return float(np.std(self.means, ddof=1)) if len(self.runs) > 1 else None


def prepare(overrides: list[str]) -> list[str]:
    """Returns the overrides unchanged."""
    return overrides


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="report")
def main(cfg: DictConfig) -> None:
    """Makes one report."""
    run_and_report(run, cfg)


def run(cfg: DictConfig) -> None:
    """Prints the tables, and writes report.md and report.csv."""
    check(cfg)
    folder = run_folder()
    refuse_used(folder)
    if not Path(cfg.runs).is_dir():
        raise ValueError(f"runs = {cfg.runs} is no folder. Name one that holds runs, such as runs=runs/sweeps.")
    found = list(collected(Path(cfg.runs)))
    if not found:
        raise ValueError(f"runs = {cfg.runs} holds no finished run, which has a result.json and an episodes.csv. Name another.")
    tables = [compared(same) for same in alike(found, lambda one: one.test)]
    lines = [line for table in tables for line in ("", title(table, tables), "", *markdown(table))]
    for line in lines:
        log.info(line)
    with whole(folder / "report.md") as file:
        file.write("\n".join(lines[1:]) + "\n")
    write(folder / "report.csv", tables)
    used = sum(len(row.runs) for table in tables for row in table)
    left = f"; {len(found) - used} older of the same settings and seed left out" if used < len(found) else ""
    log.info(f"\n{used} run{'s are' if used > 1 else ' is'} in {folder / 'report.md'} and report.csv{left}")


def collected(place: Path) -> Iterator[Finished]:
    """The finished runs below a folder, without first stages; logs and skips what cannot be read."""
    for path in sorted(place.rglob("result.json"), key=lambda path: path.stat().st_mtime):
        folder = path.parent
        if folder.name == "pretrain" and (folder.parent / "config.yaml").exists():
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result, dict):
                raise ValueError(f"{path} holds {json.dumps(result)[:40]}, expected a result by its keys")
            lacking = [key for key in (*TEST, *METHOD, "train_seed") if key not in result]
            if lacking:
                raise ValueError(f"{path} has no {lacking[0]}: another version of fsl wrote it")
            wrong = [key for key, kind in KINDS.items() if not isinstance(result.get(key), kind)]
            if wrong:
                raise ValueError(f"{path} has {wrong[0]} = {json.dumps(result[wrong[0]])[:40]}, which fsl does not write")
            name = "mse" if "mse" in result else "accuracy"
            scores = np.genfromtxt(folder / "episodes.csv", delimiter=",", names=True)[name]
            if scores.size != result["episodes"]:
                raise ValueError(f"{path} is of {result['episodes']} episodes, and episodes.csv beside it holds {scores.size}")
            yield Finished(result, settings(folder, result), np.atleast_1d(scores))
        except (OSError, ValueError, IndexError, YAMLError) as error:
            log.warning(f"Passed over: {error if str(path) in str(error) else f'{folder}: {error}'}.")


def settings(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The settings of a result's training and evaluation; if the training run is missing, its checkpoint takes their place."""
    known = read(folder)
    if result.get("checkpoint") is not None:
        adapts = {key: value for key, value in known.items() if key.startswith("algo.")}
        path = Path(result["checkpoint"])
        known = (read(path.parent) if (path.parent / "config.yaml").exists() else {CHECKPOINT: str(path)}) | adapts
        if path.name == "last.pt":  # counts as another method than best.pt
            known.setdefault(CHECKPOINT, path.name)
    return known | {"device.precision": result.get("precision")}


def read(folder: Path) -> dict[str, Any]:
    """The settings of a run folder by key, without FREE."""
    known = flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    own = {key: value for key, value in known.items() if key in TARGETS or (key not in FREE and "._" not in key)}
    return {key: value for key, value in own.items() if not key.startswith("device.")}


def tested(result: dict[str, Any]) -> dict[str, Any]:
    """The data set's content and those of its options that a test depends on."""
    options = result["dataset_options"]
    left_out = ("crop", "flip", "jitter") if "crop" in options else ("mirrored",)
    return {key: value for key, value in options.items() if key not in left_out} | {"data": result.get("data")}


def compared(runs: list[Finished]) -> list[Row]:
    """The rows of one test, best first; the runs of a row differ only in their seed, and the newest of each seed counts."""
    rows = []
    for same in alike(runs, lambda one: one.method):
        newest = list({one.result["train_seed"]: one for one in same}.values())  # runs are sorted by time
        rows.append(Row(newest, np.mean([one.scores for one in newest], axis=0)))
    return sorted(rows, key=lambda row: float(row.scores.mean()), reverse=runs[0].measure.higher)


def alike(runs: list[Finished], key: Callable[[Finished], str]) -> list[list[Finished]]:
    """Groups runs by `key`, keeping their order."""
    return [list(group) for _, group in groupby(sorted(runs, key=key), key=key)]


def title(table: list[Row], tables: list[list[Row]]) -> str:
    """The title of a table: its test, with the data set options that tell it from other tables."""
    first = table[0].runs[0].result
    tests = [other[0].runs[0].result for other in tables]
    others = [tested(other) for other in tests if other["dataset"] == first["dataset"]]
    options = [f"{key}={value}" for key, value in tested(first).items() if any(other.get(key) != value for other in others)]
    task = f"{first['way']}-way {first['shot']}-shot" if "accuracy" in first else f"{first['shot']}-shot"
    queries = f"{first['queries']} queries{' a class' if 'accuracy' in first else ''}"
    return (
        f"{' '.join([first['dataset'], *options])}, {first['split']}, {task}: {first['episodes']} episodes of seed "
        f"{first['episode_seed']}, {queries}; ± is the 95 % interval over episodes"
    )


def cells(row: Row, table: list[Row]) -> dict[str, str]:
    """The printed cells of a row."""
    result, measure = row.runs[0].result, row.runs[0].measure
    named = [other.runs[0] for other in table if all(other.runs[0].result[key] == result[key] for key in ("algo", "model"))]
    own = row.runs[0].settings
    others = [other.settings for other in named if (CHECKPOINT in other.settings) == (CHECKPOINT in own)]
    differing = [key for key in own if key == CHECKPOINT or any(other.get(key) != own[key] for other in others)]
    if len({own.get(key) for key in FOLLOWS}) == 1:
        differing = [key for key in differing if key != FOLLOWS[0]]
    by = [] if result["trained_by"] in (None, result["algo"]) else [f"trained by {result['trained_by']}"]
    first = "" if row is table[0] else measure.text(*interval(torch.from_numpy(row.scores - table[0].scores)))
    return {
        "algo": result["algo"],
        "model": result["model"],
        "norm": result["norm"] if "accuracy" in result else "-",
        "settings": ", ".join([*by, *(setting(key, own[key]) for key in differing)]),
        "seeds": ", ".join(str(one.result["train_seed"]) for one in row.runs if one.result["train_seed"] is not None),
        "score": measure.text(*interval(torch.from_numpy(row.scores))),
        "over seeds": f"{measure.text(min(row.means))} to {measure.text(max(row.means))}" if len(row.runs) > 1 else "",
        "std over seeds": measure.text(row.spread) if row.spread is not None else "",
        "behind the first": first,
    }


def setting(key: str, value: Any) -> str:
    """Formats a setting; a class by its name, without the module."""
    return f"{key.partition('.')[0]}={str(value).rpartition('.')[2]}" if key in TARGETS else f"{key}={json.dumps(value)}"


def markdown(table: list[Row]) -> list[str]:
    """The lines of a table, padded so that columns align on a terminal."""
    heads = {**dict(zip(COLUMNS, COLUMNS, strict=True)), "score": table[0].runs[0].measure.name}
    rows = [heads, *(cells(row, table) for row in table)]
    kept = [column for column in COLUMNS if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in kept}
    lines = ["| " + " | ".join(row[column].ljust(widths[column]) for column in kept) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (widths[column] + 2) for column in kept) + "|", *lines[1:]]


def write(path: Path, tables: list[list[Row]]) -> None:
    """Writes all rows of all tables as csv."""
    with whole(path, newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*TEST, *METHOD, "settings", "train_seeds", "measure", "mean", "ci95", "seed_means",
                        "std_over_seeds", "behind", "behind_ci95"])  # fmt: skip
        for table in tables:
            for row in table:
                result, shown = row.runs[0].result, cells(row, table)
                behind = interval(torch.from_numpy(row.scores - table[0].scores))
                values = [json.dumps(result[key]) if isinstance(result[key], dict) else result[key] for key in (*TEST, *METHOD)]
                score = interval(torch.from_numpy(row.scores))
                seeds = (", ".join(str(mean) for mean in row.means), row.spread)
                lines.writerow([*values, shown["settings"], shown["seeds"], row.runs[0].measure.name, *score, *seeds, *behind])
