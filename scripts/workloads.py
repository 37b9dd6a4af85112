"""The workloads of scripts/benchmark.py, each as we do it and as its peers do it."""

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import LR, Step, higher_step, labels, plain_net
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fsl_cli import device, speed, tuning
from fsl_cli.algos.base import Algorithm
from fsl_cli.algos.maml import MAML
from fsl_cli.algos.protonet import ProtoNet
from fsl_cli.algos.reptile import Reptile, minibatches
from fsl_cli.datasets.packed import Classes
from fsl_cli.episodes import EVALUATION, TRAIN, Episode, EpisodeSampler
from fsl_cli.models.conv4 import Conv4
from fsl_cli.scoring import score
from fsl_cli.store import Store

CLASSES, EACH = 400, 20
NAMES = ("W1", "W2", "W3", "W4", "W5", "W6", "W7", "W8p", "W8m", "W9")


@dataclass
class Workload:
    """One row of the benchmark: a call of `ours` or of a peer does `tasks` tasks, or `scale[peer]` if that is given."""

    what: str
    tasks: int
    ours: Step
    peers: dict[str, Step | None]
    data: Step | None = None  # the part of a training step that draws and gathers its batch
    scale: dict[str, float] = field(default_factory=dict)  # tasks per call of the peers that do fewer
    floor: Step | None = None  # the step whose floating-point operations the floor counts


def items(shape: tuple[int, ...]) -> tuple[np.ndarray, Classes]:
    """Random images `[n, *shape]` and their classes: the content does not affect the time."""
    pixels = np.random.default_rng(0).integers(0, 256, (CLASSES * EACH, *shape), dtype=np.uint8)
    starts = np.arange(CLASSES) * EACH
    return pixels, Classes([str(n) for n in range(CLASSES)], starts, np.full(CLASSES, EACH), np.zeros(CLASSES, dtype=np.int64))


class Bench:
    """Builds the workloads on one device."""

    def __init__(self, place: torch.device, arguments: argparse.Namespace) -> None:
        self.place, self.arguments = place, arguments
        self.chosen: dict[str, Any] = {}

    def setting(
        self, shape: tuple[int, ...], way: int, shot: int, queries: int, tasks: int
    ) -> tuple[Store, EpisodeSampler, Episode]:
        pixels, classes = items(shape)
        store = Store(pixels, self.place)
        sampler = EpisodeSampler(classes, way, shot, queries, tasks, 0, TRAIN)
        return store, sampler, store.episodes(sampler.indices(0), shot)

    def tuned(self, name: str, algo: Algorithm, batch: Episode) -> Step:
        """Our training step, with threads, workers, chunk size and layout as typed or as `fsl train` would measure them."""
        device.settle(algo, self.place, self.arguments.precision).train()
        asked: dict[str, Any] = {"threads": self.arguments.threads or "auto", "task_chunk": self.arguments.chunk or "auto"}
        asked["channels_last"] = True if algo.bulk else self.arguments.channels_last
        asked["workers"] = self.arguments.workers or "auto"
        if self.place.type == "cuda":
            asked["threads"] = None
        if self.arguments.compile or not tuning.divisible(algo, batch):
            asked["workers"] = 1
        choice = tuning.measure(algo, batch, asked, self.arguments.graph)
        self.chosen[name] = choice
        before = torch.get_num_threads()
        stepper = speed.Stepper(algo, choice, self.arguments.compile, self.arguments.graph)
        torch.set_num_threads(before)

        def step() -> None:
            algo.zero_grad()
            stepper(batch)

        return with_threads(step, choice["threads"] or before)

    def maml(self, name: str, what: str, shape: tuple[int, ...], filters: int, stride: bool, shot: int, tasks: int,
             steps: int, first_order: bool = False, head_only: bool = False) -> Workload:  # fmt: skip
        store, sampler, batch = self.setting(shape, 5, shot, 15, tasks)
        model = Conv4(shape, filters, "stride" if stride else "pool")
        algo = MAML(model, 5, LR, steps, steps, first_order, "head" if head_only else "all")
        net = plain_net(shape[0], filters, stride, model.out_features, 5).to(self.place)
        adapted = [n for n, _ in net[-1].named_parameters(prefix=str(len(net) - 1))] if head_only else [
            n for n, _ in net.named_parameters()]  # fmt: skip

        def loop() -> None:
            """One task after the other: adapts by autograd, then backpropagates."""
            net.zero_grad()
            for support, answers, queries, truth in zip(*(t for part in batch for t in part), strict=True):
                weights: dict[str, Tensor] = {n: p for n, p in net.named_parameters() if n in adapted}
                for _ in range(steps):
                    loss = functional.cross_entropy(functional_call(net, weights, support), labels(answers))
                    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=not first_order)
                    weights = {n: w - LR * g for (n, w), g in zip(weights.items(), grads, strict=True)}
                loss = functional.cross_entropy(functional_call(net, weights, queries), labels(truth)) / tasks
                loss.backward()

        return Workload(what, tasks, self.tuned(name, algo, batch), {"loop": loop, "higher": higher_step(
            net, batch, steps, first_order, head_only)}, lambda: self.draw(store, sampler), floor=loop)  # fmt: skip

    def protonet(self, name: str, what: str, shape: tuple[int, ...], way: int, shot: int, queries: int) -> Workload:
        store, sampler, batch = self.setting(shape, way, shot, queries, 1)
        algo = ProtoNet(Conv4(shape, 64))
        net = plain_net(shape[0], 64, False, 0, None).to(self.place)
        (support, answers), (query, truth) = batch

        def plain() -> None:
            net.zero_grad()
            features = net(torch.cat([support[0], query[0]]))
            centres = features[: len(support[0])].unflatten(0, (way, shot)).mean(1)
            distances = torch.cdist(features[len(support[0]) :], centres).square()
            functional.cross_entropy(-distances, labels(truth[0])).backward()

        assert answers.shape[-1] == way
        return Workload(what, 1, self.tuned(name, algo, batch), {"loop": plain}, lambda: self.draw(store, sampler), floor=plain)

    def reptile(self) -> Workload:
        store, sampler, batch = self.setting((1, 28, 28), 5, 10, 0, 5)
        model = Conv4((1, 28, 28), 64, "stride")
        algo = Reptile(model, 5, "sgd", LR, 5, 10, None, 50, 5)
        net = plain_net(1, 64, True, model.out_features, 5).to(self.place)
        rows = minibatches(50, 5, 10, 5, self.place)

        def loop() -> None:
            start = {n: w.clone() for n, w in net.state_dict().items()}
            optimizer = torch.optim.SGD(net.parameters(), lr=LR)
            total = {n: torch.zeros_like(w) for n, w in start.items()}
            for inputs, targets in zip(*batch.support, strict=True):
                net.load_state_dict(start)
                for chosen in rows:
                    optimizer.zero_grad()
                    functional.cross_entropy(net(inputs[chosen]), labels(targets[chosen])).backward()
                    optimizer.step()
                for n, w in net.state_dict().items():
                    total[n] += w
            net.load_state_dict(start)

        return Workload(
            "Reptile, 28x28, 5-way, 10 train shots, 5 steps of 10, meta-batch 5", 5, self.tuned("W7", algo, batch),
            {"loop": loop}, lambda: self.draw(store, sampler), floor=loop)  # fmt: skip

    def evaluation(self, what: str, algo: Algorithm, episodes: int, few: int) -> Workload:
        """Scoring a list of `episodes`; the peer scores the first `few` of them one by one."""
        pixels, classes = items((1, 28, 28))
        store = Store(pixels, self.place)
        sampler = EpisodeSampler(classes, 5, 1, 15, 1, 0, EVALUATION["test"])
        device.settle(algo, self.place).eval()
        speed.use(algo, speed.UNMEASURED | {"channels_last": algo.bulk})  # as fsl evaluate without a checkpoint, but all threads

        def ours() -> None:
            score(algo, store, sampler, episodes)

        def one_by_one() -> None:
            with torch.no_grad():
                for number in range(few):
                    episode = store.episodes(sampler.fixed(number, number + 1), 1)
                    one = type(episode)(*(type(part)(*(t[0] for t in part)) for part in episode))
                    right = algo.fit(one.support)(one.query.inputs).argmax(-1) == labels(one.query.targets)
                    right.float().mean().item()

        return Workload(what, episodes, ours, {"loop": one_by_one}, scale={"loop": few})

    def sampling(self) -> Workload:
        """W9: drawing and gathering alone, from items on the device, against the same from the memory map."""
        store, sampler, _ = self.setting((1, 28, 28), 5, 1, 15, 32)
        file = Path(tempfile.mkdtemp()) / "items.npy"
        np.save(file, items((1, 28, 28))[0])
        mapped = Store(np.load(file, mmap_mode="r"), self.place, budget=0)
        return Workload(
            "Drawing and gathering 32 tasks, 5-way 1-shot 15 queries; peer: from the memory map", 32,
            lambda: self.draw(store, sampler), {"loop": lambda: self.draw(mapped, sampler)})  # fmt: skip

    def draw(self, store: Store, sampler: EpisodeSampler) -> None:
        store.episodes(sampler.indices(1), sampler.shot)

    def build(self, name: str) -> Workload:
        """The workload called `name`."""
        small, large = (1, 28, 28), (3, 84, 84)
        mini = "84x84x3, Conv4-32, 5-way 5-shot, 5 steps, 15 queries, meta-batch 4"
        if name == "W1":
            return self.maml(
                name, "MAML, 28x28, Conv4-64, 5-way 1-shot, 1 step, 15 queries, meta-batch 32", small, 64, True, 1, 32, 1
            )
        if name in ("W2", "W3", "W4"):
            kind = {"W2": "MAML", "W3": "first-order MAML", "W4": "ANIL"}[name]
            return self.maml(name, f"{kind}, {mini}", large, 32, False, 5, 4, 5, name == "W3", name == "W4")
        if name == "W5":
            return self.protonet(name, "ProtoNet, 28x28, 60-way 1-shot, 5 queries", small, 60, 1, 5)
        if name == "W6":
            return self.protonet(name, "ProtoNet, 84x84x3, Conv4-64, 20-way 5-shot, 15 queries", large, 20, 5, 15)
        if name == "W7":
            return self.reptile()
        if name == "W8p":
            return self.evaluation("Evaluation, ProtoNet, 10,000 episodes", ProtoNet(Conv4(small, 64)), 10000, 100)
        if name == "W8m":
            algo = MAML(Conv4(small, 64, "stride"), 5, LR, 1, 3, False, "all")
            return self.evaluation("Evaluation, MAML, 3 steps (200 episodes timed)", algo, 200, 100)
        return self.sampling()


def with_threads(step: Step, threads: int) -> Step:
    """Makes `step` run on `threads` CPU threads."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        step()
        torch.set_num_threads(before)

    return run
