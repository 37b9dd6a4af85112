"""Each method against something independent of it: finite differences, hand-computed cases, identities of the papers."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support_algos import blobs, gradients, make
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fsl_cli.algos import finetune
from fsl_cli.algos.base import Algorithm
from fsl_cli.algos.finetune import Finetune
from fsl_cli.algos.heads import centroids, cosine
from fsl_cli.algos.maml import MAML
from fsl_cli.algos.reptile import Reptile, minibatches
from fsl_cli.episodes import Examples


def numerical_gradient(loss: Callable[[], Tensor], weight: Tensor, place: tuple[int, ...], step: float = 1e-5) -> float:
    with torch.no_grad():
        weight[place] += step
        above = loss()
        weight[place] -= 2 * step
        below = loss()
        weight[place] += step
    return float(above - below) / (2 * step)


@pytest.mark.parametrize("model", ["conv4", "mlp"])
@pytest.mark.parametrize("algo", ["maml algo.inner_steps=2", "anil algo.inner_steps=2", "protonet", "cavia", "metanet"])
def test_the_meta_gradient_equals_finite_differences(algo: str, model: str):
    name, *options = algo.split()
    # A weight whose step crosses the kink of a ReLU would spoil a finite difference: the seeds are such that none does.
    built = make(name, model, *options).train()
    batch = blobs(2, 3, 2, 3)
    built.backward(batch)
    grads = gradients(built)
    generator = torch.Generator().manual_seed(1)
    for name, weight in built.named_parameters():
        place = tuple(int(torch.randint(size, (), generator=generator)) for size in weight.shape)
        expected = numerical_gradient(lambda: built.loss(batch).loss.detach(), weight.data, place)
        assert abs(grads[name][place].item() - expected) <= 1e-4 * max(1.0, abs(expected)), name


def test_first_order_maml_takes_the_query_gradient_at_the_adapted_weights():
    built = make("fomaml", "mlp", "algo.inner_steps=3").train()
    assert isinstance(built, MAML)
    batch = blobs(1, 3, 2, 4)
    built.backward(batch)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in built.named_parameters()}
    start = dict(weights)
    for _ in range(3):
        logits = functional_call(built, weights, batch.support.inputs[0])
        loss = functional.cross_entropy(logits, batch.support.targets[0])
        grads = torch.autograd.grad(loss, [weights[name] for name in built.adapted])
        moved = zip(built.adapted, grads, strict=True)
        weights |= {name: (weights[name] - built.inner_lr * grad).detach().requires_grad_() for name, grad in moved}
    loss = functional.cross_entropy(functional_call(built, weights, batch.query.inputs[0]), batch.query.targets[0])
    expected = torch.autograd.grad(loss, list(weights.values()))
    assert set(start) == set(gradients(built))
    for name, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(gradients(built)[name], value, rtol=1e-7, atol=1e-10)


def test_maml_without_inner_steps_is_the_plain_network():
    built = make("maml", "conv4", "algo.eval_inner_steps=0").eval()
    assert isinstance(built, MAML)
    batch = blobs(2, 3, 2, 4)
    with torch.no_grad():
        plain = torch.stack([built(inputs) for inputs in batch.query.inputs])
        torch.testing.assert_close(built.predictions(batch), plain)


def test_maml_leaves_the_normalisation_weights_to_the_outer_loop():
    built = make("maml", "conv4")
    assert isinstance(built, MAML)
    assert not [name for name in built.adapted if name.endswith((".scale", ".shift"))]
    assert len(built.adapted) == 6  # four convolutions, weight and bias of the head


def test_anil_equals_maml_on_the_head_over_fixed_features():
    anil = make("anil", "mlp", "algo.eval_inner_steps=4").eval()
    assert isinstance(anil, MAML)
    batch = blobs(1, 3, 2, 4)
    with torch.no_grad():
        features = anil.model(batch.support.inputs[0])
        queries = anil.model(batch.query.inputs[0])
    weight, bias = (anil.get_parameter(name).detach().clone() for name in ("head.weight", "head.bias"))
    for _ in range(4):
        error = (features @ weight.T + bias).softmax(1) - batch.support.targets[0]  # gradient of cross entropy by hand
        weight -= anil.inner_lr * error.T @ features / len(features)
        bias -= anil.inner_lr * error.mean(0)
    with torch.no_grad():
        torch.testing.assert_close(anil.predictions(batch)[0], queries @ weight.T + bias)


def test_scaled_distances_decide_as_sums_of_squares_do():
    torch.manual_seed(0)
    plain, scaled = make("protonet", "conv4").eval(), make("protonet", "conv4", "algo.scale=10.0").eval()
    scaled.load_state_dict(plain.state_dict(), strict=False)
    batch = blobs(2, 3, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(scaled.predictions(batch), plain.predictions(batch) * 10 / plain.model.out_features)
    scaled.train().backward(batch)
    assert "scale" in gradients(scaled)


def test_one_shot_protonet_is_nearest_neighbour_in_the_embedding():
    built = make("protonet", "conv4").eval()
    batch = blobs(6, 3, 1, 5)
    with torch.no_grad():
        for number in range(6):
            support, queries = built.embed(batch.support.inputs[number]), built.embed(batch.query.inputs[number])
            nearest = (queries.unsqueeze(1) - support).norm(dim=-1).argmin(1)
            assert built.predictions(batch)[number].argmax(-1).equal(nearest)


def test_centroids_of_unbalanced_classes():
    inputs = torch.tensor([[0.0, 2.0], [4.0, 0.0], [8.0, 2.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(centroids(Examples(inputs, targets)), torch.tensor([[0.0, 2.0], [6.0, 1.0]]))


def test_cosine_head_ignores_lengths():
    similarity = cosine(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.5, 0.0], [0.0, 9.0]]), 2.0)
    torch.testing.assert_close(similarity, torch.tensor([[2.0, 0.0]]))


def test_centred_cosines_are_measured_from_the_middle_of_the_class_means():
    built = make("centroid", "mlp", "algo.scale=3")
    support = Examples(torch.tensor([[5.0, 2.0], [5.0, 4.0], [9.0, 5.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    logits = built.adapt(support)(torch.tensor([[9.0, 4.0], [7.0, 2.0]]))
    # The middle of (5, 3) and (9, 5) is (7, 4). From there, the second class is at (2, 1), the queries at (2, 0) and (0, -2).
    first = torch.nn.functional.normalize(torch.tensor([-2.0, -2.0]), dim=0) + torch.tensor([-1.0, 0.0])
    expected = 3 * torch.tensor([[first[0] / first.norm(), 2 / 5**0.5], [-first[1] / first.norm(), -1 / 5**0.5]])
    torch.testing.assert_close(logits, expected)
    plain = make("centroid", "mlp", "algo.centre=false", "algo.scale=3").adapt(support)(torch.tensor([[18.0, 10.0]]))
    torch.testing.assert_close(plain[0, 1], torch.tensor(3.0))
    assert plain[0, 0] < 2.9999, "from the origin, the second class lies in the direction of the query"


@pytest.mark.parametrize(
    "algo",
    ["maml", "anil", "boil", "cavia", "metasgd", "mamlpp", "protomaml", "reptile", "finetune", "mtl", "matchingnet", "protonet"],
)
def test_every_class_counts_the_same_however_many_items_it_has(algo: str):
    """Every item of one class twice changes no answer; without statistics of the batch, which copies would change."""
    whole = {"finetune": ["algo.head_batch=100"], "reptile": ["algo.eval_inner_batch=100"]}.get(algo, [])
    built = make(algo, "mlp", "model.norm=false", *whole).eval()
    support, query = (Examples(*(tensor[0] for tensor in part)) for part in blobs(1, 3, 2, 4))
    rows = [0, 1, 0, 1, 2, 3, 4, 5]
    with torch.no_grad():
        once, twice = (built.fit(part) for part in (support, Examples(support.inputs[rows], support.targets[rows])))
        torch.testing.assert_close(twice(query.inputs).softmax(1), once(query.inputs).softmax(1))


def test_refined_class_means_are_logistic_regression_held_to_them():
    """Against plain gradient descent on the same objective, in which a support item is compared to the others of its class."""
    torch.manual_seed(0)
    targets = torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1, 1, 2]]
    inputs = targets @ torch.randn(3, 6, dtype=torch.float64) + 0.7 * torch.randn(6, 6, dtype=torch.float64)
    unit = partial(functional.normalize, dim=-1)
    directions = unit(inputs - torch.stack([inputs[:3].mean(0), inputs[3:5].mean(0), inputs[5]]).mean(0))
    means = unit(torch.stack([directions[:3].mean(0), directions[3:5].mean(0), directions[5]]))
    seen = directions @ means.T
    for row, others in enumerate(([1, 2], [0, 2], [0, 1], [4], [3])):
        seen[row, row // 3] = directions[row] @ unit(directions[others].mean(0))
    seen[5, 2] = (seen[:3, 0].sum() + seen[3:5, 1].sum()) / 5  # the only one of its class
    weights = torch.tensor([2 / 3, 2 / 3, 2 / 3, 1, 1, 2], dtype=torch.float64)
    change = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        losses = functional.cross_entropy(5 * seen + directions @ change.T, targets, reduction="none")
        objective = (weights * losses).sum() + 0.3 / 2 * change.square().sum()
        change = (change - 0.2 * torch.autograd.grad(objective, change)[0]).detach().requires_grad_()
    built = make("refined_centroid", "mlp", "algo.scale=5", "algo.refine=0.3")
    answers = built.adapt(Examples(inputs, targets))(inputs)
    torch.testing.assert_close(answers, (directions @ (5 * means + change).T).detach(), atol=0.01, rtol=0.01)


def test_single_items_far_apart_leave_the_class_means_as_they_are():
    support = Examples(torch.eye(4), torch.eye(4))
    plain, refined = make("centroid", "mlp", "algo.scale=15"), make("refined_centroid", "mlp")
    queries = torch.randn(8, 4)
    torch.testing.assert_close(refined.adapt(support)(queries), plain.adapt(support)(queries), atol=1e-3, rtol=0)


@pytest.mark.parametrize("algo", ["maml", "fomaml", "anil"])
def test_recomputed_inner_steps_give_the_same_gradient(algo: str):
    torch.manual_seed(2)
    plain = make(algo, "conv4", "algo.inner_steps=3").train()
    frugal = make(algo, "conv4", "algo.inner_steps=3", "algo.recompute=true").train()
    frugal.load_state_dict(plain.state_dict())
    batch = blobs(3, 3, 2, 4)
    for built in (plain, frugal):
        built.backward(batch)
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(frugal)[name], value, rtol=1e-9, atol=1e-12)


def plain_reptile_batches(built: Reptile, n: int) -> list[list[int]]:
    return minibatches(n, 3, built.inner_batch, built.inner_steps, torch.device("cpu")).tolist()


def test_reptile_with_one_sgd_step_is_the_plain_gradient():
    built = make("reptile", "conv4", "algo.head=learned", "algo.inner_steps=1", "algo.inner_batch=100").train()
    batch = blobs(3, 3, 2, 0)
    built.backward(batch)
    found = gradients(built)
    built.zero_grad()
    assert isinstance(built, Reptile)
    losses = [
        functional.cross_entropy(built.logits(dict(built.named_parameters()), inputs), targets)
        for inputs, targets in zip(batch.support.inputs, batch.support.targets, strict=True)
    ]
    torch.stack(losses).mean().backward()
    for name, value in gradients(built).items():
        torch.testing.assert_close(found[name], built.inner_lr * value, rtol=1e-7, atol=1e-12)


def test_reptile_equals_torch_adam_on_a_copy_of_the_network_per_task():
    built = make(
        "reptile",
        "mlp",
        "algo.head=learned",
        "algo.inner_optimizer=adam",
        "algo.inner_lr=0.001",
        "algo.inner_steps=7",
        "algo.inner_batch=4",
    ).train()
    assert isinstance(built, Reptile)
    batch = blobs(2, 3, 3, 0)
    adapted = []
    for inputs, targets in zip(batch.support.inputs, batch.support.targets, strict=True):
        network = copy.deepcopy(built)
        optimizer = torch.optim.Adam(network.parameters(), lr=built.inner_lr, betas=(0.0, 0.999))
        for rows in plain_reptile_batches(built, len(inputs)):
            optimizer.zero_grad()
            functional.cross_entropy(network.logits(dict(network.named_parameters()), inputs[rows]), targets[rows]).backward()
            optimizer.step()
        adapted.append(dict(network.named_parameters()))
    before = {name: weight.detach().clone() for name, weight in built.named_parameters()}
    built.backward(batch)
    for name, value in gradients(built).items():
        mean = torch.stack([weights[name].detach() for weights in adapted]).mean(0)
        torch.testing.assert_close(before[name] - value, mean, rtol=1e-6, atol=1e-9)
    assert built.get_buffer("count") == 7


def test_reptile_with_a_fresh_head_favours_no_class_and_takes_any_way():
    built = make("reptile", "conv4", "algo.head=fresh").train()
    batch, more = blobs(2, 3, 2, 4), blobs(1, 7, 1, 2)
    optimizer = torch.optim.Adam(built.parameters(), lr=0.01)
    for _ in range(2):
        built.backward(batch)
        assert all(gradient.any() for gradient in gradients(built).values())
        optimizer.step()
    support, order = Examples(batch.support.inputs[0], batch.support.targets[0]), torch.tensor([2, 0, 1])
    renamed = Examples(support.inputs, support.targets[:, order])
    built.eval()
    logits, found = (built.adapt(part)(batch.query.inputs[0]) for part in (support, renamed))
    torch.testing.assert_close(found, logits[:, order])
    learned = make("reptile", "conv4", "algo.head=learned").eval()
    logits, found = (learned.adapt(part)(batch.query.inputs[0]) for part in (support, renamed))
    assert not torch.allclose(found, logits[:, order])
    path = built.path(Examples(more.support.inputs[0], more.support.targets[0]))
    assert not path[0](more.query.inputs[0]).any() and path[-1](more.query.inputs[0]).shape == (14, 7)


def test_reptile_with_a_fresh_head_is_a_learned_one_whose_weights_are_zeros():
    fresh, learned = (make("reptile", "conv4", f"algo.head={head}").train() for head in ("fresh", "learned"))
    with torch.no_grad():
        for name, weight in learned.named_parameters():
            if name.startswith("head."):
                weight.zero_()
    batch = blobs(2, 3, 2, 0)
    fresh.backward(batch)
    learned.backward(batch)
    found, expected = gradients(fresh), gradients(learned)
    assert expected.keys() - found.keys() == {"head.weight", "head.bias"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_reptile_visits_every_support_item_before_it_repeats_one_and_the_classes_in_turn():
    table = minibatches(50, 5, 10, 10, torch.device("cpu")).numpy()
    for one_pass in (table[:5], table[5:]):
        assert sorted(one_pass.ravel().tolist()) == list(range(50))
    assert all(sorted(classes) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] for classes in (table // 10).tolist())
    assert len({tuple(rows) for rows in table.tolist()}) == 10  # each pass is shuffled anew
    assert minibatches(5, 5, 10, 3, torch.device("cpu")).shape == (3, 5)
    unequal = minibatches(7, 5, 7, 1, torch.device("cpu"))  # classes of the user's, of different sizes
    assert sorted(unequal.ravel().tolist()) == list(range(7))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_frozen_head_equals_torch_optimizers_on_a_linear_layer(kind: str):
    built = make("finetune", "mlp", "algo.head=linear", "algo.head_epochs=6", f"algo.head_optimizer={kind}").eval()
    assert isinstance(built, Finetune)
    batch = blobs(1, 3, 2, 4)
    support = Examples(built.embed(batch.support.inputs[0]).detach(), batch.support.targets[0])
    head = torch.nn.Linear(support.inputs.shape[1], 3).double()
    for weight in head.parameters():
        torch.nn.init.zeros_(weight)
    if kind == "sgd":
        optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.001)
    else:
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.001)
    for rows in finetune.minibatches(6, built.head_batch, built.head_epochs, torch.device("cpu")):
        optimizer.zero_grad()
        functional.cross_entropy(head(support.inputs[rows]), support.targets[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        expected = head(built.embed(batch.query.inputs[0]))
        torch.testing.assert_close(built.predictions(batch)[0], expected)


def test_a_full_backbone_changes_the_answer_of_a_frozen_one():
    answers = []
    for backbone in ("frozen", "full"):
        built: Algorithm = make("finetune", "mlp", f"algo.backbone={backbone}", "algo.head_lr=0.1").eval()
        with torch.no_grad():
            torch.manual_seed(3)
            answers.append(built.predictions(blobs(1, 3, 2, 4)))
    assert not torch.allclose(*answers, atol=1e-4)
