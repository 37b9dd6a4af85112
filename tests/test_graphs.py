"""A step replayed from a CUDA graph is the step: on a CPU with a stand-in for graphs, on a GPU with its own."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import fsl
from support_algos import ALGOS, gradients, make, training_batch
from support_runs import TRAINING

from fsl_cli import speed
from fsl_cli.algos.base import Algorithm, Batch, Outcome
from fsl_cli.speed import UNMEASURED
from fsl_cli.structures import map_tensors


class Graph:
    """In place of a CUDA graph: what is captured is not computed, and a replay computes it into the captured tensors."""

    def __init__(self) -> None:
        self.replay: Callable[[], None] = lambda: None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU stand in for a CUDA device with graphs."""
    stream = MagicMock()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(speed, "refuse_capture", lambda _: None)
    backward = Algorithm.backward
    recording: list[Graph] = []

    @contextlib.contextmanager
    def graph(made: Graph, **_: Any) -> Iterator[None]:
        recording.append(made)
        yield
        recording.clear()

    def recorded(algo: Algorithm, batch: Batch) -> Outcome:
        if not recording:
            return backward(algo, batch)
        assert all(parameter.grad is None for parameter in algo.parameters()), "what is captured would add to old gradients"
        before = {name: buffer.clone() for name, buffer in algo.named_buffers()}
        outcome = backward(algo, batch)
        captured = [parameter.grad for parameter in algo.parameters()]
        speed.reset(algo, before)
        for parameter, gradient in zip(algo.parameters(), captured, strict=True):
            parameter.grad = gradient

        def replay() -> None:
            kept = [parameter.grad for parameter in algo.parameters()]
            algo.zero_grad()
            again = backward(algo, batch)
            for parameter, gradient, old in zip(algo.parameters(), captured, kept, strict=True):
                if gradient is not None and parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = old
            for old, new in zip(outcome, again, strict=True):
                old.detach().copy_(new)

        for value in (*outcome, *(gradient for gradient in captured if gradient is not None)):
            value.detach().fill_(torch.nan)  # a capture computes nothing
        recording[0].replay = replay
        return outcome

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(Algorithm, "backward", recorded)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("name", ["maml", "protonet", "finetune"])
def test_a_replayed_step_is_a_step_on_the_batch_that_is_given(name: str):
    torch.manual_seed(1)
    plain = make(name, "conv4").train()
    fast = copy.deepcopy(plain)
    step = speed.step_function(fast, UNMEASURED, captured=True)
    outcomes = []
    for number in range(speed.WARM_UP + 3):
        torch.manual_seed(number)
        batch = training_batch(plain, 4)
        plain.zero_grad()
        fast.zero_grad()
        expected = plain.backward(batch)
        outcomes.append((expected, step(batch)))
        for key, value in gradients(plain).items():
            torch.testing.assert_close(gradients(fast)[key], value, rtol=1e-8, atol=1e-11)
        for key, value in plain.named_buffers():
            torch.testing.assert_close(fast.get_buffer(key), value)
        with torch.no_grad():
            for built in (plain, fast):
                for parameter in built.parameters():
                    parameter.mul_(0.999)
    for expected, found in outcomes:  # none was overwritten by a later replay
        torch.testing.assert_close(found.loss.detach(), expected.loss.detach())
    with pytest.raises(ValueError, match="the batches differ in shape"):
        step(map_tensors(training_batch(plain, 4), lambda tensor: tensor[:2]))


def test_recomputed_steps_are_not_captured():
    algo = make("maml", "mlp", "algo.recompute=true")
    with pytest.raises(ValueError, match=r"algo\.recompute = true computes parts"):
        speed.Stepper(algo, UNMEASURED, captured=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
@pytest.mark.parametrize("algo", [algo for algo in ALGOS if not speed.changes(make(algo, "mlp"))])
def test_a_captured_step_gives_the_same_gradients(algo: str):
    place = torch.device("cuda")
    torch.manual_seed(1)
    plain = make(algo, "conv4").to(place).train()
    fast = copy.deepcopy(plain)
    stepper = speed.Stepper(fast, UNMEASURED, captured=True)
    for _ in range(speed.WARM_UP + 3):
        batch = training_batch(plain, 4)
        batch = map_tensors(batch, lambda tensor: tensor.to(place))
        plain.zero_grad()
        fast.zero_grad()
        expected, found = plain.backward(batch), stepper(batch)
        torch.testing.assert_close(found.loss, expected.loss)
        for name, value in gradients(plain).items():
            torch.testing.assert_close(gradients(fast)[name], value, rtol=1e-7, atol=1e-9)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), value, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("workplace")
def test_a_graph_on_a_cpu_is_refused_before_it_is_measured(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    assert fsl(monkeypatch, "train", *TRAINING, "steps=200", "device.graph=true", "out=run") == 2
    assert "device.graph = true, but only CUDA devices have graphs" in capfd.readouterr().err
