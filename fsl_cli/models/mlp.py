"""Fully connected embeddings: MAML's for Omniglot without convolutions (Finn et al. 2017, appendix A.1) and, without
normalisation, those for the sine curves of MAML (ReLU) and Reptile (tanh).
"""

from itertools import pairwise
from math import prod
from typing import Literal

from torch import Tensor, nn

from fsl_cli.models.embedding import Embedding, described
from fsl_cli.models.norm import Norm


class MLP(Embedding):
    """Items `[n, *item]` -> embeddings `[n, features]` through linear layers, each with normalisation and a nonlinearity."""

    def __init__(
        self,
        item_shape: tuple[int, ...],
        hidden: list[int],
        norm: bool = True,
        activation: Literal["relu", "tanh"] = "relu",
    ) -> None:
        super().__init__()
        if not item_shape:
            raise ValueError(f"model=mlp takes arrays of numbers, but the items of the data set are {described(item_shape)}.")
        if not hidden or min(hidden) < 1:
            raise ValueError(f"model.hidden = {hidden}, but it must list at least one width of 1 or more.")
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise([prod(item_shape), *hidden]):
            layers += [nn.Linear(before, after, bias=not norm)]
            layers += [Norm(after)] if norm else []
            layers += [nn.ReLU() if activation == "relu" else nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.out_features = hidden[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
