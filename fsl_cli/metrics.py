"""What a list of scored episodes comes to: mean and interval, F1, likelihood, calibration."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BINS = 15  # of the calibration error


class Scores(NamedTuple):
    """Scored episodes: for every query the true and the predicted class, the confidence in it, and its likelihood."""

    truth: Tensor  # [episodes, q] class slots
    predicted: Tensor  # [episodes, q] class slots
    confidence: Tensor  # [episodes, q] probability of the predicted class
    nll: Tensor  # [episodes, q] negative log-likelihood of the true class
    way: int

    @property
    def accuracy(self) -> Tensor:
        """Accuracy of each episode, `[episodes]`, double precision."""
        return (self.truth == self.predicted).double().mean(1)


def score_logits(logits: Tensor, targets: Tensor) -> Scores:
    """Scores of logits `[tasks, q, way]` against one-hot targets of the same shape."""
    log_probabilities = functional.log_softmax(logits.float(), dim=-1)
    confidence, predicted = log_probabilities.exp().max(-1)
    nll = -(log_probabilities * targets).sum(-1)
    return Scores(targets.argmax(-1).cpu(), predicted.cpu(), confidence.cpu(), nll.cpu(), logits.shape[-1])


def concatenate(parts: list[Scores]) -> Scores:
    """The scores of several parts of an episode list as one."""
    columns = zip(*(part[:-1] for part in parts), strict=True)
    return Scores(*(torch.cat(column) for column in columns), way=parts[0].way)


def interval(values: Tensor) -> tuple[float, float]:
    """Mean of independent values `[n]` and the half width of its 95 % confidence interval (normal approximation)."""
    if len(values) < 2:
        return float(values.double().mean()), math.nan
    values = values.double()
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share of which `right` of `n` were seen; it stays honest near 0 and 1."""
    z2 = 1.96**2
    centre, half = right + z2 / 2, 1.96 * math.sqrt(right * (n - right) / n + z2 / 4)
    return (centre - half) / (n + z2), (centre + half) / (n + z2)


def summary(scores: Scores) -> dict[str, float]:
    """Accuracy with its interval, macro F1 (mean over episodes), negative log-likelihood and calibration error."""
    # torchmetrics takes two seconds to import, as long as all the rest: only a final summary pays for it.
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

    accuracy, ci95 = interval(scores.accuracy)
    f1 = multiclass_f1_score(
        scores.predicted, scores.truth, num_classes=scores.way, average="macro", multidim_average="samplewise"
    )
    # The top-label calibration error is the binary one of "is the prediction right?".
    right = (scores.truth == scores.predicted).flatten().int()
    calibration = binary_calibration_error(scores.confidence.flatten().clamp(max=1.0), right, n_bins=BINS)
    return {
        "accuracy": accuracy,
        "ci95": ci95,
        "macro_f1": float(f1.double().mean()),
        "nll": float(scores.nll.double().mean()),
        "calibration_error": float(calibration),
    }
