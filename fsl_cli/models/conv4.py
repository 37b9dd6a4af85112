"""Conv4: the four-block convolutional embedding of the few-shot literature (Vinyals et al. 2016, Snell et al. 2017).

Each block is a 3x3 convolution, normalisation, ReLU and a halving of the map: by 2x2 max pooling as in ProtoNet, or by the
stride of the convolution as in MAML and Reptile on Omniglot. The convolutions have no bias: normalisation would remove it.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.models.convolutional import Convolutional, Pooling, convolution, halved
from fsl_cli.models.embedding import check_images
from fsl_cli.models.norm import Norm

Halving = Literal["pool", "stride"]


class Block(nn.Module):
    """A 3x3 convolution, normalisation, optionally a halving of the map, and ReLU."""

    def __init__(self, before: int, after: int, halving: Halving | None) -> None:
        super().__init__()
        self.pools = halving == "pool"
        self.convolution = convolution(before, after, stride=2 if halving == "stride" else 1)
        self.norm = Norm(after)

    def forward(self, maps: Tensor) -> Tensor:
        if not self.pools:
            return self.norm(self.convolution(maps)).relu()
        flip = 1 - 2 * (self.norm.scale < 0).to(self.norm.scale.dtype)
        kernel = self.convolution.weight * flip.view(-1, 1, 1, 1)
        return self.norm.pooled(functional.conv2d(maps, kernel, padding=1), flip).relu()


class Conv4(Convolutional):
    """Images `[n, C, H, W]` -> embeddings `[n, features]`: the last map flattened, or its mean with `pooling=mean`."""

    def __init__(
        self,
        item_shape: tuple[int, ...],
        filters: int = 64,
        halving: Halving = "pool",
        pooling: Pooling = "flatten",
        halvings: int = 4,
    ) -> None:
        check_images("conv4", item_shape)
        if filters < 1:
            raise ValueError(f"model.filters = {filters}, but it must be at least 1.")
        if not 0 <= halvings <= 4:
            raise ValueError(f"model.halvings = {halvings}, but there are four blocks: it must be 0 to 4.")
        widths = (item_shape[0], filters, filters, filters)
        blocks = [Block(before, filters, halving if number < halvings else None) for number, before in enumerate(widths)]
        sides = [halved(side, halvings) if halving == "stride" else side // 2**halvings for side in item_shape[1:]]
        if min(sides) < 1:
            raise ValueError(
                f"model=conv4 halves the image {halvings} times, so {item_shape[1]}x{item_shape[2]} is too small. "
                "Use images of 16x16 or more, or model.halving=stride."
            )
        super().__init__(nn.Sequential(*blocks), (filters, *sides), pooling)
