"""Metrics of scored episodes: mean and interval, F1, likelihood, calibration; in regression the squared error."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BINS = 15  # for the calibration error


class Measure(NamedTuple):
    """What episodes are scored by: accuracy, or mean squared error."""

    name: str
    higher: bool  # whether higher is better
    percent: bool  # whether it is printed as a percentage

    def better(self, value: float, best: float) -> bool:
        """Whether `value` beats the best so far (NaN: there is none)."""
        return math.isnan(best) or (value > best if self.higher else value < best)

    def text(self, *numbers: float) -> str:
        """Formats a number, or a mean and the half width of its interval."""
        return " ± ".join(f"{100 * n:.2f}" if self.percent else f"{n:.4f}" for n in numbers) + (" %" if self.percent else "")


ACCURACY = Measure("accuracy", higher=True, percent=True)
MSE = Measure("mse", higher=False, percent=False)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of logits `[..., way]` whose maximum is at the one-hot target."""
    return (logits.detach().argmax(-1) == targets.argmax(-1)).float().mean()


def accuracy_by_class(logits: Tensor, targets: Tensor) -> Tensor:
    """The accuracy `[tasks, way]` on the queries of each class, of logits and one-hot targets `[tasks, q, way]`."""
    right = (logits.detach().argmax(-1) == targets.argmax(-1)).to(targets.dtype)
    return (right.unsqueeze(-1) * targets).sum(1) / targets.sum(1)


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

    @property
    def measured(self) -> Tensor:
        """The measure of each episode, `[episodes]`."""
        return self.accuracy

    @property
    def columns(self) -> dict[str, Tensor]:
        """The columns of episodes.csv."""
        return {"accuracy": self.accuracy, "nll": self.nll.mean(1)}


class Errors(NamedTuple):
    """Scored episodes of regression: the mean squared error before and after each inner step."""

    squared: Tensor  # [episodes, steps + 1], double precision

    @property
    def measured(self) -> Tensor:
        """The measure of each episode, the error after the last inner step, `[episodes]`."""
        return self.squared[:, -1]

    @property
    def columns(self) -> dict[str, Tensor]:
        """The columns of episodes.csv."""
        return {"mse": self.measured} | {f"mse_{step}": column for step, column in enumerate(self.squared.unbind(1))}


def score_logits(logits: Tensor, targets: Tensor) -> Scores:
    """Scores of logits `[tasks, q, way]` against one-hot targets of the same shape."""
    log_probabilities = functional.log_softmax(logits.float(), dim=-1)
    confidence, predicted = log_probabilities.exp().max(-1)
    nll = -(log_probabilities * targets).sum(-1)
    return Scores(targets.argmax(-1).cpu(), predicted.cpu(), confidence.cpu(), nll.cpu(), logits.shape[-1])


def score_values(outputs: Tensor, targets: Tensor) -> Errors:
    """Errors of values `[tasks, steps + 1, q, *out]`, before and after each inner step, against `[tasks, q, *out]`."""
    return Errors((outputs - targets.unsqueeze(1)).double().square().flatten(2).mean(2).cpu())


def concatenate(parts: list[Scores] | list[Errors]) -> Scores | Errors:
    """Joins the scores of several parts of an episode list."""
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name, column in parts[0]._asdict().items()
        if isinstance(column, Tensor)
    }
    return parts[0]._replace(**joined)


def interval(values: Tensor) -> tuple[float, float]:
    """Mean of independent values `[n]` and the half width of its 95 % confidence interval (normal approximation)."""
    if len(values) < 2:
        return float(values.double().mean()), math.nan
    values = values.double()
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share, given `right` of `n`; it is accurate near 0 and 1 too."""
    z2 = 1.96**2
    centre, half = right + z2 / 2, 1.96 * math.sqrt(right * (n - right) / n + z2 / 4)
    return (centre - half) / (n + z2), (centre + half) / (n + z2)


def headline(scores: Scores | Errors) -> dict[str, Any]:
    """Accuracy with its interval; in regression the mean squared error, also before and after each inner step."""
    if isinstance(scores, Errors):
        steps = [interval(column) for column in scores.squared.unbind(1)]
        curves = {"adaptation_curve": [mean for mean, _ in steps], "adaptation_ci95": [ci95 for _, ci95 in steps]}
        return {"mse": steps[-1][0], "ci95": steps[-1][1], **(curves if len(steps) > 1 else {})}
    accuracy, ci95 = interval(scores.accuracy)
    return {"accuracy": accuracy, "ci95": ci95}


def details(scores: Scores | Errors) -> dict[str, float]:
    """Macro F1 (mean over episodes), negative log-likelihood and calibration error; regression has none."""
    if isinstance(scores, Errors):
        return {}
    # Imported here, because torchmetrics takes three seconds, longer than everything else.
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

    f1 = multiclass_f1_score(
        scores.predicted, scores.truth, num_classes=scores.way, average="macro", multidim_average="samplewise"
    )
    # The top-label calibration error is the binary calibration error of "the prediction is right".
    right = (scores.truth == scores.predicted).flatten().int()
    calibration = binary_calibration_error(scores.confidence.flatten().clamp(max=1.0), right, n_bins=BINS)
    return {
        "macro_f1": float(f1.double().mean()),
        "nll": float(scores.nll.double().mean()),
        "calibration_error": float(calibration),
    }


def summary(scores: Scores | Errors) -> dict[str, Any]:
    """All metrics of scored episodes."""
    return headline(scores) | details(scores)
