"""Small classifiers on embeddings that several algorithms share."""

from torch import Tensor
from torch.nn import functional

from fsl_cli.episodes import Examples


def centroids(support: Examples) -> Tensor:
    """Class means `[way, features]` of support embeddings `[n, features]`; classes may have different sizes."""
    return support.targets.T @ support.inputs / support.targets.sum(0).unsqueeze(1)


def squared_distances(queries: Tensor, prototypes: Tensor) -> Tensor:
    """Squared Euclidean distances `[q, way]` between `[q, features]` and `[way, features]`."""
    cross = queries @ prototypes.T
    return queries.square().sum(1, keepdim=True) - 2 * cross + prototypes.square().sum(1)


def cosine(inputs: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Scaled cosine similarities `[n, way]` of embeddings `[n, features]` and class weights `[way, features]`."""
    return scale * functional.normalize(inputs, dim=1) @ functional.normalize(weights, dim=1).T
