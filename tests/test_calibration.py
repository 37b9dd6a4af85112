"""How sure a classifier is: temperature, threshold and interval, on answers that are made up and on drawings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CLASSES
from support_algos import SHAPE, blobs, make

import fsl_cli
from fsl_cli.calibration import evened, held_out, rejection, temperature
from fsl_cli.classifier import Classifier
from fsl_cli.episodes import Examples
from fsl_cli.metrics import wilson


def test_the_threshold_parts_known_from_unknown_best():
    found = rejection(torch.tensor([0.9, 0.8, 0.6, 0.95]), torch.tensor([0.5, 0.65, 0.3]))
    assert (found.threshold, found.kept, found.refused) == (pytest.approx(0.725), 0.75, 1.0)
    same = rejection(torch.tensor([0.5, 0.5]), torch.tensor([0.5]))
    assert (same.threshold, same.kept, same.refused) == (0, 1, 0)


def test_the_temperature_that_made_the_answers_is_found_and_few_answers_hardly_move_it():
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(4000, 5, generator=generator)
    slots = torch.multinomial(torch.softmax(logits / 3, 1), 1, generator=generator).squeeze(1)
    assert temperature(logits, slots) == pytest.approx(3, rel=0.1)
    assert 1 < temperature(logits[:2], torch.tensor([0, 0])) < 3
    assert temperature(logits[:0], slots[:0]) == 1
    assert 0.3 < temperature(10 * torch.eye(5), torch.arange(5)) <= 1  # all right: not infinitely sure


def test_the_interval_of_a_share_is_that_of_wilson():
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)


def test_one_item_of_every_class_is_left_out_at_a_time(monkeypatch: pytest.MonkeyPatch):
    built = make("protonet", "mlp").eval()
    support = Examples(*(tensor[0] for tensor in blobs(1, 3, 4, 1).support))
    slots = support.targets.argmax(1)
    logits, judged = held_out(built, support, False)
    ranks = [(slots[:row] == slots[row]).sum().item() for row in range(len(slots))]
    expected, order = [], []
    for turn in range(4):
        out = torch.tensor([rank == turn for rank in ranks])
        expected.append(built.fit(Examples(support.inputs[~out], support.targets[~out]))(support.inputs[out]))
        order.append(slots[out])
    torch.testing.assert_close(logits, torch.cat(expected))
    assert judged.equal(torch.cat(order))
    calls = []
    predictions = built.predictions
    monkeypatch.setattr(built, "predictions", lambda batch: calls.append(batch.query.targets.shape[1]) or predictions(batch))
    assert len(held_out(built, support, False, limit=7)[0]) == sum(calls) == 7
    assert max(calls) <= 3
    empty, none = held_out(built, support, False, least=5)
    assert (tuple(empty.shape), len(none)) == ((0, 3), 0)


@pytest.mark.parametrize("algo", ["snail", "mann", "metanet"])
def test_what_reads_items_one_by_one_gets_as_many_of_every_class(algo: str, monkeypatch: pytest.MonkeyPatch):
    built = make(algo, "mlp").eval()
    items = torch.randn(6, built.model.out_features, dtype=torch.float64)
    support = Examples(items, torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1, 2, 2]])
    rows = [0, 1, 2, 3, 3, 3, 4, 5, 4]
    expected = Examples(items[rows], support.targets[rows])
    assert all(a.equal(b) for a, b in zip(evened(built, support), expected, strict=True))
    assert evened(make("protonet", "mlp"), support) is support and evened(built, expected) is expected
    without = Examples(items[:3], support.targets[:3])  # a class may be missing: it stays so
    assert evened(built, without).targets.sum(0).tolist() == [3, 0, 0]
    trained: Any = SimpleNamespace(algo=built, embeds=True)
    answers = Classifier(trained, support, ["a", "b", "c"], 1.0).predictor(torch.zeros(2, *SHAPE, dtype=torch.float64))
    queries = built.embed(torch.zeros(2, *SHAPE, dtype=torch.float64))
    torch.testing.assert_close(answers, built.adapt(expected)(queries))
    seen = []
    scores = built.scores
    monkeypatch.setattr(built, "scores", lambda batch: seen.append(batch.support.targets[0].sum(0)) or scores(batch))
    held_out(built, support, True)
    assert len(seen) == 3 and all(len(counts.unique()) == 1 for counts in seen)


@pytest.mark.parametrize("algo", ["logistic", "protonet"])
def test_classes_that_are_told_apart_are_told_apart_when_one_of_each_is_left_out(algo: str):
    torch.manual_seed(0)
    built = make(algo, "mlp").eval()
    support = Examples(*(tensor[0] for tensor in blobs(1, 3, 4, 1, noise=0.1).support))
    logits, slots = held_out(built, Examples(built.embed(support.inputs), support.targets), True)
    assert (logits.argmax(1) == slots).double().mean() > 0.8


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("algo", ["protonet", "maml", "finetune"])
def test_leaving_one_of_each_out_is_what_learning_from_the_others_answers(algo, models, drawings):
    source = fsl_cli.load(models / algo / "best.pt", "device=cpu")
    files = sorted(Path("support").rglob("*.png"))
    items, labels = source.items(files), [file.parent.name for file in files]
    whole = source.learn(items, labels)
    logits, slots = held_out(source.algo, whole.support, source.embeds)
    turns = [[row for row, label in enumerate(labels) if labels[:row].count(label) == turn] for turn in range(4)]
    assert slots.tolist() == [CLASSES.index(labels[row]) for out in turns for row in out] and len(slots) == len(files)
    answers = []
    for out in turns:
        rest = [row for row in range(len(files)) if row not in out]
        part = source.learn(items[rest], [labels[row] for row in rest])
        with torch.no_grad():
            answers.append(part.predictor(source.inputs(items[out])))
    torch.testing.assert_close(logits, torch.cat(answers), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_a_class_of_one_image_cannot_be_left_out(algo, models, drawings):
    source = fsl_cli.load(models / algo / "best.pt", "device=cpu")
    files = [
        Path(f"support/{name}/{number}.png") for name, count in zip(CLASSES, (1, 2, 1), strict=True) for number in range(count)
    ]
    classifier = source.adapt(files, [file.parent.name for file in files])
    assert classifier.leave_one_out().images == 2
    single = source.adapt([files[0], files[1], files[3]], CLASSES)
    assert single.temperature == 1
    with pytest.raises(ValueError, match="leave_one_out = true, but no class has two support items"):
        single.leave_one_out()
