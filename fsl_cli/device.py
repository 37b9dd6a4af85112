"""The device that a run uses, its precision, its threads, and how much memory there is for the data."""

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

    Of several processes on one machine each takes the CUDA device of its own number.
    """
    torch.set_num_threads(threads or _all_threads())  # an earlier job of a sweep may have left fewer
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
        torch.cuda.set_device(device)  # streams, graphs and clocks are those of the current device
    return device


@functools.cache
def _all_threads() -> int:
    """The CPU threads that this process came with, as its first job finds them."""
    return torch.get_num_threads()


def settle(algo: Algorithm, place: torch.device, precision: str = "auto") -> Algorithm:
    """Moves an algorithm to the device, with the arithmetic asked for."""
    algo.precision = arithmetic(place, precision)
    if algo.precision == "bf16":
        for module in algo.modules():
            if isinstance(module, Embedding):
                _autocast(module, place)
    return algo.to(place)


def arithmetic(place: torch.device, precision: str) -> str:
    """Lets torch compute on the device with one precision; returns which, where `auto` leaves it open."""
    cuda = place.type == "cuda"
    if precision == "auto":
        precision = "tf32" if cuda else "fp32"
    if precision == "tf32" and not cuda:
        raise ValueError("device.precision = tf32, but only CUDA devices have it. Use fp32 or bf16 on a CPU.")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"device.precision = bf16, but {torch.cuda.get_device_name(place)} has no bfloat16. Use tf32 or fp32.")
    torch.backends.cudnn.deterministic = True  # as far as there are such kernels
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def _autocast(model: Embedding, place: torch.device) -> None:
    """Computes embeddings in bfloat16 and hands them on in float32: heads, losses and inner updates keep their precision."""

    def forward(self: Embedding, inputs: Tensor) -> Tensor:
        # Without its cache: cached casts of one inner step would be taken for those of the next, and cannot be captured.
        with torch.autocast(place.type, torch.bfloat16, cache_enabled=False):
            outputs = type(self).forward(self, inputs)
        return outputs.float()

    model.forward = MethodType(forward, model)  # a method, so that a copy of the model runs the copy


def data_budget(place: torch.device, gib: float | None) -> int:
    """Bytes that the items of a data set may take on the device: `gib`, or half of what is free there."""
    if gib is not None:
        return int(gib * GIB)
    if place.type == "cuda":
        torch.cuda.empty_cache()  # what a first stage, or another job of a sweep, has left
        return torch.cuda.mem_get_info(place)[0] // 2
    return _available() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every process has them


def _available() -> int:
    """Bytes of memory that this process may still take: of the machine, or of what a container or a Slurm job may use of it."""
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
    """Of a control group (a container, a Slurm job) and of those around it, the bytes that may still be used, where limited."""
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError, KeyError):  # "max": no limit
            most, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
            yield most - used + int(cached)  # what is cached of files is given up when it is needed


def _keep_memory() -> None:
    """Lets glibc keep freed memory: it hands large blocks back at once, and paging them in again took 40 % of a CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, 2**30)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
