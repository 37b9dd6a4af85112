"""Heads on embeddings against textbook solutions of the same problems."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support_algos import blobs, make
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from fsl_cli.algos.heads import balance, logistic, nearest, ridge, scaling, svm
from fsl_cli.episodes import Examples


def problem(shot: int = 3, way: int = 4, features: int = 10) -> tuple[Tensor, Tensor]:
    """Support embeddings `[n, features]` of overlapping classes, and their one-hot targets."""
    torch.manual_seed(3)
    targets = torch.eye(way, dtype=torch.float64).repeat_interleave(shot, 0)
    return targets @ torch.randn(way, features, dtype=torch.float64) + torch.randn(way * shot, features).double(), targets


WEIGHTS = torch.linspace(0.5, 2, 12, dtype=torch.float64).unsqueeze(1)  # of the items of `problem()`


@pytest.mark.parametrize("features", [5, 40])
def test_ridge_equals_weighted_least_squares_with_the_ridge_as_rows(features: int):
    inputs, targets = problem(features=features)
    rows = torch.cat([WEIGHTS.sqrt() * inputs, 2.0**0.5 * torch.eye(features, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([WEIGHTS.sqrt() * targets, targets.new_zeros(features, 4)])).solution
    torch.testing.assert_close(inputs.T @ ridge(inputs @ inputs.T, targets, WEIGHTS, 2.0), expected)


def minimum(inputs: Tensor, targets: Tensor, weights: Tensor, strength: float, offset: Tensor) -> tuple[Tensor, Callable]:
    """The W of a weighted logistic regression that L-BFGS finds, and what it minimises."""
    solution = torch.zeros(inputs.shape[1], targets.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective(w: Tensor) -> Tensor:
        entropies = functional.cross_entropy(inputs @ w + offset, targets, reduction="none")
        return (weights.flatten() * entropies).sum() + strength * w.square().sum() / 2

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(solution)
        loss.backward()
        return loss

    optimizer.step(closure)
    return solution.detach(), objective


@pytest.mark.parametrize("moved", [False, True])
def test_logistic_regression_equals_the_minimum_that_lbfgs_finds(moved: bool):
    inputs, targets = problem()
    offset = torch.randn(12, 4, dtype=torch.float64) if moved else targets.new_zeros(12, 4)
    expected, objective = minimum(inputs, targets, WEIGHTS, 1.0, offset)
    found = inputs.T @ logistic(inputs @ inputs.T, targets, WEIGHTS, 1.0, offset)
    assert float(objective(found) - objective(expected)) < 1e-3
    torch.testing.assert_close((inputs @ found).softmax(1), (inputs @ expected).softmax(1), atol=0.02, rtol=0)


def gap(inputs: Tensor, targets: Tensor, coefficients: Tensor, strength: Tensor) -> tuple[float, float]:
    """Primal objective of the support vector machine, and its dual one: equal at the solution, and nowhere else."""
    scores = inputs @ inputs.T @ coefficients
    weight = (coefficients * scores).sum() / 2
    slack = (scores + 1 - targets).amax(1) - (scores * targets).sum(1)
    return float(weight + (strength.flatten() * slack).sum()), float((coefficients * targets).sum() - weight)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_the_support_vector_machine_closes_its_duality_gap(strength: float):
    inputs, targets = problem()
    inputs = functional.normalize(inputs, dim=1)
    coefficients = svm(inputs @ inputs.T, targets, WEIGHTS, strength)
    assert torch.allclose(coefficients.sum(1), coefficients.new_zeros(12), atol=1e-9)
    assert bool((coefficients <= strength * WEIGHTS * targets + 1e-12).all())
    primal, dual = gap(inputs, targets, coefficients, strength * WEIGHTS)
    assert 0 <= primal - dual < 0.01 * primal


@pytest.mark.parametrize("head", [ridge, logistic, svm])
def test_heads_are_mapped_and_differentiated(head):
    inputs, targets = problem()
    both = torch.stack([inputs, 2 * inputs.flip(1)])
    mapped = vmap(lambda x: head(x @ x.T, targets, WEIGHTS, 0.5))(both)
    torch.testing.assert_close(mapped[1], head(both[1] @ both[1].T, targets, WEIGHTS, 0.5))
    probe = inputs.clone().requires_grad_()
    head(probe @ probe.T, targets, WEIGHTS, 0.5)[0, 0].backward()
    assert probe.grad is not None
    moved = inputs.clone()
    moved[2, 3] += 1e-6
    change = head(moved @ moved.T, targets, WEIGHTS, 0.5)[0, 0] - head(inputs @ inputs.T, targets, WEIGHTS, 0.5)[0, 0]
    torch.testing.assert_close(change / 1e-6, probe.grad[2, 3], rtol=1e-3, atol=1e-6)


def test_balanced_classes_count_the_same():
    targets = torch.eye(3)[[0, 1, 1, 1, 2, 2]]
    weights = balance(targets)
    torch.testing.assert_close(targets.T @ weights, torch.full((3, 1), 2.0))
    assert balance(torch.eye(4)[[0, 1, 1, 1, 2, 2]]).equal(weights), "of four classes, one has no item"
    assert balance(torch.eye(5).repeat_interleave(3, 0)).equal(torch.ones(15, 1)), "equal classes are left as they are, exactly"


@pytest.mark.parametrize("algo", ["r2d2 algo.strength=1", "logistic", "metaoptnet"])
def test_a_class_with_many_items_does_not_drown_the_others(algo: str):
    """Of two classes that mirror each other, one has ten copies of its item: the border must stay in the middle."""
    built = make(*algo.split()[:1], "mlp", *algo.split()[1:]).eval()
    inputs = torch.tensor([[1.0, 0.5]] + 10 * [[-1.0, 0.5]])
    answers = built.adapt(Examples(inputs, torch.eye(2)[[0] + 10 * [1]]))(torch.tensor([[0.0, 2.0], [0.3, 0.0]]))
    torch.testing.assert_close(answers[0, 0], answers[0, 1], atol=0.02, rtol=0)
    assert answers[1, 0] > answers[1, 1]


def test_nearest_takes_the_closest_item_of_each_class():
    support = Examples(torch.tensor([[0.0], [5.0], [2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(nearest(torch.tensor([[4.0]]), support), torch.tensor([[-1.0, -4.0]]))


@pytest.mark.parametrize("algo", ["cnp", "mann", "metanet", "snail"])
def test_standardised_embeddings_may_be_moved_and_scaled_by_anything(algo: str):
    built, batch = make(algo, "mlp").eval(), blobs(1, 3, 2, 4)
    items, queries = (part.inputs[0].flatten(1)[:, : built.model.out_features] for part in batch)
    answers = []
    for scale, shift in ((1, 0), (7, 3)):
        support = Examples(scale * items + shift, batch.support.targets[0])
        answers.append(built.adapt(support)(scale * queries + shift))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)
    scaled = scaling(items, True)(items)
    assert scaled.mean(0).abs().max() < 1e-6 and scaled.square().mean() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("head", [ridge, logistic])
def test_many_items_are_solved_in_batches_on_two_threads(head: Callable):
    """LU factorisations in batches of such a size fail on some CPUs if torch has more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inputs = functional.normalize(torch.randn(4, 200, 30), dim=-1)
        targets, weights = torch.eye(20).repeat_interleave(10, 0), torch.ones(200, 1)
        solve = partial(head, targets=targets, weights=weights, strength=0.1)
        together = vmap(solve)(inputs @ inputs.mT)
    finally:
        torch.set_num_threads(before)
    for number in range(4):
        torch.testing.assert_close(together[number], solve(inputs[number] @ inputs[number].T), atol=1e-3, rtol=1e-3)
