from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fsl_cli.models.conv4 import Block
from fsl_cli.models.norm import Norm, statistics


def test_batch_statistics_equal_torch_batch_norm():
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    ours, theirs = Norm(3).double(), nn.BatchNorm2d(3).double()
    torch.testing.assert_close(ours(inputs), theirs(inputs))


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (8, 3)])
def test_running_statistics_equal_torch_batch_norm(shape: tuple[int, ...]):
    ours = Norm(3).double()
    theirs = (nn.BatchNorm2d(3) if len(shape) == 4 else nn.BatchNorm1d(3)).double()
    inputs = torch.zeros(shape)
    for _ in range(3):
        inputs = 2 + 3 * torch.randn(shape, dtype=torch.float64)
        with statistics(ours, track=True):
            torch.testing.assert_close(ours(inputs), theirs(inputs))
        ours.commit()
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.running = True
    torch.testing.assert_close(ours.eval()(inputs), theirs.eval()(inputs))


def test_groups_are_normalised_each_by_itself():
    norm, inputs = Norm(3).double(), torch.randn(4, 6, 3, 2, 2, dtype=torch.float64)
    with statistics(norm, groups=4):
        together = norm(inputs.flatten(0, 1)).unflatten(0, (4, 6))
    torch.testing.assert_close(together, torch.stack([norm(part) for part in inputs]))


def test_running_statistics_average_all_groups_of_a_step_however_it_is_cut():
    inputs = torch.randn(4, 6, 3, 2, 2, dtype=torch.float64)
    norm = Norm(3, momentum=1.0).double()
    with statistics(norm, groups=3, track=True):
        norm(inputs[:3].flatten(0, 1))
    with statistics(norm, track=True):
        norm(inputs[3])
    norm.commit()
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 1, 3, 4)))
    torch.testing.assert_close(norm.running_var, inputs.transpose(1, 2).flatten(2).var(-1).mean(0))


def test_statistics_of_the_first_rows_leave_a_row_independent_of_later_ones():
    norm, inputs = Norm(3).double(), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    with statistics(norm, rows=4):
        whole, part = norm(inputs), norm(inputs[:5])
    torch.testing.assert_close(whole[:5], part)


def test_second_order_gradient_under_vmap_equals_a_loop():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), Norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double()
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    inputs = torch.randn(3, 5, 1, 4, 4, dtype=torch.float64)

    def inner(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(network, weights, x).square().mean()

    def outer(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        grads = grad(inner)(weights, x)
        return inner({name: weight - 0.5 * grads[name] for name, weight in weights.items()}, x)

    mapped = vmap(grad(outer), in_dims=(None, 0))(weights, inputs)
    looped = [grad(outer)(weights, x) for x in inputs]
    for name in weights:
        torch.testing.assert_close(mapped[name], torch.stack([one[name] for one in looped]), rtol=1e-9, atol=1e-12)


def pooled_block() -> Block:
    """A pooled block in double precision, with scales of both signs."""
    torch.manual_seed(0)
    block = Block(3, 6, "pool").double()
    with torch.no_grad():
        block.norm.scale.copy_(torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, -1.0]))
        block.norm.shift.normal_()
    return block


def test_pooling_before_normalising_equals_pooling_after_it_to_the_second_derivative():
    block, inputs = pooled_block(), torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    leaves = [inputs, *block.parameters()]

    def plain(inputs: torch.Tensor) -> torch.Tensor:
        maps = functional.batch_norm(block.convolution(inputs), None, None, block.norm.scale, block.norm.shift, training=True)
        return functional.max_pool2d(maps.relu(), 2)

    def derivatives(network: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        outputs = network(inputs)
        first = torch.autograd.grad(outputs.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([slope.square().sum() for slope in first]).sum(), leaves)
        return [outputs, *first, *second]

    torch.testing.assert_close(derivatives(block), derivatives(plain))


def test_a_pooled_block_keeps_the_running_statistics_of_its_convolution():
    block, inputs = pooled_block(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    block.norm.momentum = 1.0
    with statistics(block, groups=2, track=True):
        block(inputs)
    block.norm.commit()
    maps = block.convolution(inputs).unflatten(0, (2, -1))
    torch.testing.assert_close(block.norm.running_mean, maps.mean((0, 1, 3, 4)))
    torch.testing.assert_close(block.norm.running_var, maps.transpose(1, 2).flatten(2).var(-1).mean(0))
    block.norm.running = True
    expected = functional.max_pool2d(block.norm(block.convolution(inputs)).relu(), 2)
    torch.testing.assert_close(block(inputs), expected)


@pytest.mark.parametrize("pooled", [False, True])
def test_bfloat16_is_read_as_it_is_under_float32_statistics(pooled: bool):
    norm, inputs = Norm(3), 20 + torch.randn(16, 3, 8, 8)
    rounded = inputs.bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with (
        statistics(norm, groups=2, track=True),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        found = norm.pooled(rounded, torch.ones(3)) if pooled else norm(rounded)
    exact = rounded.detach().float().unflatten(0, (2, 8))
    mean, _ = norm.gathered[0]
    assert (found.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(mean, exact.mean((1, 3, 4)), rtol=1e-5, atol=1e-5)
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() > 100]
    found.square().sum().backward()
    assert rounded.grad is not None
    assert rounded.grad.isfinite().all()
