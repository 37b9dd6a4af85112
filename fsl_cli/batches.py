"""The data of training steps: episodes, including hard ones, or batches for pre-training."""

import torch
from omegaconf import DictConfig

from fsl_cli import parallel
from fsl_cli.algos.base import Algorithm, Batch
from fsl_cli.config import build, head_width
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.episodes import ORDER, TRAIN, BatchSampler, Episode, EpisodeSampler, Examples, generator
from fsl_cli.hard import hard
from fsl_cli.sources import AnyStore, Sampler, open_sampler
from fsl_cli.state import Run
from fsl_cli.store import ItemStore, send


def training_data(cfg: DictConfig) -> Packed | Drawn:
    """The data set of a training; with `train_on_val`, the validation classes are training classes too."""
    data = build(cfg.dataset, "dataset").load()
    if not cfg.train_on_val:
        return data
    if isinstance(data, Drawn):
        raise ValueError(f"train_on_val = true, but dataset={data.name} draws functions and has no classes. Leave it false.")
    if cfg.early_stop is not None:
        raise ValueError(
            f"early_stop = {cfg.early_stop}, but train_on_val = true trains on the classes that it would watch. "
            "Set early_stop=null, and steps to the number that a run without train_on_val was best at."
        )
    return data.with_val_in_training()


def training_sampler(cfg: DictConfig, data: Packed | Drawn, algo: Algorithm) -> Sampler | BatchSampler:
    """The sampler of the training: of episodes, or of batches for an algorithm that pre-trains."""
    task = cfg.task
    if algo.batches is not Episode and isinstance(data, Packed):
        return BatchSampler(data.classes("train"), cfg.algo.batch, cfg.seed, TRAIN)
    if algo.hard_tasks > task.tasks:
        raise ValueError(
            f"algo.hard_tasks = {algo.hard_tasks}, but a meta-batch has task.tasks = {task.tasks}. Lower it, or raise task.tasks."
        )
    if algo.needs_queries and task.train_queries < 1:
        raise ValueError(
            f"task.train_queries = {task.train_queries}, but this algorithm learns from queries: it must be at least 1."
        )
    width = head_width(cfg.algo)
    if isinstance(data, Packed) and width is not None and task.train_way != width:
        raise ValueError(
            f"task.train_way = {task.train_way}, but the head of this algorithm has algo.way = {width} outputs. Set task.way and "
            "task.train_way to the same number, or choose an algorithm without a fixed head, such as algo=protonet."
        )
    shape = (task.train_way, task.train_shot, task.train_queries if algo.needs_queries else 0, task.tasks)
    return open_sampler(data, "train", shape, cfg.seed, TRAIN, prefix="task.train_")


def training_batch(store: AnyStore, sampler: Sampler | BatchSampler, state: Run, step: int, classes: int) -> Batch:
    """This process's share of the meta-batch or batch of a step, on the device."""
    if isinstance(sampler, BatchSampler):
        assert isinstance(store, ItemStore), "batches are made of items"
        indices, labels = sampler.indices(step)
        mine = parallel.share_of_items(len(labels))
        return store.batch(store.vary(indices, sampler.seed, step).rows(mine), labels[mine], classes)
    failed = hard(state.algo, state.failures)
    drawn = sampler.indices(step, failed) if isinstance(sampler, EpisodeSampler) else sampler.indices(step)
    indices = store.vary(drawn, sampler.seed, step)  # drawn for the whole meta-batch, of which each process takes its share
    mine = parallel.share_of_tasks(len(indices.items))
    batch = store.episodes(indices.rows(mine), indices.items.shape[-1] - sampler.queries)
    return shuffled(batch, sampler.seed, step, len(indices.items)) if state.algo.sequential else batch


def shuffled(batch: Episode, seed: int, step: int, tasks: int) -> Episode:
    """Shuffles the support items of each task; `batch` holds this process's share of the `tasks` of the meta-batch.

    If they were sorted by class, an algorithm could infer the class of an item from its position, and ignore its label.
    """
    inputs, targets = batch.support
    order = generator(seed, ORDER, step).random((tasks, targets.shape[1])).argsort(1)[parallel.part(tasks)]
    rows = send(order, targets.device)  # [tasks, n]
    task = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    return batch._replace(support=Examples(inputs[task, rows], targets[task, rows]))
