"""Data sets of functions, for regression: nothing is stored, and every episode draws new points."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Drawn:
    """A family of functions of one variable; `draw(rng, tasks, points)` returns x and y `[tasks, points]` of new functions."""

    name: str
    draw: Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
    item_shape: tuple[int, ...] = (1,)

    def class_names(self, split: str) -> list[str]:  # noqa: ARG002 - as Packed has it
        """Functions have no classes."""
        return []
