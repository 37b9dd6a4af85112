"""Hard tasks: some of each meta-batch draw their classes among those that the last ones failed at (Sun et al. 2019).

What comes back at step k are failures up to step k - 2, so that the episodes of a step are settled when a thread prepares
them one step ahead, and the run that is resumed draws the same ones.
"""

import numpy as np
import torch

from fsl_cli import parallel
from fsl_cli.algos.base import Algorithm
from fsl_cli.episodes import EpisodeSampler, Hard

LAG = 2  # steps
KEPT = 100  # failures that a step chooses from
Failure = tuple[int, int]  # step, class number


def hard(algo: Algorithm, failures: list[Failure], step: int) -> Hard | None:
    """What the hard tasks of a step are drawn from; None for algorithms without them."""
    if not algo.hard_tasks:
        return None
    known = [number for when, number in failures if when <= step - LAG]
    return Hard(algo.hard_tasks, np.unique(np.array(known[-KEPT:], dtype=np.int64)))


def failed(algo: Algorithm, sampler: EpisodeSampler, failures: list[Failure], step: int) -> list[Failure]:
    """`failures` and those of the step just done: of each task the class with the least accuracy, if that is below 1."""
    if not algo.by_class:  # the step was left out, by all processes
        return failures
    least, places = torch.cat(algo.by_class).min(dim=1)  # [tasks of this process]
    algo.by_class.clear()
    mine = [place if right < 1 else None for right, place in zip(least.tolist(), places.tolist(), strict=True)]
    everyone = [place for part in parallel.gather(mine) for place in part]
    classes = sampler.classes_of(step, hard(algo, failures, step))  # [tasks, way]
    new = [(step, int(row[place])) for row, place in zip(classes, everyone, strict=True) if place is not None]
    return [*failures, *new][-KEPT - LAG * len(classes) :]
