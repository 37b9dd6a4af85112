"""`fsl train`: compose, build, meta-train, validate, test. The loop stands in `run`, from top to bottom."""

import logging
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fsl_cli import checkpoint, device, evaluate, resume
from fsl_cli.algos.base import Algorithm, Batch
from fsl_cli.config import build, check, flat, register, run_folder
from fsl_cli.datasets.packed import Packed
from fsl_cli.episodes import TRAIN, BatchSampler, Episode, EpisodeSampler, Store
from fsl_cli.errors import told
from fsl_cli.interrupt import Interrupt
from fsl_cli.metrics import interval, summary
from fsl_cli.scoring import adaptation_curve, score
from fsl_cli.state import Run
from fsl_cli.tracking import Tracker, picture

log = logging.getLogger(__name__)
prepare = resume.prepare

EPISODE_SEED = 0  # of validation and test, whatever the run's seed: evaluate.yaml's default

register()


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Runs one training; returns the best validation accuracy."""
    return told(run, cfg)


def run(cfg: DictConfig) -> float:
    """Builds everything, trains from where the checkpoint says, keeps the best by validation, tests it once."""
    began = time.perf_counter()
    check(cfg)
    folder = run_folder()
    place = device.choose(cfg.device.name, cfg.device.threads)
    content = resume.source(cfg.resume, folder)
    choices = {**HydraConfig.get().runtime.choices, "seed": str(cfg.seed)}
    if content is not None:
        resume.refuse_contradictions(cfg, choices, content)
    data = build(cfg.dataset, "dataset").load()
    store = Store(data.items, place)
    classes = len(data.classes("train"))
    validation, test = (evaluate.evaluation_sampler(cfg, data, split, EPISODE_SEED) for split in ("val", "test"))
    state = assemble(cfg, data, classes, place)
    sampler = training_sampler(cfg, data, state.algo)
    if content is not None:
        state.restore(content)
        log.info(f"Going on from step {state.step} of {cfg.steps}.")
    began -= state.wall
    origin = {
        "config": OmegaConf.to_yaml(cfg),
        "choices": choices,
        "overrides": list(HydraConfig.get().overrides.task),
        "data": {"item_shape": list(data.item_shape), "classes": classes},
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    weights = sum(parameter.numel() for parameter in state.algo.parameters())
    log.info(f"{choices['algo']} on {choices['dataset']}: {weights:,} weights, {classes} training classes, {place}")
    log.info(f"Everything goes to {folder}")

    def save(name: str) -> None:
        state.settled()  # never keep a state that has diverged
        state.wall = time.perf_counter() - began
        checkpoint.save(folder / name, {**origin, **state.content()})

    with Interrupt() as interrupt, Tracker(folder, state.step, cfg.steps) as tracker:
        while not state.done(cfg.steps, cfg.early_stop):
            train_step(state, training_batch(store, sampler, state.step, classes), cfg)
            tracker.step()
            last = state.step == cfg.steps
            if state.step % cfg.log_every == 0 or last:
                log_window(state, tracker, cfg)
            if state.step % cfg.eval_every == 0 or last:
                validate(state, tracker, store, validation, cfg.val_episodes)
                if state.misses == 0:
                    save("best.pt")
            done = state.done(cfg.steps, cfg.early_stop)
            if state.step % cfg.checkpoint_every == 0 or done or interrupt.signal:
                save("last.pt")
            if interrupt.signal and not done:
                log.info(f"Stopped at step {state.step}. Go on with: fsl train resume={folder / 'last.pt'}")
                raise SystemExit(128 + interrupt.signal)
        return finish(state, tracker, store, (validation, test), folder, cfg, began)


def assemble(cfg: DictConfig, data: Packed, classes: int, place: torch.device) -> Run:
    """Builds model, algorithm, optimizer and schedule with the initial weights of `seed`."""
    torch.manual_seed(cfg.seed)
    model = build(cfg.model, "model", item_shape=data.item_shape)
    algo = device.settle(build(cfg.algo, "algo", model=model, classes=classes), place)
    algo.task_chunk = cfg.device.task_chunk
    optimizer = build(cfg.optimizer, "optimizer", params=algo.parameters())
    return Run(algo, optimizer, build(cfg.schedule, "schedule", optimizer=optimizer))


def training_sampler(cfg: DictConfig, data: Packed, algo: Algorithm) -> EpisodeSampler | BatchSampler:
    """What feeds the training step: episodes, or batches for an algorithm that pre-trains."""
    classes, task = data.classes("train"), cfg.task
    if algo.batches is not Episode:
        return BatchSampler(classes, cfg.algo.batch, cfg.seed, TRAIN)
    shape = (task.train_way, task.train_shot, task.train_queries, task.tasks)
    return EpisodeSampler(classes, *shape, cfg.seed, TRAIN, prefix="task.train_")


def training_batch(store: Store, sampler: EpisodeSampler | BatchSampler, step: int, classes: int) -> Batch:
    """The meta-batch or batch of a step, on the device."""
    if isinstance(sampler, BatchSampler):
        return store.batch(*sampler.indices(step), classes)
    return store.episodes(sampler.indices(step), sampler.shot)


def train_step(state: Run, batch: Batch, cfg: DictConfig) -> None:
    """One outer step."""
    start = time.perf_counter()
    key = np.random.SeedSequence((cfg.seed, TRAIN, state.step)).generate_state(1, np.uint64)
    torch.manual_seed(int(key[0]) >> 1)  # dropout and augmentation resume without stored generators
    state.optimizer.zero_grad()
    outcome = state.algo.train().backward(batch)
    gradients = [parameter.grad for parameter in state.algo.parameters() if parameter.grad is not None]
    norm = get_total_norm(gradients)
    if cfg.clip_norm is not None:
        clip_grads_with_norm_(state.algo.parameters(), cfg.clip_norm, norm)
    state.optimizer.step()
    state.schedule.step()
    state.step += 1
    state.window.append([outcome.loss, outcome.accuracy, norm])
    state.seconds += time.perf_counter() - start


def log_window(state: Run, tracker: Tracker, cfg: DictConfig) -> None:
    """Logs the means since the last log."""
    start = time.perf_counter()
    loss, accuracy, norm = np.mean(state.settled(), axis=0).tolist()
    state.seconds += time.perf_counter() - start  # a GPU has finished its steps only now
    state.window.clear()
    speed = tasks_per_s(state, cfg)
    rate = state.schedule.get_last_lr()[0]
    values = {"loss": loss, "accuracy": accuracy, "gradient_norm": norm, "learning_rate": rate, "tasks_per_s": speed}
    tracker.scalars("train", state.step, values)
    tracker.show({"loss": loss, "accuracy": accuracy, "tasks/s": speed})


def validate(state: Run, tracker: Tracker, store: Store, sampler: EpisodeSampler, episodes: int) -> None:
    """Scores the validation episodes, and counts how long the best accuracy has stood."""
    accuracy, ci95 = interval(score(state.algo, store, sampler, episodes).accuracy)
    tracker.scalars("val", state.step, {"accuracy": accuracy, "ci95": ci95})
    if accuracy > state.best:
        state.best, state.best_step, state.misses = accuracy, state.step, 0
    else:
        state.misses += 1
    log.info(
        f"step {state.step}: validation accuracy {100 * accuracy:.2f} ± {100 * ci95:.2f} % ({episodes} episodes), "
        f"best {100 * state.best:.2f} % at step {state.best_step}"
    )
    tracker.picture("val/episode", picture(*first_episode(state.algo, store, sampler)), state.step)


@torch.no_grad()
def first_episode(algo: Algorithm, store: Store, sampler: EpisodeSampler) -> tuple[Episode, Tensor]:
    """The first evaluation episode and its query logits, for the picture."""
    episode = store.episodes(sampler.fixed(0, 1), sampler.shot)
    return episode, algo.eval().predictions(episode)


def tasks_per_s(state: Run, cfg: DictConfig) -> float:
    """Training tasks per second of training steps; a pre-training batch counts as one."""
    return state.step * (cfg.task.tasks if state.algo.batches is Episode else 1) / state.seconds


def finish(
    state: Run, tracker: Tracker, store: Store, samplers: tuple[EpisodeSampler, ...], folder: Path, cfg: DictConfig, began: float
) -> float:
    """Tests the best checkpoint once, and writes what the run came to."""
    content = checkpoint.load(folder / "best.pt", "out")
    checkpoint.load_weights(state.algo, content, "out")
    validation, test = samplers
    scores = score(state.algo, store, test, cfg.episodes)
    choices = content["choices"]
    val = summary(score(state.algo, store, validation, cfg.val_episodes))
    curve = adaptation_curve(state.algo, store, validation)
    result = summary(scores) | evaluate.protocol(cfg, state.algo, choices, test, "test") | {
        "seed": cfg.seed,
        "train_seed": cfg.seed,
        "step": state.best_step,
        "steps": state.step,
        "val": val | {"episodes": cfg.val_episodes},
        "adaptation_curve": curve,
        "wall_time_s": round(time.perf_counter() - began, 3),
        "tasks_per_s": round(tasks_per_s(state, cfg), 3),
    }  # fmt: skip
    evaluate.write(folder, result, scores)
    tracker.curve(curve)
    settings = flat(OmegaConf.to_container(cfg, resolve=True))
    tracker.hparams(settings | choices, {name: result[name] for name in ("accuracy", "ci95")} | {"val_accuracy": val["accuracy"]})
    log.info(evaluate.line(result))
    return val["accuracy"]
