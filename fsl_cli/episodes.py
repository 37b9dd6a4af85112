"""Stateless samplers: which items form step `k` of a stream.

`indices(step)` is a pure function of (seed, stream, step), so that resuming needs only the step number, every process draws the
same list, and a CPU and a GPU see the same episodes. Hard tasks (hard.py) also depend on the failures in the checkpoint.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fsl_cli.datasets.packed import LYING, Classes
from fsl_cli.structures import map_tensors

# Training and evaluation have different streams, so that equal seeds never draw the same episodes.
TRAIN, AUGMENT, ORDER = 0, 1, 2
EVALUATION = {"train": 10, "val": 11, "test": 12}


class Examples(NamedTuple):
    """Labelled items; in a meta-batch, both tensors have a leading `tasks`."""

    inputs: Tensor  # [n, *item]
    targets: Tensor  # [n, way] one-hot, or [n, *out] for regression


class Episode(NamedTuple):
    """One task: the support to learn from, and the queries to be scored on."""

    support: Examples
    query: Examples


def chunks(batch: Episode, size: int | None) -> Iterator[tuple[Episode, float]]:
    """Cuts a meta-batch into parts of at most `size` tasks, each with its share of the whole."""
    tasks = len(batch.support.targets)
    for start in range(0, tasks, size or tasks):
        cut = slice(start, start + (size or tasks))
        part = map_tensors(batch, lambda tensor, cut=cut: tensor[cut])
        yield part, len(part.support.targets) / tasks


class Indices(NamedTuple):
    """Item numbers and the turn (rotation, reflection) of each, both `[tasks, way, each]` or `[n]`."""

    items: np.ndarray
    turns: np.ndarray
    draws: np.ndarray | None = None  # [..., DRAWS] random numbers for the augmentation of each item, in training

    @property
    def keys(self) -> np.ndarray:
        """One number for each pair of item and turn, same shape; `of` is the inverse."""
        return self.items * len(LYING) + self.turns

    @staticmethod
    def of(keys: np.ndarray) -> "Indices":
        """The items and turns of `keys`."""
        return Indices(*np.divmod(keys, len(LYING)))

    def rows(self, cut: slice) -> "Indices":
        """A slice of the tasks, or of the items of a batch."""
        return Indices(self.items[cut], self.turns[cut], None if self.draws is None else self.draws[cut])


class Hard(NamedTuple):
    """The first `tasks` tasks of a meta-batch draw from these classes, once there are at least `way` of them."""

    tasks: int
    classes: np.ndarray  # class numbers [n], each once


class Points(NamedTuple):
    """The points at which functions are sampled and the values there, both `[tasks, 1, each]`."""

    items: np.ndarray
    values: np.ndarray

    def rows(self, cut: slice) -> "Points":
        """A slice of the tasks."""
        return Points(self.items[cut], self.values[cut])


P = TypeVar("P", bound=Indices | Points)


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """The generator of one step of one stream."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, step))))


def _distinct(keys: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` smallest keys along the last axis, in the order of their keys: a random selection."""
    if count == keys.shape[-1]:
        return np.argsort(keys, axis=-1)
    chosen = np.argpartition(keys, count - 1, axis=-1)[..., :count]
    order = np.argsort(np.take_along_axis(keys, chosen, axis=-1), axis=-1)
    return np.take_along_axis(chosen, order, axis=-1)


def _places(rng: np.random.Generator, counts: np.ndarray, number: int) -> np.ndarray:
    """`number` distinct places `[tasks, way, number]` in each of some classes of `counts` `[tasks, way, 1]` items."""
    keys = rng.random((*counts.shape[:2], int(counts.max())))
    keys[np.arange(keys.shape[-1]) >= counts] = 2.0  # past the last item of the class: never chosen
    return _distinct(keys, number)


class EpisodeSampler:
    """Draws `tasks` episodes a step: `way` distinct classes each, and `shot + queries` distinct items of every class.

    Way and shot may be ranges `[least, most]`: every step draws one, for all its tasks. If the last items of each
    class are held out for queries (`classes.held`), queries are drawn from them and supports from the others.
    """

    def __init__(
        self,
        classes: Classes,
        way: int | list[int],
        shot: int | list[int],
        queries: int,
        tasks: int,
        seed: int,
        stream: int,
        prefix: str = "task.",
    ) -> None:
        """`prefix`: of the config keys in error messages, `task.` or `task.train_`."""
        self.ways, self.shots = (_range(value, prefix + name) for name, value in (("way", way), ("shot", shot)))
        self.way, self.shot = self.ways[1], self.shots[1]  # the largest
        for name, value, least in (("way", self.ways[0], 2), ("shot", self.shots[0], 1), ("queries", queries, 0)):
            if value < least:
                raise ValueError(f"{prefix}{name} = {value}, but it must be at least {least}.")
        if len(classes) < 2:
            raise ValueError(
                f"dataset: the {classes.split} split has only {len(classes)} class, and an episode needs two. Use more, or "
                "divide them otherwise (dataset.fractions, dataset.lists)."
            )
        if self.way > len(classes):
            raise ValueError(
                f"{prefix}way = {self.way}, but the {classes.split} split has only {len(classes)} classes. Lower {prefix}way."
            )
        smallest = int(np.argmin(classes.counts))
        if classes.held:
            self._check_parts(classes.counts[smallest] - classes.held, classes, queries, prefix)
        elif self.shot + queries > classes.counts[smallest]:
            mend = "Lower one of them." if self.shot + queries > 2 else "Add some to it, or remove it."
            raise ValueError(
                f"{prefix}shot + {prefix}queries = {self.shot} + {queries} = {self.shot + queries}, but class "
                f"{classes.names[smallest]!r} has {classes.counts[smallest]} items. {mend}"
            )
        self.classes, self.queries = classes, queries
        self.tasks, self.seed, self.stream = tasks, seed, stream

    def _check_parts(self, learned: int, classes: Classes, queries: int, prefix: str) -> None:
        for name, value, part, own in (("shot", self.shot, "training", learned), ("queries", queries, "test", classes.held)):
            if value > own:
                raise ValueError(
                    f"{prefix}{name} = {value}, but the {part} part of a class has {own} items. Lower it, or set "
                    "dataset.parts=false."
                )

    def indices(self, step: int, hard: Hard | None = None) -> Indices:
        """The items of step `step`: `[tasks, way, shot + queries]`, the support first."""
        rng = generator(self.seed, self.stream, step)
        chosen, shot = self._task(rng, hard)
        counts = self.classes.counts[chosen][..., None]
        if self.classes.held:
            learned = counts - self.classes.held
            asked = learned + _places(rng, np.full_like(counts, self.classes.held), self.queries)
            places = np.concatenate([_places(rng, learned, shot), asked], axis=-1)
        else:
            places = _places(rng, counts, shot + self.queries)
        items = self.classes.starts[chosen][..., None] + places
        return Indices(items, np.broadcast_to(self.classes.turns[chosen][..., None], items.shape))

    def classes_of(self, step: int, hard: Hard | None = None) -> np.ndarray:
        """The class numbers of step `step`: `[tasks, way]`."""
        return self._task(generator(self.seed, self.stream, step), hard)[0]

    def _task(self, rng: np.random.Generator, hard: Hard | None) -> tuple[np.ndarray, int]:
        """Class numbers `[tasks, way]` and the shot of a step."""
        way, shot = (low if low == high else int(rng.integers(low, high + 1)) for low, high in (self.ways, self.shots))
        keys = rng.random((self.tasks, len(self.classes)), dtype=np.float32)
        # The keys are multiples of 2^-24, so some are equal, and the order of equal ones would depend on the CPU.
        chosen = _distinct(keys + np.arange(len(self.classes)) * 2.0**-50, way)
        if hard is not None and len(hard.classes) >= way:
            chosen[: hard.tasks] = hard.classes[_distinct(rng.random((hard.tasks, len(hard.classes))), way)]
        return chosen, shot

    def fixed(self, start: int, stop: int) -> Indices:
        """Evaluation episodes `start` to `stop`, each with its own key, so that the list does not depend on how it is cut."""
        assert self.tasks == 1, "an evaluation episode has its own key"
        drawn = [self.indices(number) for number in range(start, stop)]
        return Indices(np.concatenate([d.items for d in drawn]), np.concatenate([d.turns for d in drawn]))


def _range(value: int | list[int], key: str) -> tuple[int, int]:
    """The least and the largest value of a number or a range `[least, most]` in the config."""
    ends = list(value) if isinstance(value, Sequence) else [value, value]
    if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends) or ends[0] > ends[1]:
        raise ValueError(f"{key} = {value}, but it must be a whole number, or a range of two: {key}=[5,20].")
    return ends[0], ends[1]


class BatchSampler:
    """Draws `batch` items a step from all classes, epoch by epoch without replacement, for supervised pre-training."""

    def __init__(self, classes: Classes, batch: int, seed: int, stream: int) -> None:
        self.labels = np.repeat(np.arange(len(classes)), classes.counts)  # [n]
        within = np.arange(len(self.labels)) - np.repeat(np.cumsum(classes.counts) - classes.counts, classes.counts)
        self.items = classes.starts[self.labels] + within
        self.turns = classes.turns[self.labels]
        if not 1 <= batch <= len(self.labels):
            raise ValueError(f"algo.batch = {batch}, but it must be 1 to {len(self.labels)}, the number of training items.")
        self.batch, self.seed = batch, seed
        self._order = lru_cache(maxsize=1)(lambda epoch: generator(seed, stream, epoch).permutation(len(self.labels)))

    def indices(self, step: int) -> tuple[Indices, np.ndarray]:
        """The items of step `step` and their class numbers, all `[batch]`."""
        epoch, place = divmod(step, len(self.labels) // self.batch)
        chosen = self._order(epoch)[place * self.batch : (place + 1) * self.batch]
        return Indices(self.items[chosen], self.turns[chosen]), self.labels[chosen]


def split(items: Tensor, shot: int) -> Episode:
    """Episodes of items `[tasks, way, shot + queries, ...]`: the first `shot` of each class are the support."""
    return Episode(_label(items[:, :, :shot]), _label(items[:, :, shot:]))


def _label(items: Tensor) -> Examples:
    """Items `[tasks, way, each, ...]` -> inputs `[tasks, way * each, ...]` and one-hot targets `[tasks, way * each, way]`."""
    tasks, way, each = items.shape[:3]
    slots = torch.eye(way, device=items.device).repeat_interleave(each, dim=0)
    return Examples(items.flatten(1, 2), slots.expand(tasks, -1, -1))
