"""Model-Agnostic Meta-Learning, Finn, Abbeel and Levine, 2017 (https://arxiv.org/abs/1703.03400), and its relatives.

`first_order` drops the second derivatives; `adapts=head` is ANIL (Raghu et al., 2020, https://arxiv.org/abs/1909.09157).
As in the published code, normalisation uses batch statistics always, and its scale and shift are learned by the outer loop
only. The inner loss is the mean over the support set, so that a published step for the sum over classes is `way` times ours.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fsl_cli.algos.base import Algorithm, Predictor, cross_entropy
from fsl_cli.episodes import Episode, Examples
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import Norm

Weights = dict[str, Tensor]


class MAML(Algorithm):
    """Learns initial weights from which a few steps of gradient descent on the support set solve an episode."""

    def __init__(
        self,
        model: Embedding,
        way: int,
        inner_lr: float,
        inner_steps: int,
        eval_inner_steps: int,
        first_order: bool,
        adapts: Literal["all", "head"],
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if inner_lr <= 0:
            raise ValueError(f"algo.inner_lr = {inner_lr}, but it must be positive.")
        for name, steps in (("inner_steps", inner_steps), ("eval_inner_steps", eval_inner_steps)):
            if steps < 0:
                raise ValueError(f"algo.{name} = {steps}, but it must not be negative.")
        self.model = model
        self.head = nn.Linear(model.out_features, way)
        self.inner_lr, self.first_order, self.adapts = inner_lr, first_order, adapts
        self.recompute = recompute
        self.inner_steps, self.eval_inner_steps = inner_steps, eval_inner_steps
        outer_only = {id(p) for m in self.modules() if isinstance(m, Norm) for p in m.parameters()}
        self.adapted = [
            name
            for name, parameter in self.named_parameters()
            if id(parameter) not in outer_only and (adapts == "all" or name.startswith("head."))
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[n, way]` of the network as it stands."""
        return self.head(self.model(inputs))

    def adapt(self, support: Examples) -> Predictor:
        return self.path(support)[-1]

    def path(self, support: Examples) -> list[Predictor]:
        weights: Weights = {name: self.get_parameter(name) for name in self.adapted}
        steps = [weights]
        features = self.model(support.inputs) if self.adapts == "head" else None
        for _ in range(self.inner_steps if self.training else self.eval_inner_steps):
            weights = self.descend(weights, support, features)
            steps.append(weights)
        return [self.with_weights(weights, support.inputs) for weights in steps]

    def descend(self, weights: Weights, support: Examples, features: Tensor | None = None) -> Weights:
        """The weights after one inner step."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.first_order):
            grads = grad(self.support_loss)(weights, support, features)
        return {name: weight - self.inner_lr * grads[name] for name, weight in weights.items()}

    def scores(self, batch: Episode) -> Tensor:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return super().scores(batch)
        tasks = len(batch.support.targets)
        weights = {name: self.get_parameter(name).expand(tasks, *self.get_parameter(name).shape) for name in self.adapted}

        def step(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(vmap(self.descend)(dict(zip(self.adapted, values, strict=True)), batch.support).values())

        for _ in range(self.inner_steps):  # the reentrant form is the one that runs around a map
            values: tuple[Tensor, ...] = checkpoint(step, *weights.values(), use_reentrant=True)  # pyright: ignore
            weights = dict(zip(self.adapted, values, strict=True))
        return vmap(lambda w, part: self.with_weights(w, part.support.inputs)(part.query.inputs))(weights, batch)

    def support_loss(self, weights: Weights, support: Examples, features: Tensor | None) -> Tensor:
        """Mean cross entropy on the support set; `features`, if given, spare the passes through a body that stays."""
        if features is None:
            logits = functional_call(self, weights, support.inputs)
        else:
            logits = functional.linear(features, weights["head.weight"], weights["head.bias"])
        return cross_entropy(logits, support.targets)
