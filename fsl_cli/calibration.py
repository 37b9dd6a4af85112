"""How sure and how good a classifier is, from its own support images: each is judged by what the others teach."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fsl_cli.algos.base import Algorithm
from fsl_cli.episodes import Episode, Examples
from fsl_cli.metrics import wilson

ITEMS = 1000  # raw items that are adapted to at once
FEATURES = 20_000  # embeddings likewise
DRAW_SEED = 20261121  # of the images that are held out if not all are
SPREAD = 0.5  # how far, in logarithms, a temperature may well be from 1: few images cannot say much about it


class Estimate(NamedTuple):
    """An accuracy on held-out images, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    images: int


def held_out(
    algo: Algorithm, support: Examples, embedded: bool, least: int = 2, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits `[folds, way]` of support items, each left out in turn while the others are adapted to, and their slots.

    Only items of classes with `least` items or more are left out: one that is alone cannot be. `limit`: at most so many,
    drawn evenly; None: all.
    """
    slots = support.targets.argmax(1)
    rows = torch.nonzero(support.targets.sum(0)[slots] >= least).flatten().cpu().numpy()
    if limit is not None and len(rows) > limit:
        rows = np.sort(np.random.default_rng(DRAW_SEED).permutation(rows)[:limit])
    left = torch.as_tensor(rows, device=slots.device)
    n = len(slots)
    parts = [support.targets.new_empty(0, support.targets.shape[1])]
    for folds in left.split(max(1, (FEATURES if embedded else ITEMS) // n)) if len(left) else ():
        others = torch.arange(n - 1, device=slots.device).repeat(len(folds), 1)
        others += others >= folds.unsqueeze(1)  # [folds, n - 1]: all rows but the one that is left out
        query = folds.unsqueeze(1)
        batch = Episode(*(Examples(support.inputs[rows], support.targets[rows]) for rows in (others, query)))
        parts.append((algo.scores(batch) if embedded else algo.predictions(batch)).squeeze(1))
    return torch.cat(parts), slots[left]


def temperature(logits: Tensor, slots: Tensor) -> float:
    """The temperature under which held-out logits `[folds, way]` are most likely, drawn towards 1; 1 if there are none."""
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
