"""Threads that share out the tasks of a meta-batch change how fast a step is, and nothing else."""

import copy
import logging
from typing import Any

import pytest
import torch
from conftest import composed, fsl
from support_algos import ALGOS, SHAPE, blobs, gradients, make, training_batch
from support_runs import TRAINING
from torch.nn import functional

from fsl_cli import device, speed, tuning
from fsl_cli.algos.maml import MAML
from fsl_cli.models.mlp import MLP
from fsl_cli.speed import UNMEASURED
from fsl_cli.structures import map_tensors


@pytest.mark.parametrize("algo", [algo for algo in ALGOS if tuning.divisible(make(algo, "mlp"), blobs(1, 3, 2, 4))])
def test_workers_change_neither_gradients_nor_buffers(algo: str):
    torch.manual_seed(1)
    alone = make(algo, "conv4").train()
    shared, again = copy.deepcopy(alone), copy.deepcopy(alone)
    batch = training_batch(alone, 5)  # parts of three and two tasks
    expected = alone.backward(batch)
    stepper = speed.Stepper(shared, UNMEASURED | {"workers": 2, "task_chunk": 2})
    found = stepper(batch)
    first = {name: value.clone() for name, value in gradients(shared).items()}
    assert first.keys() == gradients(alone).keys()
    torch.testing.assert_close(found, expected)
    speed.Stepper(again, UNMEASURED | {"workers": 2, "task_chunk": 2})(batch)
    assert all(gradients(again)[name].equal(value) for name, value in first.items())  # bit by bit
    for name, value in gradients(alone).items():
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-11)
    for name, value in alone.named_buffers():
        torch.testing.assert_close(shared.get_buffer(name), value, rtol=1e-8, atol=1e-11)
    with torch.no_grad():
        for built in (alone, shared):
            built.zero_grad()
            for parameter in built.parameters():
                parameter.add_(0.01)  # as an optimizer does: the copies follow
    alone.backward(batch)
    stepper(batch)
    for name, value in gradients(alone).items():
        torch.testing.assert_close(gradients(shared)[name], value, rtol=1e-8, atol=1e-11)


def test_workers_compute_in_bfloat16_with_the_weights_that_they_are_given():
    torch.manual_seed(1)
    algo = device.settle(make("maml", "conv4").float(), torch.device("cpu"), "bf16").train()
    batch = map_tensors(training_batch(algo, 4), torch.Tensor.float)
    shared = copy.deepcopy(algo)
    algo.task_chunk = 2  # as many as a worker has: rounding this coarse depends on the number that is mapped
    stepper = speed.Stepper(shared, UNMEASURED | {"workers": 2})
    with torch.no_grad():
        for built in (algo, shared):
            for parameter in built.parameters():
                parameter.mul_(1.5)
    expected, found = algo.backward(batch), stepper(batch)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-3)
    for name, value in gradients(algo).items():
        assert (gradients(shared)[name] - value).norm() <= 0.05 * value.norm() + 1e-6, name


class Dropping(MLP):
    """A network with dropout."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.dropout(super().forward(inputs), 0.5, self.training)


def test_workers_do_not_draw_at_random_in_any_order():
    algo = MAML(Dropping(SHAPE, [8]), 3, 0.1, 1, 1, False, "all").double().train()
    batch = blobs(4, 3, 2, 4)
    assert tuning.measure(algo, batch, UNMEASURED | {"workers": "auto"})["workers"] == 1
    with pytest.raises(ValueError, match=r"device\.workers = 2, but this network drops values at random in training"):
        speed.Stepper(algo, UNMEASURED | {"workers": 2})(batch)


@pytest.mark.usefixtures("workplace")
def test_a_run_keeps_its_workers_and_cannot_be_compiled_with_them(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    words = [*TRAINING, "algo=maml", "task.tasks=3", "task.train_way=5", "steps=2", "device.workers=2", "device.threads=2"]
    assert fsl(monkeypatch, "train", *words, "out=run") == 0
    assert torch.load("run/last.pt", weights_only=True)["fastest"]["workers"] == 2
    assert fsl(monkeypatch, "train", *words, "device.compile=true", "out=compiled") == 2
    assert "device.workers = 2, but a step that is compiled or captured is computed as a whole" in capfd.readouterr().err


def test_workers_are_left_away_where_all_tasks_are_embedded_in_one_pass(caplog: pytest.LogCaptureFixture):
    cfg = composed("algo=protonet", "device=cpu", "device.workers=2", "device.threads=1", "device.task_chunk=1")
    with caplog.at_level(logging.INFO):
        assert tuning.fastest(cfg, make("protonet", "mlp"), blobs(2, 3, 2, 4), None)["workers"] == 1
    assert "device.workers = 2 is 1 here" in caplog.text
