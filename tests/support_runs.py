"""Small runs of the commands, and what they wrote."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fsl

SMALL = [
    "dataset.train_classes=32", "dataset.val_classes=6", "dataset.test_classes=6", "model.filters=8", "task.tasks=2",
    "task.queries=3", "episodes=8", "val_episodes=4", "eval_every=4", "checkpoint_every=3", "log_every=2", "device=cpu",
]  # fmt: skip
ALGOS = {
    "protonet": ["task.train_way=6", "steps=8"],
    "maml": ["steps=8"],
    "reptile": [
        "steps=8",
        "task.train_shot=3",
        "task.train_queries=0",
        "algo.inner_batch=5",
        "algo.inner_steps=2",
        "algo.eval_inner_steps=2",
    ],
    "finetune": ["steps=8", "algo.head_epochs=3", "algo.batch=16"],
}
SMALL_TEXT = [
    "model.features=32", "model.buckets=500", "task.way=2", "task.train_way=2", "task.queries=3", "task.tasks=2", "episodes=8",
    "val_episodes=4", "device=cpu",
]  # fmt: skip
TRAINING = [
    "dataset.train_classes=32", "dataset.val_classes=6", "dataset.test_classes=6", "model.filters=8", "task.tasks=2",
    "task.train_way=6", "task.queries=3", "episodes=10", "val_episodes=10", "device=cpu",
]  # fmt: skip


def trained(monkeypatch: pytest.MonkeyPatch, algo: str, out: str, *words: str) -> int:
    return fsl(monkeypatch, "train", f"algo={algo}", f"out={out}", *SMALL, *ALGOS[algo], *words)


def result(out: str) -> dict[str, Any]:
    return json.loads((Path(out) / "result.json").read_text())


def metrics(out: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tasks_per_s"} for line in lines]


def rows(out: str) -> list[dict[str, str]]:
    with (Path(out) / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(out: str) -> dict[str, Any]:
    return json.loads((Path(out) / "predictions.json").read_text(encoding="utf-8"))


def table(path: str, classes: int = 12, each: int = 8, header: str = "text,label\n") -> Path:
    """A csv file of classes that differ in their words."""
    rng = np.random.default_rng(0)
    lines = [
        f"w{c}x{rng.integers(3)} and w{c}x{rng.integers(3)} word{rng.integers(9)},class {c:02d}"
        for _ in range(each)
        for c in range(classes)
    ]
    Path(path).write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)
