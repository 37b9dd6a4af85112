"""Meta Networks, Munkhdalai and Yu, 2017 (https://arxiv.org/abs/1703.00837).

Two networks have slow weights, learned by the outer loop, and fast ones, made anew in every episode: `u` represents items, `b`
answers. The gradient of a loss of `u` on the support set becomes the fast weights of `u` through the network `d`. The gradient
of a loss of `b` on each support item becomes fast weights of `b` through the network `m`: a memory, from which a query reads
its own by attention between representations. A layer adds up what its slow and its fast weights say, each after its own
nonlinearity.

Where it differs from the paper:

- `u` and `b` share a body, `model`, which has slow weights alone, and have two layers of their own. The fast weights of an
  episode are `support items * (features + way) * width` numbers: for large images choose `model.pooling=mean`.
- The loss of `u` is the cross entropy at any number of shots (theirs is contrastive beyond one), and `d` takes the mean
  gradient through a network like `m` (theirs reads the gradients of sampled items with an LSTM).
- Attention is sharpened by a learned factor: the softmax of cosines alone is nearly flat.
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

P = 7.0  # gradients smaller than exp(-P) are taken as they are, larger ones by logarithm and sign (Andrychowicz et al., 2016)


class MetaNet(Algorithm):
    """Turns loss gradients of the support items into weights that queries read from a memory."""

    bulk = True
    norms = PLAIN_NORMS
    cached_chunk = 8  # for the memory of each

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
        memory = self.m(vmap(grad(_loss), in_dims=(None, 0, 0))(b, *support))  # of each item: [n, ...]
        keys = represented(support.inputs, u, fast)

        def answer(query: Tensor, attention: Tensor) -> Tensor:
            return answered(query, b, {name: torch.tensordot(attention, weights, 1) for name, weights in memory.items()})

        def predictor(queries: Tensor) -> Tensor:
            queries = scaled(queries)
            attention = cosine(represented(queries, u, fast), keys, 1.0) * self.sharpness  # [q, n]
            return vmap(answer)(queries, attention.softmax(1))

        return predictor


class Generator(nn.Module):
    """Makes a weight of every coordinate of a gradient, by one small network for all of them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, gradients: Weights) -> Weights:
        """Weights of the shapes of the gradients."""
        return {name: self.layers(preprocessed(gradient)).squeeze(-1) for name, gradient in gradients.items()}


def preprocessed(gradient: Tensor) -> Tensor:
    """Size and sign of a gradient `[...]` at a scale that a network can read, `[..., 2]`: `(log|g| / P, sign g)` where `|g|` is
    at least exp(-P), else `(-1, exp(P) g)`.
    """
    size = gradient.abs().clamp(min=math.exp(-P)).log() / P
    return torch.stack([size, (math.exp(P) * gradient).clamp(-1, 1)], dim=-1)


def represented(inputs: Tensor, *paths: Weights) -> Tensor:
    """Representations `[..., width]` of inputs `[..., features]`: what each path's first layer says, summed."""
    return _sum([functional.linear(inputs, path["hidden.weight"], path["hidden.bias"]).relu() for path in paths])


def answered(inputs: Tensor, *paths: Weights) -> Tensor:
    """Logits `[..., way]` of inputs `[..., features]`; a single path is a network as usual."""
    inner = represented(inputs, *paths)
    return _sum([functional.linear(inner, path["head.weight"], path["head.bias"]) for path in paths])


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _loss(slow: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of the slow network on inputs `[..., features]` and targets `[..., way]`."""
    return cross_entropy(answered(torch.atleast_2d(inputs), slow), torch.atleast_2d(targets))
