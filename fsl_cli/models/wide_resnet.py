"""Wide residual networks, Zagoruyko and Komodakis, 2016 (https://arxiv.org/abs/1605.07146), without their dropout.

Three stages of pre-activation blocks: WRN-28-10 has 28 layers, and ten times the 16, 32 and 64 filters of a thin network. The
last two stages halve the map.
"""

from torch import nn

from fsl_cli.models.convolutional import Convolutional, Pooling, Residual, convolution, halved, initialise
from fsl_cli.models.embedding import check_images
from fsl_cli.models.norm import Norm

THIN = (16, 32, 64)  # filters of the stages at width 1


class WideResNet(Convolutional):
    """Images `[n, C, H, W]` -> embeddings `[n, features]`.

    Args:
        item_shape: shape of the images, `(C, H, W)`.
        depth: number of layers, 6 n + 4 for n blocks per stage.
        width: factor on the filters of a thin network.
        pooling: `mean` or `flatten`, for the last map.
    """

    def __init__(self, item_shape: tuple[int, ...], depth: int = 28, width: int = 10, pooling: Pooling = "mean") -> None:
        check_images("wrn28_10", item_shape)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"model.depth = {depth}, but it must be 6 n + 4 for n blocks a stage: 10, 16, 22, 28, ...")
        if width < 1:
            raise ValueError(f"model.width = {width}, but it must be at least 1.")
        before = THIN[0]
        layers: list[nn.Module] = [convolution(item_shape[0], before)]
        for stage, after in enumerate(width * thin for thin in THIN):
            for number in range(depth // 6):
                layers.append(_residual(before, after, 2 if stage > 0 and number == 0 else 1, first=number == 0))
                before = after
        layers += [Norm(before), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), (before, *(halved(side, 2) for side in item_shape[1:])), pooling)
        initialise(self)


def _residual(before: int, after: int, stride: int, first: bool) -> nn.Module:
    active = (Norm(before), nn.ReLU())
    path = (convolution(before, after, stride=stride), Norm(after), nn.ReLU(), convolution(after, after))
    if first:  # the shortcut too reads the normalised, activated maps
        return nn.Sequential(*active, Residual(nn.Sequential(*path), convolution(before, after, 1, stride)))
    return Residual(nn.Sequential(*active, *path), nn.Identity())
