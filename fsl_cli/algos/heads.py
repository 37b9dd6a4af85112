"""Small classifiers on embeddings that several algorithms share."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fsl_cli.episodes import Examples

EPS = 1e-8  # added to a variance


def centroids(support: Examples) -> Tensor:
    """Class means `[way, features]` of support embeddings `[n, features]`; classes may have different sizes."""
    return support.targets.T @ support.inputs / support.targets.sum(0).unsqueeze(1)


def squared_distances(queries: Tensor, prototypes: Tensor) -> Tensor:
    """Squared Euclidean distances `[q, way]` between `[q, features]` and `[way, features]`."""
    cross = queries @ prototypes.T
    return queries.square().sum(1, keepdim=True) - 2 * cross + prototypes.square().sum(1)


def nearest(queries: Tensor, support: Examples) -> Tensor:
    """The negative squared distance `[q, way]` of queries `[q, features]` to the nearest support item of each class."""
    distances = squared_distances(queries, support.inputs).unsqueeze(-1)  # [q, n, 1]
    return -distances.masked_fill(support.targets == 0, torch.inf).amin(1)


def cosine(inputs: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Scaled cosine similarities `[n, way]` of embeddings `[n, features]` and class weights `[way, features]`."""
    return scale * functional.normalize(inputs, dim=1) @ functional.normalize(weights, dim=1).T


def scaling(support: Tensor, standardise: bool) -> Callable[[Tensor], Tensor]:
    """Returns a function that standardises embeddings by the mean and spread of `support` `[n, features]`, or the identity.

    It makes the layers above learn faster: the embeddings of a pre-trained network have one sign and arbitrary size.
    """
    if not standardise:
        return lambda inputs: inputs
    mean = support.mean(0)
    spread = ((support - mean).square().mean() + EPS).sqrt()
    return lambda inputs: (inputs - mean) / spread


def balance(targets: Tensor) -> Tensor:
    """Weights `[n, 1]` of the items of a support set, mean 1, by which every class counts the same, however many items it has.

    A user's classes are rarely of equal size. Where they are, as in all training and evaluation, every weight is exactly 1.
    Targets times weights make a weighted cross entropy.
    """
    shots = targets.sum(0)
    present = (shots > 0).sum()  # a fixed head may have classes without items
    return targets @ (len(targets) / present / shots.clamp(min=1)).unsqueeze(1)


# The following fit linear classifiers W = X^T A to embeddings X `[n, features]`, given as their Gram matrix X X^T `[n, n]`,
# one-hot targets Y `[n, way]` and weights `[n, 1]` of the items in the loss; they return the coefficients A `[n, way]`. All can
# be mapped and differentiated.

LOGISTIC_STEPS, SVM_STEPS = 40, 60


def ridge(gram: Tensor, targets: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Ridge regression onto the targets: minimises sum_i w_i |x_i W - y_i|^2 + strength |W|^2, by the Woodbury identity."""
    roots = weights.sqrt()
    return roots * torch.cholesky_solve(roots * targets, _factor(roots * gram * roots.T, strength))


def logistic(gram: Tensor, targets: Tensor, weights: Tensor, strength: float, offset: Tensor | float = 0.0) -> Tensor:
    """Multinomial logistic regression: minimises the weighted sum of the cross entropies + strength / 2 |W|^2.

    Newton steps with Nesterov momentum, in which the bound X^T X / 2 (Boehning, 1992) replaces the Hessian, so that all steps
    share one factorisation. `offset` `[n, way]` is added to the scores X W.
    """
    roots = weights.sqrt()
    inverse = torch.cholesky_inverse(_factor(roots * gram * roots.T / 2, strength))
    coefficients = ahead = torch.zeros_like(targets)
    for number in range(LOGISTIC_STEPS):
        scores = gram @ (roots * ahead) + offset
        gradient = roots * (scores.softmax(1) - targets) + strength * ahead  # the gradient without its factor X^T
        moved = ahead - inverse @ gradient
        ahead = moved + number / (number + 3) * (moved - coefficients)
        coefficients = moved
    return roots * coefficients


def svm(gram: Tensor, targets: Tensor, weights: Tensor, strength: float) -> Tensor:
    """The multi-class support vector machine of Crammer and Singer (2001), with C = `strength`, solved in its dual.

    Minimises tr(A^T K A) / 2 - tr(A^T Y), K the Gram matrix, over A whose rows sum to 0 with `A <= strength * weights * Y`.
    """
    step = 1 / gram.diagonal().sum()  # the trace bounds the largest eigenvalue
    coefficients = ahead = torch.zeros_like(targets)
    for number in range(SVM_STEPS):
        moved = _project(ahead - step * (gram @ ahead - targets), strength * weights * targets)
        ahead = moved + number / (number + 3) * (moved - coefficients)
        coefficients = moved
    return coefficients


def _factor(gram: Tensor, strength: float) -> Tensor:
    """The Cholesky factor of `gram + strength I`, which is positive definite.

    A general solver will not do: in batches of matrices of more than 128 rows and with two threads, torch 2.14 with MKL fails on
    an AMD CPU ("Parameter 6 was incorrect on entry to SLASWP"), or runs for many minutes.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky_ex(gram + strength * eye).L  # unchecked, since a check would break CUDA graphs


def _project(values: Tensor, upper: Tensor) -> Tensor:
    """Projects rows `[n, way]` onto those that sum to 0 and are at most `upper`."""
    # For u = upper - row >= 0, with sum(u) = sum(upper), this is the projection onto a simplex (Held et al., 1974).
    total = upper.sum(1, keepdim=True)
    slack = upper - values
    ordered = slack.sort(1, descending=True).values
    sums = ordered.cumsum(1) - total
    count = torch.arange(1, slack.shape[1] + 1, dtype=slack.dtype, device=slack.device)
    active = (ordered - sums / count > 0).to(slack.dtype)
    number = active.sum(1, keepdim=True)
    shift = ((ordered * active).sum(1, keepdim=True) - total) / number
    return upper - (slack - shift).clamp(min=0)
