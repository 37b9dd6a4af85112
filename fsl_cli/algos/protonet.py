"""Prototypical Networks for Few-shot Learning, Snell, Swersky and Zemel, 2017 (https://arxiv.org/abs/1703.05175).

With `scale`, squared distances are averaged over the features and multiplied by a learned factor, as in the code of MetaOptNet
(Lee et al. 2019, https://arxiv.org/abs/1904.03758): sums over the 1,600 features of an 84x84 image give initial losses in the
hundreds.

Training normalises the support and query items of an episode together; evaluation uses running statistics.
"""

import torch
from torch import Tensor, nn

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor
from fsl_cli.algos.heads import centroids, squared_distances
from fsl_cli.algos.limits import positive
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding


class ProtoNet(Algorithm):
    """Classifies a query by the squared Euclidean distance of its embedding to each class mean."""

    bulk = True
    norms = PLAIN_NORMS
    starts = ("scale",)

    def __init__(self, model: Embedding, scale: float | None = None) -> None:
        super().__init__()
        positive(scale=scale)
        self.model = model
        self.scale = None if scale is None else nn.Parameter(torch.tensor(float(scale)))

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        prototypes = centroids(support)  # [way, features]
        factor = 1 if self.scale is None else self.scale / prototypes.shape[1]
        return lambda queries: -factor * squared_distances(queries, prototypes)
