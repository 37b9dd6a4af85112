"""What networks that were trained on photographs elsewhere have in common here: their input, and their normalisation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from fsl_cli.models.embedding import described
from fsl_cli.models.norm import Norm


def check_images(name: str, item_shape: tuple[int, ...]) -> None:
    """Refuses items that are no images, grey or in colour."""
    if len(item_shape) != 3 or item_shape[0] not in (1, 3):
        raise ValueError(f"model={name} takes images [1 or 3, H, W], but the items of the data set are {described(item_shape)}.")


def in_colour(images: Tensor, size: int | None) -> Tensor:
    """Images `[n, 1 or 3, H, W]` -> `[n, 3, size, size]`, or at their own size."""
    if size is not None and images.shape[-2:] != (size, size):
        smaller = size < min(images.shape[-2:])
        images = functional.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=smaller)
    return images.expand(-1, 3, -1, -1)


def freeze(network: nn.Module) -> None:
    """Takes all weights out of training, and makes every batch norm a constant scale and shift."""
    network.requires_grad_(False)
    _replace(network, _constant)


def thaw(network: nn.Module) -> None:
    """Makes every batch norm a Norm with the same weights and statistics, which is exact under a map over tasks."""
    _replace(network, _exact)


def _replace(network: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            after = [layer.get_submodule(part) for part in ("drop", "act") if hasattr(layer, part)]  # timm's come with these
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, nn.Sequential(make(layer), *after) if after else make(layer))


def _constant(layer: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNorm2d(layer.num_features, layer.eps)
    frozen.load_state_dict(layer.state_dict(), strict=False)
    return frozen


def _exact(layer: nn.BatchNorm2d) -> nn.Module:
    norm = Norm(layer.num_features, layer.eps, layer.momentum or 0.1)
    with torch.no_grad():
        for own, other in ((norm.scale, layer.weight), (norm.shift, layer.bias)):
            own.copy_(other)
        for own, other in ((norm.running_mean, layer.running_mean), (norm.running_var, layer.running_var)):
            if other is not None:
                own.copy_(other)
    return norm
