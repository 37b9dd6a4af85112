"""Learning to Compare: Relation Network for Few-Shot Learning, Sung et al., 2018 (https://arxiv.org/abs/1711.06025).

A small network compares a query with each class; its sigmoid is trained by the squared error to 1 for the true class and 0 for
the others, or, which learns faster, by the cross entropy over the classes. Three things differ from the published code: support
features of a class are averaged, not summed, so that any number of shots can be used; the comparing network uses group
normalisation, so that a query's answer does not depend on other queries; and it pads its convolutions, so that it takes maps of
any size.
"""

from typing import ClassVar

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
    cached_chunk = 8  # for the memory of the pairs: in 20 ways those of one episode are 75 MB, several times

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
    """Compares `[q, features]` with `[way, features]`: scores `[q, way]`; by convolutions if the embeddings are maps of `shape`.

    The first layer of a pair is linear in both: it sees every query and every class once, and a pair takes the sum.
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
            layers += [nn.GroupNorm(1, width), nn.ReLU()]
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
        """What the first layer makes of one half of a pair, `[n, features]`."""
        if isinstance(self.first, nn.Linear):
            return functional.linear(features, weight, bias)
        return functional.conv2d(features.unflatten(1, self.shape), weight, bias, padding=1)
