"""The peers of the workloads: the network and the training step as other tools write them."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.episodes import Episode

Step = Callable[[], object]
LR = 0.1  # of every inner loop; there are no outer steps, so the initial weights stay the same


def plain_net(channels: int, filters: int, stride: bool, out: int, way: int | None) -> nn.Sequential:
    """Conv4 with torch's own batch normalisation, as other tools write it; `way`: with a linear head on its `out` features."""
    blocks: list[nn.Module] = []
    for number in range(4):
        blocks += [nn.Conv2d(filters if number else channels, filters, 3, 2 if stride else 1, padding=1, bias=False)]
        blocks += [nn.BatchNorm2d(filters, track_running_stats=False), nn.ReLU()] + ([] if stride else [nn.MaxPool2d(2)])
    return nn.Sequential(*blocks, nn.Flatten(), *([nn.Linear(out, way)] if way else []))


def labels(part: Tensor) -> Tensor:
    """Class numbers of one-hot targets."""
    return part.argmax(-1)


def higher_step(net: nn.Sequential, batch: Episode, steps: int, first_order: bool, head_only: bool) -> Step | None:
    """A meta-step as in the MAML example of the package `higher`; None if that is not installed."""
    try:
        higher = importlib.import_module("higher")  # optional: most machines lack it
    except ImportError:
        return None
    body, head = (net[:-1], net[-1]) if head_only else (nn.Identity(), net)
    optimizer = torch.optim.SGD(head.parameters(), lr=LR)

    def step() -> None:
        net.zero_grad()
        for support, answers, queries, truth in zip(*(t for part in batch for t in part), strict=True):
            seen = body(support)
            context = higher.innerloop_ctx(head, optimizer, copy_initial_weights=False, track_higher_grads=not first_order)
            with context as (fast, differentiable):
                for _ in range(steps):
                    differentiable.step(functional.cross_entropy(fast(seen), labels(answers)))
                loss = functional.cross_entropy(fast(body(queries)), labels(truth))
                loss.backward()

    return step
