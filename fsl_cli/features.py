"""Cached embeddings: if the network is frozen, each item passes through it only once."""

import logging
import math
import sys

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fsl_cli.algos.base import Algorithm
from fsl_cli.datasets.packed import LYING, Classes
from fsl_cli.episodes import BatchSampler, EpisodeSampler, Indices
from fsl_cli.models.norm import norm_layers
from fsl_cli.sources import AnyStore, Sampler
from fsl_cli.store import ItemStore, Store, send

log = logging.getLogger(__name__)

EMBED_BATCH, EMBED_VALUES = 1000, 2**21  # most items embedded at once, and most numbers in them
PROBED = 32  # items on which a network is checked for dropout
Keys = np.ndarray  # [n] pairs of item and turn, see Indices.keys


@torch.no_grad()
def embeddings(algo: Algorithm, store: Store, keys: Keys, told: bool = False) -> Tensor:
    """The embeddings `[n, ...]` of items by `algo.embed`; `told`: shows a progress bar on a terminal."""
    indices = Indices.of(keys)
    order = np.arange(len(keys)) if store.lengths is None else np.argsort(store.lengths[indices.items], kind="stable")
    indices = Indices.of(keys[order])  # sorted so that texts of similar length are together
    size = min(EMBED_BATCH, max(1, EMBED_VALUES // math.prod(store.shape)))
    places = torch.as_tensor(order, device=store.device)
    found = None
    with tqdm(total=len(keys), unit="item", desc="embedding", disable=not (told and sys.stderr.isatty())) as bar:
        for cut in range(0, len(keys), size):
            part = algo.embed(store.gather(indices.rows(slice(cut, cut + size))))
            found = part.new_empty(len(keys), *part.shape[1:]) if found is None else found
            found[places[cut : cut + size]] = part
            bar.update(len(part))
    assert found is not None, "there is an item to embed"
    return found


class FeatureStore(ItemStore):
    """Makes episodes and batches of cached embeddings instead of items."""

    def __init__(self, algo: Algorithm, store: Store, keys: Keys) -> None:
        self.device, self.augment = store.device, store.augment
        self.features = embeddings(algo, store, keys, told=True)
        self.rows = np.zeros(len(LYING) * len(store.items), dtype=np.int64)  # key -> row of its embedding
        self.rows[keys] = np.arange(len(keys))

    @property
    def near(self) -> bool:
        return True

    def gather(self, indices: Indices) -> Tensor:
        """Embeddings `[..., features]` for indices `[...]`."""
        rows = self.rows[indices.keys]
        return self.features[send(rows, self.features.device)]


def training_store(algo: Algorithm, store: AnyStore, sampler: Sampler | BatchSampler, steps: int, budget: float) -> AnyStore:
    """The store for training: of items, or of their embeddings if these are constant, fit in memory and save work.

    They save work if training draws at least as many items as there are in the training classes.
    `budget`: bytes that items and embeddings may take. Sets `algo.embedded` if batches hold embeddings.
    """
    if not (isinstance(store, Store) and isinstance(sampler, EpisodeSampler)):
        return store
    keys = _keys(sampler.classes)
    asked = steps * sampler.tasks * sampler.ways[0] * (sampler.shots[0] + sampler.queries)
    room = 4 * len(keys) * algo.model.out_features + (store.items.nbytes if store.near else 0) <= budget
    if store.augment or not room or asked < len(keys) or not constant(algo, store, keys[:PROBED]):
        return store
    log.info(f"The network stays as it is: all {len(keys):,} training items are embedded once.")
    algo.embedded = True
    return FeatureStore(algo, store, keys)


def constant(algo: Algorithm, store: Store, keys: Keys) -> bool:
    """Whether embeddings stay the same during training: no weight is trained, no statistic updated, no dropout drawn."""
    if not algo.bulk or not all(layer.frozen for layer in norm_layers(algo.model)):
        return False
    inputs = store.gather(Indices.of(keys))
    algo.train()
    with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        once, again = (algo.embed(inputs) for _ in range(2))
    return not once.requires_grad and once.equal(again)


def _keys(classes: Classes) -> Keys:
    """The keys of all items of some classes, each once."""
    ranges = zip(classes.starts, classes.counts, classes.turns, strict=True)
    return np.unique(np.concatenate([Indices(np.arange(start, start + count), turn).keys for start, count, turn in ranges]))
