"""The device that a run uses, and its threads."""

import torch


def choose(name: str, threads: int | None) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:N`; `threads` limits the CPU threads of this process."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"device.threads = {threads}, but it must be at least 1, or null for all cores.")
        torch.set_num_threads(threads)
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
