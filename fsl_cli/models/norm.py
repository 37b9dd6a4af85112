"""Batch normalisation whose second-order gradients stay exact under `torch.func.vmap`, with statistics per task.

`nn.BatchNorm2d` with its affine weights under `vmap` gives the right loss and a wrong meta-gradient (torch 2.13, 2.15), so
every model uses this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional


class Mode(NamedTuple):
    """How the statistics of a batch `[groups * n, ...]` are computed."""

    groups: int = 1  # number of groups, each normalised separately
    rows: int | None = None  # leading rows of each group, whose statistics apply to the whole group; None: all rows
    track: bool = False  # gather them for the running statistics
    shared: bool = False  # normalise over the batches of all processes together
    alone: bool = False  # the batch is not under vmap


class Norm(nn.Module):
    """Normalises each channel of `[n, features, *space]` by its mean and variance, then scales and shifts it.

    The statistics are those of the batch, or with `running` set the running ones. Batch statistics are gathered only inside
    `statistics(..., track=True)`, that is, never under vmap over tasks, where writing to a buffer would be wrong. `commit` then
    updates the running ones once a step, so that they do not depend on how its tasks are cut into chunks.
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
        self.frozen = False  # use the running statistics in training too
        self.mode = Mode()
        # Mean and unbiased variance of each group, [groups, features]: of the current chunk, and of the step's earlier chunks.
        # Compiled code sees only the first list, which is empty at the start of every chunk.
        self.gathered: list[tuple[Tensor, Tensor]] = []
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if self.running:
            return functional.batch_norm(inputs, self.running_mean, self.running_var, self.scale, self.shift, eps=self.eps)
        mode = self.mode
        if (mode.track or mode.alone) and mode.groups == 1 and mode.rows is None and not self._shared:
            return self._fused(inputs)
        return self._affine(inputs, *self._moments(inputs), self.scale)

    def pooled(self, inputs: Tensor, flip: Tensor) -> Tensor:
        """Normalises `inputs`, whose channels were multiplied by `flip`, the sign of their scale, and max-pools them 2x2.

        This makes the scale positive, so that normalisation keeps the order of a channel's pixels and pooling can go first:
        scaling and shifting then take only a quarter of the map.
        """
        if self.running:
            mean, var = (self.running_mean * flip)[:, None, None], self.running_var[:, None, None]
        else:
            mean, var = self._moments(inputs, flip)
        return self._affine(functional.max_pool2d(inputs, 2), mean, var, self.scale * flip)

    @property
    def _shared(self) -> bool:
        return self.mode.shared and distributed.is_initialized()

    def _moments(self, inputs: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group and channel, both `[groups, 1, features, 1, ...]`; `flip` as in `pooled`."""
        counted = inputs.unflatten(0, (self.mode.groups, -1))[:, : self.mode.rows]  # [groups, n / groups, features, *space]
        shared = self._shared
        if shared or torch.compiler.is_compiling():
            counted, reduced = counted.to(self.scale.dtype), [1, *range(3, counted.dim())]
            mean = _mean(counted, reduced, shared)
            var = _mean((counted - mean).square(), reduced, shared)
        else:
            mean, var = _Moments.apply(counted)
        if self.mode.track:
            values = counted.numel() // mean.numel() * (distributed.get_world_size() if shared else 1)
            unbiased = values / max(values - 1, 1) * var.detach().flatten(1)
            self.gathered.append((mean.detach().flatten(1) * (1 if flip is None else flip), unbiased))
        return mean, var

    def _affine(self, inputs: Tensor, mean: Tensor, var: Tensor, scale: Tensor) -> Tensor:
        """`inputs` normalised by the `mean` and `var` of their groups, then scaled and shifted."""
        channels = (-1,) + (1,) * (inputs.dim() - 2)
        gain = scale.view(channels) * torch.rsqrt(var + self.eps)
        offset = self.shift.view(channels) - mean * gain
        # Even in bfloat16 the kernel multiplies and adds in float32, while it reads and writes half as much.
        groups = inputs.unflatten(0, (self.mode.groups, -1))
        return torch.addcmul(offset.to(inputs.dtype), groups, gain.to(inputs.dtype)).flatten(0, 1)

    def _fused(self, inputs: Tensor) -> Tensor:
        """Normalises by torch's own kernel: faster, and correct outside vmap."""
        if not self.mode.track:
            return functional.batch_norm(inputs, None, None, self.scale, self.shift, True, eps=self.eps)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        outputs = functional.batch_norm(inputs, mean, var, self.scale, self.shift, True, momentum=1.0, eps=self.eps)
        self.gathered.append((mean.unsqueeze(0), var.unsqueeze(0)))
        return outputs

    def keep(self) -> None:
        """Adds the statistics of a chunk to those of the step."""
        self.kept += self.gathered
        self.gathered.clear()

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the running statistics towards the mean of those gathered since the last call."""
        self.keep()
        if self.kept:
            mean, var = (torch.cat(part).mean(0) for part in zip(*self.kept, strict=True))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        self.forget()

    def forget(self) -> None:
        """Drops all statistics that were gathered or kept."""
        self.gathered.clear()
        self.kept.clear()


class _Moments(torch.autograd.Function):
    """Mean and variance of each group and channel of `[groups, n, features, *space]`, both `[groups, 1, features, 1, ...]`.

    Both are float32 for bfloat16 values. It uses the fastest kernel there is, and a gradient in one pass over the map that can
    itself be differentiated: torch's own second derivative of batch normalisation takes a dozen passes.
    """

    @staticmethod
    def forward(values: Tensor) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(values.dtype, torch.float32)
        if values.device.type != "cpu":
            reduced = [1, *range(3, values.dim())]
            var, mean = torch.var_mean(values.to(exact), reduced, correction=0, keepdim=True)
            return mean, var
        # On a CPU torch.var_mean takes up to 20 times as long. The kernel returns its results in the dtype of the buffers.
        buffer = torch.zeros(values.shape[2], dtype=exact)
        found = [torch.batch_norm_update_stats(group, buffer, buffer, 0.0) for group in values]
        shape = (len(values), 1, -1) + (1,) * (values.dim() - 3)
        mean, var = (torch.stack(part).view(shape) for part in zip(*found, strict=True))
        return mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (values, mean), (by_mean, by_var) = ctx.saved_tensors, grad_outputs
        count = values.numel() // mean.numel()
        slope = by_var * (2 / count)
        level = by_mean / count - slope * mean
        return torch.addcmul(level.to(values.dtype), values, slope.to(values.dtype))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], *args: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Treats tasks as further channels, as vmap does in convolutions, which it makes grouped ones."""
        together = args[0].movedim(in_dims[0], 2).flatten(2, 3)
        mean, var = (part.unflatten(2, (info.batch_size, -1)) for part in _Moments.apply(together))
        return (mean, var), (2, 2)


def _mean(values: Tensor, reduced: list[int], shared: bool) -> Tensor:
    """The mean over the dimensions `reduced`, and if `shared` over all processes, which hold equal parts of the batch."""
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


def norm_weights(network: nn.Module) -> set[int]:
    """The `id` of each scale and shift inside `network`."""
    return {id(weight) for layer in norm_layers(network) for weight in layer.parameters()}


def freeze(network: nn.Module) -> None:
    """Freezes the weights of `network`, and its normalisation statistics at the running ones."""
    network.requires_grad_(False)
    for layer in norm_layers(network):
        layer.frozen = True


@contextmanager
def statistics(network: nn.Module, **mode: Any) -> Iterator[None]:
    """Within this context, the layers of `network` compute their statistics by `Mode(**mode)`."""
    before = [(layer, layer.mode) for layer in norm_layers(network)]
    for layer, _ in before:
        layer.mode = Mode(**mode)
    try:
        yield
    finally:
        for layer, old in before:
            layer.mode = old
