"""What convolutional embeddings share: a base class, a residual sum, and the initial weights of residual networks."""

from typing import Literal

from torch import Tensor, nn

from fsl_cli.models.embedding import Embedding

Pooling = Literal["mean", "flatten"]


class Convolutional(Embedding):
    """Images `[n, C, H, W]` -> embeddings `[n, features]`: the output maps of `blocks`, flattened or averaged."""

    def __init__(self, blocks: nn.Sequential, map_shape: tuple[int, ...], pooling: Pooling) -> None:
        """`map_shape` is the shape of the output maps, `(channels, height, width)`."""
        super().__init__()
        self.blocks, self.map_shape, self.pooling = blocks, map_shape, pooling
        channels, height, width = map_shape
        self.out_features = channels * (height * width if pooling == "flatten" else 1)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.map_shape if self.pooling == "flatten" else (self.out_features,)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.blocks(inputs)  # [n, channels, h, w]
        return maps.mean(dim=(2, 3)) if self.pooling == "mean" else maps.flatten(1)


class Residual(nn.Module):
    """The sum of the outputs of two layers for the same maps."""

    def __init__(self, path: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.path, self.shortcut = path, shortcut

    def forward(self, maps: Tensor) -> Tensor:
        return self.path(maps) + self.shortcut(maps)


def check_four(key: str, numbers: list[int]) -> None:
    """Refuses anything but four numbers of at least 1."""
    if len(numbers) != 4 or min(numbers) < 1:
        raise ValueError(f"model.{key} = {numbers}, but it must be four numbers of at least 1, one for each stage.")


def convolution(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A padded convolution from `before` to `after` channels; it has no bias, since normalisation would remove it."""
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)


def halved(side: int, times: int) -> int:
    """The side of a map after `times` padded convolutions of stride 2."""
    return -(-side // 2**times)


def initialise(network: nn.Module) -> None:
    """Draws the weights of all convolutions as He et al. 2015, scaled by their fan-out."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
