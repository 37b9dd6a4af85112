"""Residual networks: their published sizes, the shapes of what they give, and DropBlock."""

from functools import cache

import pytest
import test_algos
import torch
from conftest import composed
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.func import vmap

from fsl_cli.config import build
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.resnet12 import DropBlock

MODELS = ("resnet10", "resnet12", "resnet18", "wrn28_10")
SHAPE = (3, 84, 84)


@cache
def node(name: str) -> DictConfig:
    return composed(f"model={name}").model


def network(name: str, *words: str, shape: tuple[int, ...] = SHAPE, device: str = "meta") -> Embedding:
    with torch.device(device):  # on "meta" nothing is computed
        return build(OmegaConf.merge(node(name), OmegaConf.from_dotlist([*words])), "model", item_shape=shape)


@pytest.mark.parametrize(
    ("name", "weights"), [("resnet10", 4_905_792), ("resnet12", 12_424_320), ("resnet18", 11_176_512), ("wrn28_10", 36_472_784)]
)
def test_they_have_as_many_weights_as_published(name: str, weights: int):
    assert sum(parameter.numel() for parameter in network(name).parameters()) == weights


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), SHAPE, (3, 90, 61)])
@pytest.mark.parametrize("pooling", ["mean", "flatten"])
@pytest.mark.parametrize("name", MODELS)
def test_the_features_follow_from_the_images(name: str, pooling: str, shape: tuple[int, ...]):
    built = network(name, f"pooling={pooling}", shape=shape)
    found = built(torch.empty(2, *shape, device="meta"))
    assert found.shape == (2, built.out_features)
    assert built.out_features == torch.Size(built.out_shape).numel()
    assert len(built.out_shape) == (3 if pooling == "flatten" else 1)


def test_the_published_widths():
    sizes = {"resnet10": 512, "resnet12": 640, "resnet18": 512, "wrn28_10": 640}
    assert {name: network(name).out_features for name in MODELS} == sizes
    assert network("resnet12", "pooling=flatten").out_features == 16_000
    assert network("resnet12", "filters=[64,128,256,512]").out_features == 512
    assert network("wrn28_10", "depth=16", "width=4").out_features == 256


@pytest.mark.parametrize(
    ("name", "words"), [("resnet10", "filters=[16,16,16,16]"), ("resnet12", "filters=[16,16,16,16]"), ("wrn28_10", "width=1")]
)
def test_the_initial_weights_keep_the_scale_of_the_gradient(name: str, words: str):
    torch.manual_seed(0)
    for layer in network(name, words, device="cpu").modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 500:
            outputs = layer.out_channels * layer.kernel_size[0] ** 2
            assert float(layer.weight.detach().std()) == pytest.approx((2 / outputs) ** 0.5, rel=0.1)


def test_second_order_gradients_under_a_map_equal_a_loop():
    test_algos.test_mapped_loss_and_gradients_equal_a_loop_over_tasks("maml", "resnet12")  # slow there, as all large models are


@pytest.mark.parametrize("algo", ["maml", "protonet", "reptile"])
def test_dropblock_works_in_every_way_of_training(algo: str):
    built = test_algos.make(algo, "resnet12", "model.drop_rate=0.2").train()
    batch, before = test_algos.blobs(3, 3, 2, 4), {name: value.clone() for name, value in built.state_dict().items()}
    outcomes = []
    for seed in (0, 0, 1):
        built.load_state_dict(before)
        built.zero_grad()
        torch.manual_seed(seed)
        outcomes.append((built.backward(batch).loss, test_algos.gradients(built)))
    assert outcomes[0][0].equal(outcomes[1][0]) and not outcomes[0][0].equal(outcomes[2][0])
    assert all(value.isfinite().all() for value in outcomes[0][1].values())
    with torch.no_grad():
        assert built.eval().predictions(batch).equal(built.predictions(batch))


def squares(dropped: Tensor, size: int) -> bool:
    """Whether every pixel that is dropped lies in a whole square of those."""
    inside = torch.zeros_like(dropped)
    for top in range(dropped.shape[-2] - size + 1):
        for left in range(dropped.shape[-1] - size + 1):
            cut = (..., slice(top, top + size), slice(left, left + size))
            inside[cut] |= dropped[cut].flatten(-2).all(-1)[..., None, None]
    return inside.equal(dropped)


@pytest.mark.parametrize(("size", "side"), [(1, 8), (3, 10), (5, 5), (5, 2)])
def test_dropblock_drops_squares_at_its_rate_and_keeps_the_mean(size: int, side: int):
    torch.manual_seed(0)
    found = DropBlock(0.1, size)(torch.ones(200, 10, side, side))
    assert squares(found == 0, min(size, side))
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert float(found.mean()) == pytest.approx(1, abs=1e-4)
    assert len(found.unique()) == 2


def test_dropblock_is_off_in_evaluation_and_at_rate_0():
    maps = torch.randn(4, 3, 6, 6)
    assert DropBlock(0.5, 3).eval()(maps) is maps
    assert DropBlock(0.0, 3).train()(maps) is maps


def test_under_a_map_every_task_drops_others():
    found = vmap(DropBlock(0.3, 2), randomness="different")(torch.ones(2, 4, 3, 6, 6))
    assert not (found[0] == 0).equal(found[1] == 0)


def test_dropblock_of_everything_gives_zeros():
    torch.manual_seed(0)
    found = torch.stack([DropBlock(0.9, 2)(torch.ones(1, 1, 2, 2)) for _ in range(20)])
    assert found.isfinite().all() and (found == 0).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet12", "filters=[64]"], r"^model\.filters = \[64\], but it must be four numbers"),
        (["resnet12", "drop_rate=1.0"], r"^model\.drop_rate = 1\.0, but it must be from 0 to less than 1"),
        (["resnet12", "drop_size=0"], r"^model\.drop_size = 0, but it must be at least 1 pixel"),
        (["resnet18", "blocks=[2,2,0,2]"], r"^model\.blocks = \[2, 2, 0, 2\], but it must be four numbers"),
        (["wrn28_10", "depth=12"], r"^model\.depth = 12, but it must be 6 n \+ 4"),
        (["wrn28_10", "width=0"], r"^model\.width = 0, but it must be at least 1"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        network(*words)


def test_images_that_are_too_small_and_items_that_are_none_are_refused():
    with pytest.raises(ValueError, match="so 8x28 is too small"):
        network("resnet12", shape=(1, 8, 28))
    for name in MODELS:
        with pytest.raises(ValueError, match=r"takes images \[C, H, W\], but the items"):
            network(name, shape=(5,))
