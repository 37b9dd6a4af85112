"""The fully connected embedding of MAML's Omniglot experiment without convolutions (Finn et al. 2017, appendix A.1)."""

from itertools import pairwise
from math import prod

from torch import Tensor, nn

from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import Norm


class MLP(Embedding):
    """Items `[n, *item]` -> embeddings `[n, features]` through linear layers with normalisation and ReLU."""

    def __init__(self, item_shape: tuple[int, ...], hidden: list[int]) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"model.hidden = {hidden}, but it must list at least one width of 1 or more.")
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise([prod(item_shape), *hidden]):
            layers += [nn.Linear(before, after, bias=False), Norm(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.out_features = hidden[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
