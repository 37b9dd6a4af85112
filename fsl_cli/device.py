"""The device of a run, its precision and threads, and how much of its memory the data may use."""

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor

from fsl_cli.algos.base import Algorithm
from fsl_cli.models.embedding import Embedding

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
GIB = 2**30


def choose(name: str, threads: int | None = None) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:N`; `threads` limits the CPU threads of this process (None: all).

    Of several processes on one machine, each takes the CUDA device of its local rank.
    """
    torch.set_num_threads(threads or _all_threads())  # an earlier job of a sweep may have set fewer
    _keep_memory()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device.name = {name!r}, but it must be auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ValueError(f"device.name = {name!r}, but it must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device.name = {name!r}, but torch finds no CUDA device here. Use device=cpu or device=auto.")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device.name = {device}, but torch finds {torch.cuda.device_count()} CUDA devices here, numbered from 0."
        )
    if device.index is not None:
        torch.cuda.set_device(device)  # streams, graphs and events use the current device
    return device


@functools.cache
def _all_threads() -> int:
    """The CPU threads that this process started with."""
    return torch.get_num_threads()


def settle(algo: Algorithm, place: torch.device, precision: str = "auto") -> Algorithm:
    """Moves an algorithm to the device, and sets its precision."""
    algo.precision = arithmetic(place, precision)
    if algo.precision == "bf16":
        for module in algo.modules():
            if isinstance(module, Embedding):
                _autocast(module, place)
    return algo.to(place)


def arithmetic(place: torch.device, precision: str) -> str:
    """Sets the precision of torch on the device, and returns it; `auto` is resolved."""
    cuda = place.type == "cuda"
    if precision == "auto":
        precision = "tf32" if cuda else "fp32"
    if precision == "tf32" and not cuda:
        raise ValueError("device.precision = tf32, but only CUDA devices have it. Use fp32 or bf16 on a CPU.")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"device.precision = bf16, but {torch.cuda.get_device_name(place)} has no bfloat16. Use tf32 or fp32.")
    torch.backends.cudnn.deterministic = True  # where deterministic kernels exist
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def _autocast(model: Embedding, place: torch.device) -> None:
    """Computes embeddings in bfloat16 and returns them in float32: heads, losses and inner updates stay in float32."""

    def forward(self: Embedding, inputs: Tensor) -> Tensor:
        # No cache: casts of one inner step would be reused in the next, and a CUDA graph cannot capture cached ones.
        with torch.autocast(place.type, torch.bfloat16, cache_enabled=False):
            outputs = type(self).forward(self, inputs)
        return outputs.float()

    model.forward = MethodType(forward, model)  # a bound method, so that deep copies use their own weights


def data_budget(place: torch.device, gib: float | None) -> int:
    """How many bytes of a data set may be kept on the device: `gib` GiB, or half of the free memory."""
    if gib is not None:
        return int(gib * GIB)
    if place.type == "cuda":
        torch.cuda.empty_cache()  # left by a first stage or an earlier job of a sweep
        return torch.cuda.mem_get_info(place)[0] // 2
    return _available() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process keeps its own copy


def _available() -> int:
    """Bytes of memory still available to this process, within the limits of a container or a Slurm job."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return 4 * GIB
    return max(0, min([free, *left(_group())]))


def _group() -> Path:
    """The control group of this process."""
    try:
        own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    except OSError:
        own = []
    return Path("/sys/fs/cgroup", *(name.strip("/") for name in own))


def left(group: Path) -> Iterator[int]:
    """The bytes still available in a control group (a container, a Slurm job) and in each parent, where there is a limit."""
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError, KeyError):  # "max": no limit
            most, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
            yield most - used + int(cached)  # the page cache is freed when memory is needed


def _keep_memory() -> None:
    """Makes glibc keep freed memory: returning large blocks and paging them in again took 40 % of a step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, 2**30)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
