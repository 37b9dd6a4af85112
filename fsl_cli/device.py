"""The device that a run uses, and its threads."""

import ctypes
import sys

import torch

from fsl_cli.algos.base import Algorithm
from fsl_cli.episodes import Episode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def choose(name: str, threads: int | None) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:N`; `threads` limits the CPU threads of this process."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"device.threads = {threads}, but it must be at least 1, or null for all cores.")
        torch.set_num_threads(threads)
    _keep_memory()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device.name = {name!r}, but it must be auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device.name = {name!r}, but it must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device.name = {name!r}, but torch finds no CUDA device here. Use device=cpu or device=auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device.name = {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices here, numbered from 0."
        )
    return device


def settle(algo: Algorithm, place: torch.device) -> Algorithm:
    """Moves an algorithm to the device, in the memory format in which it is fastest there."""
    algo.to(place)
    # Convolutions outside a map run up to twice as fast on channels-last tensors, on CPU and GPU.
    return algo.to(memory_format=torch.channels_last) if algo.batches is not Episode or algo.bulk else algo


def _keep_memory() -> None:
    """Lets glibc keep freed memory: it hands large blocks back at once, and paging them in again took 40 % of a CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, 2**30)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
