"""A setting that nothing would read is refused, so that no run claims to have had it."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from conftest import composed, fsl, message
from support_algos import ALGOS, made_of
from support_runs import SMALL

from fsl_cli import load
from fsl_cli.config import arguments

FITTED = ["head_scale", "head_lr", "head_decay", "head_epochs", "head_batch", "head_optimizer"]


def idle(name: str, *words: str, training: bool) -> set[str]:
    kind, options = arguments(composed(f"algo={name}", *words).algo, "algo")
    made: Any = kind
    return set(made.idle(options, training))


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo=knn", "algo.head_lr=0.5"], "algo.head_lr = 0.5, but algo.head = nearest does not read it. Leave it out."),
        (["algo=finetune", "algo.head=linear", "algo.scale=5"], "algo.scale = 5, but algo.head = linear does not read it."),
        (["algo=protomaml", "algo.way=5"], "algo.way = 5, but algo.head = prototypes makes a head for the classes there are."),
        (["algo=reptile", "algo.way=5"], "algo.way = 5, but algo.head = fresh makes a head for the classes there are."),
        (["algo=fomaml", "algo.first_order_until=0.5"], "algo.first_order_until = 0.5, but algo.first_order = true leaves out"),
        (
            ["algo=mtl", "pretrain=train", "pretrain_with={algo.head:linear,algo.head_scale:3}"],
            "algo.head_scale = 3, but algo.head = linear does not read it. Leave it out.",
        ),
    ],
)
def test_a_training_refuses_what_its_settings_leave_without_effect(words: list[str], said: str, monkeypatch: Any, capfd: Any):
    assert message(monkeypatch, capfd, "train", *SMALL, "steps=2", *words).startswith(said)


@pytest.mark.parametrize(
    ("name", "word", "said"),
    [
        ("maml", "algo.inner_steps=9", "only fsl train reads it. Write algo.eval_inner_steps=9."),
        ("maml", "algo.multi_step=0.5", "only fsl train reads it. Leave it out."),
        ("finetune", "algo.scale=9", "only fsl train reads it. Leave it out."),
        ("protonet", "algo.scale=9", "what is learned from there on comes from the checkpoint. Leave it out."),
    ],
)
def test_an_evaluation_refuses_what_it_does_not_read(models: Path, name: str, word: str, said: str, monkeypatch: Any, capfd: Any):
    key, _, value = word.partition("=")
    expected = f"{key} = {value}, but {said}"
    assert message(monkeypatch, capfd, "evaluate", f"checkpoint={models}/{name}/best.pt", word) == expected
    with pytest.raises(ValueError) as caught:
        load(models / name / "best.pt", word)
    assert str(caught.value) == expected


def test_what_another_head_reads_is_taken_on_the_network_of_a_checkpoint(models: Path, monkeypatch: Any):
    words = (f"checkpoint={models}/protonet/best.pt", "episodes=4", "algo=logistic", "algo.scale=2")
    assert fsl(monkeypatch, "evaluate", *words) == 0


@pytest.mark.parametrize("name", ALGOS)
def test_what_may_be_unread_is_an_option_and_what_is_read_in_its_place_too(name: str):
    kind: Any = made_of(name)
    options = inspect.signature(kind).parameters
    assert {*kind.only_training, *kind.only_training.values(), *kind.starts} - {""} <= options.keys()
    for training in (True, False):
        reasons = kind.idle(arguments(composed(f"algo={name}").algo, "algo")[1], training)
        assert reasons.keys() <= options.keys() and all(reasons.values())


@pytest.mark.parametrize("head", ["cosine", "linear", "centroid", "nearest"])
def test_a_head_that_is_not_fitted_reads_nothing_of_how_to_fit_it(head: str):
    unread = idle("finetune", f"algo.head={head}", training=True)
    assert unread - {"scale"} == set({"cosine": [], "linear": ["head_scale"]}.get(head, FITTED))
    assert ("scale" in unread) == (head != "cosine")


def test_an_evaluation_of_reptile_reads_the_rate_of_training_if_it_has_none_of_its_own():
    assert idle("reptile", training=False) == {"way", "inner_lr"}
    assert idle("reptile", "algo.eval_inner_lr=null", "algo.head=learned", training=False) == set()


def test_rates_that_are_learned_are_not_what_is_typed_at_evaluation():
    assert idle("metasgd", training=False) == {"inner_lr"} and idle("metasgd", training=True) == set()
