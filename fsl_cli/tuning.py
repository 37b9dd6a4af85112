"""The chunk size and the number of threads with which a training step is fastest here: measured, then kept."""

import json
import logging
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fsl_cli import parallel
from fsl_cli.algos.base import Algorithm, Batch
from fsl_cli.datasets.packed import digest
from fsl_cli.episodes import Episode
from fsl_cli.speed import Choice, batch_on_gpu, out_of_memory, reset, tasks

log = logging.getLogger(__name__)

CHUNK = 8  # tasks mapped at once, where nothing was measured
WORTHWHILE = 100  # steps: a shorter run does not get back what the measuring costs
REPEATS = 3
HOPELESS = 3  # times slower than the best: on shared cores more threads can be 20 times slower


def fastest(cfg: DictConfig, algo: Algorithm, batch: Batch, kept: Choice | None) -> Choice:
    """Threads and chunk size for a run: what the user typed, else what its checkpoint or an earlier run chose, else measured.

    A choice is kept in the cache folder, so that the same command on the same machine computes the same bits again.
    """
    asked = {"threads": cfg.device.threads, "task_chunk": cfg.device.task_chunk}
    if batch_on_gpu(batch) and asked["threads"] == "auto":
        asked["threads"] = None
    if not isinstance(batch, Episode) and asked["task_chunk"] == "auto":
        asked["task_chunk"] = None
    if "auto" not in asked.values():
        return asked
    file = Path(cfg.cache_dir).expanduser() / "speed" / f"{_key(cfg)}.json"
    chosen = kept or parallel.same(_read(file))
    if chosen is None and cfg.steps >= WORTHWHILE:
        chosen = parallel.same(measure(algo, batch, asked))
        if parallel.rank() == 0:
            _write(file, chosen)
    chosen = chosen or {"threads": None, "task_chunk": min(CHUNK, tasks(batch))}
    return {name: chosen[name] if value == "auto" else value for name, value in asked.items()}


def measure(algo: Algorithm, batch: Batch, asked: dict[str, Any]) -> Choice:
    """Times steps on a real batch, first over threads, then over chunk sizes; leaves `algo` as it was."""
    before = torch.get_num_threads()
    chosen = {"threads": None if asked["threads"] == "auto" else asked["threads"],
              "task_chunk": min(CHUNK, tasks(batch)) if asked["task_chunk"] == "auto" else asked["task_chunk"]}  # fmt: skip
    if asked["threads"] == "auto":
        chosen["threads"] = _fastest(algo, batch, "threads", chosen, halvings(before))
    if asked["task_chunk"] == "auto":
        chosen["task_chunk"] = _fastest(algo, batch, "task_chunk", chosen, halvings(tasks(batch)))
    torch.set_num_threads(before)
    return chosen


def _fastest(algo: Algorithm, batch: Batch, name: str, chosen: Choice, candidates: list[int]) -> int:
    if len(candidates) == 1:
        return candidates[0]
    times: dict[int, float] = {}
    for value in candidates:
        # Processes that exchange something in every step must all take the same number of steps.
        best = min(times.values(), default=math.inf) if parallel.world() == 1 else math.inf
        seconds = _seconds(algo, batch, best, **{**chosen, name: value})
        if seconds is not None:
            times[value] = seconds
    if not times:
        return 1
    best = min(times, key=times.__getitem__)
    table = ", ".join(f"{value}: {1000 * seconds:.0f} ms" for value, seconds in times.items())
    log.info(f"device.{name} = {best}, the fastest step of {table}")
    return best


def _seconds(algo: Algorithm, batch: Batch, best: float, threads: int | None, task_chunk: int | None) -> float | None:
    """The fastest of a few steps, or None if the memory does not reach; what is far behind the `best` is not repeated."""
    torch.set_num_threads(threads or torch.get_num_threads())
    buffers = {name: buffer.clone() for name, buffer in algo.named_buffers()}
    chunk, algo.task_chunk = algo.task_chunk, task_chunk
    times = []
    try:
        for _ in range(REPEATS):
            if times and times[0] > HOPELESS * best:
                return times[0]
            start = time.perf_counter()
            algo.train().backward(batch)
            if batch_on_gpu(batch):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        reset(algo, buffers)
        algo.task_chunk = chunk
    return min(times[1:])  # the first one warms up


def halvings(most: int) -> list[int]:
    """1, ..., the half of `most`, and `most`."""
    return (halvings(most // 2) if most > 1 else []) + [most]


def _key(cfg: DictConfig) -> str:
    """What the fastest way depends on: the work, the machine, and the version of torch."""
    work = [OmegaConf.to_container(cfg[group], resolve=True) for group in ("algo", "model", "task", "device")]
    machine = [platform.node(), platform.processor(), os.cpu_count(), torch.__version__, parallel.world()]
    if torch.cuda.is_available():
        machine.append(torch.cuda.get_device_name())
    return digest(*work, *machine)


def _read(file: Path) -> Choice | None:
    try:
        found = json.loads(file.read_text())
        return {"threads": found["threads"], "task_chunk": found["task_chunk"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, chosen: Choice) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(chosen))
        draft.replace(file)
    except OSError as error:  # the run goes on: only the next one measures again
        log.info(f"cache_dir = {file.parents[1]}: what was measured cannot be kept there ({error.strerror}).")
