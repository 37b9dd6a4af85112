"""Each mistake of a user ends in one clear sentence on stderr and exit code 2; each failed run in one and exit code 1."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fsl, full_disk, message, stopped
from omegaconf import DictConfig, OmegaConf
from support_runs import ALGOS, SMALL, result, trained

from fsl_cli import checkpoint, train
from fsl_cli.cli import apart, checked
from fsl_cli.tracking import alone

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["stepz=3"], ["no key stepz", "Did you mean steps?"]),
        (["algo=maml", "algo.iner_lr=0.1"], ["no key algo.iner_lr", "Did you mean inner_lr?"]),
        (["+algo.depth=3"], ["algo.depth is not an option of ProtoNet"]),
        (["algo=mamal"], ["algo = 'mamal'", "Did you mean maml?"]),
        (["dataset=omniglott"], ["Did you mean omniglot?"]),
        (["norm=support"], ["There is no key norm here: it is an option of fsl evaluate, predict, adapt."]),
        (["task=10way3shot"], ["task = '10way3shot'", "Write task.way=10 task.shot=3."]),
        (["algo.inner_lr=1"], ["no key algo.inner_lr in the algo that is chosen (algo=NAME chooses another). There are: scale."]),
        (["+depth=3"], ["There is no key depth. There are: algo,"]),
        (["+task.depth=3"], ["There is no key task.depth. There are: queries,"]),
        (["recipe=mamal_omniglot"], ["recipe = 'mamal_omniglot'", "Did you mean maml_omniglot?"]),
        (["recipe=null"], ["recipe = null", "~recipe"]),
        (["steps=many"], ["steps = 'many', but it must be a whole number. Write one, such as steps=10."]),
        (["train_on_val=maybe"], ["train_on_val = 'maybe', but it must be true or false."]),
        (["seed=null"], ["seed = null, but it must have a value. Give it one: seed=..."]),
        (["~optimizer"], ["optimizer = null, but one must be chosen: optimizer=NAME."]),
        (["optimizer=[adam]"], ["optimizer = [adam], but one must be chosen: optimizer=NAME."]),
        (["+optimizer=sgd"], ["optimizer has two values. Write optimizer=... once, without +."]),
        (["checkpoints=x"], ["no key checkpoints"]),
        (["lr=0.01"], ["There is no key lr. Did you mean optimizer.lr?"]),
        (["way=3"], ["There is no key way. Did you mean task.way?"]),
        (["algo=maml", "task.way=0"], ["task.way = 0, but it must be at least 1."]),
        (["algo=snail", "pretrain=null", "algo.filters=0"], ["algo.filters = 0, but it must be at least 1."]),
        (["task.way=2.5"], ["task.way", "2.5"]),
        (["steps=0"], ["steps = 0, but it must be at least 1."]),
        (["seed=-1"], ["seed = -1"]),
        (["algo=maml", "task.train_way=7"], ["task.train_way = 7, but the head of this algorithm has algo.way = 5 outputs."]),
        (["algo=reptile", "algo.head=learned", "task.train_way=[5,7]"], ["task.train_way = [5, 7], but the head of"]),
        (["seed=0..3"], ["seed = '0..3', but it must be a whole number. To run several, add -m and list them: seed=0,1,2."]),
        (["clip_norm=-1"], ["clip_norm = -1"]),
        (["algo=maml", "algo.inner_lr=fast"], ["algo.inner_lr = 'fast', but it must be a number."]),
        (["algo=maml", "algo.adapts=tail"], ["algo.adapts = 'tail', but it must be all or head or body or context."]),
        (
            ["algo=snail", "pretrain=null", "algo.keys=64"],
            ["algo.keys = 64, but it must be a list of whole numbers in brackets."],
        ),
        (["algo=maml", "algo.inner_lr=-1"], ["algo.inner_lr = -1", "must be positive"]),
        (
            ["algo=maml", "algo.inner_steps=true"],
            ["algo.inner_steps = True, but it must be a whole number. Write one, such as algo.inner_steps=10."],
        ),
        (["model.filters=0"], ["model.filters = 0"]),
        (["algo=mann", "pretrain=null", "algo.heads=8", "algo.places=4"], ["algo.heads = 8, but algo.places = 4"]),
        (["algo=r2d2", "algo.scale=-1"], ["algo.scale = -1", "must be positive"]),
        (["algo=finetune", "algo.head_decay=-1"], ["algo.head_decay = -1", "must not be negative"]),
        (["+optimizer.betas=[0.9]"], ["optimizer.betas = [0.9], but it must be a list of 2 numbers in brackets."]),
        (["optimizer.lr=-1"], ["optimizer.lr = -1, but it must not be negative."]),
        (["optimizer=adm"], ["Did you mean adam?"]),
        (["task.way=50"], ["task.way = 50, but the val split has only 6 classes"]),
        (["task.train_way=33"], ["task.train_way = 33, but the train split has only 32 classes"]),
        (["task.queries=0"], ["task.queries = 0, but an episode is scored on its queries"]),
        (["task.train_queries=0"], ["task.train_queries = 0, but this algorithm learns from queries"]),
        (["algo=cnp", "algo.hidden=-1"], ["algo.hidden = -1, but it must be at least 1."]),
        (["schedule.T_max=0"], ["schedule.T_max = 0, but it must be at least 1."]),
        (["task.tasks=-1"], ["task.tasks = -1, but it must be at least 1."]),
        (["dataset.val_classes=1"], ["the val split has only 1 class, and an episode needs two"]),
        (["algo=null"], ["algo = null, but one must be chosen"]),
        (
            ["algo=snail", "pretrain=null", "pretrain_frozen=false", "algo.keys=[8]"],
            ["algo.keys = [8] and algo.values = [32, 128, 256]"],
        ),
        (["algo=mamlpp", "algo.recompute=true"], ["algo.recompute = true, but algo.multi_step = 0.1"]),
        (["task.queries=30"], ["task.shot + task.queries = 1 + 30 = 31, but class", "has 20 items"]),
        (["device.name=tpu"], ["device.name = 'tpu'"]),
        (["device.threads=0"], ["device.threads = 0"]),
        (["device.threads=100000"], ["device.threads = 100000, but this machine has"]),
        (["device.workers=100000"], ["device.workers = 100000, but this machine has"]),
        (["seed=99999999999999999999"], ["seed"]),
        (["out"], ["out"]),
        (["out="], ["out has no value. Give it one, out=PATH"]),
        (["resume=run/last.pt", "-m"], ["resume = run/last.pt, but the jobs of a sweep", "without -m"]),
        (["algo=reptile", "algo.head=fresh", "algo.inner_optimizer=adam"], ["algo.head = fresh, but the moments of Adam"]),
        (["algo=reptile", "algo.eval_inner_batch=0"], ["algo.eval_inner_batch = 0, but it must be at least 1."]),
        (["algo=mtl", "algo.inner_steps=-1", "pretrain=null"], ["algo.inner_steps = -1, but it must not be negative."]),
        (["out=there", "-m"], ["out = there, but the jobs of a sweep", "hydra.sweep.dir=there"]),
        (["resume=nothing.pt"], ["resume = nothing.pt: there is no such file"]),
        (["--steps=20"], ["--steps=20 begins with a dash. Options are written key=value: steps=20."]),
        (["algo=a=b"], ["algo=a=b cannot be read as key=value. Put quotes around a value"]),
        (["steps", "20"], ["'steps' is not of the form key=value. Write it so, without blanks"]),
        (["seed=0,1"], ["seed=0,1 gives several values. Add -m to run each of them: fsl train -m seed=0,1."]),
        (["clip_norm=nan"], ["clip_norm = nan, but it must be a number."]),
        (["optimizer.lr=abc"], ["optimizer.lr = 'abc', but it must be a number. Write one, such as optimizer.lr=0.1."]),
    ],
)
def test_a_mistake_is_named_with_its_repair(words: list[str], parts: list[str], monkeypatch: Any, capfd: Any):
    said = message(monkeypatch, capfd, "train", *SMALL, "steps=2", *words)
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (
            ["dataset=caltech101", "data_dir=/nowhere"],
            "data_dir = /nowhere: there is no such folder. Name the one that caltech101",
        ),
        (["dataset=clinc150", "dataset.source=/nowhere"], "dataset.source = /nowhere: there is no such folder or archive"),
        (["model=bag_of_words", *(word for word in SMALL if word.startswith("dataset."))], "model=bag_of_words takes texts"),
    ],
)
def test_a_mistake_begins_with_the_key_to_change(words: list[str], start: str, monkeypatch: Any, capfd: Any):
    assert message(monkeypatch, capfd, "train", *words).startswith(start)


def test_a_refused_run_leaves_no_folder_unless_something_is_in_it(monkeypatch: Any, capfd: Any):
    Path("kept").mkdir()
    Path("kept/notes.txt").write_text("mine")
    for out in ("new", "kept"):
        message(monkeypatch, capfd, "train", *SMALL, "task.way=50", f"out={out}")
    assert not Path("new").exists()
    assert {file.name for file in Path("kept").iterdir()} == {"notes.txt"}


def test_what_is_refused_stands_in_no_log_of_another_run(monkeypatch: Any, capfd: Any):
    assert trained(monkeypatch, "protonet", "run") == 0
    record = Path("run/train.log").read_text()
    for words in (["out=run"], ["resume=run", "steps=30"]):
        message(monkeypatch, capfd, "train", *SMALL, *words)
    assert Path("run/train.log").read_text() == record


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(monkeypatch: Any, capfd: Any):
    said = message(monkeypatch, capfd, "train", *SMALL, "device=cuda")
    assert said == "device.name = 'cuda', but torch finds no CUDA device here. Use device=cpu or device=auto."


def test_an_unknown_command_is_refused(monkeypatch: Any, capfd: Any):
    assert "There is no command 'trian'" in message(monkeypatch, capfd, "trian")
    assert message(monkeypatch, capfd, "algos", "mamal") == "'mamal' is none of algos. Did you mean maml?"
    assert message(monkeypatch, capfd, "models", "mlp", "x") == "fsl models takes one name, but was given 'x' too. Leave it out."


def test_flags_of_hydra_may_stand_anywhere(monkeypatch: Any, capfd: Any):
    assert apart(["a=1", "--cfg", "job", "b=2", "-m", "--info=all"]) == (["--cfg", "job", "-m", "--info=all"], ["a=1", "b=2"])
    assert fsl(monkeypatch, "train", *SMALL, "--cfg", "job", "steps=7") == 0
    assert "steps: 7" in capfd.readouterr().out
    assert fsl(monkeypatch, "evaluate", "model=efficientnet_lite0", "--cfg", "job", "dataset=strokes", "episodes=7") == 0
    assert "episodes: 7" in capfd.readouterr().out


def test_a_finished_run_is_not_tested_otherwise(monkeypatch: Any, capfd: Any):
    assert trained(monkeypatch, "protonet", "run", "steps=2") == 0
    before = Path("run/result.json").read_bytes()
    said = message(monkeypatch, capfd, "train", "resume=run/last.pt", "episodes=7")
    assert "episodes = 7, but the run in run is finished" in said and "checkpoint=run/best.pt episodes=7" in said
    assert Path("run/result.json").read_bytes() == before
    assert fsl(monkeypatch, "train", "resume=run/last.pt") == 0


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("evaluate checkpoint=best.pt", "task.train_way"),
        ("evaluate checkpoint=best.pt", "dataset.crop"),
        ("evaluate checkpoint=best.pt", "dataset.jitter"),
        ("data show", "task.train_way"),
        ("predict query=a.png", "device.compile"),
    ],
)
def test_what_only_training_reads_is_refused_elsewhere(words: str, key: str, monkeypatch: Any, capfd: Any):
    said = message(monkeypatch, capfd, *words.split(), f"{key}=7")
    assert said == f"{key} = 7, but only fsl train reads it. Leave it out."


def test_missing_data_without_a_network_says_where_to_put_it(monkeypatch: Any, capfd: Any, tmp_path: Path):
    from torchvision import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets, "Omniglot", offline)
    words = ["train", "dataset=omniglot", f"data_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    said = message(monkeypatch, capfd, *words)
    for part in ("data_dir", "images_background.zip", "images_evaluation.zip", str(tmp_path / "omniglot-py")):
        assert part in said


def test_an_unwritable_run_folder_is_refused(monkeypatch: Any, capfd: Any):
    Path("file").write_text("")
    for out in ("file", "file/run"):
        said = message(monkeypatch, capfd, "train", *SMALL, f"out={out}")
        assert said.startswith(f"out: {out} cannot be made or written (") and said.endswith("Choose another folder: out=PATH.")
    Path("runs").write_text("")
    assert message(monkeypatch, capfd, "train", *SMALL).startswith("out: runs/train/")
    assert message(monkeypatch, capfd, "train", *SMALL, "-m", "seed=0,1").startswith("hydra.sweep.dir: runs/sweeps/")
    if Path("/proc/self").exists():  # a folder in which not even root can make files
        assert message(monkeypatch, capfd, "train", *SMALL, "out=/proc").startswith("out: /proc/train.log cannot be made or")


def test_an_unwritable_cache_is_refused(monkeypatch: Any, capfd: Any):
    Path("file").write_text("")
    said = message(monkeypatch, capfd, "train", *SMALL, "cache_dir=file/cache")
    assert "cache_dir = file/cache" in said


def test_a_run_folder_in_use_is_not_overwritten(monkeypatch: Any, capfd: Any):
    assert trained(monkeypatch, "protonet", "run", "steps=1") == 0
    said = message(monkeypatch, capfd, "train", *SMALL, *ALGOS["protonet"], "out=run")
    assert "run already holds a run" in said
    said = message(monkeypatch, capfd, "evaluate", "checkpoint=run/best.pt", "out=run")
    assert "run already holds a run or a result" in said
    Path("run/result.json").unlink()  # as if it were unfinished
    assert "run already holds a run" in message(monkeypatch, capfd, "evaluate", "checkpoint=run/best.pt", "out=run")
    Path("other").mkdir()
    Path("other/result.json").write_text("{}")
    assert "other already holds a result" in message(monkeypatch, capfd, "train", *SMALL, *ALGOS["protonet"], "out=other")
    said = message(monkeypatch, capfd, "train", "resume=run/best.pt")
    assert "resume = run/best.pt, but a run goes on from last.pt" in said and "pretrain=run/best.pt" in said
    whole = Path("run/last.pt").read_bytes()
    Path("run/last.pt").write_bytes(whole[:1000])
    assert "in another folder" in message(monkeypatch, capfd, "train", *SMALL, *ALGOS["protonet"], "out=run", "resume=auto")
    Path("run/last.pt").unlink()
    assert "pretrain=run/best.pt" in message(monkeypatch, capfd, "train", "resume=run")
    for word in ("resume=auto", "seed=5"):
        said = message(monkeypatch, capfd, "train", *SMALL, *ALGOS["protonet"], "out=run", word)
        assert "out = run holds best.pt of a run whose last.pt is gone" in said
    Path("run/last.pt").write_bytes(whole)
    Path("run/best.pt").unlink()
    assert "fsl evaluate checkpoint=run/last.pt" in message(monkeypatch, capfd, "train", "resume=run")


def test_resume_refuses_settings_that_contradict_the_checkpoint(monkeypatch: Any, capfd: Any):
    assert trained(monkeypatch, "protonet", "run", "steps=2", "schedule=constant") == 0
    for word, part in {
        "seed=1": "seed = 1, but the checkpoint",
        "optimizer.lr=0.5": "optimizer.lr = 0.5, but the checkpoint",
        "algo=maml": "algo = maml, but the checkpoint",
        "steps=1": "steps = 1, but the checkpoint stands at step 2",
    }.items():
        assert part in message(monkeypatch, capfd, "train", "resume=run", word)
    assert fsl(monkeypatch, "train", "resume=run", "steps=4") == 0  # the schedule does not depend on the end
    assert checkpoint.load("run/last.pt", "resume")["step"] == 4


def test_a_run_goes_on_though_the_configs_have_changed_since(monkeypatch: Any, capfd: Any):
    assert trained(monkeypatch, "protonet", "run", "steps=2", "schedule=constant") == 0
    content = checkpoint.load("run/last.pt", "resume")
    config = DictConfig(OmegaConf.create(content["config"]))
    del config.clip_norm  # a setting that there was not yet
    config.pretrain_frozen = True  # a default that was another one
    checkpoint.save(Path("run/last.pt"), {**content, "config": OmegaConf.to_yaml(config)})
    assert "type pretrain_frozen=true to go on" in message(monkeypatch, capfd, "train", "resume=run", "steps=4")
    config.pretrain_frozen, config.optimizer.lr = False, 0.5
    checkpoint.save(Path("run/last.pt"), {**content, "config": OmegaConf.to_yaml(config)})
    said = message(monkeypatch, capfd, "train", "resume=run", "steps=4")
    assert "was trained with optimizer.lr = 0.5. The configs have changed since: type optimizer.lr=0.5 to go on" in said
    typed = message(monkeypatch, capfd, "train", "resume=run", "steps=4", "optimizer.lr=0.5", "clip_norm=1")
    assert "clip_norm = 1.0, but the checkpoint" in typed and "Leave clip_norm out" in typed
    assert fsl(monkeypatch, "train", "resume=run", "steps=4", "optimizer.lr=0.5") == 0


@pytest.mark.parametrize(
    ("algo", "words"), [("protonet", []), ("maml", ["schedule=constant", "algo.multi_step=0.5"])], ids=["schedule", "progress"]
)
def test_a_longer_run_is_refused_where_its_steps_depend_on_their_number(
    algo: str, words: list[str], monkeypatch: Any, capfd: Any
):
    assert trained(monkeypatch, algo, "run", *words, "steps=2") == 0
    said = message(monkeypatch, capfd, "train", "resume=run", "steps=4")
    assert said.startswith("steps = 4, but the run was started for 2,")


def test_a_damaged_run_does_not_keep_resume_auto_from_another(monkeypatch: Any, capfd: Any):
    with stopped(monkeypatch, 2):
        assert trained(monkeypatch, "protonet", "runs/train/good", "steps=4") == 128 + signal.SIGTERM
    Path("runs/train/bad").mkdir()
    Path("runs/train/bad/last.pt").write_text("<html>")
    capfd.readouterr()
    assert fsl(monkeypatch, "train", "resume=auto") == 0
    said = capfd.readouterr()
    assert "Passed over: resume = runs/train/bad/last.pt" in said.err and "Going on from step 2" in said.out


@pytest.mark.parametrize("name", ["with space ü (1), [b] it's", "back\\slash\\"])
def test_names_of_files_may_hold_what_hydra_has_a_meaning_for(name: str, monkeypatch: Any, tmp_path: Path):
    assert trained(monkeypatch, "protonet", name, "steps=1") == 0
    assert fsl(monkeypatch, "evaluate", f"checkpoint={name}/best.pt", f"out=again {name}", "episodes=2") == 0
    assert fsl(monkeypatch, "train", f"resume={name}") == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fsl(monkeypatch, "evaluate", f"checkpoint=~/{name}/best.pt", "out=~/home", "episodes=2") == 0
    assert Path("home/result.json").exists() and Path(f"again {name}/result.json").exists()


def test_home_is_meant_in_sweeps_too(monkeypatch: Any, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["-m", "checkpoint=~/a.pt", "algo=centroid,knn"]
    assert checked("evaluate", words) == ["-m", f"checkpoint='{tmp_path}/a.pt'", "algo=centroid,knn"]


def test_a_frozen_network_needs_running_statistics(models: Path, monkeypatch: Any, capfd: Any):
    words = [f"pretrain={models}/maml/best.pt", "pretrain_frozen=true", "algo=cnp", "steps=1"]
    said = message(monkeypatch, capfd, "train", *SMALL, *words, "out=run")
    assert "was trained by algo=maml, which keeps no running statistics" in said


def test_classes_that_were_trained_on_are_told(models: Path, monkeypatch: Any, capfd: Any):
    assert fsl(monkeypatch, "evaluate", f"checkpoint={models}/protonet/best.pt", "split=train", "episodes=2", "out=seen") == 0
    assert "32 of the 32 train classes of strokes have the names of classes that were trained on" in capfd.readouterr().out
    assert fsl(monkeypatch, "evaluate", f"checkpoint={models}/protonet/best.pt", "episodes=2", "out=new") == 0
    assert [result(name)["classes_seen"] for name in ("seen", "new")] == [32, 0]


def test_two_processes_do_not_go_on_with_one_run(monkeypatch: Any, capfd: Any):
    with stopped(monkeypatch, 3):
        assert trained(monkeypatch, "protonet", "run") == 128 + signal.SIGTERM
    before = [Path(f"run/{name}").read_bytes() for name in ("metrics.jsonl", "config.yaml")]
    with alone(Path("run")):
        again = ["resume=auto", "out=run", *SMALL, *ALGOS["protonet"], "algo=protonet", "log_every=1"]
        for words in (["resume=run/last.pt"], again):
            assert "out = run: another process is at work on this run." in message(monkeypatch, capfd, "train", *words)
    assert [Path(f"run/{name}").read_bytes() for name in ("metrics.jsonl", "config.yaml")] == before
    assert fsl(monkeypatch, "train", "resume=run/last.pt") == 0


def test_an_evaluation_has_the_precision_of_the_training(monkeypatch: Any):
    assert trained(monkeypatch, "protonet", "run", "device.precision=bf16", "steps=2") == 0
    for out, words in (("again", []), ("typed", ["device.precision=fp32"])):
        assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "episodes=8", f"out={out}", *words) == 0
    assert [result(name)["precision"] for name in ("run", "again", "typed")] == ["bf16", "bf16", "fp32"]
    assert result("again")["nll"] == result("run")["nll"] != result("typed")["nll"]


def test_nothing_is_prepared_or_shown_of_what_is_drawn(monkeypatch: Any, capfd: Any):
    for action in ("prepare", "show"):
        assert "sine is drawn anew in every episode" in message(monkeypatch, capfd, "data", action, "dataset=sine")


def test_a_head_that_does_not_fit_the_way_is_named(monkeypatch: Any, capfd: Any):
    assert trained(monkeypatch, "maml", "run", "steps=1") == 0
    said = message(monkeypatch, capfd, "evaluate", "checkpoint=run/best.pt", "task.way=3")
    assert said.startswith("task.way = 3, but the head of algo=maml was trained for task.way=5.") and "algo=protonet" in said


def test_evaluation_refuses_what_does_not_apply(models: Path, monkeypatch: Any, capfd: Any):
    evaluate = ["evaluate", f"checkpoint={models}/maml/best.pt"]
    untrained = ["evaluate", "model=conv4", "dataset=strokes", *SMALL[:3]]
    assert "norm = 'running'" in message(monkeypatch, capfd, *evaluate, "norm=running")
    assert "split = 'tset'" in message(monkeypatch, capfd, *evaluate, "split=tset")
    assert "algo=maml" in message(monkeypatch, capfd, *evaluate, "algo=protonet")
    assert "items are of shape [1, 20, 20]" in message(monkeypatch, capfd, *evaluate, "dataset.size=20")
    assert "checkpoint has no value" in message(monkeypatch, capfd, "evaluate")
    assert "dataset is not an option of this command" in message(monkeypatch, capfd, "predict", "dataset=omniglot")
    assert "checkpoint has no value" in message(monkeypatch, capfd, "evaluate", "model=conv4")
    assert "model = conv4 has no weights yet" in message(monkeypatch, capfd, *untrained, "checkpoint=null")
    assert "but a sweep has one" in message(monkeypatch, capfd, "evaluate", "-m", "checkpoint=a.pt,b.pt")
    assert "algo = maml must be trained first" in message(monkeypatch, capfd, *untrained, "algo=maml")
    assert "maml is a folder" in message(monkeypatch, capfd, "evaluate", f"checkpoint={models}/maml")


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good_checkpoint(monkeypatch: Any, capfd: Any):
    step = train.train_step

    def diverging(state: train.Run, *rest: Any) -> None:
        step(state, *rest)
        if state.step == 5:
            state.window[-1][0] = torch.tensor(float("nan"))

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", diverging)
        said = message(patched, capfd, "train", "out=run", *SMALL, *ALGOS["protonet"], code=1)
    assert "At step 5 the loss was nan" in said
    assert checkpoint.load("run/last.pt", "resume")["step"] == 4  # with best.pt
    assert "At step 5 the loss was nan" in Path("run/train.log").read_text()


def test_a_disk_that_is_full_ends_a_run_in_a_sentence(monkeypatch: Any, capfd: Any):
    words = [*SMALL, *ALGOS["protonet"], "model.filters=64", "steps=1"]
    assert fsl(monkeypatch, "train", "out=packs", *words) == 0  # the data set, which is larger
    with full_disk(200_000):
        said = message(monkeypatch, capfd, "train", "out=run", *words, code=1)
    assert said.startswith("run/best.pt: File too large. If it is where the run writes, choose another folder with out=PATH")
    assert not [path for path in Path("run").iterdir() if "best.pt" in path.name]
    with full_disk(5_000), pytest.raises(OSError, match="File too large"):
        content = dict.fromkeys(checkpoint.CLASSIFIER.keys() - {"format"}, torch.zeros(10_000))
        checkpoint.save(Path("classifier"), content)
