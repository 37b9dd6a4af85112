"""A Simple Neural Attentive Meta-Learner, Mishra et al., 2018 (https://arxiv.org/abs/1707.03141).

The support items with their labels, then a query without one, form a sequence. Causal convolutions and causal attentions read
it, each appending its outputs to its inputs; the answer is read at the last place.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor, check_way
from fsl_cli.algos.heads import scaling
from fsl_cli.algos.limits import at_least
from fsl_cli.algos.sequences import in_order
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding


class SNAIL(Algorithm):
    """Reads the support set and a query as one sequence through convolutions and attention.

    No place reads a later one, so the support set is processed once and every query continues from it.
    """

    bulk = True
    sequential = True
    equal_shots = True
    norms = PLAIN_NORMS

    def __init__(
        self,
        model: Embedding,
        way: int,
        shot: int,
        filters: int,
        keys: list[int],
        values: list[int],
        standardise: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, shot=shot, filters=filters)
        if not keys or len(keys) != len(values) or min(*keys, *values) < 1:
            raise ValueError(
                f"algo.keys = {keys} and algo.values = {values}, but each must have a number of at least 1 for every attention. "
                "The published widths are algo.keys=[64,256,512] algo.values=[32,128,256]."
            )
        self.model, self.way, self.standardise = model, way, standardise
        layers: list[Attention | Convolution] = []
        width = model.out_features + way
        for block, (key, value) in enumerate(zip(keys, values, strict=True), start=1):
            layers.append(Attention(width, key, value))
            width += value
            for level in range(math.ceil(math.log2(way * shot + 1)) if block < len(keys) else 0):
                layers.append(Convolution(width, filters, 2**level))
                width += filters
        self.layers = nn.ModuleList(layers)
        self.answer = nn.Linear(width, way)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        check_way(self.way, support.targets)
        order = in_order(len(support.inputs), self.way, support.inputs.device)
        scaled = scaling(support.inputs, self.standardise)
        seen = torch.cat([scaled(support.inputs), support.targets], dim=1)[order]  # [n, features + way]
        before = []  # the inputs of each layer at the support items
        for layer in self.layers:
            before.append(seen)
            seen = torch.cat([seen, layer(seen)], dim=1)

        def predictor(queries: Tensor) -> Tensor:
            last = torch.cat([scaled(queries), queries.new_zeros(queries.shape[0], self.way)], dim=1)
            for layer, earlier in zip(self.layers, before, strict=True):
                assert isinstance(layer, Attention | Convolution)
                last = torch.cat([last, layer.after(earlier, last)], dim=1)
            return self.answer(last)

        return predictor


class Convolution(nn.Module):
    """A causal gated convolution of two taps: each place of a sequence, and the one `dilation` before it."""

    def __init__(self, width: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.here, self.before = nn.Linear(width, 2 * filters), nn.Linear(width, 2 * filters, bias=False)
        self.dilation = dilation

    def forward(self, sequence: Tensor) -> Tensor:
        """`[n, width]` -> `[n, filters]`."""
        earlier = functional.pad(sequence, (0, 0, self.dilation, 0))[: len(sequence)]
        return _gated(self.here(sequence) + self.before(earlier))

    def after(self, sequence: Tensor, last: Tensor) -> Tensor:
        """Outputs `[q, filters]` at the place after a sequence `[n, width]`, for each alternative input `[q, width]` there."""
        place = len(sequence) - self.dilation
        return _gated(self.here(last) + (self.before(sequence[place]) if place >= 0 else 0))


class Attention(nn.Module):
    """Causal attention: each place of a sequence reads from itself and the places before it."""

    def __init__(self, width: int, keys: int, values: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, keys), nn.Linear(width, keys), nn.Linear(width, values)
        self.scale = 1 / math.sqrt(keys)

    def forward(self, sequence: Tensor) -> Tensor:
        """`[n, width]` -> `[n, values]`."""
        near = self.query(sequence) @ self.key(sequence).T * self.scale  # [n, n]
        later = torch.ones_like(near, dtype=torch.bool).triu(1)
        return near.masked_fill(later, -torch.inf).softmax(1) @ self.value(sequence)

    def after(self, sequence: Tensor, last: Tensor) -> Tensor:
        """Outputs `[q, values]` at the place after a sequence `[n, width]`, for each alternative input `[q, width]` there."""
        query = self.query(last) * self.scale
        near = torch.cat([query @ self.key(sequence).T, (query * self.key(last)).sum(1, keepdim=True)], dim=1)  # [q, n + 1]
        read = near.softmax(1)
        return read[:, :-1] @ self.value(sequence) + read[:, -1:] * self.value(last)


def _gated(both: Tensor) -> Tensor:
    value, gate = both.chunk(2, dim=1)
    return value.tanh() * gate.sigmoid()
