"""Batch normalisation whose second-order gradients stay exact under `torch.func.vmap`, with statistics per task.

`nn.BatchNorm2d` with its affine weights under `vmap` gives a right loss and a wrong meta-gradient (torch 2.13, 2.15), so
every model uses this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


class Norm(nn.Module):
    """Normalises each channel of `[n, features, *space]` by its mean and variance, then scales and shifts it.

    Statistics come from the batch, or with `running` set from the running ones. Running statistics are gathered only inside
    `statistics(..., track=True)`, that is never under a map over tasks, where writing to a buffer would be wrong.
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

    def forward(self, inputs: Tensor) -> Tensor:
        if self.running or (self.track and self.groups == 1):  # not under a map with gradients: the fused kernel is right
            buffers = (self.running_mean, self.running_var)
            return functional.batch_norm(inputs, *buffers, self.scale, self.shift, not self.running, self.momentum, self.eps)
        channels = (1, -1) + (1,) * (inputs.dim() - 2)
        groups = inputs.unflatten(0, (self.groups, -1))  # [groups, n / groups, features, *space]
        reduced = [1, *range(3, groups.dim())]
        # Two passes by plain operations: exact, and faster under a map, forward and backward, than torch.var_mean.
        mean = groups[:, : self.rows].mean(reduced, keepdim=True)
        centred = groups - mean
        var = centred[:, : self.rows].square().mean(reduced, keepdim=True)
        if self.track:
            self._update(mean, var, centred[:, : self.rows].numel() // mean.numel())
        gain = self.scale.view(channels) * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.shift.view(channels), centred, gain).flatten(0, 1)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, values: int) -> None:
        unbiased = values / max(values - 1, 1)
        self.running_mean.lerp_(mean.mean(0).flatten(), self.momentum)
        self.running_var.lerp_(var.mean(0).flatten() * unbiased, self.momentum)


def norm_layers(network: nn.Module) -> list[Norm]:
    """The normalisation layers inside `network`."""
    return [module for module in network.modules() if isinstance(module, Norm)]


@contextmanager
def statistics(network: nn.Module, groups: int = 1, rows: int | None = None, track: bool = False) -> Iterator[None]:
    """Within it, a batch `[groups * n, ...]` is normalised group by group, each by the statistics of its first `rows`."""
    layers = norm_layers(network)
    for layer in layers:
        layer.groups, layer.rows, layer.track = groups, rows, track
    try:
        yield
    finally:
        for layer in layers:
            layer.groups, layer.rows, layer.track = 1, None, False
