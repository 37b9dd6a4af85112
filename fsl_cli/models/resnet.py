"""ResNet-10 and ResNet-18 (He et al. 2016, https://arxiv.org/abs/1512.03385) as Chen et al. 2019 use them for few-shot learning
(https://arxiv.org/abs/1904.04232), there on images of 224x224.

A 7x7 convolution and max pooling, each of stride 2, then four stages of residual blocks of two 3x3 convolutions; all stages but
the first halve the map.
"""

from torch import nn

from fsl_cli.models.convolutional import (
    Convolutional,
    Pooling,
    Residual,
    check_four,
    convolution,
    halved,
    initialise,
)
from fsl_cli.models.embedding import check_images
from fsl_cli.models.norm import Norm


class ResNet(Convolutional):
    """Images `[n, C, H, W]` -> embeddings `[n, features]`.

    Args:
        item_shape: shape of the images, `(C, H, W)`.
        blocks: number of blocks of each of the four stages.
        filters: number of filters of each of the four stages.
        pooling: `mean` or `flatten`, for the last map.
    """

    def __init__(self, item_shape: tuple[int, ...], blocks: list[int], filters: list[int], pooling: Pooling = "mean") -> None:
        check_images("resnet10 or resnet18", item_shape)
        check_four("blocks", blocks)
        check_four("filters", filters)
        width = filters[0]
        layers: list[nn.Module] = [convolution(item_shape[0], width, 7, stride=2), Norm(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        for stage, (count, after) in enumerate(zip(blocks, filters, strict=True)):
            for number in range(count):
                layers += [_residual(width, after, 2 if stage > 0 and number == 0 else 1), nn.ReLU()]
                width = after
        super().__init__(nn.Sequential(*layers), (width, *(halved(side, 5) for side in item_shape[1:])), pooling)
        initialise(self)


def _residual(before: int, after: int, stride: int) -> Residual:
    path = nn.Sequential(
        *(convolution(before, after, stride=stride), Norm(after), nn.ReLU()),
        *(convolution(after, after), Norm(after)),
    )
    if stride == 1 and before == after:
        return Residual(path, nn.Identity())
    return Residual(path, nn.Sequential(convolution(before, after, 1, stride), Norm(after)))
