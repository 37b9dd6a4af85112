"""In lower precision the same is learned, and what overflows is left out."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, fsl
from support_algos import blobs
from support_runs import TRAINING

from fsl_cli import device, speed, state
from fsl_cli.algos.base import Batch, Outcome
from fsl_cli.algos.protonet import ProtoNet
from fsl_cli.config import build
from fsl_cli.models.conv4 import Conv4
from fsl_cli.structures import map_tensors


def test_bfloat16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has no bfloat16"):
        device.arithmetic(torch.device("cuda"), "bf16")


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_bfloat16_learns_what_float32_learns(monkeypatch: pytest.MonkeyPatch):
    results = {}
    for precision in ("fp32", "bf16"):
        words = [*TRAINING, "algo=protonet", "steps=60", "val_episodes=60", "eval_every=60", "device.task_chunk=2"]
        assert fsl(monkeypatch, "train", *words, f"device.precision={precision}", f"out={precision}") == 0
        lines = Path(precision, "metrics.jsonl").read_text().splitlines()
        results[precision] = json.loads(lines[-1])["accuracy"]
    assert results["fp32"] > 0.3
    assert results["bf16"] == pytest.approx(results["fp32"], abs=0.06)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("broken", "code"), [({3}, 0), ({3, 4, 6}, 0), ({3, 4, 5}, 1)])
def test_bfloat16_leaves_out_a_step_whose_gradient_is_not_finite(
    broken: set[int], code: int, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    call, count = speed.Stepper.__call__, iter(range(1, 100))

    def overflowing(self: speed.Stepper, batch: Batch) -> Outcome:
        result = call(self, batch)
        if next(count) in broken:
            for parameter in self.algo.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf)
        return result

    monkeypatch.setattr(speed.Stepper, "__call__", overflowing)
    monkeypatch.setattr(state, "LEFT_OUT", 3)
    words = [*TRAINING, "algo=protonet", "steps=6", "log_every=2", "device.precision=bf16", "out=run"]
    assert fsl(monkeypatch, "train", *words) == code
    said = capfd.readouterr()
    assert "Step 3 is left out" in said.out
    if code == 0:
        kept = torch.load("run/last.pt", weights_only=True)
        assert kept["step"] == 6
        assert all(value.isfinite().all() for value in kept["algo"].values())
    else:
        assert "None of the last 3 steps up to 5 had a finite gradient: the run has diverged." in said.err


def test_bfloat16_is_used_in_the_embedding_and_nowhere_else():
    algo = device.settle(ProtoNet(Conv4((1, 16, 16), 4)), torch.device("cpu"), "bf16")
    inputs = torch.rand(6, 1, 16, 16)
    seen = []
    network = algo.get_submodule("model")
    algo.get_submodule("model.blocks.0").register_forward_hook(lambda *found: seen.append(found[2].dtype))
    features = algo.train().embed(inputs)
    assert (seen, features.dtype) == ([torch.bfloat16], torch.float32)
    del network.forward
    exact = algo.embed(inputs)
    assert 0 < float((features - exact).detach().abs().max()) < 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_precisions_agree_within_noise_on_cuda(precision: str):
    cfg = composed("algo=maml", "task.way=3", "model.filters=8")
    torch.manual_seed(0)
    built = build(cfg.algo, "algo", model=build(cfg.model, "model", item_shape=(1, 16, 16)), classes=5)
    batch = map_tensors(blobs(4, 3, 2, 4), lambda tensor: tensor.float().cuda())
    exact = device.settle(copy.deepcopy(built), torch.device("cuda"), "fp32").train().loss(batch).loss
    found = device.settle(copy.deepcopy(built), torch.device("cuda"), precision).train().loss(batch).loss
    assert torch.isfinite(found)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05)
