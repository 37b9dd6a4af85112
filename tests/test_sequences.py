"""Networks that read a sequence or keep a memory: the order that they read in, and steps by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import fsl
from support_algos import blobs, make
from support_runs import SMALL
from torch import Tensor

from fsl_cli import parallel, speed
from fsl_cli.algos.mann import MANN, Memory, least_used
from fsl_cli.algos.metanet import Generator, MetaNet, preprocessed
from fsl_cli.algos.sequences import presentations
from fsl_cli.algos.snail import SNAIL
from fsl_cli.batches import shuffled
from fsl_cli.episodes import Episode, Examples


def test_mann_writes_to_the_least_used_place_and_reads_it_back():
    built = make("mann", "mlp", "algo.places=3", "algo.width=2", "algo.heads=1", "algo.controller=4")
    assert isinstance(built, MANN)
    with torch.no_grad():
        for module in (built.keys, built.gate):
            module.weight.zero_()
        built.keys.bias.copy_(torch.tensor([math.atanh(0.5), 0.0]))  # the key is [0.5, 0]
        built.gate.bias.fill_(-1000.0)  # writes to the least used place alone
        built.sharpness.fill_(2.0)
        cells = torch.tensor([[0.0, 1.0], [3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
        empty = built.empty(torch.zeros(10, dtype=torch.float64))
        memory = Memory(cells, torch.tensor([0.9, 0.2, 0.4], dtype=torch.float64), *empty[2:])
        after, _ = built.step(memory, torch.zeros(10, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(after.cells, torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, 0.0]], dtype=torch.float64))
    weights = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64).softmax(0)  # twice the cosine with each place
    torch.testing.assert_close(after.read[0], weights)
    torch.testing.assert_close(after.values, weights @ after.cells)
    wrote = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(after.usage, 0.95 * memory.usage + weights + wrote)


def test_the_least_used_places():
    assert least_used(torch.tensor([0.3, 0.1, 0.2, 0.9]), 2).tolist() == [0, 1, 1, 0]


def labelled(examples: Examples) -> list[list[list[float]]]:
    return torch.cat([examples.inputs.flatten(2), examples.targets], dim=2).tolist()


def test_items_that_are_read_in_order_come_in_an_order_of_their_own_in_every_task(monkeypatch: pytest.MonkeyPatch):
    batch = blobs(5, 3, 4, 2)
    mixed = shuffled(batch, 0, 7, 5)
    assert mixed.query is batch.query
    for before, after in zip(*(labelled(part.support) for part in (batch, mixed)), strict=True):
        assert sorted(before) == sorted(after)  # every item has kept its label
    orders = {tuple(targets.argmax(1).tolist()) for step in (7, 8) for targets in shuffled(batch, 0, step, 5).support.targets}
    assert len(orders) == 10
    halves = []
    monkeypatch.setattr(parallel, "world", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        cut = parallel.part(5)
        halves.append(shuffled(Episode(*(Examples(*(t[cut] for t in part)) for part in batch)), 0, 7, 5).support.inputs)
    assert torch.equal(torch.cat(halves), mixed.support.inputs)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("algo", "mixed"), [("snail", True), ("mann", True), ("matchingnet algo.context=true", True), ("protonet", False)]
)
def test_training_mixes_the_support_of_what_reads_it_in_order(monkeypatch: pytest.MonkeyPatch, algo: str, mixed: bool):
    fed = []
    monkeypatch.setattr(speed.Stepper, "__call__", lambda stepper, batch: fed.append(batch) or stepper.algo.backward(batch))
    words = [*f"algo={algo}".split(), "~recipe", "steps=2", "device.threads=1", "device.task_chunk=2"]
    assert fsl(monkeypatch, "train", *SMALL, *words) == 0
    slots = [targets.argmax(1).tolist() for batch in fed for targets in batch.support.targets]
    assert slots and any(one != sorted(one) for one in slots) == mixed


def test_every_presentation_holds_one_item_of_each_class():
    rows = presentations(6, 3)
    assert sorted(rows.ravel().tolist()) == list(range(6))
    assert [sorted(row // 2) for row in rows.tolist() for row in [torch.tensor(row)]] == [[0, 1, 2], [0, 1, 2]]


def test_more_presentations_give_more_answers():
    built = make("mann", "mlp").eval()
    with torch.no_grad():
        support = blobs(1, 3, 4, 1).support
        assert len(built.path(Examples(built.embed(support.inputs[0]), support.targets[0]))) == 5


@pytest.mark.parametrize("shot", [1, 4])
def test_snail_reads_support_and_query_as_one_sequence(shot: int):
    built = make("snail", "mlp", "task.shot=4", "algo.standardise=false").eval()
    assert isinstance(built, SNAIL)
    batch = blobs(1, 3, shot, 1)
    with torch.no_grad():
        support = Examples(built.embed(batch.support.inputs[0]), batch.support.targets[0])
        queries = built.embed(batch.query.inputs[0])
        order = presentations(len(support.inputs), 3).ravel()
        whole = torch.cat([torch.cat(support, dim=1)[order], torch.cat([queries[:1], torch.zeros(1, 3)], dim=1)])
        for layer in built.layers:
            whole = torch.cat([whole, layer(whole)], dim=1)
        torch.testing.assert_close(built.adapt(support)(queries)[0], built.answer(whole[-1]))


@pytest.mark.usefixtures("workplace")
def test_snail_reads_other_shots_through_the_layers_that_it_has(monkeypatch: pytest.MonkeyPatch):
    words = ["algo=snail", "~recipe", "steps=2", "device.threads=1", "device.task_chunk=2", "out=run"]
    assert fsl(monkeypatch, "train", *SMALL, *words) == 0
    shot = json.loads(Path("run/result.json").read_text())["shot"]
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", f"task.shot={shot + 4}", "out=more") == 0
    assert json.loads(Path("more/result.json").read_text())["shot"] == shot + 4


def metanet() -> MetaNet:
    built = make("metanet", "mlp", "algo.standardise=false").eval()
    assert isinstance(built, MetaNet)
    return built


def test_a_meta_network_whose_fast_weights_are_zero_is_its_slow_network():
    built, batch = metanet(), blobs(1, 3, 2, 4)
    support = Examples(batch.support.inputs[0], batch.support.targets[0])
    hidden, head = (built.b[name] for name in ("hidden", "head"))
    with torch.no_grad():
        slow = head(hidden(built.embed(batch.query.inputs[0])).relu())
        assert not torch.allclose(built.fit(support)(batch.query.inputs[0]), slow, atol=1e-2)
        for parameter in built.m.layers[-1].parameters():
            parameter.zero_()
        torch.testing.assert_close(built.fit(support)(batch.query.inputs[0]), slow)


def test_a_meta_network_with_the_memory_of_one_item_by_hand():
    built, batch = metanet(), blobs(1, 3, 1, 4)
    with torch.no_grad():
        features = built.embed(batch.support.inputs[0])
        built.sharpness.fill_(1e6)  # a query that is a support item reads the weights of that item alone
        answer = built.adapt(Examples(features, batch.support.targets[0]))(features[1:2])
    slow = {name: weight.detach().clone().requires_grad_() for name, weight in built.b.named_parameters()}

    def network(inputs: Tensor, *paths: dict[str, Tensor]) -> Tensor:
        inner = sum((inputs @ w["hidden.weight"].T + w["hidden.bias"]).clamp(min=0) for w in paths)
        return sum(inner @ w["head.weight"].T + w["head.bias"] for w in paths)  # pyright: ignore

    loss = -network(features[1:2], slow).log_softmax(1)[0, batch.support.targets[0, 1].argmax()]
    grads = dict(zip(slow, torch.autograd.grad(loss, list(slow.values())), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(answer, network(features[1:2], slow, built.m(grads)))


def test_one_network_makes_the_weights_of_all_coordinates():
    torch.manual_seed(0)
    made, gradient = Generator(6), torch.randn(4, 5)
    rows, columns = torch.randperm(4), torch.randperm(5)
    torch.testing.assert_close(made({"a": gradient[rows][:, columns]})["a"], made({"a": gradient})["a"][rows][:, columns])


def test_a_meta_network_does_not_know_the_order_of_its_hidden_units():
    built, batch = metanet(), blobs(2, 3, 2, 4)
    with torch.no_grad():
        before = built.predictions(batch)
        for network in ("u", "b"):
            weights = [built.get_parameter(f"{network}.{name}") for name in ("hidden.weight", "hidden.bias", "head.weight")]
            order = torch.randperm(len(weights[0]))
            for weight in (weights[0], weights[1], weights[2].T):
                weight.copy_(weight[order].clone())
        torch.testing.assert_close(built.predictions(batch), before)


def test_the_size_and_sign_of_gradients():
    edge = math.exp(-7)
    found = preprocessed(torch.tensor([math.exp(-3.5), -1.0, edge / 2, 0.0], dtype=torch.float64))
    expected = [[-0.5, 1.0], [0.0, -1.0], [-1.0, 0.5], [-1.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
