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
    """Classifies a query by the cosine between its embedding and the mean of each class's normalised embeddings.

    Args:
        model: the embedding.
        scale: factor on the cosines.
        centre: measure them from the middle of the class means of the support set. Without it, what all images of an episode
            have in common makes every cosine large. The paper subtracts the mean of the training classes instead; a
            network trained elsewhere has none.
    """

    bulk = True
    norms = PLAIN_NORMS

    def __init__(self, model: Embedding, scale: float, centre: bool = False) -> None:
        super().__init__()
        positive(scale=scale)
        self.model, self.scale, self.centre = model, scale, centre

    def embed(self, inputs: Tensor) -> Tensor:
        return functional.normalize(self.model(inputs), dim=1)

    def adapt(self, support: Examples) -> Predictor:
        middle = centroids(support).mean(0) if self.centre else 0.0  # [features]
        directions = functional.normalize(support.inputs - middle, dim=1)
        means = centroids(Examples(directions, support.targets))  # [way, features]
        return lambda queries: cosine(queries - middle, means, self.scale)
