"""Conv4: the four-block convolutional embedding of the few-shot literature (Vinyals et al. 2016, Snell et al. 2017).

Each block is a 3x3 convolution, normalisation, ReLU and a halving of the map: by 2x2 max pooling as in ProtoNet, or by the
stride of the convolution as in MAML and Reptile on Omniglot. The convolutions have no bias: the normalisation removes it.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fsl_cli.models.embedding import Embedding, described
from fsl_cli.models.norm import Norm


class Conv4(Embedding):
    """Images `[n, C, H, W]` -> embeddings `[n, features]`: the last map flattened, or its mean with `pooling=mean`."""

    def __init__(
        self,
        item_shape: tuple[int, ...],
        filters: int = 64,
        halving: Literal["pool", "stride"] = "pool",
        pooling: Literal["flatten", "mean"] = "flatten",
        halvings: int = 4,
    ) -> None:
        super().__init__()
        if len(item_shape) != 3:
            raise ValueError(f"model=conv4 takes images [C, H, W], but the items of the data set are {described(item_shape)}.")
        if filters < 1:
            raise ValueError(f"model.filters = {filters}, but it must be at least 1.")
        if not 0 <= halvings <= 4:
            raise ValueError(f"model.halvings = {halvings}, but there are four blocks: it must be 0 to 4.")
        blocks = []
        for number, channels in enumerate((item_shape[0], filters, filters, filters)):
            halves = halving if number < halvings else None
            stride = 2 if halves == "stride" else 1
            blocks += [nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False), Norm(filters)]
            # Before the ReLU, which gives the same values and gradients and then has a quarter of the map to do.
            blocks += [nn.MaxPool2d(2)] if halves == "pool" else []
            blocks += [nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.pooling = pooling
        try:
            with torch.no_grad():
                self.map_shape = tuple(self.blocks(torch.zeros(1, *item_shape)).shape[1:])
                self.out_features = self(torch.zeros(1, *item_shape)).shape[1]
        except RuntimeError as error:
            raise ValueError(
                f"model=conv4 halves the image {halvings} times, so {item_shape[1]}x{item_shape[2]} is too small. "
                "Use images of 16x16 or more, or model.halving=stride."
            ) from error

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.map_shape if self.pooling == "flatten" else (self.out_features,)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.blocks(inputs)  # [n, filters, h, w]
        return maps.mean(dim=(2, 3)) if self.pooling == "mean" else maps.flatten(1)
