"""Nearest class mean by cosine similarity, the centroid method of SimpleShot (Wang et al., 2019), and a refinement of it.

https://arxiv.org/abs/1911.04623, with its L2 normalisation. The embedding is used as it is, or trained on episodes.

The refinement is logistic regression that starts from the class means and is held to them (biased regularisation, Kuzborskij &
Orabona, 2013): with one item a class it hardly moves them, and with many it becomes logistic regression.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor
from fsl_cli.algos.heads import balance, centroids, logistic
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
        refine: strength that holds the class weights to the scaled class means while logistic regression refines them; None:
            they stay the means.
    """

    bulk = True
    norms = PLAIN_NORMS

    def __init__(self, model: Embedding, scale: float, centre: bool = False, refine: float | None = None) -> None:
        super().__init__()
        positive(scale=scale, refine=refine)
        self.model, self.scale, self.centre, self.refine = model, scale, centre, refine

    def embed(self, inputs: Tensor) -> Tensor:
        return functional.normalize(self.model(inputs), dim=1)

    def adapt(self, support: Examples) -> Predictor:
        middle = centroids(support).mean(0) if self.centre else 0.0  # [features]
        directions = functional.normalize(support.inputs - middle, dim=1)
        means = functional.normalize(centroids(Examples(directions, support.targets)), dim=1)
        weights = self.scale * means  # [way, features]
        if self.refine is not None:
            offset = self.scale * _unseen(directions, means, support.targets)
            gram = directions @ directions.T
            weights = weights + logistic(gram, support.targets, balance(support.targets), self.refine, offset).T @ directions
        return lambda queries: functional.normalize(queries - middle, dim=1) @ weights.T


def _unseen(directions: Tensor, means: Tensor, targets: Tensor) -> Tensor:
    """Cosines `[n, way]` of support items `[n, features]` to the class means, as if their own class did not include them.

    An item is closer to a mean that it is part of than a new one would be, the more so the fewer items there are. The only item
    of a class takes the average of the others.
    """
    others = targets @ (targets.T @ directions) - directions
    own = (directions * functional.normalize(others, dim=1)).sum(1, keepdim=True)
    alone = targets @ targets.sum(0).unsqueeze(1) < 2  # [n, 1]
    usual = torch.where(alone, 0, own).sum() / (~alone).sum().clamp(min=1)
    usual = torch.where(alone.all(), 1.0, usual)  # nothing is known of new items: the means are taken at their word
    return torch.where(targets > 0, torch.where(alone, usual, own), directions @ means.T)
