"""Episodes of functions, for regression: points drawn anew, where episodes.py draws items of classes.

As there, what step `k` of a stream holds is a pure function of (seed, stream, step).
"""

from typing import Any

import numpy as np
import torch

from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.datasets.texts import to_texts
from fsl_cli.episodes import Episode, EpisodeSampler, Examples, Indices, P, Points, generator
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.texts import TextEmbedding
from fsl_cli.store import Store


class FunctionSampler:
    """Draws `tasks` functions a step, and `shot + queries` points of each; with EpisodeSampler's interface."""

    way = 1
    classes = ()

    def __init__(
        self, data: Drawn, way: Any, shot: Any, queries: int, tasks: int, seed: int, stream: int, prefix: str = "task."
    ) -> None:
        """`prefix` is how the user calls the numbers in a message: `task.` or `task.train_`."""
        if way != 1:
            raise ValueError(f"{prefix}way = {way}, but the functions of dataset={data.name} have one value: use task=sine.")
        if not isinstance(shot, int):
            raise ValueError(f"{prefix}shot = {shot}, but for functions it must be a whole number.")
        for name, value, least in ((f"{prefix}shot", shot, 1), (f"{prefix}queries", queries, 0), ("task.tasks", tasks, 1)):
            if value < least:
                raise ValueError(f"{name} = {value}, but it must be at least {least}.")
        self.draw, self.shot, self.queries = data.draw, shot, queries
        self.tasks, self.seed, self.stream = tasks, seed, stream

    def indices(self, step: int) -> Points:
        """The points of step `step`: `[tasks, 1, shot + queries]`, the support first."""
        drawn = self.draw(generator(self.seed, self.stream, step), self.tasks, self.shot + self.queries)
        return Points(*(column[:, None] for column in drawn))

    def fixed(self, start: int, stop: int) -> Points:
        """Evaluation episodes `start` to `stop`, one key each, so that the list does not depend on how it is cut."""
        assert self.tasks == 1, "an evaluation episode has its own key"
        drawn = [self.indices(number) for number in range(start, stop)]
        return Points(*(np.concatenate(column) for column in zip(*drawn, strict=True)))


class FunctionStore:
    """Makes episodes of points; with Store's interface, though there is nothing to keep."""

    near = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def vary(self, indices: P, seed: int, step: int) -> P:  # noqa: ARG002
        """The same points: nothing is augmented."""
        return indices

    def episodes(self, indices: Indices | Points, shot: int) -> Episode:
        """A meta-batch of episodes from points `[tasks, 1, shot + queries]`; inputs and targets are `[tasks, n, 1]`."""
        assert isinstance(indices, Points), "functions are drawn as points"
        x, y = (torch.as_tensor(column, dtype=torch.float32, device=self.device).mT for column in indices)
        return Episode(Examples(x[:, :shot], y[:, :shot]), Examples(x[:, shot:], y[:, shot:]))


Sampler = EpisodeSampler | FunctionSampler
AnyStore = Store | FunctionStore


def open_store(data: Packed | Drawn, place: torch.device, budget: float, model: Embedding) -> AnyStore:
    """What makes episodes of the data for `model` on the device, of which they may take `budget` bytes."""
    if isinstance(data, Drawn):
        return FunctionStore(place)
    if isinstance(model, TextEmbedding):
        texts = to_texts(data.items)
        return Store(model.encode(texts), place, budget, texts=texts)
    return Store(data.items, place, budget, data.augment)


def open_sampler(
    data: Packed | Drawn, split: str, shape: tuple[Any, Any, int, int], seed: int, stream: int, prefix: str = "task."
) -> Sampler:
    """What draws episodes of `shape` (way, shot, queries, tasks) from a split."""
    if isinstance(data, Drawn):
        return FunctionSampler(data, *shape, seed, stream, prefix)
    return EpisodeSampler(data.classes(split), *shape, seed, stream, prefix)
