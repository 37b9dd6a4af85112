"""The contract of a few-shot algorithm: `adapt(support) -> predictor`, for one episode; the rest is implemented here once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from fsl_cli.episodes import Episode, Examples, chunks
from fsl_cli.metrics import ACCURACY, MSE, Measure, accuracy, accuracy_by_class
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import norm_layers, statistics
from fsl_cli.structures import leaves, map_tensors, stack

Batch = Episode | Examples
Predictor = Callable[[Tensor], Tensor]  # query inputs [q, ...] -> logits [q, way]
Weights = dict[str, Tensor]
PLAIN_NORMS = ("running", "transductive", "support")  # the protocols of algorithms that gather running statistics in training


class Outcome(NamedTuple):
    """The result of a step or a batch: mean loss, and accuracy or mean squared error; both scalars."""

    loss: Tensor
    measure: Tensor


class Algorithm(nn.Module, ABC):
    """A few-shot algorithm over an embedding network `model`.

    A subclass writes `adapt` for ONE episode, as a pure function that vmap can map. Bulk algorithms also write `embed`; their
    `adapt` and its predictor then take embeddings.
    """

    model: Embedding
    batches: type[Batch] = Episode  # what a training step takes: Episode, or Examples over all training classes
    bulk: bool = False  # embed() does not depend on the episode: one pass per batch, cached at evaluation
    embedded: bool = False  # training batches already hold embeddings, which are constant in this training
    needs_queries: bool = True  # a training step needs query sets
    sequential: bool = False  # reads its support items one by one: training shuffles them in every episode
    equal_shots: bool = False  # a class with more support items than others would win by that: `fsl predict` repeats the others'
    recompute: bool = False  # a training step recomputes parts of its forward pass in the backward pass
    wants_pretrained: bool = False  # keeps the weights of a trained network: training without `pretrain` is refused
    regresses: bool = False  # can also learn functions, whose targets are values instead of classes
    norms: tuple[str, ...] = ("transductive", "support", "one_query")  # evaluation protocols, the default first
    precision: str = "fp32"  # arithmetic of the network: fp32, tf32 or bf16
    task_chunk: int | None = None  # tasks mapped at once in a training step; None: all of them
    score_chunk: int = 8  # tasks mapped at once in scoring
    cached_chunk: int = 250  # tasks mapped at once in scoring from cached embeddings
    progress: float = 0.0  # share of the training that is done, from 0 to 1
    spans: tuple[str, ...] = ()  # the options in use that make a training step depend on `progress`
    hard_tasks: int = 0  # tasks of each meta-batch that draw from the classes that recent tasks failed at
    only_training: ClassVar[Mapping[str, str]] = {}  # options that only training reads -> what evaluation reads instead, or ""
    starts: tuple[str, ...] = ()  # options that only set the initial value of something learned: a checkpoint overrides them
    compiled: tuple[str, ...] = ("loss",)  # the methods with a training step's arithmetic, which device.compile compiles

    def __init__(self, regression: bool = False) -> None:
        super().__init__()
        self.norm = self.norms[0]
        self.regression = regression
        self.by_class: list[Tensor] = []  # with `hard_tasks`: accuracy by class in a training step, [tasks, way] per chunk

    @classmethod
    def idle(cls, options: Mapping[str, Any], training: bool) -> dict[str, str]:  # noqa: ARG003
        """The options of its YAML file that have no effect under the others, each with the reason."""
        return {}

    @classmethod
    def network(cls, state: Weights) -> Weights:
        """The weights of the embedding network in a saved `state_dict` of this class, as any algorithm can load them."""
        return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}

    def take(self, network: Weights) -> None:
        """Starts from the weights of a trained network."""
        self.model.load_state_dict(network)

    @abstractmethod
    def adapt(self, support: Examples) -> Predictor:
        """Learns one episode from its support `[n, ...]` and returns its predictor; changes nothing in `self`."""

    def embed(self, inputs: Tensor) -> Tensor:
        """The part that does not depend on the episode: inputs `[n, *item]` -> `[n, ...]`."""
        return inputs

    def path(self, support: Examples) -> list[Predictor]:
        """The predictor before and after each inner step, for algorithms that have inner steps."""
        return [self.adapt(support)]

    def use_norm(self, protocol: str) -> None:
        """Sets where normalisation statistics come from at evaluation; refuses a protocol that the algorithm lacks."""
        if protocol not in self.norms:
            raise ValueError(
                f"norm = {protocol!r}, but {type(self).__name__} can be evaluated with norm={'|'.join(self.norms)}. "
                "Choose one of them."
            )
        self.norm = protocol
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for layer in norm_layers(self):
            layer.running = layer.frozen if mode else self.norm == "running"
        return self

    def fit(self, support: Examples) -> Predictor:
        """Learns one episode from raw support items `[n, *item]`; the predictor takes raw items too. For eval mode."""
        if self.bulk and self.norm != "running":
            return lambda queries: self._together(support, queries)
        predictor = self.adapt(Examples(self.embed(support.inputs), support.targets))
        return lambda queries: predictor(self.embed(queries))

    def _together(self, support: Examples, queries: Tensor) -> Tensor:
        unknown = support.targets.new_zeros(queries.shape[0], support.targets.shape[-1])
        episode = Episode(support, Examples(queries, unknown))
        return self.predictions(map_tensors(episode, lambda tensor: tensor.unsqueeze(0))).squeeze(0)

    def scores(self, batch: Episode) -> Tensor:
        """Query logits `[tasks, q, way]` of embedded episodes."""
        return self.each(lambda episode: self.adapt(episode.support)(episode.query.inputs), batch)

    def curves(self, batch: Episode) -> Tensor:
        """Query logits before and after each inner step, `[tasks, steps + 1, q, way]`, of raw episodes."""

        def curve(episode: Episode) -> Tensor:
            return torch.stack([predictor(episode.query.inputs) for predictor in self.path(episode.support)])

        return self.each(curve, self._embedded(batch) if self.bulk else batch)

    def each(self, function: Callable[..., Any], *tasks: Any) -> Any:
        """Applies `function` to all tasks in structures of tensors `[tasks, ...]`, under vmap if there are several."""
        if next(leaves(tasks)).shape[0] == 1:
            return self.one_by_one(function, *tasks)
        return vmap(function, randomness="different")(*tasks)  # each task draws its own dropout

    def one_by_one(self, function: Callable[..., Tensor], *tasks: Any) -> Any:
        """Applies `function` to the tasks one after the other: outside vmap, fused kernels can be used."""
        count = next(leaves(tasks)).shape[0]
        with statistics(self, alone=True):
            results = [function(*map_tensors(tasks, lambda t, k=k: t[k])) for k in range(count)]
        return stack(results)

    def predictions(self, batch: Episode) -> Tensor:
        """Query logits `[tasks, q, way]` of raw episodes, after one embedding pass if bulk."""
        return self.scores(self._embedded(batch) if self.bulk else batch)

    def _embedded(self, batch: Episode) -> Episode:
        if self.embedded and self.training:
            return batch
        tasks, n = batch.support.inputs.shape[:2]
        inputs = torch.cat([batch.support.inputs, batch.query.inputs], dim=1)  # [tasks, n + q, *item]
        rows = n if self.norm == "support" and not self.training else None
        with statistics(self, groups=tasks, rows=rows, track=self.training):
            features = self.embed(inputs.flatten(0, 1)).unflatten(0, (tasks, -1))
        return Episode(Examples(features[:, :n], batch.support.targets), Examples(features[:, n:], batch.query.targets))

    def loss(self, batch: Batch) -> Outcome:
        """Mean query loss of the meta-batch, differentiable, and its accuracy or mean squared error."""
        assert isinstance(batch, Episode), "an algorithm that eats Examples writes its own loss"
        return self.outcome(self.predictions(batch), batch.query.targets)

    @property
    def measure(self) -> Measure:
        """The measure of its episodes: accuracy, or mean squared error in regression."""
        return MSE if self.regression else ACCURACY

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of outputs and targets `[..., way]`: mean cross entropy, or in regression mean squared error."""
        return (outputs - targets).square().mean() if self.regression else cross_entropy(outputs, targets)

    def outcome(self, outputs: Tensor, targets: Tensor) -> Outcome:
        """The objective and the measure of outputs `[..., way]`; records the accuracy by class for `hard_tasks`."""
        loss = self.objective(outputs, targets)
        if self.hard_tasks and self.training:
            self.by_class.append(accuracy_by_class(outputs, targets))
        return Outcome(loss, loss.detach() if self.regression else accuracy(outputs, targets))

    def backward(self, batch: Batch) -> Outcome:
        """Adds the gradient of `loss` to `.grad`, chunk by chunk, so that memory is bounded by the chunk."""
        parts = []
        cut = chunks(batch, self.task_chunk) if isinstance(batch, Episode) else [(batch, 1.0)]
        for part, share in cut:
            result = self.loss(part)
            (result.loss * share).backward()
            parts.append(Outcome(result.loss.detach() * share, result.measure * share))
            for layer in norm_layers(self):
                layer.keep()
        for layer in norm_layers(self):
            layer.commit()
        return Outcome(*(torch.stack(values).sum() for values in zip(*parts, strict=True)))

    def forget(self) -> None:
        """Drops what an unfinished `backward` has gathered."""
        self.by_class.clear()
        for layer in norm_layers(self):
            layer.forget()

    def under_norm(self, network: Predictor, support: Tensor, inputs: Tensor) -> Tensor:
        """Outputs of `network` for query `inputs` under the norm protocol, given the support inputs of the episode."""
        if self.training or self.norm in ("transductive", "running"):
            return network(inputs)
        if self.norm == "support":
            with statistics(self, rows=len(support)):
                return network(torch.cat([support, inputs]))[len(support) :]
        with statistics(self):
            return vmap(lambda query: network(torch.cat([support, query.unsqueeze(0)]))[-1])(inputs)


def check_moves(weights: Iterable[Tensor]) -> None:
    """Refuses frozen weights among those that the inner loop adapts."""
    if not all(weight.requires_grad for weight in weights):
        raise ValueError(
            "model.frozen = true, but this algorithm moves the network itself when it adapts to a task. Set model.frozen=false, "
            "or choose an algorithm that leaves it as it is, such as algo=protonet or algo=anil."
        )


def check_way(width: int, targets: Tensor) -> None:
    """Refuses targets `[..., way]` whose way is not `width`, the number of outputs of a head."""
    if width != targets.shape[-1]:
        raise ValueError(
            f"The head has {width} outputs, but the episode has {targets.shape[-1]} classes. "
            "Set task.way and task.train_way to the same number, or choose an algorithm without a fixed head."
        )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits `[..., way]` against one-hot targets of the same shape."""
    check_way(logits.shape[-1], targets)
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(0, -2))


def undotted(name: str) -> str:
    """The name of a weight without dots, which the name of a parameter or buffer must not contain."""
    return name.replace(".", "_")
