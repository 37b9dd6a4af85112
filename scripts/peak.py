"""The peak memory of a step, for the other scripts here. Each is measured in a process of its own, which starts clean."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak(make: Callable[..., Callable[[], object]], *args: Any, calls: int = 1) -> float | None:
    """MiB that a step adds at its peak: on the CUDA device if it uses one, else to the process (Linux); None if it fails.

    Args:
        make: returns the step, given `args`; what it loads itself does not count. A function of a module.
        calls: how often the step is called on a CUDA device.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_measure, args=(make, args, calls, answers))
    process.start()
    process.join()
    return answers.get() / 2**20 if process.exitcode == 0 else None


def _measure(make: Callable[..., Callable[[], object]], args: tuple[Any, ...], calls: int, answers: Any) -> None:
    step = make(*args)
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(calls):
            step()
        answers.put(torch.cuda.max_memory_allocated() - before)
        return
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of this process
    step()
    answers.put(_resident("VmHWM") - before)


def _resident(line: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at the peak (VmHWM)."""
    found = dict(part.split(":") for part in Path("/proc/self/status").read_text().splitlines())
    return int(found[line].split()[0]) * 1024
