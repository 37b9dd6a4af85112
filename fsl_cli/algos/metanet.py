"""Meta Networks, Munkhdalai and Yu, 2017 (https://arxiv.org/abs/1703.00837).

Two networks have slow weights, learned by the outer loop, and fast weights, made in every episode: `u` represents items, `b`
answers queries. The network `d` turns the gradient of the loss of `u` on the support set into the fast weights of `u`. The
network `m` turns the gradient of the loss of `b` on each support item into fast weights of `b`: a memory, from which each query
reads its own by attention between representations. A layer adds its outputs under slow and under fast weights, each after its
own nonlinearity.

Differences from the paper:

- `u` and `b` share a body, `model`, which has only slow weights, and have two layers of their own. The fast weights of an
  episode are `support items * (features + way) * width` numbers: for large images choose `model.pooling=mean`.
- The loss of `u` is the cross entropy at any number of shots (the paper's is contrastive beyond one), and `d` is a network like
  `m` applied to the mean gradient (the paper's reads the gradients of sampled items with an LSTM).
- The attention is multiplied by a learned factor: the softmax of cosines alone is nearly flat.
- Embeddings are standardised by the support set (`standardise`).
"""

import math

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor, Weights, check_way, cross_entropy
from fsl_cli.algos.heads import cosine, scaling
from fsl_cli.algos.limits import at_least
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding

P = 7.0  # gradients below exp(-P) are read linearly, larger ones as logarithm and sign (Andrychowicz et al., 2016)


class MetaNet(Algorithm):
    """Turns loss gradients of the support items into weights that queries read from a memory."""

    bulk = True
    equal_shots = True
    norms = PLAIN_NORMS
    cached_chunk = 8  # limits memory: every query has its own fast weights

    def __init__(self, model: Embedding, way: int, width: int, hidden: int, standardise: bool = False) -> None:
        super().__init__()
        at_least(1, width=width, hidden=hidden)
        self.model, self.way, self.standardise = model, way, standardise
        self.u, self.b = (
            nn.ModuleDict({"hidden": nn.Linear(model.out_features, width), "head": nn.Linear(width, way)}) for _ in range(2)
        )
        self.d, self.m = Generator(hidden), Generator(hidden)
        self.sharpness = nn.Parameter(torch.tensor(10.0))

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        check_way(self.way, support.targets)
        scaled = scaling(support.inputs, self.standardise)
        support = Examples(scaled(support.inputs), support.targets)
        u: Weights = dict(self.u.named_parameters())
        b: Weights = dict(self.b.named_parameters())
        fast = self.d(grad(_loss)(u, *support))
        memory = self.m(vmap(grad(_loss), in_dims=(None, 0, 0))(b, *support))  # by support item: [n, ...]
        keys = represented(support.inputs, u, fast)

        def answer(query: Tensor, attention: Tensor) -> Tensor:
            return answered(query, b, {name: torch.tensordot(attention, weights, 1) for name, weights in memory.items()})

        def predictor(queries: Tensor) -> Tensor:
            queries = scaled(queries)
            attention = cosine(represented(queries, u, fast), keys, 1.0) * self.sharpness  # [q, n]
            return vmap(answer)(queries, attention.softmax(1))

        return predictor


class Generator(nn.Module):
    """Turns every coordinate of a gradient into a weight, by one small network for all of them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, gradients: Weights) -> Weights:
        """Weights with the shapes of the gradients."""
        return {name: self.layers(preprocessed(gradient)).squeeze(-1) for name, gradient in gradients.items()}


def preprocessed(gradient: Tensor) -> Tensor:
    """Size and sign of a gradient `[...]`, scaled as a network's inputs `[..., 2]`: `(log|g| / P, sign g)` where `|g|` is at
    least exp(-P), else `(-1, exp(P) g)`.
    """
    size = gradient.abs().clamp(min=math.exp(-P)).log() / P
    return torch.stack([size, (math.exp(P) * gradient).clamp(-1, 1)], dim=-1)


def represented(inputs: Tensor, *paths: Weights) -> Tensor:
    """Representations `[..., width]` of inputs `[..., features]`: the first layer's outputs, summed over `paths` of weights."""
    return _sum([functional.linear(inputs, path["hidden.weight"], path["hidden.bias"]).relu() for path in paths])


def answered(inputs: Tensor, *paths: Weights) -> Tensor:
    """Logits `[..., way]` of inputs `[..., features]`; a single path is an ordinary network."""
    inner = represented(inputs, *paths)
    return _sum([functional.linear(inner, path["head.weight"], path["head.bias"]) for path in paths])


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _loss(slow: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of the slow network on inputs `[..., features]` and targets `[..., way]`."""
    return cross_entropy(answered(torch.atleast_2d(inputs), slow), torch.atleast_2d(targets))
