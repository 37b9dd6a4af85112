"""Measures which chunk size, memory layout and threads make a training step fastest on this machine, and caches the choice."""

import itertools
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fsl_cli import parallel
from fsl_cli.algos.base import Algorithm, Batch
from fsl_cli.datasets.packed import digest
from fsl_cli.episodes import Episode
from fsl_cli.errors import out_of_memory
from fsl_cli.speed import UNMEASURED, WARM_UP, Choice, batch_on_gpu, reset, step_function, tasks, use
from fsl_cli.structures import leaves
from fsl_cli.whole import whole

log = logging.getLogger(__name__)

CHUNK = 8  # tasks mapped at once if nothing was measured
WORTHWHILE = 100  # steps; in a shorter run, measuring costs more than it saves
ROUNDS = 3  # of timing; the fastest step of each candidate counts
PATIENCE = 20.0  # seconds, after which no further round starts: such long steps vary little
HOPELESS, BEHIND = 3, 1.2  # multiples of the best time: slower candidates are dropped, after the warm-up and after later rounds


def fastest(cfg: DictConfig, algo: Algorithm, batch: Batch, kept: Choice | None) -> Choice:
    """How a run computes its steps: as typed, else as its checkpoint or an earlier run chose, else as measured now.

    A measured choice is stored in the cache folder, so that the same command on the same machine computes the same bits again.
    """
    asked = {name: cfg.device[name] for name in UNMEASURED}
    if batch_on_gpu(batch) and asked["threads"] == "auto":
        asked["threads"] = None
    if not isinstance(batch, Episode) and asked["task_chunk"] == "auto":
        asked["task_chunk"] = None
    if not divisible(algo, batch):
        if asked["workers"] not in (1, "auto"):
            log.info(
                f"device.workers = {asked['workers']} is 1 here: threads share out tasks on a CPU, where each adapts the network."
            )
        asked["workers"] = 1
    elif asked["workers"] == "auto" and (cfg.device.compile or parallel.world() > 1):
        asked["workers"] = 1
    if (algo.bulk or algo.batches is not Episode) and asked["channels_last"] == "auto":
        asked["channels_last"] = True  # up to twice as fast for convolutions outside vmap, on CPU and GPU
    if "auto" not in asked.values():
        return asked
    file = Path(cfg.cache_dir).expanduser() / "speed" / f"{_key(cfg, batch)}.json"
    chosen = kept or parallel.from_first(_read(file))
    if chosen is None and cfg.steps >= WORTHWHILE:
        chosen = parallel.from_first(measure(algo, batch, asked, cfg.device.graph))
        if parallel.rank() == 0:
            _write(file, chosen)
    return _filled(asked, chosen or UNMEASURED | {"task_chunk": min(CHUNK, tasks(batch))})


def divisible(algo: Algorithm, batch: Batch) -> bool:
    """Whether worker threads can share the tasks: on a CPU, for an algorithm that does not embed all tasks in one pass."""
    return isinstance(batch, Episode) and not algo.bulk and not batch_on_gpu(batch)


def _filled(asked: dict[str, Any], chosen: Choice) -> Choice:
    return {name: chosen[name] if value == "auto" else value for name, value in asked.items()}


def measure(algo: Algorithm, batch: Batch, asked: dict[str, Any], captured: bool = False) -> Choice:
    """Times steps on a real batch, first over threads and workers, then over chunk sizes and layouts; leaves `algo` as it was.

    `captured`: the steps are replayed from CUDA graphs, as in the run.
    """
    before = torch.get_num_threads()
    chosen = _filled(asked, {**UNMEASURED, "threads": before, "task_chunk": min(CHUNK, tasks(batch))})
    ways = [(threads, chosen["workers"]) for threads in (halvings(before) if asked["threads"] == "auto" else [chosen["threads"]])]
    if asked["workers"] == "auto" and not draws(algo, batch):
        ways += [(chosen["threads"], workers) for workers in halvings(min(chosen["threads"] or before, tasks(batch)))[1:]]
    # Workers may be faster with tasks one by one than mapped, so chunk 1 is tried too.
    sizes = sorted({1, chosen["task_chunk"]}) if asked["task_chunk"] == "auto" and len(ways) > 1 else [chosen["task_chunk"]]
    first = [{"threads": t, "workers": w, "task_chunk": size} for (t, w), size in itertools.product(ways, sizes)]
    chosen = _fastest(algo, batch, [{**chosen, **one} for one in first], captured)
    layouts = (False, True) if asked["channels_last"] == "auto" else (chosen["channels_last"],)
    sizes = halvings(-(-tasks(batch) // chosen["workers"])) if asked["task_chunk"] == "auto" else [chosen["task_chunk"]]
    ways = itertools.product(layouts, sizes)
    chosen = _fastest(algo, batch, [{**chosen, "channels_last": layout, "task_chunk": size} for layout, size in ways], captured)
    torch.set_num_threads(before)
    return chosen


def draws(algo: Algorithm, batch: Batch) -> bool:
    """Whether a step draws random numbers, as dropout does: worker threads would draw them in no fixed order."""
    before = torch.get_rng_state()
    _seconds(algo, batch, UNMEASURED | {"task_chunk": 1})
    return not torch.get_rng_state().equal(before)


def _fastest(algo: Algorithm, batch: Batch, candidates: list[Choice], captured: bool) -> Choice:
    """The candidate with the fastest step, timed in rounds over all candidates, so that a slow phase of the machine hits all."""
    if len(candidates) == 1:
        return candidates[0]
    _seconds(algo, batch, candidates[0], captured)  # loads the libraries
    times: dict[int, float] = {}  # best time of each remaining candidate
    start = time.perf_counter()
    for turn in range(1 + ROUNDS):  # the first is the warm-up
        if turn > 1 and parallel.world() == 1 and time.perf_counter() - start > PATIENCE:
            break
        for number in list(times) if turn else range(len(candidates)):
            seconds = _seconds(algo, batch, candidates[number], captured)
            if seconds is None:
                times.pop(number, None)
            else:
                times[number] = min(seconds, times[number]) if turn > 1 else seconds
        # Processes that communicate in every step must take the same number of steps, so no candidate is dropped early.
        stays = parallel.world() > 1 or (turn == 0 and batch_on_gpu(batch))  # a GPU's first step chooses and loads kernels
        bound = math.inf if stays else (HOPELESS if turn == 0 else BEHIND) * min(times.values(), default=0)
        for number, seconds in list(times.items()):
            if seconds > bound:
                _report(candidates, number, seconds)
                del times[number]
    if not times:
        return candidates[0]
    best = min(times, key=times.__getitem__)
    for number, seconds in times.items():
        _report(candidates, number, seconds, ", the fastest" if number == best else "")
    return candidates[best]


def _report(candidates: list[Choice], number: int, seconds: float, more: str = "") -> None:
    varied = [name for name in candidates[0] if len({candidate[name] for candidate in candidates}) > 1]
    words = ", ".join(f"device.{name}={str(candidates[number][name]).lower()}" for name in varied)
    log.info(f"{words}: {1000 * seconds:.0f} ms a step{more}")


def _seconds(algo: Algorithm, batch: Batch, choice: Choice, captured: bool = False) -> float | None:
    """How long one step takes, or None if memory runs out; leaves `algo` as it was."""
    buffers = {name: buffer.clone() for name, buffer in algo.named_buffers()}
    chunk = algo.task_chunk
    use(algo, choice)
    try:
        step = step_function(algo.train(), choice, captured)
        for _ in range(WARM_UP + 1 if captured else 0):
            step(batch)
        if batch_on_gpu(batch):
            torch.cuda.synchronize()  # wait for earlier work
        start = time.perf_counter()
        step(batch)
        if batch_on_gpu(batch):
            torch.cuda.synchronize()
        return time.perf_counter() - start
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        reset(algo, buffers)
        algo.task_chunk = chunk
        algo.to(memory_format=torch.contiguous_format)


def threads(work: Callable[[], object]) -> int:
    """The number of CPU threads with which `work` is fastest: all, half, ..., or one; restores the current number."""
    before = torch.get_num_threads()
    work()  # warms up
    times = {}
    for candidate in halvings(before):
        torch.set_num_threads(candidate)
        start = time.perf_counter()
        work()
        times[candidate] = time.perf_counter() - start
    torch.set_num_threads(before)
    return min(times, key=times.__getitem__)


def halvings(most: int) -> list[int]:
    """Numbers from 1 to `most`, each about half of the next."""
    return (halvings(most // 2) if most > 1 else []) + [most]


def _key(cfg: DictConfig, batch: Batch) -> str:
    """The key of the cached choice: the work, the machine, and the version of torch."""
    work = [OmegaConf.to_container(cfg[group], resolve=True) for group in ("algo", "model", "task", "device")]
    inputs = next(leaves(batch))
    image = list(inputs.shape[-3:]) if inputs.dim() > 3 else []  # not for texts, whose length differs from batch to batch
    machine = [
        platform.node(),
        platform.processor(),
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
        parallel.world(),
    ]
    if torch.cuda.is_available():
        machine.append(torch.cuda.get_device_name())
    return digest(*work, image, *machine)


def _read(file: Path) -> Choice | None:
    try:
        found = json.loads(file.read_text())
        return {name: found[name] for name in UNMEASURED}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, chosen: Choice) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as draft:
            json.dump(chosen, draft)
    except OSError as error:  # harmless: the next run measures again
        log.info(f"cache_dir = {file.parents[1]}: what was measured cannot be kept there ({error.strerror}).")
