"""Hard tasks: some tasks of each meta-batch draw from classes that recent tasks failed at (Sun et al. 2019)."""

import numpy as np
import torch

from fsl_cli import parallel
from fsl_cli.algos.base import Algorithm
from fsl_cli.episodes import EpisodeSampler, Hard

KEPT = 100  # most recent failures kept


def hard(algo: Algorithm, failures: list[int]) -> Hard | None:
    """The hard tasks of a step, which draw from the classes `failures`; None for algorithms without hard tasks."""
    return Hard(algo.hard_tasks, np.unique(np.array(failures, dtype=np.int64))) if algo.hard_tasks else None


def failed(algo: Algorithm, sampler: EpisodeSampler, failures: list[int], step: int) -> list[int]:
    """`failures` with those of the last step added: the worst class of each task, if its accuracy is below 1."""
    if not algo.by_class:  # the step was skipped, by all processes
        return failures
    least, places = torch.cat(algo.by_class).min(dim=1)  # [tasks of this process]
    algo.by_class.clear()
    mine = [place if right < 1 else None for right, place in zip(least.tolist(), places.tolist(), strict=True)]
    everyone = [place for part in parallel.gather(mine) for place in part]
    classes = sampler.classes_of(step, hard(algo, failures))  # [tasks, way]
    new = [int(row[place]) for row, place in zip(classes, everyone, strict=True) if place is not None]
    return [*failures, *new][-KEPT:]
