"""What the algorithms share that read the support set as a sequence: an LSTM cell, and the order of the items in evaluation."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

ORDER_SEED = 20160519  # of an evaluation episode: those of a size present their items in one order


class Cell(nn.Module):
    """An LSTM cell of plain operations, which can be mapped; the state that it is fed may be wider than its output."""

    def __init__(self, width: int, state: int, out: int) -> None:
        super().__init__()
        self.gates = nn.Linear(width + state, 4 * out)

    def forward(self, inputs: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """One step on inputs `[..., width]`: the output and the cell, both `[..., out]`."""
        enter, forget, leave, new = self.gates(torch.cat([inputs, state], dim=-1)).chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * cell.tanh(), cell

    def outputs(self, sequence: Tensor) -> Tensor:
        """The output after each row of a sequence `[n, width]`, `[n, out]`."""
        cell = sequence.new_zeros(1, self.gates.out_features // 4)
        hidden = cell
        rows = []
        for row in sequence.split(1):
            hidden, cell = self(row, hidden, cell)
            rows.append(hidden)
        return torch.cat(rows)


def presentations(n: int, way: int) -> np.ndarray:
    """The order of `n` items that are sorted by class: rows of one of every class, or a single row if `way` does not divide `n`.

    Where the classes differ in size and `n` is a multiple of `way` all the same, a row may hold two of a class.
    """
    if n % way:
        return np.random.default_rng(ORDER_SEED).permutation(n)[None]
    order = np.random.default_rng(ORDER_SEED).permutation(way)
    return order * (n // way) + np.arange(n // way)[:, None]


@torch.compiler.assume_constant_result
def in_order(n: int, way: int, device: torch.device) -> Tensor:
    """The rows of `presentations` one after the other, `[n]`; kept on the device: a CUDA graph admits no copy from the host."""
    return _in_order(n, way, device)


@lru_cache(maxsize=32)
def _in_order(n: int, way: int, device: torch.device) -> Tensor:
    return torch.as_tensor(presentations(n, way).ravel(), device=device)
