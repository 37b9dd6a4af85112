"""Reptile: On First-Order Meta-Learning Algorithms, Nichol, Achiam and Schulman, 2018 (https://arxiv.org/abs/1803.02999).

The optimizer takes `theta - mean(theta_i)` as the gradient, so that `optimizer=sgd` with a learning rate annealed from 1 to 0
is the published update. The inner Adam has beta1 = 0; its second moments carry over between tasks. The published code runs the
tasks of a meta-batch one after another through one Adam; here all start from the same moments, and the mean of their final
moments is kept. The published code draws minibatches at random; here all tasks share one order, whose minibatches hold the
classes in equal numbers as far as possible: unequal numbers, the same in all tasks, would favour some outputs of the head.

`head=fresh` starts every task, of any way, with a head of zeros: which output stands for which class is drawn anew in every
task, so that any difference between the outputs of a learned head is noise.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional

from fsl_cli.algos.base import Algorithm, Batch, Outcome, Predictor, Weights, check_moves, undotted
from fsl_cli.algos.heads import balance
from fsl_cli.algos.limits import at_least, positive
from fsl_cli.episodes import Episode, Examples, chunks
from fsl_cli.models.embedding import Embedding
from fsl_cli.structures import map_tensors, stack

BETA2, EPS = 0.999, 1e-8
ORDER_SEED = 20180302  # a constant: minibatches visit all support sets of a size in the same order

Slopes = Callable[[Weights, Examples], tuple[Weights, Outcome]]


class State(NamedTuple):
    """The state of an inner loop: the weights, Adam's second moments, and the outcome of the last minibatch."""

    weights: Weights
    moments: Weights
    outcome: Outcome


class Reptile(Algorithm):
    """Moves the initial weights towards those that training on each task ends with."""

    compiled = ("trained",)
    needs_queries = False
    regresses = True
    only_training: ClassVar = {"inner_steps": "eval_inner_steps", "inner_batch": "eval_inner_batch"}

    def __init__(
        self,
        model: Embedding,
        way: int,
        inner_optimizer: Literal["adam", "sgd"],
        inner_lr: float,
        inner_steps: int,
        inner_batch: int,
        eval_inner_lr: float | None,
        eval_inner_steps: int,
        eval_inner_batch: int,
        head: Literal["learned", "fresh"] = "learned",
        regression: bool = False,
    ) -> None:
        super().__init__(regression)
        positive(inner_lr=inner_lr, eval_inner_lr=eval_inner_lr)
        at_least(1, inner_steps=inner_steps, inner_batch=inner_batch, eval_inner_batch=eval_inner_batch)
        at_least(0, eval_inner_steps=eval_inner_steps)
        if head == "fresh" and (regression or inner_optimizer == "adam"):
            why = "functions (dataset=sine) have no classes" if regression else "the moments of Adam live on between tasks"
            raise ValueError(f"algo.head = fresh, but {why}. Use algo.head=learned.")
        check_moves(model.parameters())
        self.model = model
        self.head = nn.Linear(model.out_features, way) if head == "learned" else None
        self.inner_optimizer, self.inner_lr = inner_optimizer, inner_lr
        self.inner_steps, self.inner_batch = inner_steps, inner_batch
        self.eval_inner_lr = eval_inner_lr or inner_lr
        self.eval_inner_steps, self.eval_inner_batch = eval_inner_steps, eval_inner_batch
        self.register_buffer("count", torch.zeros(()))  # inner steps in the moments, for Adam's bias correction
        for name, weight in list(self.named_parameters()):
            self.register_buffer(_moment(name), torch.zeros_like(weight))

    @classmethod
    def idle(cls, options: Mapping[str, Any], training: bool) -> dict[str, str]:
        made = "algo.head = fresh makes a head for the classes there are"
        reasons = {"way": made} if options.get("head") == "fresh" else {}
        if not training and options["eval_inner_lr"] is not None:
            reasons["inner_lr"] = "an evaluation reads algo.eval_inner_lr"
        return reasons

    def logits(self, weights: Weights, inputs: Tensor) -> Tensor:
        """Logits `[n, way]` of the network under `weights`."""
        body = {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")}
        return functional.linear(functional_call(self.model, body, inputs), weights["head.weight"], weights["head.bias"])

    def start(self, way: int) -> Weights:
        """The weights that a task of `way` classes starts from."""
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        if self.head is None:
            some = next(iter(weights.values()))
            weights |= {"head.weight": some.new_zeros(way, self.model.out_features), "head.bias": some.new_zeros(way)}
        return weights

    def adapt(self, support: Examples) -> Predictor:
        return self.path(support)[-1]

    def path(self, support: Examples) -> list[Predictor]:
        if not self.regression:
            support = Examples(support.inputs, balance(support.targets) * support.targets)
        steps = [self.start(support.targets.shape[-1])]
        states = self._descend(support, self.eval_inner_lr, self.eval_inner_steps, self.eval_inner_batch, self._slopes)
        steps += [state.weights for state in states]
        return [self._predictor(weights, support.inputs) for weights in steps]

    def _predictor(self, weights: Weights, support: Tensor) -> Predictor:
        """Predicts by `logits` under the norm protocol, given the support inputs of the episode."""
        return lambda queries: self.under_norm(lambda inputs: self.logits(weights, inputs), support, queries)

    @torch.no_grad()
    def backward(self, batch: Batch) -> Outcome:
        assert isinstance(batch, Episode), "Reptile trains on episodes, whose query sets are empty"
        total: State | None = None  # the mean over all tasks
        for part, share in chunks(batch, self.task_chunk):
            mean = map_tensors(self.trained(part.support), lambda values, share=share: share * values.mean(0))
            total = mean if total is None else map_tensors(stack([total, mean]), lambda both: both.sum(0))
        assert total is not None, "a meta-batch has a task"
        for name, weight in self.named_parameters():
            weight.grad = weight - total.weights[name]
            self.get_buffer(_moment(name)).copy_(total.moments[name])
        self.get_buffer("count").add_(self.inner_steps)
        return total.outcome

    def trained(self, support: Examples) -> State:
        """The state after training on each of the support sets `[tasks, n, ...]`, with `[tasks]` in front."""
        mapped = len(support.inputs) > 1 or torch.compiler.is_compiling()  # as in `each`; _plain_slopes is not compiled
        slopes = self._slopes if mapped else self._plain_slopes
        return self.each(lambda one: self._descend(one, self.inner_lr, self.inner_steps, self.inner_batch, slopes)[-1], support)

    def _descend(self, support: Examples, lr: float, steps: int, batch: int, slopes: Slopes) -> list[State]:
        """The state after each inner step on minibatches of a support set `[n, ...]`."""
        states = []
        weights = self.start(support.targets.shape[-1])
        moments = {name: self.get_buffer(_moment(name)) for name, _ in self.named_parameters()}
        way = 1 if self.regression else support.targets.shape[-1]
        for step, chosen in enumerate(minibatches(len(support.inputs), way, batch, steps, support.inputs.device), start=1):
            part = Examples(support.inputs[chosen], support.targets[chosen])
            grads, result = slopes(weights, part)
            if self.inner_optimizer == "adam":
                moments = {name: BETA2 * v + (1 - BETA2) * grads[name].square() for name, v in moments.items()}
                correction = 1 - BETA2 ** (self.get_buffer("count") + step)
                grads = {name: g / ((moments[name] / correction).sqrt() + EPS) for name, g in grads.items()}
            weights = {name: weight - lr * grads[name] for name, weight in weights.items()}
            states.append(State(weights, moments, result))
        return states

    def _slopes(self, weights: Weights, part: Examples) -> tuple[Weights, Outcome]:
        """The gradient of the loss on a minibatch, and its outcome; may run under vmap."""
        grads, (_, result) = grad_and_value(self._loss, has_aux=True)(weights, part)
        return grads, result

    def _plain_slopes(self, weights: Weights, part: Examples) -> tuple[Weights, Outcome]:
        """The same outside vmap, where plain autograd saves a quarter of the time of a small network on a CPU."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            loss, result = self._loss(leaves, part)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), Outcome(*(part.detach() for part in result))

    def _loss(self, weights: Weights, part: Examples) -> tuple[Tensor, Outcome]:
        result = self.outcome(self.logits(weights, part.inputs), part.targets)
        return result.loss, Outcome(result.loss.detach(), result.measure)


@torch.compiler.assume_constant_result
def minibatches(n: int, way: int, batch: int, count: int, device: torch.device) -> Tensor:
    """Row numbers `[count, min(n, batch)]` of `n` items sorted by class: shuffled passes through them, cut into minibatches.

    A pass takes rounds of one item of every class, unless `n` is no multiple of `way`. Cached on the device: a CUDA graph
    cannot capture a copy from the host in every step.
    """
    return _minibatches(n, way, batch, count, device)


@lru_cache(maxsize=32)
def _minibatches(n: int, way: int, batch: int, count: int, device: torch.device) -> Tensor:
    batch = min(n, batch)
    rng = np.random.default_rng(ORDER_SEED)
    passes = max(1, -(-count * batch // n))
    rows = np.concatenate([_pass(rng, n, way) for _ in range(passes)])[: count * batch].reshape(count, batch)
    return torch.as_tensor(rows, device=device)


def _pass(rng: np.random.Generator, n: int, way: int) -> np.ndarray:
    if way == 1 or n % way:
        return rng.permutation(n)
    shuffled = rng.permuted(np.arange(n).reshape(way, -1), axis=1)  # [way, n / way]: within each class
    return rng.permuted(shuffled.T, axis=1).ravel()


def _moment(name: str) -> str:
    return "moment_" + undotted(name)
