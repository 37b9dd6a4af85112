import math

import torch

from fsl_cli.metrics import concatenate, interval, score_logits, summary


def logits_and_targets(episodes: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.eye(4).repeat(3, 1).expand(episodes, 12, 4)
    return torch.randn(episodes, 12, 4) + 2 * targets, targets


def test_interval_covers_the_truth_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    truth = 0.9
    right = torch.rand(1000, 400, 20, generator=generator) < truth  # runs, episodes, queries
    covered = 0
    for accuracies in right.double().mean(-1):
        mean, ci95 = interval(accuracies)
        covered += abs(mean - truth) <= ci95
    assert 0.93 <= covered / 1000 <= 0.97


def test_interval_of_known_values():
    mean, ci95 = interval(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert mean == 0.5
    assert math.isclose(ci95, 1.96 * math.sqrt(1 / 3) / 2)


def test_summary_against_counting_by_hand():
    logits, targets = logits_and_targets()
    result = summary(score_logits(logits, targets))
    predicted, truth = logits.argmax(-1), targets.argmax(-1)
    f1 = []
    for one, true in zip(predicted, truth, strict=True):
        per_class = []
        for slot in range(4):
            hit = ((one == slot) & (true == slot)).sum().item()
            per_class.append(2 * hit / max(((one == slot).sum() + (true == slot).sum()).item(), 1))
        f1.append(sum(per_class) / 4)
    assert math.isclose(result["accuracy"], (predicted == truth).double().mean().item())
    assert math.isclose(result["macro_f1"], sum(f1) / len(f1), rel_tol=1e-6)
    assert math.isclose(
        result["nll"], torch.nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten()).item(), rel_tol=1e-5
    )


def test_calibration_error_against_binning_by_hand():
    logits, targets = logits_and_targets()
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == targets.argmax(-1)).float()
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.float().mean().item() * abs(confidence[inside].mean() - right[inside].mean()).item()
    assert math.isclose(summary(score_logits(logits, targets))["calibration_error"], expected, rel_tol=1e-4)


def test_scores_do_not_depend_on_how_the_list_is_cut():
    logits, targets = logits_and_targets()
    whole = score_logits(logits, targets)
    parts = concatenate([score_logits(logits[:20], targets[:20]), score_logits(logits[20:], targets[20:])])
    assert summary(whole) == summary(parts)
