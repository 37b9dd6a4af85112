"""Learning to Compare: Relation Network for Few-Shot Learning, Sung et al., 2018 (https://arxiv.org/abs/1711.06025).

A small network compares a query with each class; its sigmoid is trained by the squared error to 1 for the true class and 0 for
the others. Three things differ from the published code: support features of a class are averaged, not summed, so that any number
of shots can be used; the comparing network uses group normalisation, so that a query's answer does not depend on other queries;
and it pads its convolutions, so that it takes maps of any size.
"""

import torch
from torch import Tensor, nn

from fsl_cli.algos.base import Algorithm, Batch, Outcome, Predictor, accuracy
from fsl_cli.algos.heads import centroids
from fsl_cli.episodes import Episode, Examples
from fsl_cli.models.embedding import Embedding


class RelationNet(Algorithm):
    """Scores a class by a learned comparison of its mean feature map with the query's."""

    bulk = True
    norms = ("running", "transductive", "support")

    def __init__(self, model: Embedding, hidden: int) -> None:
        super().__init__()
        self.model = model
        self.relation = Relation(model.out_shape, hidden)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        prototypes = centroids(support)  # [way, features]

        def predictor(queries: Tensor) -> Tensor:
            q, way = len(queries), len(prototypes)
            pairs = torch.stack([prototypes.expand(q, -1, -1), queries.unsqueeze(1).expand(-1, way, -1)], dim=2)
            return self.relation(pairs.flatten(0, 1)).unflatten(0, (q, way))

        return predictor

    def loss(self, batch: Batch) -> Outcome:
        assert isinstance(batch, Episode), "a relation network trains on episodes"
        scores, targets = self.predictions(batch), batch.query.targets
        return Outcome((scores.sigmoid() - targets).square().mean(), accuracy(scores, targets))


class Relation(nn.Module):
    """Pairs of embeddings `[n, 2, features]` -> scores `[n]`, by convolutions if the embeddings are maps of `shape`."""

    def __init__(self, shape: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.shape = (2 * shape[0], *shape[1:])
        layers: list[nn.Module] = []
        width, size = self.shape[0], list(shape[1:])
        for _ in range(2 if size else 0):
            layers += [nn.Conv2d(width, shape[0], 3, padding=1), nn.GroupNorm(1, shape[0]), nn.ReLU()]
            width = shape[0]
            if min(size) > 1:
                layers.append(nn.MaxPool2d(2))
                size = [side // 2 for side in size]
        flat = width * (size[0] * size[1] if size else 1)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, pairs: Tensor) -> Tensor:
        return self.layers(pairs.reshape(-1, *self.shape)).squeeze(1)
