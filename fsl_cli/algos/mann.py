"""Meta-Learning with Memory-Augmented Neural Networks, Santoro et al., 2016 (https://arxiv.org/abs/1605.06065).

The support set is read as a sequence: item t together with the label of item t-1. Training shuffles the items in every
episode; evaluation presents one item of every class, then the second of every class, and so on. An LSTM reads from an external
memory, and writes to its least recently used places and those that it read last. A query is the item after the last one. The
published network answers at every step of one long sequence; here it answers queries after the support, so that its accuracy
after k presentations of a class is its k-shot accuracy. `path` gives the answers after each presentation. The similarities of
the read are multiplied by a learned factor, without which attention over 128 places stays flat. Every head spreads its write
over as many least used places as there are heads, so that these come to hold the same content, and items beyond the first
`places / heads` overwrite older ones. Unlike the paper, embeddings are standardised by the support set (`standardise`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor, check_way
from fsl_cli.algos.heads import scaling
from fsl_cli.algos.limits import at_least
from fsl_cli.algos.sequences import Cell, presentations
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding

DECAY = 0.95  # of the usage, per item


class Memory(NamedTuple):
    """The state of the network between two items."""

    cells: Tensor  # [places, width]
    usage: Tensor  # [places]
    read: Tensor  # [heads, places] weights of the last read
    hidden: Tensor  # [controller]
    cell: Tensor  # [controller]
    values: Tensor  # [heads * width] result of the last read


class MANN(Algorithm):
    """An LSTM with an external memory, which it writes to at the least recently used places and those read last."""

    bulk = True
    sequential = True
    equal_shots = True
    norms = PLAIN_NORMS
    cached_chunk = 8  # limits memory: every query has its own copy of the places

    def __init__(
        self, model: Embedding, way: int, places: int, width: int, heads: int, controller: int, standardise: bool = False
    ) -> None:
        super().__init__()
        at_least(1, places=places, width=width, heads=heads, controller=controller)
        if heads > places:
            raise ValueError(
                f"algo.heads = {heads}, but algo.places = {places}, and every head writes to a place of its own. Lower it, or "
                "raise algo.places."
            )
        self.model, self.way, self.standardise = model, way, standardise
        self.places, self.width, self.heads = places, width, heads
        self.controller = Cell(model.out_features + way, heads * width + controller, controller)
        self.keys = nn.Linear(controller, heads * width)
        self.gate = nn.Linear(controller, heads)
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        self.answer = nn.Linear(controller + heads * width, way)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        return self.path(support)[-1]

    def path(self, support: Examples) -> list[Predictor]:
        check_way(self.way, support.targets)
        scaled = scaling(support.inputs, self.standardise)
        items = scaled(support.inputs)
        memory = self.empty(items)
        label = torch.zeros_like(support.targets[0])
        predictors = [self._predictor(memory, label, scaled)]
        for presentation in presentations(len(support.inputs), self.way):
            for item in presentation:
                memory, _ = self.step(memory, items[item], label)
                label = support.targets[item]
            predictors.append(self._predictor(memory, label, scaled))
        return predictors

    def _predictor(self, memory: Memory, label: Tensor, scaled: Predictor) -> Predictor:
        return lambda queries: torch.func.vmap(lambda query: self.step(memory, query, label)[1])(scaled(queries))

    def empty(self, like: Tensor) -> Memory:
        """The state before the first item."""
        controller = self.gate.in_features
        zeros = like.new_zeros
        cells = zeros(self.places, self.width) + 1e-6  # the cosine of a zero vector has no gradient
        order = torch.linspace(0, 1e-3, self.places, dtype=like.dtype, device=like.device)  # ranks places never used
        read, values = zeros(self.heads, self.places), zeros(self.heads * self.width)
        return Memory(cells, order, read, zeros(controller), zeros(controller), values)

    def step(self, memory: Memory, item: Tensor, label: Tensor) -> tuple[Memory, Tensor]:
        """Reads an embedding `[features]` with the previous item's label `[way]`; returns the new state and logits `[way]`."""
        state = torch.cat([memory.values, memory.hidden])
        hidden, cell = self.controller(torch.cat([item, label]), state, memory.cell)
        keys = self.keys(hidden).tanh().view(self.heads, self.width)
        share = self.gate(hidden).sigmoid().unsqueeze(1)  # [heads, 1]
        least = least_used(memory.usage, self.heads)  # [places]
        write = share * memory.read + (1 - share) * least / self.heads  # [heads, places]
        # The least used place of all is wiped before it is written to.
        cells = memory.cells * (1 - least_used(memory.usage, 1)).unsqueeze(1) + write.T @ keys
        near = functional.normalize(keys, dim=1) @ functional.normalize(cells, dim=1).T
        read = (self.sharpness * near).softmax(1)
        values = (read @ cells).flatten()
        usage = DECAY * memory.usage + read.sum(0) + write.sum(0)
        logits = self.answer(torch.cat([hidden, values]))
        return Memory(cells, usage, read, hidden, cell, values), logits


def least_used(usage: Tensor, count: int) -> Tensor:
    """1 at the `count` places of least `usage` `[places]`, else 0."""
    return functional.one_hot(usage.topk(count, largest=False).indices, usage.shape[-1]).sum(0).to(usage.dtype)
