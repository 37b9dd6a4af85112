"""What algorithms that read the support set as a sequence share: an LSTM cell, and the order of the items at evaluation."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

ORDER_SEED = 20160519  # a constant: evaluation episodes of a size present their items in the same order


class Cell(nn.Module):
    """An LSTM cell made of plain operations, which vmap can map; the state that it reads may be wider than its output."""

    def __init__(self, width: int, state: int, out: int) -> None:
        super().__init__()
        self.gates = nn.Linear(width + state, 4 * out)

    def forward(self, inputs: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """One step on inputs `[..., width]`: returns the output and the new cell, both `[..., out]`."""
        enter, forget, leave, new = self.gates(torch.cat([inputs, state], dim=-1)).chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * cell.tanh(), cell

    def outputs(self, sequence: Tensor) -> Tensor:
        """The outputs `[n, out]` after each row of a sequence `[n, width]`."""
        cell = sequence.new_zeros(1, self.gates.out_features // 4)
        hidden = cell
        rows = []
        for row in sequence.split(1):
            hidden, cell = self(row, hidden, cell)
            rows.append(hidden)
        return torch.cat(rows)


def presentations(n: int, way: int) -> np.ndarray:
    """The order of `n` items sorted by class: rows with one item of every class, or one row if `way` does not divide `n`.

    If the classes differ in size although `n` is a multiple of `way`, a row may hold two items of one class.
    """
    if n % way:
        return np.random.default_rng(ORDER_SEED).permutation(n)[None]
    order = np.random.default_rng(ORDER_SEED).permutation(way)
    return order * (n // way) + np.arange(n // way)[:, None]


@torch.compiler.assume_constant_result
def in_order(n: int, way: int, device: torch.device) -> Tensor:
    """The rows of `presentations` joined, `[n]`; cached on the device: a CUDA graph cannot capture a copy from the host."""
    return _in_order(n, way, device)


@lru_cache(maxsize=32)
def _in_order(n: int, way: int, device: torch.device) -> Tensor:
    return torch.as_tensor(presentations(n, way).ravel(), device=device)
