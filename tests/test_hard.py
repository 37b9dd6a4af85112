"""Hard tasks of MTL: what they are drawn from, that they are drawn so, and that a run can be resumed."""

import signal

import numpy as np
import pytest
import torch
from conftest import fsl, stopped
from support_algos import make
from support_runs import SMALL, metrics

from fsl_cli import checkpoint
from fsl_cli.datasets.packed import Classes
from fsl_cli.episodes import TRAIN, EpisodeSampler, Hard
from fsl_cli.hard import KEPT, failed, hard
from fsl_cli.metrics import accuracy_by_class

pytestmark = pytest.mark.usefixtures("workplace")

STEPS = ["algo.inner_steps=2", "algo.eval_inner_steps=2", "pretrain=before/best.pt", "task.way=2", "steps=8"]


def trained(monkeypatch: pytest.MonkeyPatch, out: str, *words: str) -> int:
    assert fsl(monkeypatch, "train", "algo=finetune", "out=before", *SMALL, "algo.batch=16", "algo.head_epochs=1", "steps=1") == 0
    return fsl(monkeypatch, "train", "algo=mtl", f"out={out}", *SMALL, *STEPS, *words)


def sampler(tasks: int = 4, way: int = 3) -> EpisodeSampler:
    names = [str(number) for number in range(20)]
    classes = Classes(names, np.arange(20) * 10, np.full(20, 10), np.zeros(20, dtype=np.int64))
    return EpisodeSampler(classes, way, 1, 2, tasks, seed=0, stream=TRAIN)


def test_the_first_tasks_of_a_meta_batch_are_kept_to_the_hard_classes():
    ours, again = sampler(), Hard(2, np.array([3, 5, 7, 11]))
    free, kept = ours.classes_of(6), ours.classes_of(6, again)
    assert set(kept[:2].ravel()) <= {3, 5, 7, 11} and all(len(set(row)) == 3 for row in kept)
    assert (kept[2:] == free[2:]).all()
    items = ours.indices(6, again).items
    assert (items[..., 0] // 10 == kept).all() and (items // 10 == kept[..., None]).all()
    assert (ours.classes_of(6, Hard(2, np.array([3, 5]))) == free).all()  # too few for a task


def test_the_worst_class_of_a_task_is_a_failure_and_a_perfect_task_has_none():
    logits = torch.eye(3).repeat_interleave(2, 0).repeat(4, 1, 1)  # [tasks, way * 2, way]: all right
    targets = logits.clone()
    logits[0, 2], logits[2, 4:] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    found = accuracy_by_class(logits, targets)
    assert found.tolist() == [[1, 0.5, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]]
    algo, ours = make("mtl", "conv4", "algo.hard_tasks=1"), sampler()
    algo.by_class = [found[:3], found[3:]]
    new = failed(algo, ours, [], 7)
    classes = ours.classes_of(7)
    assert new == [classes[0, 1], classes[2, 2]]
    assert algo.by_class == []


def test_failures_come_back_and_the_oldest_are_forgotten():
    algo = make("mtl", "conv4", "algo.hard_tasks=2")
    failures = [number % 17 for number in range(KEPT)]
    found = hard(algo, failures)
    assert found is not None and found.tasks == 2
    assert set(found.classes) == set(range(17))
    algo.by_class = [torch.zeros(4, 3)]
    after = failed(algo, sampler(), failures, 300)
    assert len(after) == KEPT and after[:-4] == failures[4:]
    assert hard(make("mtl", "conv4", "algo.hard_tasks=0"), failures) is None


def test_a_run_with_hard_tasks_is_resumed_bit_by_bit(monkeypatch: pytest.MonkeyPatch):
    assert trained(monkeypatch, "whole") == 0
    assert len(set(checkpoint.load("whole/last.pt", "test")["progress"]["failures"])) >= 2
    with stopped(monkeypatch, 5):
        assert fsl(monkeypatch, "train", "algo=mtl", "out=halves", *SMALL, *STEPS) == 128 + signal.SIGTERM
    assert fsl(monkeypatch, "train", "resume=halves/last.pt") == 0
    assert metrics("halves") == metrics("whole")
    assert fsl(monkeypatch, "train", "algo=mtl", "out=none", *SMALL, *STEPS, "algo.hard_tasks=0") == 0
    assert metrics("none") != metrics("whole")


def test_more_hard_tasks_than_tasks_are_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    assert trained(monkeypatch, "run", "algo.hard_tasks=9") == 2
    assert "algo.hard_tasks = 9, but a meta-batch has task.tasks = 2" in capfd.readouterr().err


def test_a_step_that_was_left_out_has_no_failures():
    algo = make("mtl", "conv4")
    algo.forget()
    assert failed(algo, sampler(), [3], 4) == [3]
