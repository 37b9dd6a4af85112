"""Supervised training on all training classes, then a new head on the frozen embeddings of the support set.

Baseline and Baseline++: A Closer Look at Few-shot Classification, Chen et al., 2019 (https://arxiv.org/abs/1904.04232).
SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning, Wang et al., 2019
(https://arxiv.org/abs/1911.04623): `head=centroid`, after centring and scaling the embeddings (`transform`). `head=nearest`
answers with the class of the nearest support item. The mean that centring subtracts is a running one from training; the paper
takes the mean of all training images under the final weights.

Baseline fits a linear head, Baseline++ a cosine head. The head is trained as published (SGD with dampening), except that the
cosine head starts at the class means and the linear head at zero (the published code draws both at random), and that class
weights of the cosine head have no length (the published code, but not the paper, learns one for every class). In its loss every
class counts the same, however many items it has.
`backbone=full` adapts the embedding too; transformers need `head_optimizer=adam` for that.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Batch, Outcome, Predictor, Weights, cross_entropy
from fsl_cli.algos.heads import balance, centroids, cosine, nearest, squared_distances
from fsl_cli.algos.limits import at_least, positive
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import Norm, statistics

MOMENTUM, DAMPENING = 0.9, 0.9
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
ORDER_SEED = 20190408  # a constant: minibatches visit the support set in the same order in every episode

State = tuple[Any, ...]  # what an optimizer keeps from step to step


class Finetune(Algorithm):
    """Pre-trains an embedding with a classifier over all training classes, and fits a new head to every episode."""

    batches = Examples
    norms = PLAIN_NORMS
    only_training: ClassVar = {"batch": "", "scale": ""}

    def __init__(
        self,
        model: Embedding,
        classes: int,
        batch: int,
        head: Literal["cosine", "linear", "centroid", "nearest"],
        transform: Literal["none", "l2n", "cl2n"],
        backbone: Literal["frozen", "full"],
        scale: float,
        head_scale: float,
        head_lr: float,
        head_decay: float,
        head_epochs: int,
        head_batch: int,
        head_optimizer: Literal["sgd", "adam"] = "sgd",
    ) -> None:
        super().__init__()
        positive(scale=scale, head_scale=head_scale, head_lr=head_lr)
        at_least(0, head_epochs=head_epochs, head_decay=head_decay)
        at_least(1, head_batch=head_batch)
        if backbone == "full" and head not in ("cosine", "linear"):
            raise ValueError(f"algo.backbone = full, but algo.head = {head} fits nothing. Use algo.head=cosine|linear.")
        if transform != "none" and head not in ("centroid", "nearest"):
            raise ValueError(f"algo.transform = {transform}, but algo.head = {head} has none. Use algo.head=centroid|nearest.")
        self.model = model
        self.classifier = nn.Linear(model.out_features, classes, bias=head != "cosine")
        self.transform = transform
        self.centre = Norm(model.out_features, momentum=0.01) if transform == "cl2n" else None  # for its running mean
        self.batch = batch
        self.bulk = backbone == "frozen"
        self.norms = self.norms if self.bulk else ("running",)  # minibatches of a few items are too small for batch statistics
        self.head, self.scale, self.head_scale = head, scale, head_scale
        self.head_lr, self.head_decay, self.head_epochs, self.head_batch = head_lr, head_decay, head_epochs, head_batch
        self.direction = {"sgd": _sgd, "adam": _adam}[head_optimizer]

    @classmethod
    def idle(cls, options: Mapping[str, Any], training: bool) -> dict[str, str]:  # noqa: ARG003
        head = options["head"]
        fits = [name for name in options if name.startswith("head_")]  # the options of fitting a head to an episode
        names = {"cosine": [], "linear": ["scale", "head_scale"]}.get(head, ["scale", *fits])
        return dict.fromkeys(names, f"algo.head = {head} does not read it")

    def embed(self, inputs: Tensor) -> Tensor:
        return self._transformed(self.model(inputs)) if self.bulk else inputs

    def _transformed(self, features: Tensor) -> Tensor:
        """Embeddings minus their mean over the training classes (`cl2n`), then scaled to length 1 (`cl2n` and `l2n`)."""
        centred = features if self.centre is None else features - self.centre.running_mean
        return centred if self.transform == "none" else functional.normalize(centred, dim=1)

    def loss(self, batch: Batch) -> Outcome:
        assert isinstance(batch, Examples), "pre-training eats Examples over all training classes"
        with statistics(self, track=self.training, shared=self.training):
            features = self.model(batch.inputs)
            if self.centre is not None:
                self.centre(features)
        if self.head == "cosine":
            return self.outcome(cosine(features, self.classifier.weight, self.scale), batch.targets)
        return self.outcome(self.classifier(features), batch.targets)

    def adapt(self, support: Examples) -> Predictor:
        if self.head == "centroid":
            prototypes = centroids(support)
            return lambda queries: -squared_distances(queries, prototypes)
        if self.head == "nearest":
            return lambda queries: nearest(queries, support)
        weights, targets = self._start(support), balance(support.targets) * support.targets
        state: State = ()
        for chosen in minibatches(len(support.inputs), self.head_batch, self.head_epochs, support.inputs.device):
            part = Examples(support.inputs[chosen], targets[chosen])
            grads = grad(self._head_loss)(weights, part)
            direction, state = self.direction(grads, weights, self.head_decay, state)
            weights = {name: torch.sub(weight, direction[name], alpha=self.head_lr) for name, weight in weights.items()}
        return lambda queries: self._logits(weights, queries)

    def _start(self, support: Examples) -> Weights:
        """The weights that an episode fits, before the first step: the head `[way, features]`, and a full backbone."""
        backbone = {} if self.bulk else {name: weight.detach() for name, weight in self.model.named_parameters()}
        means = centroids(Examples(self._features(backbone, support.inputs), support.targets))
        if self.head == "cosine":
            return backbone | {"head": functional.normalize(means, dim=1)}
        return backbone | {"head": torch.zeros_like(means), "bias": torch.zeros_like(means[:, 0])}

    def _features(self, weights: Weights, inputs: Tensor) -> Tensor:
        return inputs if self.bulk else functional_call(self.model, weights, inputs)

    def _logits(self, weights: Weights, inputs: Tensor) -> Tensor:
        backbone = {name: weight for name, weight in weights.items() if name not in ("head", "bias")}
        features = self._features(backbone, inputs)
        if self.head == "cosine":
            return cosine(features, weights["head"], self.head_scale)
        return functional.linear(features, weights["head"], weights["bias"])

    def _head_loss(self, weights: Weights, part: Examples) -> Tensor:
        return cross_entropy(self._logits(weights, part.inputs), part.targets)


@lru_cache(maxsize=32)
def minibatches(n: int, size: int, epochs: int, device: torch.device) -> list[Tensor]:
    """Row numbers of `n` items, reshuffled in every epoch and cut into minibatches; cached on the device."""
    rng = np.random.default_rng(ORDER_SEED)
    cuts = range(size, n, size)
    return [torch.as_tensor(rows, device=device) for _ in range(epochs) for rows in np.split(rng.permutation(n), cuts)]


def _sgd(grads: Weights, weights: Weights, decay: float, state: State) -> tuple[Weights, State]:
    """SGD with dampened momentum: returns the direction to subtract, and the new state."""
    grads = {name: torch.add(g, weights[name], alpha=decay) for name, g in grads.items()}
    velocity = {name: MOMENTUM * state[0][name] + (1 - DAMPENING) * g for name, g in grads.items()} if state else grads
    return velocity, (velocity,)


def _adam(grads: Weights, weights: Weights, decay: float, state: State) -> tuple[Weights, State]:
    """Adam with decoupled decay (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101); overwrites `state`."""
    first, second, number = state or (*({name: torch.zeros_like(g) for name, g in grads.items()} for _ in BETAS), 0)
    fades = [1 - beta ** (number + 1) for beta in BETAS]
    direction = {}
    for name, g in grads.items():
        first[name].lerp_(g, 1 - BETAS[0])
        second[name].mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        # In place: for an encoder of millions of weights, memory bandwidth sets the speed.
        scale = second[name].sqrt().mul_(fades[0] / math.sqrt(fades[1])).add_(EPSILON * fades[0])
        direction[name] = torch.div(first[name], scale).add_(weights[name], alpha=decay)
    return direction, (first, second, number + 1)
