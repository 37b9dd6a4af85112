"""The sampler and the store of a data set, whether it has items or functions."""

import hashlib
import json
from typing import Any

import torch
from omegaconf import DictConfig

from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.datasets.texts import to_texts
from fsl_cli.episodes import EVALUATION, EpisodeSampler
from fsl_cli.functions import FunctionSampler, FunctionStore
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.texts import TextEmbedding
from fsl_cli.store import ItemStore, Store

Sampler = EpisodeSampler | FunctionSampler
AnyStore = ItemStore | FunctionStore


def open_store(data: Packed | Drawn, place: torch.device, budget: float, model: Embedding) -> AnyStore:
    """The store of a data set for `model`, which may keep `budget` bytes on the device."""
    if isinstance(data, Drawn):
        return FunctionStore(place)
    if isinstance(model, TextEmbedding):
        texts = to_texts(data.items)
        return Store(model.encode(texts), place, budget, texts=texts)
    return Store(data.items, place, budget, data.augment)


def contents(data: Packed | Drawn, split: str) -> str | None:
    """A short hash of a split: its class names and numbers of items, and the texts if it has any; None for functions.

    Pixels are left out, because versions of an image decoder differ.
    """
    if isinstance(data, Drawn):
        return None
    classes = data.classes(split)
    found = hashlib.blake2b(json.dumps([classes.names, classes.counts.tolist()]).encode(), digest_size=8)
    if not data.item_shape:
        for start, count in zip(classes.starts, classes.counts, strict=True):
            found.update("\n".join(to_texts(data.items[start : start + count])).encode())
    return found.hexdigest()


def open_sampler(
    data: Packed | Drawn, split: str, shape: tuple[Any, Any, int, int], seed: int, stream: int, prefix: str = "task."
) -> Sampler:
    """A sampler of episodes of `shape` (way, shot, queries, tasks) from a split."""
    if isinstance(data, Drawn):
        return FunctionSampler(data, *shape, seed, stream, prefix)
    return EpisodeSampler(data.classes(split), *shape, seed, stream, prefix)


def evaluation_sampler(cfg: DictConfig, data: Packed | Drawn, split: str, seed: int) -> Sampler:
    """The sampler of the fixed evaluation episodes of a split."""
    if split not in EVALUATION:
        raise ValueError(f"split = {split!r}, but {data.name} has {', '.join(EVALUATION)}. Choose one of them.")
    if cfg.task.queries < 1:
        raise ValueError(f"task.queries = {cfg.task.queries}, but an episode is scored on its queries: it must be at least 1.")
    shape = (cfg.task.way, cfg.task.shot, cfg.task.queries, 1)
    return open_sampler(data, split, shape, seed, EVALUATION[split])
