"""ResNet-12, the deeper network of the few-shot literature (Oreshkin et al. 2018), as MetaOptNet uses it (Lee et al. 2019,
https://arxiv.org/abs/1904.03758).

Four residual blocks of three 3x3 convolutions with leaky ReLU, each followed by 2x2 max pooling, the last two also by DropBlock
(Ghiasi et al. 2018, https://arxiv.org/abs/1810.12890). Two things differ from MetaOptNet's code: the rate of DropBlock is
constant instead of growing over the training, and the first two blocks have no dropout.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.models.convolutional import Convolutional, Pooling, Residual, check_four, convolution, initialise
from fsl_cli.models.embedding import check_images
from fsl_cli.models.norm import Norm

SLOPE = 0.1  # of the leaky ReLU
LEAST = 16  # pixels: the smallest side that four halvings can reduce to 1


class ResNet12(Convolutional):
    """Images `[n, C, H, W]` -> embeddings `[n, features]`.

    Args:
        item_shape: shape of the images, `(C, H, W)`.
        filters: number of filters of each of the four blocks.
        pooling: `mean` (640 features) or `flatten` (16,000 at 84x84, as MetaOptNet), for the last map.
        drop_rate: the approximate share of a map that DropBlock sets to 0 in training.
        drop_size: the side of the squares that it sets to 0.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        filters: list[int],
        pooling: Pooling = "mean",
        drop_rate: float = 0.1,
        drop_size: int = 5,
    ) -> None:
        check_images("resnet12", item_shape)
        check_four("filters", filters)
        if min(item_shape[1:]) < LEAST:
            raise ValueError(
                f"model=resnet12 halves the image four times, so {item_shape[1]}x{item_shape[2]} is too small. "
                f"Use images of {LEAST}x{LEAST} or more."
            )
        if not 0 <= drop_rate < 1:
            raise ValueError(f"model.drop_rate = {drop_rate}, but it must be from 0 to less than 1. Use 0.1, or 0 for none.")
        if drop_size < 1:
            raise ValueError(f"model.drop_size = {drop_size}, but it must be at least 1 pixel. Use 5 at 84x84, 2 at 32x32.")
        blocks: list[nn.Module] = []
        for number, (before, after) in enumerate(zip([item_shape[0], *filters], filters, strict=False)):
            drop = DropBlock(drop_rate if number >= 2 else 0.0, drop_size)
            blocks.append(nn.Sequential(_residual(before, after), nn.LeakyReLU(SLOPE), nn.MaxPool2d(2), drop))
        super().__init__(nn.Sequential(*blocks), (filters[-1], *(side // LEAST for side in item_shape[1:])), pooling)
        initialise(self)


def _residual(before: int, after: int) -> Residual:
    path = nn.Sequential(
        *(convolution(before, after), Norm(after), nn.LeakyReLU(SLOPE)),
        *(convolution(after, after), Norm(after), nn.LeakyReLU(SLOPE)),
        *(convolution(after, after), Norm(after)),
    )
    return Residual(path, nn.Sequential(convolution(before, after, 1), Norm(after)))


class DropBlock(nn.Module):
    """In training, sets squares of side `size` in maps `[n, C, H, W]` to 0, about `rate` of each, and scales up the rest."""

    def __init__(self, rate: float, size: int) -> None:
        super().__init__()
        self.rate, self.size = rate, size

    def forward(self, maps: Tensor) -> Tensor:
        if not (self.training and self.rate > 0):
            return maps
        *front, height, width = maps.shape
        size = min(self.size, height, width)
        places = (height - size + 1, width - size + 1)  # positions of a square's first corner
        chance = self.rate / size**2 * (height * width) / (places[0] * places[1])
        corners = (torch.rand(*front, *places, device=maps.device) < chance).to(maps.dtype)
        kept = 1 - functional.max_pool2d(functional.pad(corners, [size - 1] * 4), size, stride=1)
        return maps * kept * (kept.numel() / kept.sum().clamp(min=1))
