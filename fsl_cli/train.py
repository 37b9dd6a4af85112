"""`fsl train`: compose, build, meta-train, validate, test. `run` is the whole loop, from top to bottom."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fsl_cli import checkpoint, device, parallel, results, resume, speed, stages, tuning
from fsl_cli.algos.base import Batch
from fsl_cli.batches import training_batch, training_data, training_sampler
from fsl_cli.config import check, flat, recipes
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import Packed
from fsl_cli.episodes import TRAIN, Episode, EpisodeSampler
from fsl_cli.errors import run_and_report
from fsl_cli.features import training_store
from fsl_cli.hard import failed
from fsl_cli.interrupt import Interrupt
from fsl_cli.metrics import headline, interval, summary
from fsl_cli.pictures import first_episode
from fsl_cli.schema import Precision, register
from fsl_cli.scoring import adaptation_curve, score
from fsl_cli.sources import AnyStore, Sampler, contents, evaluation_sampler, open_store
from fsl_cli.state import Run
from fsl_cli.store import Ahead
from fsl_cli.tracking import Tracker

log = logging.getLogger(__name__)
prepare = resume.prepare

EPISODE_SEED = 0  # for validation and test, independent of the run's seed; the default of evaluate.yaml

register()


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Runs one training; returns the best validation accuracy, or mean squared error."""
    return run_and_report(run, cfg)


def run(cfg: DictConfig, job: stages.Job | None = None) -> float:
    """Trains a `job` (None: the current command), resuming if asked, keeps the best by validation, and tests it once."""
    began = time.perf_counter()
    check(cfg)
    place = device.choose(cfg.device.name)
    cfg.device.name = place.type  # checkpoints record on which device the step was tuned
    parallel.join(place)
    chief = parallel.rank() == 0  # the only process that writes
    job = job or stages.current_job(cfg)
    folder, choices = job.folder, job.choices
    content = resume.source(cfg.resume, folder)
    if content is not None:
        resume.refuse_contradictions(cfg, choices, job.overrides, content)
    pretrained = stages.pretrained_checkpoint(cfg, job, run) if content is None else None
    data = training_data(cfg)
    classes = 0 if isinstance(data, Drawn) else len(data.classes("train"))
    validation, test = (evaluation_sampler(cfg, data, split, EPISODE_SEED) for split in ("val", "test"))
    state = stages.assemble(cfg, data, classes, place, choices["algo"])
    budget = device.data_budget(place, cfg.device.memory)
    store = open_store(data, place, budget, state.algo.model)
    sampler = training_sampler(cfg, data, state.algo)
    holds = contents(data, "val")
    if content is not None:
        resume.refuse_other_data(content, holds)
        resume.refuse_other_length(cfg, content, *(f"algo.{name}" for name in state.algo.spans))
        state.restore(content)
        if state.done(cfg.steps, cfg.early_stop):
            resume.refuse_other_test(cfg, folder)
        log.info(f"Going on from step {state.step} of {cfg.steps}.")
        seen = checkpoint.seen(content)
    else:
        seen = [*data.class_names("train"), *stages.start_from(state.algo, pretrained, cfg, choices["algo"])]
    began -= state.wall
    feed = training_store(state.algo, store, sampler, cfg.steps, budget)
    batches = partial(training_batch, feed, sampler, state, classes=classes)
    # A thread prepares the next batch, unless that is quick (data in a CPU's memory) or depends on this step's failures.
    ahead = not (feed.near and place.type == "cpu") and not state.algo.hard_tasks
    batches = Ahead(batches) if ahead else batches
    fastest = tuning.fastest(cfg, state.algo, batches(state.step), checkpoint.fastest(content, place))
    stepper = speed.Stepper(state.algo, fastest, cfg.device.compile, cfg.device.graph)
    origin = {
        "config": OmegaConf.to_yaml(cfg),
        "choices": choices,
        "overrides": job.relaunch,
        "data": {"item_shape": list(data.item_shape), "classes": classes, "seen": sorted(set(seen)), "contents": holds},
        "fastest": stepper.fastest,
    }
    weights = sum(parameter.numel() for parameter in state.algo.parameters())
    by = " and ".join(recipes(choices))
    log.info(
        f"{choices['algo']} on {choices['dataset']}: {weights:,} weights, {classes or 'no'} training classes, {place}, "
        f"{f'recipe {by}' if by else 'no recipe: default settings'}"
    )
    log.info(f"Everything goes to {folder}")
    seen_counts = {split: results.warn_of_seen(seen, data, split) for split in ("val", "test")}

    def save(name: str) -> None:
        state.settled()  # never keep a state that has diverged
        state.wall = time.perf_counter() - began
        if chief:
            checkpoint.save(folder / name, {**origin, **state.content()})

    stopping = parallel.Stopping()
    with parallel.all_or_none(lambda: Tracker(folder, state.step, cfg.steps, silent=not chief)) as tracker:
        if chief:  # after the tracker has locked the folder
            used = OmegaConf.merge(cfg, {"device": stepper.fastest})
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(used, resolve=True), encoding="utf-8")
            if not state.done(cfg.steps, cfg.early_stop):
                results.set_aside(folder, state.step)
        with Interrupt() as interrupt:
            while not state.done(cfg.steps, cfg.early_stop):
                rate = float(state.schedule.get_last_lr()[0])
                train_step(state, batches, stepper, cfg)
                if state.algo.hard_tasks and isinstance(sampler, EpisodeSampler):
                    state.failures = failed(state.algo, sampler, state.failures, state.step - 1)
                tracker.step()
                last = state.step == cfg.steps
                if state.step % cfg.log_every == 0 or last:
                    log_window(state, tracker, rate, cfg)
                if state.step % cfg.eval_every == 0 or last:
                    validate(state, tracker, store, validation, cfg)
                    if state.misses == 0:
                        save("best.pt")
                done = state.done(cfg.steps, cfg.early_stop)
                stop = stopping(interrupt.signal)
                if state.step % cfg.checkpoint_every == 0 or done or stop or state.best_step == state.step:  # with best.pt
                    save("last.pt")
                if stop and not done:
                    log.info(f"Stopped at step {state.step}. Go on with: {job.again}")
                    raise SystemExit(128 + stop)
        return finish(state, tracker, store, (validation, test), data, seen_counts, folder, cfg, began)


def train_step(state: Run, batches: Callable[[int], Batch], stepper: speed.Stepper, cfg: DictConfig) -> None:
    """One outer step."""
    start = time.perf_counter()
    batch = batches(state.step)
    mine = (cfg.seed, TRAIN, state.step, *([parallel.rank()] if parallel.rank() else []))  # each process draws its own dropout
    key = np.random.SeedSequence(mine).generate_state(1, np.uint64)
    torch.manual_seed(int(key[0]) >> 1)  # the same in a resumed run
    state.optimizer.zero_grad()
    state.algo.progress = state.step / cfg.steps
    guarded = cfg.device.precision == Precision.bf16
    before = {name: b.clone() for name, b in state.algo.named_buffers()} if guarded else {}
    share = speed.tasks(batch) / cfg.task.tasks if isinstance(batch, Episode) else 1 / parallel.world()
    outcome = parallel.average(state.algo, stepper(batch), share)
    gradients = [parameter.grad for parameter in state.algo.parameters() if parameter.grad is not None]
    norm = get_total_norm(gradients)
    state.step += 1
    if guarded and not torch.isfinite(norm):  # rounding to bfloat16 can cause this: skip the step
        speed.reset(state.algo, before)
        state.leave_out()
    else:
        state.left_out = 0
        if cfg.clip_norm is not None:
            clip_grads_with_norm_(state.algo.parameters(), cfg.clip_norm, norm)
        state.optimizer.step()
        state.window.append([outcome.loss, outcome.measure, norm])
    state.schedule.step()
    state.seconds += time.perf_counter() - start


def log_window(state: Run, tracker: Tracker, rate: float, cfg: DictConfig) -> None:
    """Logs the means over the steps since the last log, and the learning rate of the last step."""
    start = time.perf_counter()
    if not state.window:  # all its steps were skipped
        return
    loss, measure, norm = np.mean(state.settled(), axis=0).tolist()
    state.seconds += time.perf_counter() - start  # reading the window has waited for the GPU
    state.window.clear()
    pace = tasks_per_s(state, cfg)
    name = state.algo.measure.name
    values = {"loss": loss, name: measure, "gradient_norm": norm, "learning_rate": rate, "tasks_per_s": pace}
    tracker.scalars("train", state.step, values)
    tracker.show({"loss": loss, name: measure, "tasks/s": pace})


def validate(state: Run, tracker: Tracker, store: AnyStore, sampler: Sampler, cfg: DictConfig) -> None:
    """Scores the validation episodes, and updates the best score and the number of validations since."""
    measure = state.algo.measure
    mean, ci95 = interval(score(state.algo, store, sampler, cfg.val_episodes).measured)
    tracker.scalars("val", state.step, {measure.name: mean, "ci95": ci95})
    if cfg.train_on_val or measure.better(mean, state.best):  # scores on trained classes cannot choose: keep the last
        state.best, state.best_step, state.misses = mean, state.step, 0
    else:
        state.misses += 1
    log.info(
        f"step {state.step}: validation {measure.name} {measure.text(mean, ci95)} ({cfg.val_episodes} episodes), "
        f"best {measure.text(state.best)} at step {state.best_step}"
    )
    tracker.picture("val/episode", first_episode(state.algo, store, sampler), state.step)


def tasks_per_s(state: Run, cfg: DictConfig) -> float:
    """Training tasks per second of training steps; a pre-training batch counts as one."""
    return state.step * (cfg.task.tasks if state.algo.batches is Episode else 1) / state.seconds


def finish(
    state: Run,
    tracker: Tracker,
    store: AnyStore,
    samplers: tuple[Sampler, ...],
    data: Packed | Drawn,
    seen_counts: dict[str, int],
    folder: Path,
    cfg: DictConfig,
    began: float,
) -> float:
    """Tests the best checkpoint and writes the result; `seen_counts`: how many classes of each split were trained on."""
    content = checkpoint.load(parallel.from_first(folder) / "best.pt", "out")  # waits until process 0 has written it
    checkpoint.load_weights(state.algo, content, "out")
    validation, test = samplers
    scores = score(state.algo, store, test, cfg.episodes)
    choices = content["choices"]
    describe = summary if parallel.rank() == 0 else headline  # only process 0 writes the details
    val = describe(score(state.algo, store, validation, cfg.val_episodes))
    tested = describe(scores)
    if state.algo.regression:
        curve = tested.get("adaptation_curve", [])
    else:
        curve = adaptation_curve(state.algo, store, validation, cfg.val_episodes)
    result = tested | results.protocol(cfg, state.algo, choices, test, data, "test") | {
        "trained_by": choices["algo"],
        "train_seed": cfg.seed,
        "train_on_val": cfg.train_on_val,
        "step": content["step"],
        "steps": state.step,
        "classes_seen": seen_counts["test"],
        "val": val | {"episodes": cfg.val_episodes, "classes_seen": seen_counts["val"]},
        "adaptation_curve": curve,
        "wall_time_s": round(time.perf_counter() - began, 3),
        "tasks_per_s": round(tasks_per_s(state, cfg), 3),
    }  # fmt: skip
    if parallel.rank() == 0:
        results.write(folder, result, scores)
    name = state.algo.measure.name
    tracker.curve(name, curve)
    settings = flat(OmegaConf.to_container(cfg, resolve=True))
    tracker.hparams(settings | choices, {name: result[name], "ci95": result["ci95"], f"val_{name}": val[name]})
    log.info(results.line(result))
    return val[name]
