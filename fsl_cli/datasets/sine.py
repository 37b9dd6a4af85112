"""Sine curves y = amplitude * sin(x - phase), the regression tasks of MAML (Finn et al. 2017, section 5.1).

Amplitude U[0.1, 5], phase U[0, pi], x U[-5, 5]. There are no classes to split: training, validation and test draw their
functions from separate streams of random numbers.
"""

import numpy as np

from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Dataset

AMPLITUDE, PHASE, X = (0.1, 5.0), (0.0, np.pi), (-5.0, 5.0)


class Sine(Dataset):
    """Curves of random amplitude and phase; needs no files."""

    def load(self) -> Drawn:
        return Drawn("sine", draw)


def draw(rng: np.random.Generator, tasks: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of new curves: x and y, both `[tasks, points]`."""
    amplitude, phase = (rng.uniform(*bounds, (tasks, 1)) for bounds in (AMPLITUDE, PHASE))
    x = rng.uniform(*X, (tasks, points))
    return x, amplitude * np.sin(x - phase)
