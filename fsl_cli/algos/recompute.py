"""An inner loop whose memory does not grow with its steps: each is computed once more while it is differentiated."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fsl_cli.algos.base import Weights


def unrolled(weights: Weights, step: Callable[[Weights, int], Weights], count: int) -> Weights:
    """The weights after `count` steps, each called with those before it and its number, from 0."""
    names = list(weights)
    for number in range(count):

        def again(*values: Tensor, number: int = number) -> tuple[Tensor, ...]:
            return tuple(step(dict(zip(names, values, strict=True)), number).values())

        # The reentrant form is the one that runs around a map.
        values: tuple[Tensor, ...] = checkpoint(again, *weights.values(), use_reentrant=True)  # pyright: ignore
        weights = dict(zip(names, values, strict=True))
    return weights
