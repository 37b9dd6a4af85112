"""Matching Networks for One Shot Learning, Vinyals et al., 2016 (https://arxiv.org/abs/1606.04080).

A query is answered by attention over the support items. `context` adds the paper's full context embeddings: a bidirectional
LSTM over the support set, and for queries an LSTM with attention over it. The cosine similarities are multiplied by a learned
scale, without which the attention cannot become sharp; `distance=euclidean` uses squared distances instead.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor
from fsl_cli.algos.heads import cosine, squared_distances
from fsl_cli.algos.limits import positive
from fsl_cli.algos.sequences import Cell, in_order
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding

READS = 5  # steps of the attention LSTM
SCALES = {"cosine": 10.0, "euclidean": 1.0}  # squared distances are large enough for a sharp softmax


class MatchingNet(Algorithm):
    """The probability of a class is the attention that its support items receive from the query."""

    bulk = True
    norms = PLAIN_NORMS
    starts = ("scale",)

    def __init__(self, model: Embedding, distance: Literal["cosine", "euclidean"], scale: float | None, context: bool) -> None:
        super().__init__()
        scale = SCALES[distance] if scale is None else scale
        positive(scale=scale)
        self.model, self.distance = model, distance
        self.sequential = context
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        width = model.out_features
        self.forwards, self.backwards = (Cell(width, width, width) if context else None for _ in range(2))
        self.reader = Cell(width, 2 * width, width) if context else None

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        items, targets = support
        if self.forwards is not None and self.backwards is not None:
            order = in_order(len(items), targets.shape[-1], items.device)  # training shuffles: never present them by class
            items, targets = items[order], targets[order]
            items = items + self.forwards.outputs(items) + self.backwards.outputs(items.flip(0)).flip(0)
        other = (targets == 0).unsqueeze(0)  # [1, n, way]
        even = (len(targets) / targets.shape[1] / targets.sum(0)).log()  # a class with many items must not win by their number

        def predictor(queries: Tensor) -> Tensor:
            seen = self._read(queries, items)
            near = cosine(seen, items, 1.0) if self.distance == "cosine" else -squared_distances(seen, items)
            attention = (self.scale * near).unsqueeze(-1).masked_fill(other, -torch.inf)  # [q, n, way]
            return attention.logsumexp(1) + even  # log of the attention, up to a constant: a softmax gives the probabilities

        return predictor

    def _read(self, queries: Tensor, items: Tensor) -> Tensor:
        if self.reader is None:
            return queries
        hidden = cell = torch.zeros_like(queries)
        read = torch.zeros_like(queries)
        for _ in range(READS):
            hidden, cell = self.reader(queries, torch.cat([hidden, read], dim=1), cell)
            hidden = hidden + queries
            read = functional.softmax(hidden @ items.T, dim=1) @ items
        return hidden
