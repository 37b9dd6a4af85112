"""Meta-Transfer Learning for Few-Shot Learning, Sun et al., 2019 (https://arxiv.org/abs/1812.02391).

The weights of a pre-trained network (`pretrain=train`, or `pretrain=PATH`) stay fixed; the outer loop learns a factor for every
kernel, the scale and shift of the normalisation layers, and the initial head; the inner loop trains only the head, without
second derivatives. The paper's shift is the bias of a convolution; here it is the shift of the normalisation that follows.
In each meta-batch, `hard_tasks` tasks draw their classes from those that recent tasks failed at.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor, Weights, cross_entropy, undotted
from fsl_cli.algos.heads import balance
from fsl_cli.algos.limits import at_least, positive
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import norm_weights


class MTL(Algorithm):
    """Learns factors of frozen kernels, and the initial weights of a head that the inner loop trains."""

    bulk = True
    wants_pretrained = True
    norms = PLAIN_NORMS
    only_training: ClassVar = {"inner_steps": "eval_inner_steps", "hard_tasks": ""}

    def __init__(
        self, model: Embedding, way: int, inner_lr: float, inner_steps: int, eval_inner_steps: int, hard_tasks: int = 0
    ) -> None:
        super().__init__()
        positive(inner_lr=inner_lr)
        at_least(0, inner_steps=inner_steps, eval_inner_steps=eval_inner_steps, hard_tasks=hard_tasks)
        self.hard_tasks = hard_tasks
        self.model = model
        self.head = nn.Linear(model.out_features, way)
        self.inner_lr, self.inner_steps, self.eval_inner_steps = inner_lr, inner_steps, eval_inner_steps
        self.factors = nn.ParameterDict()
        norms = norm_weights(model)
        self.kernels = [name for name, p in model.named_parameters() if id(p) not in norms and p.dim() > 1]
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in norms)
        for name in self.kernels:
            kernel = model.get_parameter(name)  # [out, in, ...]
            self.factors[undotted(name)] = torch.ones(*kernel.shape[:2], *[1] * (kernel.dim() - 2))

    @classmethod
    def network(cls, state: Weights) -> Weights:
        """Multiplies the kernels by their factors, as `embed` does."""
        return {name: value * state.get(f"factors.{undotted(name)}", 1) for name, value in super().network(state).items()}

    def embed(self, inputs: Tensor) -> Tensor:
        weights = {name: self.model.get_parameter(name) * self.factors[undotted(name)] for name in self.kernels}
        return functional_call(self.model, weights, inputs)

    def adapt(self, support: Examples) -> Predictor:
        return self.path(support)[-1]

    def path(self, support: Examples) -> list[Predictor]:
        weights: Weights = dict(self.head.named_parameters())
        steps = [weights]
        fixed = Examples(support.inputs.detach(), balance(support.targets) * support.targets)
        for _ in range(self.inner_steps if self.training else self.eval_inner_steps):
            with torch.no_grad():
                grads = grad(_loss)({name: weight.detach() for name, weight in weights.items()}, fixed)
            weights = {name: weight - self.inner_lr * grads[name] for name, weight in weights.items()}
            steps.append(weights)
        return [lambda queries, w=w: functional.linear(queries, w["weight"], w["bias"]) for w in steps]


def _loss(weights: Weights, support: Examples) -> Tensor:
    return cross_entropy(functional.linear(support.inputs, weights["weight"], weights["bias"]), support.targets)
