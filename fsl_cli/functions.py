"""Episodes of functions, for regression: the counterpart of episodes.py, with points drawn instead of items.

As there, the content of step `k` of a stream is a pure function of (seed, stream, step).
"""

from typing import Any

import numpy as np
import torch

from fsl_cli.datasets.drawn import Drawn
from fsl_cli.episodes import Episode, Examples, Indices, P, Points, generator
from fsl_cli.store import send


class FunctionSampler:
    """Draws `tasks` functions a step, and `shot + queries` points of each; same interface as EpisodeSampler."""

    way = 1
    classes = ()

    def __init__(
        self, data: Drawn, way: Any, shot: Any, queries: int, tasks: int, seed: int, stream: int, prefix: str = "task."
    ) -> None:
        """`prefix`: start of the config keys in error messages, `task.` or `task.train_`."""
        if way != 1:
            raise ValueError(f"{prefix}way = {way}, but the functions of dataset={data.name} have one value: use task=sine.")
        if not isinstance(shot, int):
            raise ValueError(f"{prefix}shot = {shot}, but for functions it must be a whole number.")
        for name, value, least in (("shot", shot, 1), ("queries", queries, 0)):
            if value < least:
                raise ValueError(f"{prefix}{name} = {value}, but it must be at least {least}.")
        self.draw, self.shot, self.queries = data.draw, shot, queries
        self.tasks, self.seed, self.stream = tasks, seed, stream

    def indices(self, step: int) -> Points:
        """The points of step `step`: `[tasks, 1, shot + queries]`, the support first."""
        drawn = self.draw(generator(self.seed, self.stream, step), self.tasks, self.shot + self.queries)
        return Points(*(column[:, None] for column in drawn))

    def fixed(self, start: int, stop: int) -> Points:
        """Evaluation episodes `start` to `stop`, the same ones whatever part of the list is asked for."""
        assert self.tasks == 1, "an evaluation episode has its own key"
        drawn = [self.indices(number) for number in range(start, stop)]
        return Points(*(np.concatenate(column) for column in zip(*drawn, strict=True)))


class FunctionStore:
    """Makes episodes of points; same interface as Store."""

    near = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def vary(self, indices: P, seed: int, step: int) -> P:  # noqa: ARG002
        """Returns the same points: there is no augmentation."""
        return indices

    def episodes(self, indices: Indices | Points, shot: int) -> Episode:
        """A meta-batch of episodes from points `[tasks, 1, shot + queries]`; inputs and targets are `[tasks, n, 1]`."""
        assert isinstance(indices, Points), "functions are drawn as points"
        x, y = (send(column.astype(np.float32), self.device).mT for column in indices)
        return Episode(Examples(x[:, :shot], y[:, :shot]), Examples(x[:, shot:], y[:, shot:]))
