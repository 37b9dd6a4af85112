"""What networks that were trained on photographs elsewhere share here: their input, and their normalisation."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fsl_cli.models.norm import Norm


def in_colour(images: Tensor, size: int | None) -> Tensor:
    """Images `[n, 1 or 3, H, W]` -> `[n, 3, size, size]`, or with `size` None at their own size."""
    if size is not None and images.shape[-2:] != (size, size):
        smaller = size < min(images.shape[-2:])
        images = functional.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=smaller)
    return images.expand(-1, 3, -1, -1)


def freeze_folded(network: nn.Module) -> None:
    """Freezes all weights, and replaces every batch norm.

    It is folded into the convolution before it, which saves two passes over the maps and their memory; one that cannot be
    folded becomes a constant scale and shift.
    """
    network.requires_grad_(False)
    for convolution, norm in _followed(network.eval()):
        layer, after = network.get_submodule(convolution), network.get_submodule(norm)
        assert isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
        mean, var = after.running_mean, after.running_var
        if mean is not None and var is not None:
            folded = fuse_conv_bn_weights(layer.weight, layer.bias, mean, var, after.eps, after.weight, after.bias)
            layer.weight, layer.bias = folded
            _put(network, norm, nn.Identity())
    _replace(network, _constant)
    network.to(memory_format=torch.channels_last)


def thaw(network: nn.Module) -> None:
    """Replaces every batch norm by a Norm with the same weights and statistics, which is exact under vmap over tasks."""
    _replace(network, _exact)


class _Tracer(fx.Tracer):
    """Traces into no batch norm or convolution, of whatever package."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d | nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _followed(network: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution whose output only a batch norm reads, and of that batch norm."""
    layers = dict(network.named_modules())
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in layers.values()):
        return []
    try:
        graph = _Tracer().trace(deepcopy(network))  # a copy, since a network may store its inputs
    except Exception:  # tracing runs foreign code, which may raise anything; then no norm is folded, and all become constants
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        ours = isinstance(layers[str(before.target)], nn.Conv2d) and isinstance(layers[str(node.target)], nn.BatchNorm2d)
        if ours and len(before.users) == 1 and calls[node.target] == calls[before.target] == 1:
            found.append((str(before.target), str(node.target)))
    return found


def _replace(network: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            _put(network, name, make(layer))


def _put(network: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces a batch norm by `new`; keeps the dropout and activation that timm's batch norms contain."""
    layer = network.get_submodule(name)
    after = [layer.get_submodule(part) for part in ("drop", "act") if hasattr(layer, part)]
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, nn.Sequential(new, *after) if after else new)


def _constant(layer: nn.BatchNorm2d) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d  # takes seconds to import, and most networks do not need it

    frozen = FrozenBatchNorm2d(layer.num_features, layer.eps)
    frozen.load_state_dict(layer.state_dict(), strict=False)
    return frozen


def _exact(layer: nn.BatchNorm2d) -> nn.Module:
    norm = Norm(layer.num_features, layer.eps, layer.momentum or 0.1)
    with torch.no_grad():
        for own, name in (
            ("scale", "weight"),
            ("shift", "bias"),
            ("running_mean", "running_mean"),
            ("running_var", "running_var"),
        ):
            if getattr(layer, name) is not None:
                getattr(norm, own).copy_(getattr(layer, name))
    return norm
