"""Members of a family against the member that they extend."""

import math

import pytest
import torch
from conftest import composed
from support_algos import blobs, gradients, make
from torch import nn
from torch.nn import functional

from fsl_cli.algos.closed import ClosedForm
from fsl_cli.algos.context import Context
from fsl_cli.algos.maml import MAML
from fsl_cli.algos.relationnet import Relation
from fsl_cli.config import build
from fsl_cli.episodes import Examples
from fsl_cli.models.conv4 import Block, Conv4
from fsl_cli.models.mlp import MLP


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


def test_a_network_goes_into_norms_per_step_and_comes_out_of_them():
    plus, other = make("mamlpp", "conv4"), make("protonet", "conv4", seed=1)
    assert isinstance(plus, MAML)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            parameter.add_(0.1 if "norm" in name else 0)
        plus.take(other.model.state_dict())
        items = blobs(1, 3, 2, 4).support.inputs[0]
        torch.testing.assert_close(plus.logits({}, items, 1, embed=True), other.model(items))
        for steps in plus.norms_by_step.values():
            steps[0].add_(0.2)
        other.take(type(plus).network(plus.state_dict()))
        torch.testing.assert_close(plus.logits({}, items, 0, embed=True), other.model(items))


@pytest.mark.parametrize("algo", ["reptile", "maml", "boil", "metasgd"])
def test_inner_steps_do_not_move_a_network_that_is_to_stay(algo: str):
    model = MLP((1, 28, 28), [32]).requires_grad_(False)
    made = composed(f"algo={algo}").algo
    with pytest.raises(ValueError, match=r"model\.frozen = true, but this algorithm moves the network itself"):
        build(made, "algo", model=model, classes=0, regression=False)
    assert build(composed("algo=anil").algo, "algo", model=model, classes=0, regression=False)


def test_recomputed_steps_of_a_head_see_the_body_once():
    plain, frugal = (make("anil", "resnet12", "model.drop_rate=0.3", f"algo.recompute={on}").train() for on in ("false", "true"))
    batch = blobs(2, 3, 2, 4)
    losses = []
    for algo in (plain, frugal):
        torch.manual_seed(0)
        losses.append(algo.backward(batch).loss)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(gradients(plain), gradients(frugal))


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


def test_from_a_head_of_zeros_the_first_step_makes_it_of_class_means():
    algo = make("maml", "conv4", "algo.head=zeros", "algo.inner_lr=0.2", "algo.eval_inner_steps=1").train()
    way, batch = 3, blobs(1, 3, 2, 4)
    support, query = Examples(batch.support.inputs[0], batch.support.targets[0]), batch.query.inputs[0]
    before, after = (predictor(query) for predictor in algo.path(support))
    assert before.abs().max() == 0
    features, asked = algo.model(support.inputs), algo.model(query)
    means = support.targets.T @ features / len(features)  # each class has a third of the support
    expected = 0.2 * asked @ (means - features.mean(0) / way).T
    torch.testing.assert_close(after, expected)


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


def test_mtl_leaves_the_pretrained_weights_alone():
    built = make("mtl", "conv4").train()
    built.backward(blobs(2, 3, 2, 4))
    touched = set(gradients(built))
    assert not [name for name in touched if name.startswith("model.") and not name.endswith((".scale", ".shift"))]
    assert len([name for name in touched if name.startswith("factors.")]) == 4


def test_cavia_without_inner_steps_is_the_plain_network():
    built, batch = make("cavia", "conv4", "algo.eval_inner_steps=0").eval(), blobs(2, 3, 2, 4)
    assert isinstance(built, MAML) and isinstance(built.head, nn.Linear)
    with torch.no_grad():
        plain = torch.stack([built.head(built.model(inputs)) for inputs in batch.query.inputs])
        torch.testing.assert_close(built.predictions(batch), plain)


def test_cavia_adapts_the_context_alone_by_gradient_descent():
    built, batch = make("cavia", "conv4", "algo.context=3", "algo.inner_lr=0.5").eval(), blobs(1, 3, 2, 4)
    assert isinstance(built, MAML)
    support = Examples(batch.support.inputs[0], batch.support.targets[0])
    context = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for weights in built.weights(support):
        assert set(weights) == {"context"}
        torch.testing.assert_close(weights["context"], context)
        loss = functional.cross_entropy(built.logits({"context": context}, support.inputs, 0), support.targets)
        (slope,) = torch.autograd.grad(loss, context)
        assert float(slope.abs().max()) > 0
        context = (context - 0.5 * slope).detach().requires_grad_()


def test_the_context_scales_and_shifts_normalised_maps_or_stands_beside_the_inputs():
    torch.manual_seed(0)
    context = torch.randn(3)
    images, points = torch.randn(5, 1, 16, 16), torch.randn(7, 1)
    maps, curve = Conv4((1, 16, 16), filters=4), MLP((1,), [6, 4], norm=False)
    film, beside = Context(maps, 3), Context(curve, 3)
    with torch.no_grad():
        x = images
        for number, entry in enumerate(film.entries):
            block = maps.blocks[number]
            assert isinstance(block, Block)
            gain, offset = entry(context).view(2, 4, 1, 1)
            x = functional.max_pool2d(((1 + gain) * block.norm(block.convolution(x)) + offset).relu(), 2)
        torch.testing.assert_close(torch.func.functional_call(maps, film(context, maps), images), x.flatten(1))
        first, second = curve.layers[1], curve.layers[3]
        wide = torch.cat([first.weight, beside.entries[0].weight], dim=1)  # pyright: ignore
        inner = (torch.cat([points, context.expand(7, -1)], dim=1) @ wide.T + first.bias).relu()  # pyright: ignore
        torch.testing.assert_close(torch.func.functional_call(curve, beside(context, curve), points), second(inner).relu())


@pytest.mark.parametrize(
    ("algo", "option", "said"),
    [
        ("boil", "head=zeros", "algo.head = zeros gives no gradient to what algo.adapts=body moves"),
        ("cavia", "context=0", "algo.context = 0, but algo.adapts = context needs at least 1"),
        ("cavia", "recompute=true", "algo.recompute=false"),
        ("cavia", "rates=step", "algo.rates=fixed"),
        ("maml", "context=5", "algo.context = 5, but algo.adapts = all"),
        ("metanet", "width=0", "algo.width = 0, but it must be at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(algo: str, option: str, said: str):
    with pytest.raises(ValueError, match=said):
        make(algo, "mlp", f"algo.{option}")


def test_a_context_needs_a_layer_to_enter():
    with pytest.raises(ValueError, match="Choose model=conv4 or model=mlp"):
        Context(nn.Flatten(), 3)  # pyright: ignore


@pytest.mark.parametrize("shape", [(6,), (4, 6, 5)])
def test_relations_are_those_of_the_pairs_put_together(shape: tuple[int, ...]):
    relation = Relation(shape, hidden=3).double()
    queries, prototypes = (torch.randn(n, math.prod(shape), dtype=torch.double) for n in (5, 3))
    pairs = [torch.cat([c.view(shape), q.view(shape)]) for q in queries for c in prototypes]  # one behind the other
    whole = nn.Sequential(relation.first, relation.layers)
    torch.testing.assert_close(relation(queries, prototypes), whole(torch.stack(pairs)).view(5, 3))


def test_the_network_of_mtl_is_handed_on_with_its_factors():
    built = make("mtl", "conv4").eval()
    with torch.no_grad():
        for factor in built.get_submodule("factors").parameters():
            factor.uniform_(0.5, 2.0)
    taken = make("protonet", "conv4").eval()
    taken.model.load_state_dict(type(built).network(built.state_dict()))
    inputs = blobs(1, 3, 2, 4).query.inputs[0]
    with torch.no_grad():
        torch.testing.assert_close(taken.embed(inputs), built.embed(inputs))


def test_a_scale_and_a_strength_go_with_the_distance_and_the_head():
    for words, scale in ((["algo.distance=cosine"], 10.0), (["algo.distance=euclidean"], 1.0), (["algo.scale=3"], 3.0)):
        assert make("matchingnet", "mlp", *words).get_parameter("scale").item() == scale
    for algo, words, strength in (
        ("r2d2", [], 50.0),
        ("metaoptnet", [], 0.1),
        ("metaoptnet", ["algo.head=ridge"], 50.0),
        ("logistic", [], 1.0),
        ("logistic", ["algo.strength=7"], 7.0),
    ):
        built = make(algo, "mlp", *words)
        assert isinstance(built, ClosedForm) and built.strength == strength


def test_relation_networks_may_train_by_cross_entropy():
    batch = blobs(3, 3, 2, 4)
    squared, entropy = (make("relationnet", "conv4_maps", f"algo.cross_entropy={value}").train() for value in ("false", "true"))
    scores, truth = entropy.predictions(batch), batch.query.targets.argmax(-1)
    expected = functional.cross_entropy(scores.flatten(0, 1), truth.flatten())
    torch.testing.assert_close(entropy.loss(batch).loss, expected)
    torch.testing.assert_close(squared.loss(batch).loss, (scores.sigmoid() - batch.query.targets).square().mean())
