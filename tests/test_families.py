"""Members of a family against the member that they extend, and sequence models against hand-computed steps."""

import math

import torch
from test_algos import blobs, gradients, make
from torch.nn import functional

from fsl_cli.algos.maml import MAML
from fsl_cli.algos.mann import MANN, Memory, least_used
from fsl_cli.algos.sequences import presentations
from fsl_cli.episodes import Examples


def pair(one: str, other: str, model: str = "conv4") -> tuple[MAML, MAML]:
    """Two algorithms with the same initial weights."""
    built = [make(*words.split()[:1], model, *words.split()[1:]) for words in (one, other)]
    assert all(isinstance(algo, MAML) for algo in built)
    built[1].load_state_dict(built[0].state_dict(), strict=False)
    return built[0].train(), built[1].train()  # pyright: ignore


def test_meta_sgd_with_equal_rates_is_maml():
    maml, metasgd = pair("maml", "metasgd")
    batch = blobs(3, 3, 2, 4)
    assert torch.allclose(maml.backward(batch).loss, metasgd.backward(batch).loss)
    learned = gradients(metasgd)
    for name, value in gradients(maml).items():
        torch.testing.assert_close(learned.pop(name), value)
    assert len(learned) == len(maml.adapted)  # what is left: the rates
    assert all(float(value.abs().max()) > 0 for value in learned.values())


def test_mamlpp_with_everything_equal_is_maml():
    maml, plus = pair("maml algo.inner_steps=2 algo.inner_lr=0.1", "mamlpp algo.inner_steps=2 algo.multi_step=0.0")
    batch = blobs(3, 3, 2, 4)
    assert torch.allclose(maml.backward(batch).loss, plus.backward(batch).loss)
    learned = gradients(plus)
    for name, value in gradients(maml).items():
        if name in learned:
            torch.testing.assert_close(learned[name], value)
        else:  # each step has its own: their gradients add up to the shared one's
            torch.testing.assert_close(learned["norms_by_step." + name.replace(".", "_")].sum(0), value)


def test_the_multi_step_loss_starts_even_and_ends_at_the_last_step():
    plus = make("mamlpp", "mlp", "algo.inner_steps=3", "algo.multi_step=0.5").train()
    batch = blobs(2, 3, 2, 4)
    steps = plus.curves(batch)[:, 1:].unbind(1)
    losses = torch.stack([functional.cross_entropy(s.flatten(0, 1), batch.query.targets.flatten(0, 1)) for s in steps])
    torch.testing.assert_close(plus.loss(batch).loss, losses.mean())
    plus.progress = 0.25
    early = (1 - 0.97 / 2) / 3
    torch.testing.assert_close(plus.loss(batch).loss, early * losses[:2].sum() + (1 - 2 * early) * losses[2])
    plus.progress = 0.5
    torch.testing.assert_close(plus.loss(batch).loss, losses[2])


def test_second_derivatives_wait_for_their_time():
    plain, later = pair("maml", "maml algo.first_order_until=0.5", "mlp")
    fomaml, _ = pair("fomaml", "fomaml", "mlp")
    batch = blobs(2, 3, 2, 4)
    for algo in (plain, later, fomaml):
        algo.backward(batch)
    torch.testing.assert_close(gradients(later), gradients(fomaml))
    later.zero_grad()
    later.progress = 0.5
    later.backward(batch)
    torch.testing.assert_close(gradients(later), gradients(plain))


def test_boil_adapts_what_anil_leaves():
    boil, anil, maml = (make(name, "conv4") for name in ("boil", "anil", "maml"))
    assert isinstance(boil, MAML)
    assert isinstance(anil, MAML)
    assert isinstance(maml, MAML)
    assert not set(boil.adapted) & set(anil.adapted)
    assert set(boil.adapted) | set(anil.adapted) == set(maml.adapted)


def test_protomaml_without_steps_decides_as_protonet():
    proto = make("protomaml", "conv4", "algo.eval_inner_steps=0").eval()
    metric = make("protonet", "conv4").eval()
    metric.use_norm("transductive")
    metric.load_state_dict(proto.state_dict())
    batch = blobs(3, 3, 2, 4)
    # ProtoMAML normalises the support set by itself, ProtoNet with the queries: the same where the queries are the support.
    same = type(batch)(batch.support, batch.support)
    with torch.no_grad():
        ours, theirs = proto.predictions(same), metric.predictions(same)
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1))


def test_protomaml_takes_any_way():
    proto = make("protomaml", "conv4").eval()
    with torch.no_grad():
        assert proto.predictions(blobs(2, 7, 1, 2)).shape == (2, 14, 7)


def test_simpleshot_without_transform_is_protonet_on_the_same_features():
    simple = make("simpleshot", "conv4", "algo.transform=none").eval()
    metric = make("protonet", "conv4").eval()
    metric.load_state_dict({name: value for name, value in simple.state_dict().items() if name.startswith("model.")})
    batch = blobs(3, 3, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(simple.predictions(batch), metric.predictions(batch))


def test_simpleshot_centres_by_the_mean_of_what_it_was_trained_on():
    simple = make("simpleshot", "mlp")
    batch = Examples(blobs(1, 12, 4, 0).support.inputs[0], blobs(1, 12, 4, 0).support.targets[0])
    for _ in range(600):
        with torch.no_grad():
            simple.train().loss(batch)
        for layer in (m for m in simple.modules() if hasattr(m, "commit")):
            layer.commit()  # pyright: ignore
    with torch.no_grad():
        simple.train()
        mean = simple.model(batch.inputs).mean(0)  # pyright: ignore
    torch.testing.assert_close(simple.centre.running_mean, mean, atol=0.01, rtol=0)  # pyright: ignore


def test_one_shot_matching_is_nearest_neighbour():
    built = make("matchingnet", "conv4").eval()
    batch = blobs(4, 5, 1, 3)
    with torch.no_grad():
        for number in range(4):
            support, query = (part.inputs[number] for part in batch)
            near = functional.normalize(built.embed(query), dim=1) @ functional.normalize(built.embed(support), dim=1).T
            answer = built.fit(Examples(support, batch.support.targets[number]))(query)
            assert near.argmax(1).equal(answer.argmax(1))
            torch.testing.assert_close(answer.softmax(1), (10 * near).softmax(1))


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


def test_every_presentation_holds_one_item_of_each_class():
    rows = presentations(6, 3)
    assert sorted(rows.ravel().tolist()) == list(range(6))
    assert [sorted(row // 2) for row in rows.tolist() for row in [torch.tensor(row)]] == [[0, 1, 2], [0, 1, 2]]


def test_more_presentations_give_more_answers():
    built = make("mann", "mlp").eval()
    with torch.no_grad():
        support = blobs(1, 3, 4, 1).support
        assert len(built.path(Examples(built.embed(support.inputs[0]), support.targets[0]))) == 5


def test_mtl_leaves_the_pretrained_weights_alone():
    built = make("mtl", "conv4").train()
    built.backward(blobs(2, 3, 2, 4))
    touched = set(gradients(built))
    assert not [name for name in touched if name.startswith("model.") and not name.endswith((".scale", ".shift"))]
    assert len([name for name in touched if name.startswith("factors.")]) == 4


def test_snail_answers_a_query_from_its_support_alone():
    built = make("snail", "mlp").eval()
    batch = blobs(1, 3, 2, 4)
    with torch.no_grad():
        predictor = built.fit(Examples(batch.support.inputs[0], batch.support.targets[0]))
        torch.testing.assert_close(predictor(batch.query.inputs[0])[:1], predictor(batch.query.inputs[0][:1]))
