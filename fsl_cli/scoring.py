"""Scores an algorithm on a fixed list of episodes; validation and evaluation use the same code.

Several processes share the list and gather the scores, so that all of them get the same accuracy.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from fsl_cli import parallel
from fsl_cli.algos.base import Algorithm
from fsl_cli.episodes import Examples, Indices, chunks, split
from fsl_cli.errors import out_of_memory
from fsl_cli.features import embeddings
from fsl_cli.metrics import Errors, Scores, concatenate, score_logits, score_values
from fsl_cli.sources import AnyStore, Sampler
from fsl_cli.store import Store

log = logging.getLogger(__name__)

CACHED_VALUES = 2**28  # most numbers in the embeddings scored at once; limits memory for large ways
CURVE_EPISODES = 48  # at most in a curve: on all episodes it would take as long as the accuracy itself


@torch.no_grad()
def score(algo: Algorithm, store: AnyStore, sampler: Sampler, episodes: int) -> Scores | Errors:
    """Scores the first `episodes` episodes of a fixed list, under the algorithm's norm protocol."""
    training = algo.training
    algo.eval()
    mine = parallel.part(episodes)
    parts = _score(algo, store, sampler, mine) if mine.stop > mine.start else []  # there may be more processes than episodes
    algo.train(training)
    return concatenate([scores for scores in parallel.gather(concatenate(parts) if parts else None) if scores])


def _score(algo: Algorithm, store: AnyStore, sampler: Sampler, part: slice) -> list[Scores] | list[Errors]:
    """Scores a part of the list, batch by batch."""
    indices = sampler.fixed(part.start, part.stop)
    if isinstance(store, Store) and isinstance(indices, Indices) and algo.bulk and algo.norm == "running":
        return _score_cached(algo, store, indices, sampler.shot)
    parts, done = [], 0
    while done < len(indices.items):
        batch = store.episodes(indices.rows(slice(done, done + algo.score_chunk)), sampler.shot)
        try:
            if algo.regression:
                parts.append(score_values(algo.curves(batch), batch.query.targets))
            else:
                parts.append(score_logits(algo.predictions(batch), batch.query.targets))
        except RuntimeError as error:
            if not out_of_memory(error) or algo.score_chunk == 1:
                raise
            algo.score_chunk //= 2
            log.info(f"Out of memory: {algo.score_chunk} episodes are scored at once from here on.")
        else:
            done += len(batch.query.targets)
    return parts


def _score_cached(algo: Algorithm, store: Store, indices: Indices, shot: int) -> list[Scores]:
    """Embeds every item of the list once, and scores all episodes from the embeddings."""
    keys, places = np.unique(indices.keys, return_inverse=True)
    features = embeddings(algo, store, keys)
    places = torch.as_tensor(places.reshape(indices.items.shape), device=features.device)  # [episodes, way, shot + queries]
    parts = []
    most = max(1, CACHED_VALUES // (places[0].numel() * features.shape[1]))
    for part in places.split(min(algo.cached_chunk, most)):
        episodes = split(features[part], shot)
        parts.append(score_logits(algo.scores(episodes), episodes.query.targets))
    return parts


@torch.no_grad()
def adaptation_curve(algo: Algorithm, store: AnyStore, sampler: Sampler, episodes: int) -> list[float]:
    """Query accuracy before and after each inner step, over a few episodes; empty for bulk algorithms and without inner steps."""
    if algo.bulk:
        return []
    training = algo.training
    algo.eval()
    batch = store.episodes(sampler.fixed(0, min(episodes, CURVE_EPISODES)), sampler.shot)
    right = [_right(algo.curves(part), part.query) for part, _ in chunks(batch, algo.score_chunk)]  # each [tasks, steps + 1]
    algo.train(training)
    means = torch.cat(right).mean(0).tolist()
    return means if len(means) > 1 else []


def _right(logits: Tensor, query: Examples) -> Tensor:
    return (logits.argmax(-1) == query.targets.argmax(-1).unsqueeze(1)).float().mean(-1)
