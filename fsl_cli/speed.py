"""How a training step is run: the chunk size and the threads that measured fastest, compiled or captured as a CUDA graph."""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fsl_cli import parallel
from fsl_cli.algos.base import Algorithm, Batch, Outcome
from fsl_cli.datasets.packed import digest
from fsl_cli.episodes import Episode

log = logging.getLogger(__name__)

Choice = dict[str, int | None]  # threads and task_chunk; None: all

CHUNK = 8  # tasks mapped at once, where nothing was measured
WORTHWHILE = 100  # steps: a shorter run does not get back what the measuring costs
REPEATS = 3
HOPELESS = 3  # times slower than the best: on shared cores more threads can be 20 times slower
WARM_UP = 3  # steps before a CUDA graph is captured, so that every library has chosen its kernels


class Stepper:
    """Runs `algo.backward`. Out of memory, it halves the chunk and runs the step again."""

    def __init__(self, algo: Algorithm, fastest: Choice, compiled: bool = False, captured: bool = False) -> None:
        """`captured` replays the whole step from a CUDA graph; every batch must have the shapes of the first."""
        self.algo, self.fastest = algo, fastest
        algo.task_chunk = fastest["task_chunk"]
        torch.set_num_threads(fastest["threads"] or torch.get_num_threads())
        self.capture = Capture(algo) if captured else None
        if compiled:
            for name in algo.compiled:
                setattr(algo, name, torch.compile(getattr(algo, name)))

    def __call__(self, batch: Batch) -> Outcome:
        self.algo.train()
        while True:
            try:
                return self.capture(batch) if self.capture else self.algo.backward(batch)
            except RuntimeError as error:
                if not (out_of_memory(error) and self._can_halve(batch)):
                    raise
                reset(self.algo, {})  # a step changes buffers only when it is through
                self.algo.task_chunk = max(1, min(self.algo.task_chunk or tasks(batch), tasks(batch)) // 2)
                self.fastest["task_chunk"] = self.algo.task_chunk  # checkpoints keep it
                log.info(f"Out of memory: device.task_chunk is {self.algo.task_chunk} from here on.")
            if self.capture:
                self.capture = Capture(self.algo)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _can_halve(self, batch: Batch) -> bool:
        return isinstance(batch, Episode) and min(self.algo.task_chunk or tasks(batch), tasks(batch)) > 1


class Capture:
    """`algo.backward` as a CUDA graph: one launch in place of thousands, each of which costs more than its arithmetic."""

    def __init__(self, algo: Algorithm) -> None:
        self.algo, self.calls = algo, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> Outcome:
        self.calls += 1
        if self.calls <= WARM_UP:  # true steps, only on a stream of their own, as capturing asks
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outcome = self.algo.backward(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return outcome
        if self.graph is None:
            self._record(batch)
        assert self.graph is not None
        for static, tensor in zip(leaves(self.batch), leaves(batch), strict=True):
            static.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return Outcome(*(value.clone() for value in self.outcome))

    def _record(self, batch: Batch) -> None:
        self.batch = type(batch)(*(map_part(part, torch.clone) for part in batch))  # the graph reads from here
        for parameter in self.algo.parameters():
            parameter.grad = None  # so that the graph sets its gradients and does not add to old ones
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.outcome = self.algo.backward(self.batch)
        self.graph = graph
        self.gradients = [(p, p.grad) for p in self.algo.parameters() if p.grad is not None]


def map_part(part: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A tensor, or a named tuple of tensors, with every tensor changed."""
    return change(part) if isinstance(part, torch.Tensor) else type(part)(*(map_part(inner, change) for inner in part))


def leaves(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors of a batch."""
    if isinstance(batch, torch.Tensor):
        yield batch
    else:
        for part in batch:
            yield from leaves(part)


def tasks(batch: Batch) -> int:
    """The tasks of a meta-batch; a pre-training batch is one."""
    return len(batch.support.targets) if isinstance(batch, Episode) else 1


def reset(algo: Algorithm, buffers: dict[str, torch.Tensor]) -> None:
    """Undoes what an unfinished or a trial step has left behind."""
    algo.zero_grad()
    algo.forget()
    with torch.no_grad():
        for name, buffer in buffers.items():
            algo.get_buffer(name).copy_(buffer)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or (where only the message tells) on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def stepper(cfg: DictConfig, algo: Algorithm, batch: Batch, kept: Choice | None) -> Stepper:
    """What runs the steps of a training, as `device.*` asks; `batch` is a real one, to measure with."""
    if cfg.device.graph and not batch_on_gpu(batch):
        raise ValueError("device.graph = true, but only CUDA devices have graphs. Leave it false on a CPU.")
    return Stepper(algo, fastest(cfg, algo, batch, kept), cfg.device.compile, cfg.device.graph)


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


def batch_on_gpu(batch: Batch) -> bool:
    """Whether the batch lies on a CUDA device."""
    return next(leaves(batch)).is_cuda


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
