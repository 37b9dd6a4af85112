"""Learning to Compare: Relation Network for Few-Shot Learning, Sung et al., 2018 (https://arxiv.org/abs/1711.06025).

A small network scores a query against each class; the sigmoid of the score is trained by the squared error to 1 for the true
class and 0 for the others, or the score by the cross entropy over the classes, which learns faster. Three things differ from
the published code: the support features of a class are averaged, not summed, so that any number of shots works; the small
network uses group normalisation, so that a query's answer does not depend on other queries; and it pads its convolutions, so
that it takes maps of any size.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Batch, Outcome, Predictor
from fsl_cli.algos.heads import centroids
from fsl_cli.algos.limits import at_least
from fsl_cli.episodes import Episode, Examples
from fsl_cli.metrics import accuracy
from fsl_cli.models.embedding import Embedding


class RelationNet(Algorithm):
    """Scores a class by a learned comparison of its mean feature map with the query's."""

    bulk = True
    norms = PLAIN_NORMS
    only_training: ClassVar = {"cross_entropy": ""}
    cached_chunk = 8  # limits memory: the pairs of one 20-way episode take 75 MB, several times over

    def __init__(self, model: Embedding, hidden: int, cross_entropy: bool = False) -> None:
        super().__init__()
        at_least(1, hidden=hidden)
        self.model, self.cross_entropy = model, cross_entropy
        self.relation = Relation(model.out_shape, hidden)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        prototypes = centroids(support)  # [way, features]
        return lambda queries: self.relation(queries, prototypes)

    def loss(self, batch: Batch) -> Outcome:
        assert isinstance(batch, Episode), "a relation network trains on episodes"
        scores, targets = self.predictions(batch), batch.query.targets
        if self.cross_entropy:
            return Outcome(functional.cross_entropy(scores.flatten(0, 1), targets.flatten(0, 1)), accuracy(scores, targets))
        return Outcome((scores.sigmoid() - targets).square().mean(), accuracy(scores, targets))


class Relation(nn.Module):
    """Scores `[q, way]` of queries `[q, features]` and classes `[way, features]`, by convolutions if `shape` is that of a map.

    The first layer is linear in the query and the class: it is applied once to each of them, and a pair takes the sum.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.shape = shape
        if len(shape) == 1:
            self.first: nn.Conv2d | nn.Linear = nn.Linear(2 * shape[0], hidden)
            self.layers = nn.Sequential(nn.ReLU(), nn.Linear(hidden, 1))
            return
        width, *size = shape
        self.first = nn.Conv2d(2 * width, width, 3, padding=1)
        layers: list[nn.Module] = []
        for number in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1)] if number else []
            layers += [MapNorm(width), nn.ReLU()]
            if min(size) > 1:
                layers.append(nn.MaxPool2d(2))
                size = [side // 2 for side in size]
        flat = width * size[0] * size[1]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, queries: Tensor, prototypes: Tensor) -> Tensor:
        of_class, of_query = self.first.weight.chunk(2, dim=1)
        pairs = self._half(queries, of_query).unsqueeze(1) + self._half(prototypes, of_class, self.first.bias)
        return self.layers(pairs.flatten(0, 1)).unflatten(0, (queries.shape[0], len(prototypes))).squeeze(-1)

    def _half(self, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of the first layer for one half of the pairs, `[n, features]`."""
        if isinstance(self.first, nn.Linear):
            return functional.linear(features, weight, bias)
        return functional.conv2d(features.unflatten(1, self.shape), weight, bias, padding=1)


class MapNorm(nn.Module):
    """Normalises each of the maps `[n, channels, H, W]` as a whole, then scales and shifts every channel.

    It is GroupNorm with one group, which torch 2.9 cannot map over tasks if the maps have channels last.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        return functional.layer_norm(maps, maps.shape[1:]) * self.weight[:, None, None] + self.bias[:, None, None]
