"""Nearest class mean by cosine similarity, the centroid method of SimpleShot (Wang et al., 2019).

https://arxiv.org/abs/1911.04623, with its L2 normalisation. The embedding is used as it is, or trained on episodes.
"""

from torch import Tensor
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor
from fsl_cli.algos.heads import centroids, cosine
from fsl_cli.algos.limits import positive
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding


class Centroid(Algorithm):
    """Classifies a query by the cosine between its embedding and the mean of each class's normalised embeddings."""

    bulk = True
    norms = PLAIN_NORMS

    def __init__(self, model: Embedding, scale: float) -> None:
        super().__init__()
        positive(scale=scale)
        self.model, self.scale = model, scale

    def embed(self, inputs: Tensor) -> Tensor:
        return functional.normalize(self.model(inputs), dim=1)

    def adapt(self, support: Examples) -> Predictor:
        means = centroids(support)  # [way, features]
        return lambda queries: cosine(queries, means, self.scale)
