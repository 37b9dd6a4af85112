"""The form of a data set of functions, for regression: nothing is stored, points are drawn anew for every episode."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Drawn:
    """A family of functions of one variable; `draw(rng, tasks, points)` gives points x and y `[tasks, points]` of new ones."""

    name: str
    draw: Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
    item_shape: tuple[int, ...] = (1,)

    def class_names(self, split: str) -> list[str]:  # noqa: ARG002 - as Packed has it
        """Functions have no classes."""
        return []
