"""Several processes of one run: each takes its slice of every meta-batch, and all keep the same weights.

Started by torchrun, or by `device=ddp`, which starts torchrun's launcher itself. Every process draws the same episodes, so
that any number of them trains on the same ones. Without torchrun there is one process, and nothing is exchanged.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from fsl_cli.algos.base import Algorithm, Outcome
from fsl_cli.errors import RunError
from fsl_cli.overrides import typed

TIMEOUT = timedelta(minutes=10)  # a process that gives no sign of life for so long counts as dead
LAUNCHED = "TORCHELASTIC_RUN_ID"  # an environment variable that torchrun sets in its processes
OURS = "fsl"  # its value in the processes of `launch`
GRACE_S = 5.0  # before others report their errors: if process 0 fails too, it reports, and the launcher ends the others meanwhile
POLL_S = 1.0  # between two checks whether a process wants to stop

Made = TypeVar("Made")


def launched() -> bool:
    """Whether torchrun has started this process, as one of several or alone."""
    return LAUNCHED in os.environ


def join(device: torch.device) -> None:
    """Joins the processes that torchrun has started; the first call does so for all jobs of a sweep."""
    if launched() and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def leave() -> None:
    """Leaves the process group after a finished run."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", 0)) if launched() else 0


def speaks() -> bool:
    """Whether this process prints messages that all processes would print."""
    return rank() == 0 and os.environ.get(LAUNCHED) != OURS


def world() -> int:
    """How many processes share the run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def part(count: int) -> slice:
    """This process's slice of `count` things; the sizes of the slices differ by one at most."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


def quiet(overrides: list[str]) -> list[str]:
    """The overrides of this process: those other than 0 get no run folder, and only report their errors."""
    if rank() == 0:
        return overrides
    folder = tempfile.gettempdir()
    return [
        *overrides,
        f"hydra.run.dir={folder}",
        f"hydra.sweep.dir={folder}",
        *("hydra.sweep.subdir=.", "hydra/job_logging=other_process", "hydra/hydra_logging=disabled"),
    ]


def processes_asked(overrides: list[str]) -> int | None:
    """How many processes `device=ddp` asks this one to start; None if this process is to do the work itself."""
    words = typed(overrides)
    looks = {"--cfg", "-c", "--help", "-h", "--info", "-i"} & set(overrides)
    if launched() or looks:
        return None
    processes, name = words.get("device.processes", "null"), words.get("device.name", "auto")
    if words.get("device") != "ddp":
        if processes != "null":
            raise ValueError(
                f"device.processes = {processes}, but only device=ddp starts processes. Add it, or leave device.processes out."
            )
        return None
    if name.startswith("cuda:"):
        raise ValueError(f"device.name = {name}, but each process of device=ddp takes a device of its own. Leave it out.")
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else None
    if processes == "null":
        if gpus is None:
            raise ValueError("device = ddp, but there is no CUDA device to count. Say how many processes: device.processes=2.")
        processes = gpus
    if not str(processes).isdecimal() or int(processes) < 1:
        raise ValueError(f"device.processes = {processes}, but it must be a whole number of at least 1.")
    if gpus is not None and int(processes) > gpus:
        raise ValueError(f"device.processes = {processes}, but torch finds {gpus} CUDA devices here. Use at most {gpus}.")
    return int(processes)


def launch(processes: int, command: str, overrides: list[str]) -> int:
    """Runs a command in several processes on this machine; returns 0, or the exit code of the first one that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))  # else each would use all
    # Seconds from SIGTERM to SIGKILL: a CPU step may take long; a GPU step does not, but its wait for a dead peer might.
    gpus = torch.cuda.is_available() and typed(overrides).get("device.name") != "cpu"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(60 if gpus else TIMEOUT.seconds))
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes report their own errors
    config = LaunchConfig(1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=OURS, max_restarts=0)
    try:
        elastic_launch(config, sys.executable)("-m", "fsl_cli", command, *overrides)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(
            f"Process {number} of {processes} was killed by signal {-failure.exitcode}: the run has ended. If it was for want "
            "of memory, start fewer; last.pt, if there is one, is from before: go on with resume.",
            file=sys.stderr,
        )
        return 1
    except SignalException as error:  # the processes got the signal, and have ended
        return 128 + error.sigval
    return 0


def share_of_tasks(tasks: int) -> slice:
    """This process's share of the tasks of a meta-batch."""
    if tasks < world():
        raise ValueError(
            f"task.tasks = {tasks}, but {world()} processes share each meta-batch, and every one needs a task. "
            f"Set task.tasks={world()} or more, or start fewer processes."
        )
    return part(tasks)


def share_of_items(batch: int) -> slice:
    """This process's share of the items of a pre-training batch; normalisation over all of them needs parts of equal size."""
    if batch % world():
        raise ValueError(f"algo.batch = {batch}, but {world()} processes share each batch. Choose a multiple of {world()}.")
    return part(batch)


@torch.no_grad()
def average(algo: Algorithm, outcome: Outcome, share: float) -> Outcome:
    """Averages gradients, buffers and outcome over the processes, each weighted by its share of the meta-batch.

    One flat buffer, reduced once. Buffers (running statistics, Reptile's moments) are means over tasks and averaged too.
    """
    if world() == 1:
        return outcome
    gradients = [parameter.grad for parameter in algo.parameters() if parameter.grad is not None]
    tensors = [*gradients, *(buffer for buffer in algo.buffers() if buffer.is_floating_point())]
    flat = torch.cat([t.flatten() for t in (*tensors, *outcome)]) * share
    with _peers():
        distributed.all_reduce(flat)
    *parts, loss, measure = flat.split([t.numel() for t in (*tensors, *outcome)])
    for tensor, mean in zip(tensors, parts, strict=True):
        tensor.copy_(mean.view_as(tensor))
    return Outcome(loss.squeeze(), measure.squeeze())


def gather(mine: Any) -> list[Any]:
    """The values of all processes, by rank, in every process."""
    if world() == 1:
        return [mine]
    everyone: list[Any] = [None] * world()
    with _peers():
        distributed.all_gather_object(everyone, mine)
    return everyone


def from_first(value: Any) -> Any:
    """The value of process 0, in every process."""
    return gather(value)[0]


def all_or_none(make: Callable[[], Made]) -> Made:
    """The result of `make`; if it raises ValueError in one process, all raise it, so that none waits for another."""
    if world() == 1:
        return make()
    made = said = None
    try:
        made = make()
    except ValueError as error:
        said = str(error)
    for refusal in filter(None, gather(said)):
        raise ValueError(refusal)
    return made  # pyright: ignore[reportReturnType] - set, since nothing was raised


class Stopping:
    """Lets all processes stop at the same step: about once a second they check whether one of them has got a signal."""

    def __init__(self) -> None:
        self.since, self.steps = time.monotonic(), 0  # since the last check
        self.wait = 1  # steps until the next check

    def __call__(self, wish: int | None) -> int | None:
        """Returns the signal that any process has got, or None; to be called after every step."""
        if world() == 1:
            return wish
        self.steps += 1
        if self.steps < self.wait:
            return None
        now = time.monotonic()
        found = gather((wish, (now - self.since) / self.steps))
        self.since, self.steps = now, 0
        self.wait = max(1, int(POLL_S / max(pace for _, pace in found)))
        return next((signal for signal, _ in found if signal is not None), None)


class OtherProcess(logging.StreamHandler):
    """Reports the error of a process other than 0, after a pause, so that an error of all is reported once, by process 0."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes to stderr."""
        time.sleep(GRACE_S)
        record.msg = f"Process {rank()}: {record.msg}"
        super().emit(record)


@contextmanager
def _peers() -> Iterator[None]:
    """Turns a failed exchange into an error that points to the process that has ended, whose own message says why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0][:120]  # without the location in torch's source
        raise RunError(
            f"Process {rank()} of {world()} lost another process of the run ({reason}). "
            "Its own message says why; last.pt is from before: go on with resume."
        ) from error
