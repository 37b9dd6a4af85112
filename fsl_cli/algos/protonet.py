"""Prototypical Networks for Few-shot Learning, Snell, Swersky and Zemel, 2017 (https://arxiv.org/abs/1703.05175).

Training normalises the support and query items of an episode together; evaluation uses running statistics.
"""

from torch import Tensor

from fsl_cli.algos.base import Algorithm, Predictor
from fsl_cli.algos.heads import centroids, squared_distances
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding


class ProtoNet(Algorithm):
    """Classifies a query by the squared Euclidean distance of its embedding to each class mean."""

    bulk = True
    norms = ("running", "transductive", "support")

    def __init__(self, model: Embedding) -> None:
        super().__init__()
        self.model = model

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        prototypes = centroids(support)  # [way, features]
        return lambda queries: -squared_distances(queries, prototypes)
