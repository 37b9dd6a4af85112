"""Batch normalisation whose second-order gradients stay exact under `torch.func.vmap`, with statistics per task.

`nn.BatchNorm2d` with its affine weights under `vmap` gives a right loss and a wrong meta-gradient (torch 2.13, 2.15), so
every model uses this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional


class Mode(NamedTuple):
    """What the statistics of a batch `[groups * n, ...]` are taken from."""

    groups: int = 1  # each is normalised by itself
    rows: int | None = None  # the first of each group, whose statistics serve for all of it; None: all
    track: bool = False  # gathers them for the running statistics
    shared: bool = False  # the batch is a part of one that all processes hold together, and is normalised as a whole
    alone: bool = False  # the batch is not under a map


class Norm(nn.Module):
    """Normalises each channel of `[n, features, *space]` by its mean and variance, then scales and shifts it.

    Statistics come from the batch, or with `running` set from the running ones. Running statistics are gathered only inside
    `statistics(..., track=True)`, that is never under a map over tasks, where writing to a buffer would be wrong, and move
    the running ones in `commit`: once a step, so that they do not depend on how its tasks are cut into chunks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.eps = eps
        self.momentum = momentum
        self.running = False
        self.mode = Mode()
        self.gathered: list[tuple[Tensor, Tensor]] = []  # mean and unbiased variance of each group, [groups, features]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.running:
            return functional.batch_norm(inputs, self.running_mean, self.running_var, self.scale, self.shift, eps=self.eps)
        mode = self.mode
        shared = mode.shared and distributed.is_initialized()
        if (mode.track or mode.alone) and mode.groups == 1 and mode.rows is None and not shared:
            return self._fused(inputs)
        channels = (1, -1) + (1,) * (inputs.dim() - 2)
        exact = inputs.to(self.scale.dtype)  # statistics of bfloat16 are kept in float32
        groups = exact.unflatten(0, (mode.groups, -1))  # [groups, n / groups, features, *space]
        reduced = [1, *range(3, groups.dim())]
        # Two passes by plain operations: exact, and faster under a map, forward and backward, than torch.var_mean.
        mean = _mean(groups[:, : mode.rows], reduced, shared)
        centred = groups - mean
        var = _mean(centred[:, : mode.rows].square(), reduced, shared)
        if mode.track:
            values = inputs.numel() // mean.numel() * (distributed.get_world_size() if shared else 1)
            unbiased = values / max(values - 1, 1)
            self.gathered.append((mean.detach().flatten(1), unbiased * var.detach().flatten(1)))
        gain = self.scale.view(channels) * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.shift.view(channels), centred, gain).flatten(0, 1).to(inputs.dtype)

    def _fused(self, inputs: Tensor) -> Tensor:
        """By torch's own kernel: faster, and right where nothing is mapped."""
        if not self.mode.track:
            return functional.batch_norm(inputs, None, None, self.scale, self.shift, True, eps=self.eps)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        outputs = functional.batch_norm(inputs, mean, var, self.scale, self.shift, True, momentum=1.0, eps=self.eps)
        self.gathered.append((mean.unsqueeze(0), var.unsqueeze(0)))
        return outputs

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the running statistics towards the mean of those gathered since the last call."""
        if self.gathered:
            mean, var = (torch.cat(part).mean(0) for part in zip(*self.gathered, strict=True))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            self.gathered.clear()


def _mean(values: Tensor, reduced: list[int], shared: bool) -> Tensor:
    """The mean over some dimensions, and if `shared` over all processes, each of which holds an equal part of the batch."""
    mean = values.mean(reduced, keepdim=True)
    return _Sum.apply(mean) / distributed.get_world_size() if shared else mean


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        total = values.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # noqa: ARG004
        total = grad_outputs[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def norm_layers(network: nn.Module) -> list[Norm]:
    """The normalisation layers inside `network`."""
    return [module for module in network.modules() if isinstance(module, Norm)]


@contextmanager
def statistics(network: nn.Module, **mode: Any) -> Iterator[None]:
    """Within it, the layers of `network` take their statistics as a `Mode` of these options says."""
    before = [(layer, layer.mode) for layer in norm_layers(network)]
    for layer, _ in before:
        layer.mode = Mode(**mode)
    try:
        yield
    finally:
        for layer, old in before:
            layer.mode = old
