"""Model-Agnostic Meta-Learning, Finn, Abbeel and Levine, 2017 (https://arxiv.org/abs/1703.03400), and its relatives.

Options turn MAML into its relatives:

- `first_order` drops the second derivatives (FOMAML).
- `adapts=head` is ANIL (Raghu et al., 2020, https://arxiv.org/abs/1909.09157), `adapts=body` is BOIL (Oh et al., 2021,
  https://arxiv.org/abs/2008.08882).
- `adapts=context` is CAVIA (Zintgraf et al., 2019, https://arxiv.org/abs/1810.03642): the inner loop adapts `context` numbers,
  zero at the start of every episode, that enter a network shared by all episodes.
- `rates=weight` learns a step of either sign for every weight: Meta-SGD (Li et al., 2017, https://arxiv.org/abs/1707.09835).
- `rates=step` learns one for every parameter tensor and step, `norm_per_step` a scale and shift of each normalisation for every
  step, `multi_step` sums the query losses after all steps early in training, `first_order_until` omits second derivatives early
  in training: MAML++ (Antoniou et al., 2019, https://arxiv.org/abs/1810.09502).
- `head=prototypes` starts the head at class means: ProtoMAML (Triantafillou et al., 2020, https://arxiv.org/abs/1903.03096).

`head=zeros` learns a head that is zero at first and so favours no class: the first inner step turns it into a class-mean head,
and training begins about where metric methods do.

As in the published code, normalisation always uses batch statistics, and only the outer loop learns its scale and shift. The
inner loss is the mean over the support set: multiply a step size published for the sum over the classes by `way`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from fsl_cli.algos.base import Algorithm, Batch, Outcome, Predictor, Weights, check_moves, undotted
from fsl_cli.algos.context import Context
from fsl_cli.algos.heads import balance, centroids
from fsl_cli.algos.limits import at_least, positive
from fsl_cli.algos.recompute import unrolled
from fsl_cli.episodes import Episode, Examples
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import norm_weights

LEAST = 0.03  # final weight of the query losses before the last one, as a share of their initial weight (MAML++)


class MAML(Algorithm):
    """Learns initial weights from which a few steps of gradient descent on the support set solve an episode."""

    regresses = True
    only_training: ClassVar = {"inner_steps": "eval_inner_steps"} | dict.fromkeys(
        ("first_order", "first_order_until", "multi_step", "recompute"), ""
    )

    def __init__(
        self,
        model: Embedding,
        way: int,
        inner_lr: float,
        inner_steps: int,
        eval_inner_steps: int,
        first_order: bool = False,
        adapts: Literal["all", "head", "body", "context"] = "all",
        context: int | None = None,
        head: Literal["learned", "zeros", "prototypes"] = "learned",
        rates: Literal["fixed", "step", "weight"] = "fixed",
        norm_per_step: bool = False,
        multi_step: float = 0.0,
        first_order_until: float = 0.0,
        recompute: bool = False,
        regression: bool = False,
    ) -> None:
        super().__init__(regression)
        positive(inner_lr=inner_lr)
        at_least(0, inner_steps=inner_steps, eval_inner_steps=eval_inner_steps)
        for name, share in (("multi_step", multi_step), ("first_order_until", first_order_until)):
            if not 0 <= share <= 1:
                raise ValueError(f"algo.{name} = {share}, but it must be a share of the training, from 0 to 1.")
        if head == "prototypes" and (rates == "weight" or adapts == "body"):
            raise ValueError("algo.head = prototypes has no weights of its own: use algo.rates=fixed|step, algo.adapts=all|head.")
        if head == "zeros" and adapts in ("body", "context"):
            raise ValueError(f"algo.head = zeros gives no gradient to what algo.adapts={adapts} moves. Use algo.head=learned.")
        if head == "prototypes" and regression:
            raise ValueError(
                "algo.head = prototypes (algo=protomaml) starts at class means, but functions (dataset=sine) have no classes. "
                "Choose algo=maml."
            )
        if adapts == "context" and (head == "prototypes" or rates != "fixed" or norm_per_step or recompute):
            raise ValueError(
                "algo.adapts = context goes with algo.head=learned, algo.rates=fixed, algo.norm_per_step=false and "
                "algo.recompute=false. Leave these as algo=cavia has them."
            )
        if recompute and multi_step > 0:
            raise ValueError(
                f"algo.recompute = true, but algo.multi_step = {multi_step} keeps what every inner step computed. Set "
                "algo.multi_step=0.0, or algo.recompute=false."
            )
        if adapts != "context" and context is not None:
            raise ValueError(f"algo.context = {context}, but algo.adapts = {adapts}. Choose algo=cavia, or leave it out.")
        self.model = model
        self.context = Context(model, context or 0) if adapts == "context" else None
        self.head = nn.Linear(model.out_features, way) if head != "prototypes" else None
        if self.head is not None and head == "zeros":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.inner_lr, self.first_order, self.adapts = inner_lr, first_order, adapts
        self.multi_step, self.first_order_until, self.recompute = multi_step, first_order_until, recompute
        self.inner_steps, self.eval_inner_steps = inner_steps, eval_inner_steps
        self.spans = tuple(name for name in ("multi_step", "first_order_until") if getattr(self, name) > 0)
        norms = norm_weights(self)
        own = [name for name, parameter in self.named_parameters() if id(parameter) not in norms]
        self.adapted = [name for name in own if adapts == "all" or name.startswith("head.") == (adapts == "head")]
        self.adapted = [] if self.context is not None else self.adapted
        check_moves(self.get_parameter(name) for name in self.adapted)
        steps = max(1, inner_steps)
        self.rates, self.by_weight = nn.ParameterDict(), rates == "weight"
        moving = self.adapted + (["head.weight", "head.bias"] if head == "prototypes" else [])
        for name in moving if rates != "fixed" else []:
            shape = self.get_parameter(name).shape if self.by_weight else (steps,)
            self.rates[undotted(name)] = torch.full(shape, float(inner_lr))
        self.norms_by_step = nn.ParameterDict()
        self.norm_names = [name for name, p in self.named_parameters() if id(p) in norms] if norm_per_step else []
        for name in self.norm_names:
            self.norms_by_step[undotted(name)] = self.get_parameter(name).detach().repeat(steps, 1)

    @classmethod
    def idle(cls, options: Mapping[str, Any], training: bool) -> dict[str, str]:
        made = "algo.head = prototypes makes a head for the classes there are"
        reasons = {"way": made} if options.get("head") == "prototypes" else {}
        if options.get("first_order"):
            reasons["first_order_until"] = "algo.first_order = true leaves out second derivatives to the end"
        if options.get("rates", "fixed") != "fixed" and not training:
            reasons["inner_lr"] = f"the rates of algo.rates = {options['rates']} are those that it has learned"
        return reasons

    @classmethod
    def network(cls, state: Weights) -> Weights:
        """With `norm_per_step`, takes the scales and shifts of the first step, trained with the initial weights."""
        first = {name: steps[0] for name, steps in state.items() if name.startswith("norms_by_step.")}
        own = super().network(state)
        return {name: first.get(f"norms_by_step.{undotted(f'model.{name}')}", value) for name, value in own.items()}

    def take(self, network: Weights) -> None:
        super().take(network)
        for name in self.norm_names:
            values = self.norms_by_step[undotted(name)]
            values.data.copy_(self.get_parameter(name).detach().expand_as(values))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[n, way]` under the initial weights."""
        return self.logits({}, inputs, 0)

    def adapt(self, support: Examples) -> Predictor:
        return self.path(support)[-1]

    def path(self, support: Examples) -> list[Predictor]:
        return [self.predictor(weights, support, number) for number, weights in enumerate(self.weights(support))]

    def weights(self, support: Examples) -> list[Weights]:
        """The adapted weights before and after each inner step."""
        weights = self.start(support)
        steps = [weights]
        features = self.model(support.inputs) if self.adapts == "head" and not self.norm_names else None
        for step in range(self.inner_steps if self.training else self.eval_inner_steps):
            weights = self.descend(weights, support, step, features)
            steps.append(weights)
        return steps

    def start(self, support: Examples) -> Weights:
        """The weights that the inner loop adapts, before its first step."""
        weights: Weights = {name: self.get_parameter(name) for name in self.adapted}
        if self.context is not None:
            weights["context"] = support.inputs.new_zeros(self.context.size)
        if self.head is None:  # minus the squared distance to the class means c, plus |x|^2, as a layer: 2 c x - |c|^2
            means = centroids(Examples(self.logits({}, support.inputs, 0, embed=True), support.targets))
            weights |= {"head.weight": 2 * means, "head.bias": -means.square().sum(1)}
        return weights

    def descend(self, weights: Weights, support: Examples, step: int, features: Tensor | None = None) -> Weights:
        """The weights after inner step `step`, counted from 0."""
        # Compiled code must not read `progress`: torch.compile sees a constant in the first step, but not in the second.
        early = self.first_order_until > 0 and self.training and self.progress < self.first_order_until
        first_order = self.first_order or early
        with torch.set_grad_enabled(torch.is_grad_enabled() and not first_order):
            grads = grad(self.support_loss)(weights, support, step, features)
        return {name: weight - self.rate(name, step) * grads[name] for name, weight in weights.items()}

    def rate(self, name: str, step: int) -> Tensor | float:
        """The inner step size of a weight; steps beyond those trained use that of the last one."""
        if undotted(name) not in self.rates:
            return self.inner_lr
        rate = self.rates[undotted(name)]
        return rate if self.by_weight else rate[min(step, len(rate) - 1)]

    def support_loss(self, weights: Weights, support: Examples, step: int, features: Tensor | None) -> Tensor:
        """The objective on the support set; `features`, if given, are its embeddings by a body that is not adapted."""
        targets = support.targets if self.regression else balance(support.targets) * support.targets
        if features is None:
            return self.objective(self.logits(weights, support.inputs, step), targets)
        return self.objective(functional.linear(features, weights["head.weight"], weights["head.bias"]), targets)

    def logits(self, weights: Weights, inputs: Tensor, step: int, embed: bool = False) -> Tensor:
        """Logits `[n, way]`, or with `embed` embeddings, under `weights` and the normalisation of inner step `step`."""
        body = {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")}
        for name in self.norm_names:
            values = self.norms_by_step[undotted(name)]
            body[name.removeprefix("model.")] = values[min(step, len(values) - 1)]
        if self.context is not None and "context" in weights:
            body |= self.context(weights["context"], self.model)
        features = functional_call(self.model, body, inputs)
        if embed:
            return features
        head = weights if "head.weight" in weights else dict(self.named_parameters())
        return functional.linear(features, head["head.weight"], head["head.bias"])

    def predictor(self, weights: Weights, support: Examples, steps: int) -> Predictor:
        """Predicts by the weights after `steps` inner steps, normalised as in the last step, under the norm protocol."""
        return lambda queries: self.under_norm(
            lambda inputs: self.logits(weights, inputs, max(0, steps - 1)), support.inputs, queries
        )

    def loss(self, batch: Batch) -> Outcome:
        if not (self.multi_step > 0 and self.training and self.progress < self.multi_step and self.inner_steps > 0):
            return super().loss(batch)
        assert isinstance(batch, Episode), "MAML trains on episodes"
        after = self.curves(batch)[:, 1:].unbind(1)  # query logits after each step
        left = 1 - (1 - LEAST) * self.progress / self.multi_step
        parts = [self.outcome(logits, batch.query.targets) for logits in after]
        early = left / len(parts)
        shares = [early] * (len(parts) - 1) + [1 - early * (len(parts) - 1)]
        return Outcome(
            sum((s * part.loss for s, part in zip(shares, parts, strict=True)), start=0 * parts[0].loss), parts[-1].measure
        )

    def scores(self, batch: Episode) -> Tensor:
        weights = self._adapted(batch.support)
        # Under vmap, weights that differ by task make convolutions grouped, which is faster on a GPU and slower on a CPU.
        images = batch.query.inputs.dim() > 4  # [tasks, q, C, H, W]
        over = self.one_by_one if images and batch.query.inputs.device.type == "cpu" else self.each
        steps = self.inner_steps if self.training else self.eval_inner_steps
        return over(lambda w, part: self.predictor(w, part.support, steps)(part.query.inputs), weights, batch)

    def _adapted(self, support: Examples) -> Weights:
        """The adapted weights `[tasks, ...]` after all inner steps on support sets `[tasks, n, ...]`."""
        # With a fixed body, weights() embeds the support set once, and the steps of the head alone need little memory.
        small = self.adapts == "head" and not self.norm_names
        if small or not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.each(lambda one: self.weights(one)[-1], support)

        def step(weights: Weights, number: int) -> Weights:
            return self.each(lambda one, part: self.descend(one, part, number), weights, support)

        return unrolled(self.each(self.start, support), step, self.inner_steps)
