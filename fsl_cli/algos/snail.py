"""A Simple Neural Attentive Meta-Learner, Mishra et al., 2018 (https://arxiv.org/abs/1707.03141).

The support items with their labels, then a query without one, form a sequence. Causal convolutions and causal attention, each of
which adds its outputs to those before it, read the sequence; the last place is the answer.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.algos.base import Algorithm, Predictor, check_way
from fsl_cli.algos.sequences import in_order
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding


class SNAIL(Algorithm):
    """Reads support set and query as one sequence through convolutions and attention."""

    bulk = True
    norms = ("running", "transductive", "support")

    def __init__(self, model: Embedding, way: int, shot: int, filters: int, keys: int, values: int) -> None:
        super().__init__()
        self.model, self.way = model, way
        layers, width = [], model.out_features + way
        for block in range(3):
            layers.append(Attention(width, keys * 2**block, values * 2**block))
            width += values * 2**block
            for level in range(math.ceil(math.log2(way * shot + 1)) if block < 2 else 0):
                layers.append(Convolution(width, filters, 2**level))
                width += filters
        self.layers = nn.Sequential(*layers)
        self.answer = nn.Linear(width, way)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        check_way(self.way, support.targets)
        order = in_order(len(support.inputs), self.way, support.inputs.device)
        seen = torch.cat([support.inputs, support.targets], dim=1)[order]  # [n, features + way]

        def predictor(queries: Tensor) -> Tensor:
            last = torch.cat([queries, queries.new_zeros(len(queries), self.way)], dim=1).unsqueeze(1)
            sequences = torch.cat([seen.expand(len(queries), -1, -1), last], dim=1)  # [q, n + 1, features + way]
            return self.answer(self.layers(sequences)[:, -1])

        return predictor


class Convolution(nn.Module):
    """Sequences `[q, t, width]` -> `[q, t, width + filters]`: each place, and the one `dilation` before it, gated."""

    def __init__(self, width: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.here, self.before = nn.Linear(width, 2 * filters), nn.Linear(width, 2 * filters, bias=False)
        self.dilation = dilation

    def forward(self, sequences: Tensor) -> Tensor:
        earlier = functional.pad(sequences, (0, 0, self.dilation, 0))[:, : sequences.shape[1]]
        value, gate = (self.here(sequences) + self.before(earlier)).chunk(2, dim=2)
        return torch.cat([sequences, value.tanh() * gate.sigmoid()], dim=2)


class Attention(nn.Module):
    """Sequences `[q, t, width]` -> `[q, t, width + values]`: what each place reads from itself and the places before it."""

    def __init__(self, width: int, keys: int, values: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, keys), nn.Linear(width, keys), nn.Linear(width, values)

    def forward(self, sequences: Tensor) -> Tensor:
        near = self.query(sequences) @ self.key(sequences).transpose(1, 2) / math.sqrt(self.key.out_features)  # [q, t, t]
        later = torch.ones_like(near[0], dtype=torch.bool).triu(1)
        read = near.masked_fill(later, -torch.inf).softmax(2) @ self.value(sequences)
        return torch.cat([sequences, read], dim=2)
