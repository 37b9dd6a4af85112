"""Regression on `dataset=sine`: the episodes, every algorithm that regresses, and the commands."""

import copy
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed, fsl, in_two_parts, stopped
from support_algos import ALGOS, gradients, made_of, task

from fsl_cli import checkpoint
from fsl_cli.algos.base import Algorithm
from fsl_cli.algos.maml import MAML
from fsl_cli.config import build
from fsl_cli.datasets.sine import Sine
from fsl_cli.episodes import Episode, Examples
from fsl_cli.functions import FunctionSampler, FunctionStore
from fsl_cli.metrics import ACCURACY, MSE, concatenate, score_values, summary
from fsl_cli.pictures import sketch

REGRESS = [algo for algo in ALGOS if getattr(made_of(algo), "regresses", False) and algo != "protomaml"]
SMALL = ["steps=6", "eval_every=2", "checkpoint_every=3", "log_every=2", "episodes=20", "val_episodes=10", "device=cpu",
         "task.tasks=3", "task.queries=20"]  # fmt: skip


def make(algo: str, *overrides: str) -> Algorithm:
    short = ["algo.inner_steps=3", "algo.eval_inner_steps=4"] if algo in ("anil", "mamlpp", "reptile") else []
    cfg = composed(f"algo={algo}", "dataset=sine", *short, *overrides)
    torch.manual_seed(0)
    model = build(cfg.model, "model", item_shape=(1,))
    return build(cfg.algo, "algo", model=model, classes=0, regression=True).double()


def sampler(shot: int = 5, queries: int = 7, tasks: int = 4, seed: int = 0, stream: int = 0) -> FunctionSampler:
    return FunctionSampler(Sine().load(), 1, shot, queries, tasks, seed, stream)


def episodes(tasks: int, shot: int = 5, queries: int = 7) -> Episode:
    drawn = sampler(shot, queries, tasks).indices(0)
    return Episode(*(Examples(*(t.double() for t in part)) for part in FunctionStore(torch.device("cpu")).episodes(drawn, shot)))


def result(out: str) -> dict[str, Any]:
    return json.loads((Path(out) / "result.json").read_text())


def metrics(out: str, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tasks_per_s"} for line in lines if line["kind"] == kind]


def test_every_episode_is_a_sine_of_the_published_amplitudes_and_phases():
    drawn = sampler(queries=15, tasks=500).indices(0)
    assert drawn.items.shape == drawn.values.shape == (500, 1, 20)
    assert -5 <= drawn.items.min() < -4.9 < 4.9 < drawn.items.max() <= 5
    found = []
    for x, y in zip(drawn.items[:, 0], drawn.values[:, 0], strict=True):
        # a sin(x - p) = (a cos p) sin x - (a sin p) cos x: linear in two numbers, which least squares finds
        (sine, cosine), rest, *_ = np.linalg.lstsq(np.stack([np.sin(x), -np.cos(x)], axis=1), y)
        assert rest.item() < 1e-20
        found.append((math.hypot(sine, cosine), math.atan2(cosine, sine)))
    amplitudes, phases = np.array(found).T
    assert 0.1 <= amplitudes.min() < 0.2 < 4.9 < amplitudes.max() <= 5
    assert 0 <= phases.min() < 0.05 < 3.1 < phases.max() <= math.pi
    assert abs(amplitudes.mean() - 2.55) < 0.2
    assert abs(phases.mean() - math.pi / 2) < 0.15


def test_support_and_query_are_points_of_one_curve_in_the_order_drawn():
    drawn = sampler().indices(3)
    episode = FunctionStore(torch.device("cpu")).episodes(drawn, 5)
    assert episode.support.inputs.shape == episode.support.targets.shape == (4, 5, 1)
    assert episode.query.inputs.shape == (4, 7, 1)
    np.testing.assert_allclose(episode.support.inputs[2, :, 0], drawn.items[2, 0, :5], rtol=1e-6)
    np.testing.assert_allclose(episode.query.targets[2, :, 0], drawn.values[2, 0, 5:], rtol=1e-6)


def test_episodes_are_a_function_of_seed_stream_and_step_alone():
    one, two = sampler(), sampler()
    two.indices(0)
    np.testing.assert_array_equal(one.indices(9), two.indices(9))
    for other in (sampler(seed=1).indices(9), sampler(stream=1).indices(9), one.indices(10)):
        assert (one.indices(9).items != other.items).all()
    fixed = sampler(tasks=1)
    parts = [fixed.fixed(0, 5), fixed.fixed(5, 12)]
    np.testing.assert_array_equal(fixed.fixed(0, 12).values, np.concatenate([part.values for part in parts]))


def test_processes_that_slice_the_meta_batch_train_on_the_episodes_of_one_process(monkeypatch: pytest.MonkeyPatch):
    parts = in_two_parts(monkeypatch, lambda: sampler(tasks=5).indices(2))
    np.testing.assert_array_equal(np.concatenate([part.values for part in parts]), sampler(tasks=5).indices(2).values)


def test_the_members_that_regress_are_those_of_the_issue():
    assert set(REGRESS) >= {"maml", "fomaml", "anil", "boil", "metasgd", "mamlpp", "reptile", "cnp"}


@pytest.mark.parametrize("algo", [*REGRESS, "maml algo.recompute=true", "maml algo.multi_step=1.0 algo.inner_steps=3"])
def test_mapped_errors_and_gradients_equal_a_loop_over_tasks(algo: str):
    name, *options = algo.split()
    mapped, batch = make(name, *options).train(), episodes(4)
    fresh = copy.deepcopy(mapped)
    mapped.task_chunk = 3  # a full chunk and a rest
    together = mapped.backward(batch)
    outcomes, sums = [], {}
    for number in range(4):
        looped = copy.deepcopy(fresh)
        outcomes.append(torch.stack([*looped.backward(task(batch, number))]))
        for key, value in gradients(looped).items():
            sums[key] = sums.get(key, 0) + value / 4
    torch.testing.assert_close(torch.stack([*together]), torch.stack(outcomes).mean(0), rtol=1e-10, atol=1e-12)
    assert set(sums) == set(gradients(mapped))
    for key, value in gradients(mapped).items():
        torch.testing.assert_close(value, sums[key], rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("algo", REGRESS)
def test_adapting_is_pure_and_mapped_predictions_equal_one_task_at_a_time(algo: str):
    built, batch = make(algo).eval(), episodes(3)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with torch.no_grad():
        mapped, curves = built.predictions(batch), built.curves(batch)
        assert mapped.shape == (3, 7, 1)
        torch.testing.assert_close(curves[:, -1], mapped)
        for number in range(3):
            predictor = built.fit(Examples(batch.support.inputs[number], batch.support.targets[number]))
            torch.testing.assert_close(mapped[number], predictor(batch.query.inputs[number]), rtol=1e-9, atol=1e-11)
    for name, value in built.state_dict().items():
        assert value.equal(before[name]), name


def test_the_error_of_maml_after_each_step_equals_plain_gradient_descent():
    built, batch = make("maml", "algo.inner_lr=0.05", "algo.eval_inner_steps=2").eval(), episodes(3)
    assert isinstance(built, MAML)
    with torch.no_grad():
        found = score_values(built.curves(batch), batch.query.targets).squared
    for number in range(3):
        layers = [module for module in built.modules() if isinstance(module, torch.nn.Linear)]
        weights = [w.detach().clone() for layer in layers for w in layer.parameters()]
        assert [list(w.shape) for w in weights] == [[40, 1], [40], [40, 40], [40], [1, 40], [1]]

        def network(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
            for place in (0, 2):
                x = (x @ weights[place].T + weights[place + 1]).clamp(min=0)
            return x @ weights[4].T + weights[5]

        (x, y), (xs, ys) = ((part.inputs[number], part.targets[number]) for part in batch)
        for step in range(3):
            error = ((network(xs, weights) - ys) ** 2).mean()
            torch.testing.assert_close(found[number, step], error)
            weights = [w.requires_grad_() for w in weights]
            grads = torch.autograd.grad(((network(x, weights) - y) ** 2).mean(), weights)
            weights = [(w - 0.05 * g).detach() for w, g in zip(weights, grads, strict=True)]


def test_a_neural_process_takes_the_mean_code_of_the_pairs():
    built, batch = make("cnp").eval(), episodes(1)
    x, y = batch.support.inputs[0], batch.support.targets[0]
    with torch.no_grad():
        plain = built.fit(Examples(x, y))(batch.query.inputs[0])
        turned = built.fit(Examples(x.flip(0), y.flip(0)))(batch.query.inputs[0])
        twice = built.fit(Examples(torch.cat([x, x]), torch.cat([y, y])))(batch.query.inputs[0])
        other = built.fit(Examples(x, y.flip(0)))(batch.query.inputs[0])
    torch.testing.assert_close(plain, turned)
    torch.testing.assert_close(plain, twice)
    assert not torch.allclose(plain, other, atol=1e-4)


@pytest.mark.parametrize("algo", REGRESS)
def test_a_training_lowers_the_error(algo: str):
    built = make(algo, "algo.inner_lr=0.02") if algo != "cnp" else make(algo)
    lr = {"reptile": 1.0}.get(algo, 0.01)
    optimizer = (torch.optim.SGD if algo == "reptile" else torch.optim.Adam)(built.parameters(), lr=lr)
    batch = episodes(16, shot=10, queries=20)
    with torch.no_grad():
        before = built.eval().outcome(built.predictions(batch), batch.query.targets).measure
    for _ in range(40):
        optimizer.zero_grad()
        built.train().backward(batch)
        optimizer.step()
    with torch.no_grad():
        after = built.eval().outcome(built.predictions(batch), batch.query.targets).measure
    assert after < 0.8 * before


def test_errors_by_hand():
    outputs = torch.tensor([[[[1.0], [2.0]], [[0.0], [0.0]]], [[[5.0], [5.0]], [[3.0], [1.0]]]])  # 2 tasks, 2 steps, 2 queries
    targets = torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]]])
    errors = concatenate([score_values(outputs[:1], targets[:1]), score_values(outputs[1:], targets[1:])])
    assert errors.measured.tolist() == [0.5, 2.0]
    found = summary(errors)
    assert found["mse"] == 1.25
    assert found["ci95"] == pytest.approx(1.96 * math.sqrt(1.125 / 2))
    assert found["adaptation_curve"] == [9.0, 1.25]


def test_the_better_of_two_is_the_lower_error_and_the_higher_accuracy():
    assert MSE.better(0.3, 0.4) and not MSE.better(0.4, 0.3)
    assert ACCURACY.better(0.4, 0.3) and not ACCURACY.better(0.3, 0.4)
    for measure in (MSE, ACCURACY):
        assert measure.better(0.0, math.nan) and not measure.better(math.nan, 0.0)
    assert MSE.text(0.35, 0.02) == "0.3500 ± 0.0200"
    assert ACCURACY.text(0.9789, 0.0022) == "97.89 ± 0.22 %"


def test_the_picture_shows_truth_support_and_prediction():
    x = torch.linspace(-5, 5, 50).view(1, 50, 1)
    support = Examples(torch.tensor([[[0.0]]]), torch.tensor([[[1.0]]]))
    episode = Episode(support, Examples(x, torch.ones_like(x)))
    image = sketch(episode, torch.stack([torch.full_like(x, -1.0), torch.full_like(x, math.nan)], dim=1))
    assert image.shape[0] == 3 and 0 <= image.min() <= image.max() <= 1
    height, width = image.shape[1:]
    top = 1.6  # of the picture, for a largest value of 1
    column = image[:, :, width // 4]
    rows = {value: round((1 - value / top) / 2 * (height - 1)) for value in (1.0, -1.0, 0.0)}
    assert column[:, rows[1.0]].tolist() == pytest.approx([150 / 255] * 3)
    assert column[2, rows[-1.0]] > 0.9 > 0.5 > column[0, rows[-1.0]]
    assert column[0, rows[0.0]] > 0.8 > 0.2 > column[1, rows[0.0]]
    assert image[:, rows[1.0], width // 2].tolist() == [0, 0, 0]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("algo", ["maml", "reptile", "cnp"])
def test_train_and_evaluate_give_the_same_error_and_validation_keeps_the_lowest(algo: str, monkeypatch: pytest.MonkeyPatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert fsl(monkeypatch, "train", f"algo={algo}", "dataset=sine", "out=run", *SMALL) == 0
    ours, validations = result("run"), metrics("run", "val")
    lowest = min(validations, key=lambda line: line["mse"])
    assert (ours["val"]["mse"], ours["step"]) == (lowest["mse"], lowest["step"])
    assert "accuracy" not in ours
    assert (ours["algo"], ours["dataset"], ours["shot"], ours["queries"]) == (algo, "sine", 5, 20)
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "out=again", "episodes=20", "device=cpu") == 0
    again = result("again")
    assert [again[key] for key in ("mse", "ci95", "norm")] == [ours[key] for key in ("mse", "ci95", "norm")]
    assert Path("run/episodes.csv").read_text() == Path("again/episodes.csv").read_text()
    header, *rows = Path("run/episodes.csv").read_text().splitlines()
    assert header.startswith("episode,mse,mse_0")
    assert len(rows) == 20
    assert np.mean([float(row.split(",")[1]) for row in rows]) == pytest.approx(ours["mse"])
    line = Path("again/evaluate.log").read_text()
    assert f"{algo} on sine test, 5-shot: mse " in line
    tags = EventAccumulator("run/tensorboard").Reload().Tags()
    assert {"train/mse", "val/mse", "val/ci95", "hparam/mse", "hparam/val_mse"} <= set(tags["scalars"])
    assert tags["images"] == ["val/episode"]
    if algo != "cnp":
        assert len(again["adaptation_curve"]) == ours["inner_steps"] + 1
        assert again["adaptation_curve"][-1] == again["mse"]
        assert " after 1, " in line and " after 10" in line and " inner steps (" in line


@pytest.mark.usefixtures("workplace")
def test_a_stopped_regression_resumes_bit_identical_and_sweeps_run(monkeypatch: pytest.MonkeyPatch):
    words = ["train", "algo=metasgd", "dataset=sine", *SMALL]
    assert fsl(monkeypatch, *words, "out=whole") == 0
    with stopped(monkeypatch, 3):
        assert fsl(monkeypatch, *words, "out=stopped") == 128 + signal.SIGTERM
    assert fsl(monkeypatch, "train", "resume=stopped/last.pt") == 0
    whole, resumed = (checkpoint.load(f"{name}/last.pt", "resume") for name in ("whole", "stopped"))
    for name, value in whole["algo"].items():
        assert value.equal(resumed["algo"][name]), name
    assert metrics("stopped", "train") == metrics("whole", "train")
    assert result("stopped")["adaptation_curve"] == result("whole")["adaptation_curve"]
    assert fsl(monkeypatch, "train", "-m", *words[1:], "seed=0,1", "hydra.sweep.dir=sweep") == 0
    assert result("sweep/0")["mse"] == result("whole")["mse"] != result("sweep/1")["mse"]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["algo=protonet"], ["algo=protonet tells classes apart", "dataset=sine has values to predict"]),
        (["algo=finetune"], ["algo=finetune", "dataset=sine"]),
        (["algo=relationnet"], ["algo=relationnet", "dataset=sine"]),
        (["algo=reptile", "algo.head=fresh"], ["algo.head = fresh", "dataset=sine", "algo.head=learned"]),
        (["algo=protomaml"], ["algo=protomaml", "dataset=sine", "algo=maml"]),
        (["algo=maml", "task=5way1shot"], ["task.way = 5", "dataset=sine", "task=sine"]),
        (["algo=maml", "task.shot=0"], ["task.shot = 0, but it must be at least 1"]),
        (["algo=maml", "model=conv4"], ["model=conv4 takes images"]),
    ],
)
def test_what_cannot_regress_is_refused(words: list[str], parts: list[str], monkeypatch: Any, capfd: Any):
    assert fsl(monkeypatch, "train", "dataset=sine", *words, "out=run") == 2
    said = capfd.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    for part in parts:
        assert part in said


@pytest.mark.usefixtures("workplace")
def test_evaluation_may_name_the_data_set_and_keeps_the_trained_network(monkeypatch: Any, capfd: Any):
    assert fsl(monkeypatch, "train", "algo=maml", "dataset=sine", "model.hidden=[8,8]", "out=run", *SMALL) == 0
    words = ["evaluate", "checkpoint=run/best.pt", "episodes=20", "device=cpu"]
    assert fsl(monkeypatch, *words, "dataset=sine", "task.shot=10", "split=val", "out=again") == 0
    assert (result("again")["shot"], result("again")["split"], result("again")["queries"]) == (10, "val", 20)
    few = [f"dataset.{split}_classes=6" for split in ("train", "val", "test")]
    assert fsl(monkeypatch, *words, "dataset=strokes", *few, "out=other") == 2
    assert "its items are of shape [1, 28, 28], but those of the checkpoint were of shape [1]" in capfd.readouterr().err
    assert fsl(monkeypatch, *words, "split=tset", "out=third") == 2
    assert "split = 'tset', but sine has train, val, test" in capfd.readouterr().err
