#!/usr/bin/env python
"""Prints the peak memory of a MAML step by inner steps and by tasks, each case measured in a process of its own.

    .venv/bin/python scripts/memory.py

Second order, Omniglot's 28x28, strided Conv4-64, 5-way 1-shot, 15 queries: what the step adds to the process (on a CPU, with
Linux and one thread) or to what is allocated on the CUDA device, after a smaller step has loaded the libraries.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peak import peak
from torch.nn import functional

from fsl_cli import device
from fsl_cli.algos.maml import MAML
from fsl_cli.episodes import Episode, Examples
from fsl_cli.models.conv4 import Conv4

STEPS, TASKS = (1, 5, 10, 20), (1, 4, 16, 64)


def batch(tasks: int, place: torch.device) -> Episode:
    """Random episodes, 5-way 1-shot with 15 queries: their content does not affect memory."""
    targets = functional.one_hot(torch.arange(5).repeat_interleave(16), 5).float().expand(tasks, -1, -1)
    whole = Examples(torch.rand(tasks, 80, 1, 28, 28), targets)
    cut = torch.arange(80) % 16 == 0
    return Episode(*(Examples(*(t[:, rows].to(place) for t in whole)) for rows in (cut, ~cut)))


def training_step(where: str, inner_steps: int, tasks: int, chunk: int, recompute: bool) -> Callable[[], object]:
    """The step to measure; a smaller one runs here, which loads the libraries."""
    place = device.choose(where, 1)
    algo = MAML(Conv4((1, 28, 28), 64, "stride"), 5, 0.1, inner_steps, inner_steps, recompute=recompute)
    algo = device.settle(algo, place).train()
    algo.task_chunk = chunk
    work = batch(tasks, place)
    small = MAML(Conv4((1, 28, 28), 8, "stride"), 5, 0.1, 2, 2, recompute=recompute).to(place)
    small.backward(batch(2, place))
    return lambda: algo.backward(work)


def cell(*case: Any) -> str:
    """The peak MiB of a case (the arguments of `training_step`), as text; "failed" if it fails."""
    mib = peak(training_step, *case)
    return "failed" if mib is None else f"{mib:.0f}"


def main() -> None:
    """Measures and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    where = parser.parse_args().device
    print("| MiB by inner steps, 4 tasks in one chunk |", " | ".join(map(str, STEPS)), "|\n|" + " --- |" * (1 + len(STEPS)))
    for recompute in (False, True):
        cells = [cell(where, steps, 4, 4, recompute) for steps in STEPS]
        print(f"| `algo.recompute={str(recompute).lower()}` |", " | ".join(cells), "|")
    print("\n| MiB by tasks, 5 inner steps |", " | ".join(map(str, TASKS)), "|\n|" + " --- |" * (1 + len(TASKS)))
    for words, chunks in (("in chunks of 4", [4] * len(TASKS)), ("in one chunk", TASKS)):
        cells = [cell(where, 5, tasks, chunk, False) for tasks, chunk in zip(TASKS, chunks, strict=True)]
        print(f"| {words} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
