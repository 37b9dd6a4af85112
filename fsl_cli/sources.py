"""Where episodes come from: the sampler and the store that go with a data set, be it of items or of functions."""

from typing import Any

import torch

from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.datasets.texts import to_texts
from fsl_cli.episodes import EpisodeSampler
from fsl_cli.functions import FunctionSampler, FunctionStore
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.texts import TextEmbedding
from fsl_cli.store import Store

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
