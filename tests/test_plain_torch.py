"""Algorithms against loops over tasks in plain torch."""

from collections.abc import Callable

import pytest
import torch
from support_algos import blobs, gradients, make
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.algos.maml import MAML
from fsl_cli.algos.matchingnet import MatchingNet
from fsl_cli.algos.mtl import MTL
from fsl_cli.algos.sequences import Cell, in_order
from fsl_cli.episodes import Examples


def plain(weights: dict[str, Tensor], items: Tensor, norms: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
    """Embeddings of Conv4 by torch alone."""
    for number in range(4):
        maps = functional.conv2d(items, weights[f"model.blocks.{number}.convolution.weight"], padding=1)
        items = functional.max_pool2d(functional.batch_norm(maps, None, None, *norms(number), training=True).relu(), 2)
    return items.flatten(1)


@pytest.mark.parametrize("first_order", [False, True])
def test_mamlpp_with_everything_different_equals_a_loop_in_plain_torch(first_order: bool):
    words = ["algo.inner_steps=3", "algo.multi_step=0.5", f"algo.first_order={str(first_order).lower()}"]
    algo, batch = make("mamlpp", "conv4", *words).train(), blobs(2, 3, 2, 4)
    assert isinstance(algo, MAML)
    with torch.no_grad():
        for weight in (*algo.rates.values(), *algo.norms_by_step.values()):
            weight.add_(0.1 * torch.randn_like(weight))
    algo.progress = 0.2
    algo.backward(batch)
    start = {name: weight.detach().clone().requires_grad_() for name, weight in algo.named_parameters()}

    def logits(weights: dict[str, Tensor], items: Tensor, step: int) -> Tensor:
        own = "norms_by_step.model_blocks_{}_norm_{}"
        features = plain(weights, items, lambda k: (start[own.format(k, "scale")][step], start[own.format(k, "shift")][step]))
        return functional.linear(features, weights["head.weight"], weights["head.bias"])

    early = (1 - 0.97 * 0.2 / 0.5) / 3
    for number in range(2):
        (items, slots), (queries, truth) = ((part.inputs[number], part.targets[number]) for part in batch)
        weights = dict(start)
        for step, share in enumerate((early, early, 1 - 2 * early)):
            loss = functional.cross_entropy(logits(weights, items, step), slots)
            grads = torch.autograd.grad(loss, [weights[name] for name in algo.adapted], create_graph=not first_order)
            rates = [start[f"rates.{name.replace('.', '_')}"][step] for name in algo.adapted]
            weights |= {n: weights[n] - rate * g for n, rate, g in zip(algo.adapted, rates, grads, strict=True)}
            (share * functional.cross_entropy(logits(weights, queries, step), truth) / 2).backward(retain_graph=True)
    for name, value in gradients(algo).items():
        torch.testing.assert_close(start[name].grad, value, msg=name)


def test_full_context_embeddings_equal_the_lstms_of_torch():
    algo, batch = make("matchingnet", "mlp", "algo.context=true").eval(), blobs(1, 3, 2, 4)
    assert isinstance(algo, MatchingNet)

    def lstm(cell: Cell | None, width: int) -> nn.LSTM:
        """The same cell as torch has it, whose gates stand in another order."""
        assert cell is not None
        made = nn.LSTM(width, cell.gates.out_features // 4).double()
        weight, bias = (
            torch.cat([part[k] for k in (0, 1, 3, 2)]) for part in (cell.gates.weight.chunk(4), cell.gates.bias.chunk(4))
        )
        values = (weight[:, :width], weight[:, width:], bias, torch.zeros_like(bias))
        made.load_state_dict(dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), values, strict=True)))
        return made

    with torch.no_grad():
        items, queries = (algo.embed(part.inputs[0]) for part in batch)
        order = in_order(6, 3, items.device)  # two of each class, one of each first
        items, slots, width = items[order], batch.support.targets[0], algo.model.out_features
        back = lstm(algo.backwards, width)(items.flip(0))[0].flip(0)
        known = items + lstm(algo.forwards, width)(items)[0] + back
        weight, bias = (algo.get_parameter(f"reader.gates.{kind}") for kind in ("weight", "bias"))
        hidden, cell, read = (torch.zeros_like(queries) for _ in range(3))
        for _ in range(5):
            enter, forget, leave, new = (torch.cat([queries, hidden, read], 1) @ weight.T + bias).chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh() + queries
            read = (hidden @ known.T).softmax(1) @ known
        near = functional.normalize(hidden, dim=1) @ functional.normalize(known, dim=1).T
        torch.testing.assert_close(
            algo.adapt(Examples(algo.embed(batch.support.inputs[0]), slots))(queries).softmax(1),
            (10 * near).softmax(1) @ slots[order],
        )


def test_mtl_equals_a_loop_in_plain_torch():
    algo, batch = make("mtl", "conv4").train(), blobs(2, 3, 2, 4)
    assert isinstance(algo, MTL)
    with torch.no_grad():
        for factor in algo.factors.values():
            factor.uniform_(0.5, 1.5)
    algo.backward(batch)
    start = {name: weight.detach().clone().requires_grad_() for name, weight in algo.named_parameters()}
    kernels = {
        f"model.{name}": start[f"model.{name}"].detach() * start[f"factors.{name.replace('.', '_')}"] for name in algo.kernels
    }
    for number in range(2):
        items = torch.cat([part.inputs[number] for part in batch])
        features = plain(kernels, items, lambda k: (start[f"model.blocks.{k}.norm.scale"], start[f"model.blocks.{k}.norm.shift"]))
        support, queries = features[:6], features[6:]
        weight, bias = start["head.weight"], start["head.bias"]
        for _ in range(algo.inner_steps):  # the gradient of the cross entropy by hand; as published, none goes through it
            error = ((support @ weight.T + bias).softmax(1) - batch.support.targets[number]).detach() / len(support)
            weight, bias = weight - algo.inner_lr * error.T @ support.detach(), bias - algo.inner_lr * error.sum(0)
        loss = functional.cross_entropy(functional.linear(queries, weight, bias), batch.query.targets[number]) / 2
        loss.backward(retain_graph=True)
    for name, value in gradients(algo).items():
        torch.testing.assert_close(start[name].grad, value, msg=name)
