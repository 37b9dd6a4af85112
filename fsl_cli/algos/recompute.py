"""An inner loop that keeps only the weights after each step: the backward pass computes each step again."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fsl_cli.algos.base import Weights


def unrolled(weights: Weights, step: Callable[[Weights, int], Weights], count: int) -> Weights:
    """The weights after `count` calls of `step`, each with the weights before it and its number, from 0."""
    names = list(weights)
    for number in range(count):

        def again(*values: Tensor, number: int = number) -> tuple[Tensor, ...]:
            return tuple(step(dict(zip(names, values, strict=True)), number).values())

        # Only the reentrant form works around vmap.
        values: tuple[Tensor, ...] = checkpoint(again, *weights.values(), use_reentrant=True)  # pyright: ignore
        weights = dict(zip(names, values, strict=True))
    return weights
