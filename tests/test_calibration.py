"""How sure a classifier is: temperature, threshold and interval, on answers that are made up."""

import pytest
import torch
from test_algos import blobs, make

from fsl_cli.calibration import held_out, rejection, temperature
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


@pytest.mark.parametrize("algo", ["logistic", "protonet"])
def test_classes_that_are_told_apart_are_told_apart_when_one_of_each_is_left_out(algo: str):
    torch.manual_seed(0)
    built = make(algo, "mlp").eval()
    support = Examples(*(tensor[0] for tensor in blobs(1, 3, 4, 1, noise=0.1).support))
    logits, slots = held_out(built, Examples(built.embed(support.inputs), support.targets), True)
    assert (logits.argmax(1) == slots).double().mean() > 0.8
