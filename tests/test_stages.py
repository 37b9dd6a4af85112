"""What a training starts from: the network of a checkpoint, kept or trained on, or a first stage of the same command."""

import os
import shlex
import signal
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import fsl, stopped
from omegaconf import DictConfig
from support_runs import SMALL, metrics, result, trained

from fsl_cli import checkpoint, stages, train
from fsl_cli.config import composed
from fsl_cli.overrides import typed

pytestmark = pytest.mark.usefixtures("workplace")


def test_a_network_comes_from_another_checkpoint(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    assert trained(monkeypatch, "finetune", "before") == 0
    assert (
        trained(monkeypatch, "maml", "run", "pretrain=before/best.pt", "steps=1", "model.halving=pool", "optimizer.lr=0.0") == 0
    )
    before, after = (checkpoint.load(f"{run}/best.pt", "test")["algo"] for run in ("before", "run"))
    assert before["model.blocks.0.convolution.weight"].equal(after["model.blocks.0.convolution.weight"])
    capfd.readouterr()
    assert trained(monkeypatch, "maml", "other", "pretrain=before/best.pt", "model.filters=4") == 2
    assert "pretrain: the network of the checkpoint is another one" in capfd.readouterr().err
    assert fsl(monkeypatch, "train", "algo=mtl", "pretrain=null", "out=none", *SMALL) == 2
    assert "pretrain = null, but algo=mtl" in capfd.readouterr().err


def test_a_frozen_network_stays_as_it_came(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    assert trained(monkeypatch, "finetune", "before", "steps=4") == 0
    words = ["train", *SMALL, "pretrain=before/best.pt", "pretrain_frozen=true"]
    assert fsl(monkeypatch, *words, "algo=cnp", "steps=4", "out=run") == 0
    assert "embedded once" not in capfd.readouterr().out  # in so few steps, few of them are seen at all
    before, after = (checkpoint.load(f"{run}/best.pt", "test")["algo"] for run in ("before", "run"))
    network = [name for name in after if name.startswith("model.")]
    assert any("running" in name for name in network)
    assert all(after[name].equal(before[name]) for name in network)
    losses = [line["loss"] for line in metrics("run") if line["kind"] == "train"]
    assert losses[0] != losses[-1]
    capfd.readouterr()
    for more, said in (
        ("algo=maml", "pretrain_frozen = true, but algo=maml adapts the network itself."),
        ("algo=mtl", "pretrain_frozen = true, but algo=mtl adapts the network itself."),
        ("algo=protonet", "pretrain_frozen = true leaves nothing to train."),
        ("pretrain=null", "pretrain_frozen = true, but pretrain = null names no network to keep."),
    ):
        assert fsl(monkeypatch, *words, more, "out=other") == 2
        assert said in capfd.readouterr().err


def test_items_are_embedded_once_where_the_network_stays_and_the_run_resumes_bit_identical(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    assert trained(monkeypatch, "finetune", "before", "steps=4") == 0
    words = [*SMALL, "pretrain=before/best.pt", "pretrain_frozen=true", "algo=snail", "steps=8", "dataset.train_classes=8"]
    assert fsl(monkeypatch, "train", *words, "out=whole") == 0
    assert "The network stays as it is: all 160 training items are embedded once." in capfd.readouterr().out
    with stopped(monkeypatch, 5):
        assert fsl(monkeypatch, "train", *words, "out=stopped") == 128 + signal.SIGTERM
    assert fsl(monkeypatch, "train", "resume=stopped") == 0
    assert metrics("stopped") == metrics("whole")
    assert fsl(monkeypatch, "evaluate", "checkpoint=whole/best.pt", "episodes=8", "device=cpu", "out=again") == 0
    assert result("again")["accuracy"] == result("whole")["accuracy"]


def test_the_first_stage_is_trained_in_the_same_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    steps = ["algo.inner_steps=3", "algo.eval_inner_steps=3"]
    stage = "pretrain_with={steps:8,eval_every:4,checkpoint_every:3,algo:{batch:16,head_epochs:3}}"
    words = ["algo=mtl", "pretrain=train", *SMALL, *steps, "steps=4", "seed=3"]
    assert fsl(monkeypatch, "train", *words, stage, "out=whole") == 0
    before, after = (checkpoint.load(f"whole/{name}", "test") for name in ("pretrain/best.pt", "best.pt"))
    assert (before["choices"]["algo"], before["choices"]["seed"]) == ("finetune", "3")
    assert before["algo"]["model.blocks.0.convolution.weight"].equal(after["algo"]["model.blocks.0.convolution.weight"])
    assert (result("whole/pretrain")["steps"], result("whole")["steps"]) == (8, 4)
    assert fsl(monkeypatch, "train", "algo=mtl", "pretrain=whole/pretrain/best.pt", *words[2:], "out=apart") == 0
    step = train.train_step

    def stopping(state: train.Run, *rest: Any) -> None:
        step(state, *rest)
        if (type(state.algo).__name__, state.step) in (("Finetune", 5), ("MTL", 2)):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", stopping)
        assert fsl(monkeypatch, "train", *words, stage, "out=stopped") == 128 + signal.SIGTERM
        again = shlex.split(capfd.readouterr().out.split("Go on with: fsl ")[1].splitlines()[0])
        assert "resume=auto" in again
        assert not Path("stopped/last.pt").exists()
        assert fsl(monkeypatch, *again) == 128 + signal.SIGTERM
    assert fsl(monkeypatch, "train", "resume=stopped/last.pt") == 0
    for name in ("stopped", "apart", "stopped/pretrain"):
        other = {"apart": "whole", "stopped": "whole", "stopped/pretrain": "whole/pretrain"}[name]
        assert result(name)["nll"] == result(other)["nll"], name
        assert metrics(name) == metrics(other), name
    for file in ("last.pt", "best.pt", "result.json"):
        (Path("whole") / file).unlink()
    capfd.readouterr()
    assert fsl(monkeypatch, "train", *words, stage, "out=whole") == 0
    assert "The first stage is finished" in capfd.readouterr().out
    for name in ("last.pt", "best.pt", "result.json"):
        (Path("whole") / name).unlink()
    assert fsl(monkeypatch, "train", *words, stage.replace("batch:16", "batch:8"), "out=whole") == 2
    assert "algo.batch = 8, but the checkpoint" in capfd.readouterr().err


def test_resume_auto_finds_a_run_that_is_still_in_its_first_stage(monkeypatch: pytest.MonkeyPatch):
    stage = "pretrain_with={steps:6,eval_every:3,algo:{batch:16,head_epochs:1}}"
    words = ["algo=mtl", "pretrain=train", *SMALL, "algo.inner_steps=1", "algo.eval_inner_steps=1", "steps=2", stage]
    with stopped(monkeypatch, 5):
        assert fsl(monkeypatch, "train", "resume=auto", *words) == 128 + signal.SIGTERM
    (folder,) = Path("runs/train").iterdir()
    first = folder / "pretrain/last.pt"
    assert train.prepare(["resume=auto", "seed=9"]) == ["resume=auto", "seed=9"]  # another run
    assert typed(train.prepare(["resume=auto", *words])) == typed([*words, f"out={folder}", "resume=auto"])
    assert train.prepare(["resume=auto"]) == train.prepare([f"resume={first}"])
    assert fsl(monkeypatch, "train", "resume=auto") == 0
    assert [path.name for path in Path("runs/train").iterdir()] == [folder.name]
    assert (result(str(folder / "pretrain"))["steps"], result(str(folder))["steps"]) == (6, 2)


@pytest.mark.parametrize(("algo", "first"), [("snail", "protonet"), ("mtl", "finetune")])
def test_a_first_stage_without_settings_of_its_own_is_of_the_recipe(algo: str, first: str, tmp_path: Path):
    words = [f"algo={algo}", "pretrain=train", "seed=3"]
    cfg, choices = composed("train", words)
    run: list[DictConfig] = []

    def fake(stage: DictConfig, job: stages.Job) -> float:
        run.append(stage)
        return 0.0

    best = stages.pretrained_checkpoint(cfg, stages.Job(choices, words, words, tmp_path, "again"), fake)
    assert best == str(tmp_path / "pretrain/best.pt")
    plain, _ = composed("train", [f"algo={first}", "seed=3", f"out={tmp_path / 'pretrain'}", "resume=auto"])
    assert run == [plain]


@pytest.mark.slow
def test_every_job_of_a_sweep_has_a_first_stage_of_its_own(monkeypatch: pytest.MonkeyPatch):
    small = [*SMALL, "algo.inner_steps=1", "steps=1", "val_episodes=2", "episodes=2", "hydra.sweep.dir=sweep"]
    stage = "pretrain_with={steps:1,algo.batch:8,algo.head_epochs:1}"
    assert fsl(monkeypatch, "train", "-m", "algo=mtl", "pretrain=train", stage, "seed=0,1", *small) == 0
    for seed in (0, 1):
        folder = Path("sweep") / str(seed)
        assert checkpoint.load(folder / "pretrain/best.pt", "test")["choices"]["seed"] == str(seed)
        assert "finetune on strokes test" in (folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain_with={steps:3}"], "pretrain_with = {'steps': 3}, but it must be"),
        (["pretrain_algo=protonet"], "pretrain_algo = protonet, but pretrain = null trains no first stage."),
        (["algo=snail", "pretrain=train", "pretrain_algo=protonett"], "Did you mean protonet?"),
        (["pretrain=train", "pretrain_with=3"], "pretrain_with = 3, but it must be settings by key"),
        (["pretrain=train", "pretrain_with={algo.bathc:3}"], "algo.bathc"),
        (["pretrain=train", "experiment=protonet_omniglot_paper"], "experiment=protonet_omniglot_paper"),
    ],
)
def test_a_first_stage_that_cannot_be_is_refused(words: list[str], said: str, monkeypatch: Any, capfd: Any):
    assert fsl(monkeypatch, "train", "device=cpu", *words, "out=run") == 2
    assert said in capfd.readouterr().err


def test_options_of_the_user_s_own_are_found_when_a_run_goes_on(monkeypatch: pytest.MonkeyPatch):
    packaged = files("fsl_cli.configs").joinpath("dataset", "strokes.yaml").read_text(encoding="utf-8")
    Path("own/dataset").mkdir(parents=True)
    Path("own/dataset/inky.yaml").write_text(packaged.replace("noise: 0.0", "noise: 0.1"))
    stage = "pretrain_with={steps:4,eval_every:4,algo:{batch:16,head_epochs:3}}"
    words = ["--config-dir=own", "dataset=inky", "algo=mtl", "pretrain=train", *SMALL, "steps=6", stage, "algo.inner_steps=1"]
    with stopped(monkeypatch, 5):  # of the second stage
        assert fsl(monkeypatch, "train", *words, "out=run") == 128 + signal.SIGTERM
    monkeypatch.chdir(Path("own").resolve())  # the folder is found from elsewhere, too
    assert fsl(monkeypatch, "train", "resume=../run") == 0
    assert "noise: 0.1" in Path("../run/config.yaml").read_text()
    assert "noise: 0.1" in Path("../run/pretrain/config.yaml").read_text()
