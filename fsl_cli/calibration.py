"""Estimates the confidence and accuracy of a classifier on its own support images, which are left out in turn.

The threshold for refusing an answer (`reject_below=auto`) is chosen the same way: each class in turn is left out and plays the
unknown one. A threshold from training would not carry over: how probable answers are depends on the number of classes, the
images of each, and what they show.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fsl_cli.algos.base import Algorithm
from fsl_cli.episodes import Episode, Examples
from fsl_cli.metrics import wilson
from fsl_cli.structures import map_tensors

DRAW_SEED = 20261121  # draws the held-out images if not all are held out
SPREAD = 0.5  # of the prior on the logarithm of the temperature, centred on 1, since few images say little about it


class Estimate(NamedTuple):
    """An accuracy on held-out images, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    images: int


class Rejection(NamedTuple):
    """The threshold below which answers are refused, and its effect on the support images that it was chosen on."""

    threshold: float
    kept: float  # share of answers kept for images of known classes
    refused: float  # share of answers refused for images whose whole class was left out
    known: int  # images
    unknown: int


def held_out(
    algo: Algorithm, support: Examples, embedded: bool, least: int = 2, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits `[images, way]` of support items that are left out of the support set, and their class slots.

    One item of every class is left out at a time, because some heads never predict a class that has fewer items than the others.
    Only classes with at least `least` items are used, and at most `limit` items, drawn evenly (None: all).
    """
    slots = support.targets.argmax(1)
    left = _some(torch.nonzero(support.targets.sum(0)[slots] >= least).flatten(), limit)
    if not len(left):
        return support.targets.new_empty(0, support.targets.shape[1]), left
    earlier = (slots[left].unsqueeze(1) == slots[left]).tril(-1).sum(1)  # of the same class
    turns = [left[earlier == turn] for turn in range(int(earlier.max()) + 1)]
    places = torch.arange(len(slots), device=slots.device)
    parts = [_judged(algo, support, embedded, rows, torch.isin(places, rows)) for rows in turns]
    return torch.cat(parts), slots[torch.cat(turns)]


def left_out(algo: Algorithm, support: Examples, embedded: bool, fixed: bool, limit: int) -> Tensor:
    """Logits `[n, way - 1]` of support items whose whole class is left out of the support set.

    `fixed`: the algorithm has a fixed head, which includes the class left out. At most `limit` items, drawn evenly.
    """
    slots = support.targets.argmax(1)
    chosen = _some(torch.arange(len(slots), device=slots.device), limit)
    parts = []
    for slot in slots[chosen].unique():
        others = torch.arange(support.targets.shape[1], device=slots.device) != slot
        known = support if fixed else Examples(support.inputs, support.targets[:, others])
        logits = _judged(algo, known, embedded, chosen[slots[chosen] == slot], slots == slot)
        parts.append(logits[:, others] if fixed else logits)
    return torch.cat(parts)


def _judged(algo: Algorithm, support: Examples, embedded: bool, rows: Tensor, without: Tensor) -> Tensor:
    """Logits `[len(rows), way]` of the support items `rows` after adapting to the support without the mask `without`."""
    left, judged = (Examples(*(tensor[cut] for tensor in support)) for cut in (~without, rows))
    batch = map_tensors(Episode(evened(algo, left), judged), lambda tensor: tensor.unsqueeze(0))
    return (algo.scores(batch) if embedded else algo.predictions(batch)).squeeze(0)


def evened(algo: Algorithm, support: Examples) -> Examples:
    """Repeats the items of small classes until all classes have as many, for an algorithm with `equal_shots`."""
    shots = support.targets.sum(0).long()
    if not algo.equal_shots or bool((shots == shots.max()).all()):
        return support
    slots = support.targets.argmax(1)
    items = [torch.nonzero(slots == slot).flatten() for slot in torch.nonzero(shots).flatten()]
    rows = torch.cat([own[torch.arange(int(shots.max()), device=own.device) % len(own)] for own in items])
    return Examples(support.inputs[rows], support.targets[rows])


def _some(rows: Tensor, limit: int | None) -> Tensor:
    """At most `limit` of some rows, drawn evenly with a constant seed."""
    if limit is None or len(rows) <= limit:
        return rows
    drawn = np.sort(np.random.default_rng(DRAW_SEED).permutation(rows.cpu().numpy())[:limit])
    return torch.as_tensor(drawn, device=rows.device)


def rejection(known: Tensor, unknown: Tensor) -> Rejection:
    """The threshold that best separates the probabilities of known and unknown items, with equal weight for both."""
    values = torch.cat([known, unknown]).unique()
    thresholds = torch.cat([values.new_zeros(1), (values[1:] + values[:-1]) / 2])
    kept = (known >= thresholds.unsqueeze(1)).double().mean(1)
    refused = (unknown < thresholds.unsqueeze(1)).double().mean(1)
    good = kept + refused
    best = torch.nonzero(good == good.max()).flatten()
    middle = int(best[len(best) // 2])
    return Rejection(float(thresholds[middle]), float(kept[middle]), float(refused[middle]), len(known), len(unknown))


def temperature(logits: Tensor, slots: Tensor) -> float:
    """The most likely temperature of held-out logits `[folds, way]`, with a prior centred on 1; 1 if there are none."""
    logs = np.linspace(-3, 3, 241)
    likely = [
        functional.cross_entropy(logits / math.exp(step), slots, reduction="sum").item() + step**2 / (2 * SPREAD**2)
        for step in logs.tolist()
    ]
    return math.exp(logs[int(np.argmin(likely))])


def estimate(logits: Tensor, slots: Tensor) -> Estimate:
    """The accuracy of held-out logits `[folds, way]`."""
    if len(slots) == 0:
        raise ValueError("leave_one_out = true, but no class has two support items, so that none can be left out. Add some.")
    right = int((logits.argmax(1) == slots).sum())
    return Estimate(right / len(slots), *wilson(right, len(slots)), len(slots))


def check_threshold(reject_below: object, auto: bool = False) -> None:
    """Refuses anything but a probability, None, or `auto` if that is allowed."""
    if reject_below is None or (auto and reject_below == "auto"):
        return
    if isinstance(reject_below, int | float | np.floating) and not isinstance(reject_below, bool) and 0 <= reject_below <= 1:
        return
    others = "auto, or null" if auto else "or None; what auto would be is classifier.rejection().threshold"
    raise ValueError(f"reject_below = {reject_below}, but it must be a probability from 0 to 1, {others}.")
