"""Small algorithms and episodes for them: what the tests of several files are made with."""

from pathlib import Path

import torch
from conftest import composed
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from fsl_cli.algos.base import Algorithm, Batch
from fsl_cli.config import build
from fsl_cli.episodes import Episode, Examples, split

FOLDER = Path(__file__).parents[1] / "configs"
ALGOS = sorted(path.stem for path in (FOLDER / "algo").glob("*.yaml"))
PRETRAINED = {"efficientnet_lite0", "timm", "text_encoder"}  # of packages that need not be there: test_pretrained.py
MODELS = sorted({path.stem for path in (FOLDER / "model").glob("*.yaml")} - PRETRAINED)
TEXTS = {"bag_of_words"}  # what takes no images
SHAPE = (1, 16, 16)
SMALL = {
    "conv4": ["model.filters=4", "model.halving=pool"],
    "conv4_maps": ["model.filters=4"],
    "mlp": ["model.hidden=[12,10]"],
    "mlp_sine": [],
    "bag_of_words": ["model.features=10", "model.buckets=60"],
    "resnet10": ["model.filters=[4,4,4,6]"],
    "resnet12": ["model.filters=[4,4,4,6]", "model.drop_rate=0.0"],  # what is dropped differs between a map and a loop
    "resnet18": ["model.filters=[4,4,4,6]"],
    "wrn28_10": ["model.depth=10", "model.width=1"],
}
QUICK = {
    "maml": ["algo.head=learned"],  # a head of zeros hides the first step of the body from a test
    "fomaml": ["algo.head=learned", "algo.inner_lr=0.4", "algo.inner_steps=1"],
    "metanet": ["algo.width=16", "algo.hidden=8"],
    "finetune": ["algo.head_epochs=3"],
    "reptile": ["algo.eval_inner_steps=4"],
    "mtl": ["algo.inner_steps=5", "algo.inner_lr=0.3"],
}
CLASSES = 12


def made_of(algo: str) -> type[Algorithm]:
    """The class of an algorithm, from its file alone: composing would make importing this module take seconds."""
    node = OmegaConf.load(FOLDER / "algo" / f"{algo}.yaml")
    return get_class(node._target_) if "_target_" in node else made_of(next(name for name in node.defaults if name != "_self_"))


def make(algo: str, model: str, *overrides: str, seed: int = 0) -> Algorithm:
    small = [*SMALL.get(model, []), *QUICK.get(algo, [])]
    cfg = composed(f"algo={algo}", f"model={model}", "task.way=3", *small, *overrides)
    torch.manual_seed(seed)
    network = build(cfg.model, "model", item_shape=() if model in TEXTS else SHAPE)
    return build(cfg.algo, "algo", model=network, classes=CLASSES).double()


def blobs(tasks: int, way: int, shot: int, queries: int, noise: float = 0.3, texts: bool = False) -> Episode:
    """Episodes of separable classes: each a random pattern, seen through noise, or words that its texts are made of."""
    if texts:
        words = torch.stack([torch.randperm(CLASSES)[:way] for _ in range(tasks)])[:, :, None, None]
        tokens = 1 + 4 * words + torch.randint(4, (tasks, way, shot + queries, 6))
        ends = torch.randint(2, 7, (tasks, way, shot + queries, 1))
        tokens = tokens.masked_fill(torch.arange(6) >= ends, 0)
        return doubled(split(tokens, shot))
    patterns = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    chosen = torch.stack([torch.randperm(CLASSES)[:way] for _ in range(tasks)])
    inputs = patterns[chosen].unsqueeze(2) + noise * torch.randn(tasks, way, shot + queries, *SHAPE, dtype=torch.float64)
    return doubled(split(inputs, shot))


def doubled(batch: Episode) -> Episode:
    return Episode(*(part._replace(targets=part.targets.double()) for part in batch))


def training_batch(algo: Algorithm, tasks: int) -> Batch:
    if algo.batches is Episode:
        return blobs(tasks, 3, 2, 4)
    episode = blobs(1, CLASSES, 4, 0)  # its slots are the classes in a random order
    order = torch.randperm(len(episode.support.inputs[0]))
    return Examples(episode.support.inputs[0][order], episode.support.targets[0][order])


def task(batch: Episode, number: int) -> Episode:
    return Episode(*(Examples(*(tensor[number : number + 1] for tensor in part)) for part in batch))


def gradients(algo: Algorithm) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in algo.named_parameters() if weight.grad is not None}


EPISODIC = [algo for algo in ALGOS if made_of(algo).batches is Episode]
