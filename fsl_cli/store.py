"""Gathers items into episodes and batches on the device."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fsl_cli.datasets.augment import DRAWS, Augment
from fsl_cli.episodes import AUGMENT, Episode, Examples, Indices, P, Points, generator, split

T = TypeVar("T")


class ItemStore(ABC):
    """Makes episodes and batches on the device from what a subclass gathers: items, or their embeddings."""

    device: torch.device
    augment: Augment

    @property
    @abstractmethod
    def near(self) -> bool:
        """Whether the data are on the device, so that batches need no prefetching."""

    @abstractmethod
    def gather(self, indices: Indices) -> Tensor:
        """Items, or their embeddings, `[..., *item]` for indices `[...]`."""

    def vary(self, indices: P, seed: int, step: int) -> P:
        """The same indices, with the random numbers for the augmentation in training step `step`, if there is any."""
        if isinstance(indices, Points) or not self.augment:
            return indices
        draws = generator(seed, AUGMENT, step).random((*indices.items.shape, DRAWS), dtype=np.float32)
        return indices._replace(draws=draws)

    def episodes(self, indices: Indices | Points, shot: int) -> Episode:
        """A meta-batch of episodes from indices `[tasks, way, shot + queries]`; targets are one-hot."""
        assert isinstance(indices, Indices), "a store holds items"
        return split(self.gather(indices), shot)

    def batch(self, indices: Indices, labels: np.ndarray, classes: int) -> Examples:
        """A supervised batch: inputs `[batch, *item]`, targets `[batch, classes]`."""
        targets = send(labels, self.device)
        return Examples(self.gather(indices), torch.nn.functional.one_hot(targets, classes).float())


class Store(ItemStore):
    """The items of a data set themselves: images as floats in [0, 1], or texts as tokens.

    They are kept on the device if they take at most `budget` bytes; otherwise each batch is copied from `items` to the device.
    """

    def __init__(
        self,
        items: np.ndarray,
        device: torch.device,
        budget: float = math.inf,
        augment: Augment | None = None,
        texts: list[str] | None = None,
    ) -> None:
        """`texts`: the texts whose tokens the items are, for pictures of episodes."""
        self.texts = texts
        self.device, self.augment = device, augment or Augment()
        self.resident = torch.tensor(np.asarray(items), device=device) if items.nbytes <= budget else None
        self.items = items  # uint8 [n, C, H, W], or int64 [n, length]
        self.shape = items.shape[1:]
        self.lengths = (items != 0).sum(1) if items.ndim == 2 else None  # number of tokens [n]; None for images
        if self.lengths is not None:
            return
        height, width = self.shape[-2:]
        pixels = np.arange(height * width).reshape(height, width)
        turns = range(4 if height == width else 1)  # only squares can be rotated
        turned = np.stack([np.rot90(side, k).flatten() for side in (pixels, np.fliplr(pixels)) for k in turns])
        self.turned = torch.as_tensor(turned, device=device)  # [turns, H * W]: where each pixel of a turned item comes from

    def gather(self, indices: Indices) -> Tensor:
        """Items `[..., *item]` for indices `[...]`."""
        items = self._fetch(indices.items.ravel())  # [n, C, H, W] or [n, length]
        if self.lengths is not None:  # cuts the padding that all these texts share
            return items[:, : max(1, self.lengths[indices.items].max())].unflatten(0, indices.items.shape)
        if indices.turns.any():
            turns = send(indices.turns.ravel(), self.device)
            source = self.turned[turns].unsqueeze(1).expand(-1, self.shape[0], -1)  # [n, C, H * W]
            items = items.flatten(2).gather(2, source)
        inputs = items.to(torch.float32) / 255
        if indices.draws is not None:
            inputs = self.augment(inputs, send(indices.draws.reshape(-1, DRAWS), self.device))
        return inputs.reshape(*indices.items.shape, *self.shape)

    def _fetch(self, numbers: np.ndarray) -> Tensor:
        if self.resident is not None:
            return self.resident[send(numbers, self.device)]
        return send(np.take(self.items, numbers, axis=0), self.device)  # np.take releases the GIL

    @property
    def near(self) -> bool:
        return self.resident is not None


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to the device, without waiting for a GPU."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Ahead(Generic[T]):
    """Calls `prepare(step)` for consecutive steps; a thread prepares the next one while this one is used."""

    def __init__(self, prepare: Callable[[int], T]) -> None:
        self.prepare = prepare
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="fsl-data")
        self.coming: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        ready = self.coming[1].result() if self.coming and self.coming[0] == step else self.prepare(step)
        self.coming = (step + 1, self.pool.submit(self.prepare, step + 1))
        return ready
