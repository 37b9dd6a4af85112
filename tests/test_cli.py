"""The commands as a user types them, in this process, on a small `strokes`: train, evaluate, stop, resume, sweep."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fsl, message, stopped
from support_algos import make
from support_runs import ALGOS, SMALL, metrics, result, trained

from fsl_cli import checkpoint, cli, train
from fsl_cli.loading import give_weights
from fsl_cli.tracking import alone

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("algo", ALGOS)
def test_evaluate_gives_the_accuracy_that_train_printed(algo: str, monkeypatch: pytest.MonkeyPatch):
    assert trained(monkeypatch, algo, "run") == 0
    for name in ("config.yaml", "metrics.jsonl", "best.pt", "last.pt", "result.json", "episodes.csv", "tensorboard", "train.log"):
        assert (Path("run") / name).exists(), name
    ours = result("run")
    for key in ("accuracy", "ci95", "episodes", "way", "shot", "queries", "dataset", "split", "norm", "algo", "train_seed",
                "episode_seed", "step", "wall_time_s", "tasks_per_s", "macro_f1", "nll", "calibration_error", "inner_steps",
                "val"):  # fmt: skip
        assert key in ours, key
    assert (ours["algo"], ours["dataset"], ours["split"]) == (algo, "strokes", "test")
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "out=evaluated", "device=cpu") == 0
    again = result("evaluated")
    for key in ("accuracy", "ci95", "macro_f1", "nll", "calibration_error", "norm", "way", "queries", "step", "train_seed"):
        assert again[key] == ours[key], key
    assert (Path("run") / "episodes.csv").read_text() == (Path("evaluated") / "episodes.csv").read_text()
    assert again["checkpoint_sha256"] == checkpoint.sha256("run/best.pt")


@pytest.mark.parametrize(
    ("algo", "words", "said"),
    [
        ("protonet", [], "cpu, recipe protonet_strokes"),
        ("protonet", ["~recipe"], "cpu, no recipe: default settings"),
        ("maml", [], "cpu, recipe maml_strokes and maml_strokes_conv4"),
        ("maml", ["~recipe"], "cpu, no recipe: default settings"),
    ],
)
def test_the_first_line_of_a_run_names_its_recipes(
    algo: str, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    assert trained(monkeypatch, algo, "run", "steps=1", *words) == 0
    assert said in capfd.readouterr().out


FILES = sorted((Path(__file__).parents[1] / "configs/algo").glob("*.yaml"))
# A file without a class of its own holds other settings of another algorithm.
OTHERS = [
    path.stem if "_target_" in path.read_text() else pytest.param(path.stem, marks=pytest.mark.slow)
    for path in FILES
    if path.stem not in ALGOS
]


@pytest.mark.parametrize("algo", OTHERS)
def test_every_other_algorithm_of_the_folder_trains_and_is_evaluated_again(algo: str, monkeypatch: pytest.MonkeyPatch):
    words = ["task.train_way=5", "steps=2", "eval_every=2", "episodes=4", "val_episodes=2"]
    if algo == "mtl":
        assert trained(monkeypatch, "finetune", "before", "steps=1", "eval_every=1") == 0
        words += ["pretrain=before/best.pt", "algo.inner_steps=3", "algo.eval_inner_steps=3"]
    else:
        words += ["pretrain=null", "pretrain_frozen=false"]
    small = [word for word in SMALL if word.split("=")[0] not in {w.split("=")[0] for w in words}]
    assert fsl(monkeypatch, "train", f"algo={algo}", "out=run", *small, *words) == 0
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "out=evaluated", "episodes=4", "device=cpu") == 0
    assert result("evaluated")["accuracy"] == result("run")["accuracy"]


def test_way_and_shot_are_drawn_in_training(monkeypatch: pytest.MonkeyPatch):
    assert trained(monkeypatch, "protonet", "run", "task.train_way=[4,6]", "task.train_shot=[1,3]") == 0


@pytest.mark.parametrize("stop", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algo", ALGOS)
def test_a_run_that_was_stopped_and_resumed_ends_bit_identical(algo: str, stop: int, monkeypatch: pytest.MonkeyPatch):
    assert trained(monkeypatch, algo, "whole") == 0
    with stopped(monkeypatch, stop):
        assert trained(monkeypatch, algo, "stopped") == 128 + signal.SIGTERM
    assert checkpoint.load("stopped/last.pt", "resume")["step"] == stop
    assert not Path("stopped/result.json").exists()
    assert fsl(monkeypatch, "train", "resume=stopped/last.pt") == 0
    assert metrics("stopped") == metrics("whole")
    whole, resumed = (checkpoint.load(f"{name}/last.pt", "resume") for name in ("whole", "stopped"))
    for name, value in whole["algo"].items():
        assert value.equal(resumed["algo"][name]), name
    for key in ("accuracy", "ci95", "nll", "step", "val"):
        assert result("stopped")[key] == result("whole")[key], key


def test_a_run_killed_after_its_checkpoint_resumes_without_doubled_metrics(monkeypatch: pytest.MonkeyPatch):
    assert trained(monkeypatch, "protonet", "whole", "log_every=1") == 0
    step = train.train_step

    def dying(state: train.Run, *rest: Any) -> None:
        step(state, *rest)
        if state.step == 6:
            raise KeyboardInterrupt  # as a kill would: nothing of steps 5 and 6 is saved, but step 5 is in metrics.jsonl

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", dying)
        assert trained(monkeypatch, "protonet", "killed", "log_every=1") == 130
    assert checkpoint.load("killed/last.pt", "resume")["step"] == 4  # with best.pt
    with Path("killed/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert trained(monkeypatch, "protonet", "killed", "log_every=1", "resume=auto") == 0
    assert metrics("killed") == metrics("whole")
    assert result("killed")["accuracy"] == result("whole")["accuracy"]


def test_resume_auto_finds_the_newest_unfinished_run_or_starts_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    words = [*SMALL, *ALGOS["protonet"], "log_every=1"]
    with stopped(monkeypatch, 6, by=signal.SIGINT):
        assert fsl(monkeypatch, "train", "resume=auto", *words) == 128 + signal.SIGINT
    (folder,) = Path("runs/train").iterdir()
    assert f"fsl train resume={folder / 'last.pt'}" in capfd.readouterr().out
    with alone(folder):
        assert train.prepare(["resume=auto"]) == ["resume=auto"]
    assert f"Passed over: another process is at work on {folder}." in capfd.readouterr().err
    assert fsl(monkeypatch, "train", "resume=auto") == 0
    assert [path.name for path in Path("runs/train").iterdir()] == [folder.name]
    assert result(str(folder))["steps"] == 8


def test_a_finished_run_that_goes_on_has_no_result_until_it_has_ended(monkeypatch: pytest.MonkeyPatch):
    words = [*SMALL, *ALGOS["protonet"], "schedule=constant", "steps=4"]
    assert fsl(monkeypatch, "train", *words, "out=runs/train/run") == 0
    before = result("runs/train/run")
    with stopped(monkeypatch, 6):
        assert fsl(monkeypatch, "train", "resume=runs/train/run/last.pt", "steps=8") == 128 + signal.SIGTERM
    assert not Path("runs/train/run/result.json").exists()
    assert json.loads(Path("runs/train/run/result_of_4_steps.json").read_text()) == before
    assert fsl(monkeypatch, "train", "resume=auto") == 0
    assert result("runs/train/run")["steps"] == 8


def test_a_result_names_the_step_of_the_weights_that_were_tested(monkeypatch: pytest.MonkeyPatch):
    words = [*SMALL, *ALGOS["protonet"], "schedule=constant"]
    assert fsl(monkeypatch, "train", *words, "steps=4", "eval_every=2", "checkpoint_every=4", "out=run") == 0
    kept = checkpoint.load("run/last.pt", "resume")
    later = checkpoint.load("run/best.pt", "resume") | {"step": 5}  # as if it were killed after that, before last.pt
    checkpoint.save(Path("run/best.pt"), {key: value for key, value in later.items() if key != "format"})
    Path("run/result.json").unlink()
    assert fsl(monkeypatch, "train", "resume=run/last.pt", "steps=4") == 0
    assert result("run")["step"] == 5 and kept["progress"]["best_step"] < 5


def test_a_sweep_gives_every_job_its_folder(monkeypatch: pytest.MonkeyPatch):
    words = [*SMALL, "steps=2", "task.train_shot=2", "task.train_queries=2", "hydra.sweep.dir=sweep"]
    assert fsl(monkeypatch, "train", "-m", "algo=protonet,maml", "seed=0,1", *words) == 0
    found = [result(f"sweep/{number}") for number in range(4)]
    assert [(one["algo"], one["train_seed"]) for one in found] == [("protonet", 0), ("protonet", 1), ("maml", 0), ("maml", 1)]
    weights = [checkpoint.load(f"sweep/{number}/best.pt", "checkpoint")["algo"] for number in (0, 1)]
    assert not weights[0]["model.blocks.0.convolution.weight"].equal(weights[1]["model.blocks.0.convolution.weight"])


def test_a_failing_job_of_a_sweep_says_why_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    words = [*SMALL, *ALGOS["protonet"], "hydra.sweep.dir=sweep", "task.way=50,3"]
    assert fsl(monkeypatch, "train", "-m", *words) == 2
    assert "task.way = 50, but the val split has only 6 classes" in capfd.readouterr().err
    assert result("sweep/1")["way"] == 3


def test_the_command_returns_the_best_validation_accuracy_to_a_sweeper(monkeypatch: pytest.MonkeyPatch):
    returned = []
    run = train.run
    monkeypatch.setattr(train, "run", lambda cfg: returned.append(run(cfg)) or returned[-1])
    assert trained(monkeypatch, "protonet", "run") == 0
    best = max(line["accuracy"] for line in metrics("run") if line["kind"] == "val")
    assert returned == [best] == [result("run")["val"]["accuracy"]]


def test_evaluate_at_another_way_shot_norm_split_and_data_set(monkeypatch: pytest.MonkeyPatch):
    assert trained(monkeypatch, "protonet", "run") == 0
    words = [
        "checkpoint=run/best.pt",
        "episodes=10",
        "device=cpu",
        "dataset=strokes",
        "dataset.train_classes=9",
        "dataset.test_classes=9",
        "dataset.val_classes=9",
    ]
    assert fsl(monkeypatch, "evaluate", *words, "task.way=8", "task.shot=5", "norm=support", "split=val", "seed=7", "out=e") == 0
    found = result("e")
    assert (found["way"], found["shot"], found["norm"], found["split"], found["episode_seed"], found["classes"]) == (
        8,
        5,
        "support",
        "val",
        7,
        9,
    )


def test_another_head_uses_the_network_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    assert trained(monkeypatch, "protonet", "run") == 0
    evaluate = ["evaluate", "checkpoint=run/best.pt", "episodes=8", "device=cpu"]
    capfd.readouterr()
    assert fsl(monkeypatch, *evaluate, "algo=logistic", "out=other") == 0
    assert "logistic on strokes test (6 classes), 5-way 1-shot: " in (said := capfd.readouterr().out)
    assert "trained by protonet with seed 0" in said
    other = result("other")
    assert (other["algo"], other["trained_by"], other["step"]) == ("logistic", "protonet", result("run")["step"])
    assert other["accuracy"] > 0.3 and other["accuracy"] != result("run")["accuracy"]
    assert fsl(monkeypatch, *evaluate, "algo=knn", "out=nearest") == 0  # with one support image, the nearest is the nearest mean
    assert result("nearest")["accuracy"] == result("run")["accuracy"]
    for name in ("maml", "simpleshot"):  # a head, and the mean of the training classes
        refused = message(monkeypatch, capfd, *evaluate, f"algo={name}")
        assert refused.startswith(f"algo = {name}, but the checkpoint was trained by algo=protonet. Leave algo out.")
    assert message(monkeypatch, capfd, *evaluate, "algo=reptile").startswith("algo = reptile must be trained first.")


def test_without_a_checkpoint_a_head_that_learns_is_refused():
    for name in ("protonet", "r2d2", "knn"):
        give_weights(make(name, "mlp"), {"algo": name}, None, "checkpoint")
    for name in ("relationnet", "simpleshot", "cnp"):
        with pytest.raises(ValueError, match=f"algo = {name} must be trained first"):
            give_weights(make(name, "mlp"), {"algo": name}, None, "checkpoint")


def test_the_episode_list_is_the_same_for_every_training_seed(monkeypatch: pytest.MonkeyPatch):
    for seed in (0, 1):
        assert trained(monkeypatch, "protonet", f"run{seed}", f"seed={seed}", "steps=1") == 0
    assert result("run0")["episode_seed"] == result("run1")["episode_seed"] == 0
    assert result("run0")["accuracy"] != result("run1")["accuracy"]


def test_early_stop_ends_a_run_that_no_longer_improves(monkeypatch: pytest.MonkeyPatch):
    words = ["steps=40", "eval_every=1", "early_stop=2", "optimizer.lr=0.000000001"]
    assert trained(monkeypatch, "protonet", "run", *words) == 0
    assert result("run")["steps"] < 40


def test_validation_classes_are_trained_on_if_asked(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    words = ["train_on_val=true", "steps=8", "optimizer.lr=1"]  # a rate at which training does not improve
    assert trained(monkeypatch, "protonet", "run", *words) == 0
    printed = capfd.readouterr().out
    assert "38 training classes" in printed and "trained on train and val with seed 0 for 8 steps" in printed
    assert "6 of the 6 val classes of strokes have the names of classes that were trained on" in printed
    content = checkpoint.load("run/best.pt", "checkpoint")
    assert (content["step"], len(content["data"]["seen"])) == (8, 38)
    ours = result("run")
    assert (ours["train_on_val"], ours["step"], ours["classes"], ours["classes_seen"]) == (True, 8, 6, 0)
    assert ours["val"]["classes_seen"] == 6
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "out=evaluated", "episodes=8", "device=cpu") == 0
    assert (result("evaluated")["train_on_val"], result("evaluated")["classes_seen"]) == (True, 0)
    refused = message(monkeypatch, capfd, "train", "train_on_val=true", "early_stop=3", *SMALL)
    assert refused.startswith("early_stop = 3, but train_on_val = true")
    refused = message(monkeypatch, capfd, "train", "train_on_val=true", "algo=maml", "dataset=sine")
    assert refused.startswith("train_on_val = true, but dataset=sine draws functions")


def test_clipping_bounds_the_step_and_logs_the_norm_before_it(monkeypatch: pytest.MonkeyPatch):
    for name, words in {"free": [], "clipped": ["clip_norm=0.001"]}.items():
        assert trained(monkeypatch, "protonet", name, "steps=1", "optimizer=sgd", "optimizer.lr=1", *words) == 0
    start = checkpoint.load("free/last.pt", "resume")["algo"]
    (norm,) = {line["gradient_norm"] for name in ("free", "clipped") for line in metrics(name) if line["kind"] == "train"}
    assert norm > 0.01
    clipped = checkpoint.load("clipped/last.pt", "resume")["algo"]
    moved = [(start[name] - clipped[name]).square().sum() for name in start if "running" not in name]
    assert torch.stack(moved).sum().sqrt() == pytest.approx(norm - 0.001, rel=1e-3)  # the same direction, cut to 0.001


def test_tensorboard_holds_scalars_picture_adaptation_and_hparams(monkeypatch: pytest.MonkeyPatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trained(monkeypatch, "maml", "run", "algo.eval_inner_steps=3") == 0
    events = EventAccumulator("run/tensorboard").Reload()
    tags = events.Tags()
    train_scalars = {f"train/{name}" for name in ("loss", "accuracy", "gradient_norm", "learning_rate", "tasks_per_s")}
    assert train_scalars | {"val/accuracy", "val/ci95", "adaptation/accuracy", "hparam/accuracy"} <= set(tags["scalars"])
    assert tags["images"] == ["val/episode"]
    assert [event.step for event in events.Scalars("adaptation/accuracy")] == [0, 1, 2, 3]
    assert result("run")["adaptation_curve"] == pytest.approx([event.value for event in events.Scalars("adaptation/accuracy")])


def test_lists_help_and_composed_config(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    for words, expected in {
        ("--help",): "usage: fsl COMMAND",
        ("algos",): "maml",
        ("algos", "reptile"): "inner_batch: 10 # support items a step",
        ("datasets",): "omniglot",
        ("models",): "conv4",
        ("train", "--help"): "algo: anil, boil, ",
        ("evaluate", "--help"): "checkpoint",
        ("data", "show", "--help"): "fsl data show draws one of its episodes",
        ("train", "--cfg", "job", "algo=reptile", "dataset=omniglot"): "train_shot: 10",
        ("--version",): ".",
    }.items():
        assert fsl(monkeypatch, *words) == 0
        assert expected in capfd.readouterr().out, words


def test_help_says_what_the_options_mean(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    expected = {
        "train algo=mamlpp": [
            "as it stands, with algo=mamlpp ",
            "\n  rates: step  # fixed, step: one learned",  # mamlpp's value, and what the file of maml says of it
            "\n  task_chunk: auto  # tasks mapped at once",
            "\nsteps: 1000  # outer steps\n",
            "\nearly_stop: null  # validations without",
        ],
        "train dataset=sine": ["task=sine", "\n  queries: 100\n", "\n  train_shot: 10\n"],
        "evaluate": ["dataset=trained", "\nsplit: test  # train, val or test classes\n", "\ndataset: {}\n"],
        "report": ["as it stands:\n", "\nruns: runs  # a folder with runs at any depth\n"],
        "data show": ["\nepisode: 0  # its number in the list"],
    }
    for words, lines in expected.items():
        assert fsl(monkeypatch, *words.split(), "--help") == 0
        out = capfd.readouterr().out
        assert [line for line in lines if line not in out] == [], words
        assert "hydra/" not in out


def test_a_terminal_without_a_sign_shows_its_number(monkeypatch: pytest.MonkeyPatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "HELP", "97.8 ± 0.2\n")
    assert fsl(monkeypatch, "--help") == 0
    terminal.seek(0)
    assert terminal.read() == "97.8 \\xb1 0.2\n"


@pytest.mark.parametrize("word", ["algos", "--help", "nonsense"])
def test_nothing_is_said_to_a_pipe_that_is_closed(word: str):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "fsl_cli", word], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    said = "There is no command" if word == "nonsense" else ""
    assert done.stderr.startswith(said) and "Broken" not in done.stderr
    assert done.returncode == (2 if said else 0)


def test_a_sweep_takes_folders_whose_names_hydra_cannot_read(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    assert trained(monkeypatch, "protonet", "a=b", "steps=1") == 0
    words = [*SMALL, *ALGOS["protonet"], "steps=2", "pretrain=a=b/best.pt", "hydra.sweep.dir=é (1)", "seed=1,2"]
    with stopped(monkeypatch, 1):
        assert fsl(monkeypatch, "train", "-m", *words) == 143
    assert "(or with the whole sweep: its command, with hydra.sweep.dir=é (1) resume=auto)" in capfd.readouterr().out
    assert fsl(monkeypatch, "train", "-m", *words, "resume=auto") == 0
    assert [result(f"é (1)/{job}")["train_seed"] for job in (0, 1)] == [1, 2]


@pytest.mark.data
def test_published_settings_need_no_preset_and_real_characters_are_learned(data_dir: str, monkeypatch: pytest.MonkeyPatch):
    words = ["dataset=omniglot", f"data_dir={data_dir}", "steps=40", "eval_every=40", "val_episodes=20", "episodes=100"]
    assert (
        fsl(monkeypatch, "train", *words, "task.train_way=20", "model.filters=16", "optimizer.lr=0.01", "out=run", "device=cpu")
        == 0
    )
    assert result("run")["classes"] == 4 * 659
    assert result("run")["accuracy"] > 0.5  # raw pixels reach 0.38
    data = torch.load("run/best.pt", weights_only=True)["data"]
    assert (data["item_shape"], data["classes"], len(data["seen"])) == ([1, 28, 28], 4 * 792, 792)
