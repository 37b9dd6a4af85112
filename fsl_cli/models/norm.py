"""Batch normalisation whose second-order gradients stay exact under `torch.func.vmap`, with statistics per task.

`nn.BatchNorm2d` with its affine weights under `vmap` gives a right loss and a wrong meta-gradient (torch 2.13, 2.15), so
every model uses this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional


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
        self.groups = 1
        self.rows: int | None = None
        self.track = False
        self.shared = False
        self.alone = False
        self.gathered: list[tuple[Tensor, Tensor]] = []  # mean and unbiased variance of each group, [groups, features]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.running:
            return functional.batch_norm(inputs, self.running_mean, self.running_var, self.scale, self.shift, eps=self.eps)
        shared = self.shared and distributed.is_initialized()
        if (self.track or self.alone) and self.groups == 1 and self.rows is None and not shared:
            return self._fused(inputs)
        channels = (1, -1) + (1,) * (inputs.dim() - 2)
        exact = inputs.to(self.scale.dtype)  # statistics of bfloat16 are kept in float32
        groups = exact.unflatten(0, (self.groups, -1))  # [groups, n / groups, features, *space]
        reduced = [1, *range(3, groups.dim())]
        # Two passes by plain operations: exact, and faster under a map, forward and backward, than torch.var_mean.
        mean = _mean(groups[:, : self.rows], reduced, shared)
        centred = groups - mean
        var = _mean(centred[:, : self.rows].square(), reduced, shared)
        if self.track:
            values = inputs.numel() // mean.numel() * (distributed.get_world_size() if shared else 1)
            unbiased = values / max(values - 1, 1)
            self.gathered.append((mean.detach().flatten(1), unbiased * var.detach().flatten(1)))
        gain = self.scale.view(channels) * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.shift.view(channels), centred, gain).flatten(0, 1).to(inputs.dtype)

    def _fused(self, inputs: Tensor) -> Tensor:
        """By torch's own kernel: faster, and right where nothing is mapped."""
        if not self.track:
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
def statistics(
    network: nn.Module,
    groups: int = 1,
    rows: int | None = None,
    track: bool = False,
    shared: bool = False,
    alone: bool = False,
) -> Iterator[None]:
    """Within it, a batch `[groups * n, ...]` is normalised group by group, each by the statistics of its first `rows`.

    `shared`: the batch is one part of a batch that all processes of the run hold together, and is normalised as a whole.
    `alone`: the batch is not under a map.
    """
    before = [(layer, layer.groups, layer.rows, layer.track, layer.shared, layer.alone) for layer in norm_layers(network)]
    for layer, *_ in before:
        layer.groups, layer.rows, layer.track, layer.shared, layer.alone = groups, rows, track, shared, alone
    try:
        yield
    finally:
        for layer, *state in before:
            for name, value in zip(("groups", "rows", "track", "shared", "alone"), state, strict=True):
                setattr(layer, name, value)
