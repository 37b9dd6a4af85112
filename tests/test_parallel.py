"""Several processes on the CPU, started as a user starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from support_algos import SHAPE, make

from fsl_cli import checkpoint, parallel
from fsl_cli.datasets.packed import Classes
from fsl_cli.episodes import EpisodeSampler
from fsl_cli.scoring import score
from fsl_cli.store import Store

# Strides, since pooling has ties: in float32 another order of sums breaks them otherwise, and a gradient moves by 1 %.
ALGOS = ("maml", "finetune")  # tasks are sliced, and a batch that is normalised as a whole
FOLDER = Path(__file__).parents[1] / "configs/algo"
# MTL has a test of its own. Meta networks multiply small gradients by e^7, so that in float32 the last digits of one step are the
# first ones 20 steps later; that their gradient does not depend on how the tasks are cut is tested in float64, as of all.
APART = ("mtl", "metanet")
OTHERS = tuple(sorted({path.stem for path in FOLDER.glob("*.yaml")} - {*ALGOS, *APART}))
SMALL = [
    "dataset.train_classes=32", "dataset.val_classes=6", "dataset.test_classes=6", "model.filters=8", "model.halving=stride",
    "task.train_shot=3", "task.train_queries=2", "task.queries=3", "task.tasks=5", "episodes=3", "val_episodes=3",
    "eval_every=20", "log_every=2", "checkpoint_every=10", "optimizer=sgd", "optimizer.lr=0.001", "schedule=constant",
    "steps=20", "device.threads=1", "task.train_way=5",
]  # fmt: skip
TWO = ["device=ddp", "device.name=cpu", "device.processes=2"]

pytestmark = pytest.mark.usefixtures("workplace")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fsl_cli", *words]


def fsl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.parametrize("algos", [ALGOS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["two", "others"])
def test_two_processes_come_to_the_weights_and_accuracies_of_one(algos: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    sweep = ["train", "-m", f"algo={','.join(algos)}", "pretrain=null", "pretrain_frozen=false", *SMALL]
    assert conftest.fsl(monkeypatch, *sweep, "device=cpu", "hydra.sweep.dir=one") == 0
    done = fsl(*sweep, *TWO, "hydra.sweep.dir=two")
    assert done.returncode == 0, done.stderr
    for number, algo in enumerate(algos):
        one, two = (checkpoint.load(f"{place}/{number}/last.pt", "resume") for place in ("one", "two"))
        assert one["step"] == two["step"] == 20
        for name, value in one["algo"].items():
            torch.testing.assert_close(
                two["algo"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name, a=algo: f"{a} {n}: {m}"
            )
        rows = [Path(place, str(number), "episodes.csv").read_text().splitlines() for place in ("one", "two")]
        assert [row.split(",")[0] for row in rows[1]] == ["episode", "0", "1", "2"]
        lines = [Path(place, str(number), "metrics.jsonl").read_text().splitlines() for place in ("one", "two")]
        assert len(lines[0]) == len(lines[1]) == 11


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_ends_the_run_and_another_number_of_processes_goes_on(
    rank: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    words = ["algo=protonet", *SMALL, "steps=100000", "checkpoint_every=5", "eval_every=100000", "out=run"]
    run = subprocess.Popen(command("train", *words, *TWO), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("run/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process_of_rank(run.pid, rank), signal.SIGKILL)
    _, said = run.communicate(timeout=100)
    assert run.returncode == 1
    assert ("lost another process of the run" if rank == "1" else "Process 0 of 2 was killed by signal 9") in said
    assert said.count("\n") <= 2
    step = checkpoint.load("run/last.pt", "resume")["step"]
    assert step >= 5
    words = ["resume=run/last.pt", f"steps={step + 5}", "device=cpu"]
    assert conftest.fsl(monkeypatch, "train", *words) == 0
    assert f"Going on from step {step}" in capfd.readouterr().out
    assert checkpoint.load("run/last.pt", "resume")["step"] == step + 5


@pytest.mark.slow
def test_an_interrupted_run_of_several_processes_stops_in_order_and_can_go_on():
    words = [
        "algo=protonet",
        *SMALL,
        "steps=100000",
        "checkpoint_every=100000",
        "eval_every=100000",
        "log_every=100000",
        "out=run",
    ]
    run = subprocess.Popen(command("train", *words, *TWO), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("run/config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    run.send_signal(signal.SIGINT)
    out, said = run.communicate(timeout=100)
    assert run.returncode == 130
    assert "Stopped at step" in out and "Traceback" not in said
    assert checkpoint.load("run/last.pt", "resume")["step"] > 0


def process_of_rank(parent: int, rank: str) -> int:
    threads = list(Path(f"/proc/{parent}/task").iterdir())
    children = [child for thread in threads for child in (thread / "children").read_text().split()]
    ranked = [
        int(child) for child in children if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes()
    ]
    return ranked[0]


def test_there_may_be_more_processes_than_episodes(monkeypatch: pytest.MonkeyPatch):
    algo, items = make("protonet", "mlp"), np.random.default_rng(0).integers(0, 256, (40, *SHAPE)).astype(np.uint8)
    classes = Classes([str(c) for c in range(4)], np.arange(4) * 10, np.full(4, 10), np.zeros(4, dtype=np.int64))
    setting = (Store(items, torch.device("cpu")), EpisodeSampler(classes, 3, 1, 2, 1, 0, 1), 2)
    expected = score(algo.float(), *setting)
    monkeypatch.setattr(parallel, "part", lambda count: slice(0, 0))
    monkeypatch.setattr(parallel, "gather", lambda mine: [mine, expected])
    assert torch.equal(score(algo, *setting).measured, expected.measured)


def test_what_cannot_be_shared_out_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match=r"task\.tasks = 1, but 2 processes share each meta-batch"):
        parallel.share_of_tasks(1)
    with pytest.raises(ValueError, match=r"algo\.batch = 7, but 2 processes share each batch"):
        parallel.share_of_items(7)


def test_what_one_process_refuses_all_refuse(monkeypatch: pytest.MonkeyPatch):
    def refusing() -> None:
        raise ValueError("out = x. Choose another.")

    assert parallel.all_or_none(lambda: 3) == 3
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "gather", lambda mine: [mine, None])
    assert parallel.all_or_none(lambda: 3) == 3
    with pytest.raises(ValueError, match=r"^out = x\. Choose another\.$"):
        parallel.all_or_none(refusing)
    monkeypatch.setattr(parallel, "gather", lambda mine: [mine, "out = y. Choose another."])
    with pytest.raises(ValueError, match=r"^out = y\. Choose another\.$"):
        parallel.all_or_none(lambda: 3)


def test_processes_look_about_once_a_second_whether_to_stop(monkeypatch: pytest.MonkeyPatch):
    assert parallel.Stopping()(None) is None and parallel.Stopping()(15) == 15
    now, looks = [0.0], []
    others: list[int | None] = [None]

    def gather(mine: tuple[int | None, float]) -> list[tuple[int | None, float]]:
        looks.append(round(now[0], 1))
        return [mine, (others[0], 0.2)]  # the other process takes longer for a step

    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "gather", gather)
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    stopping = parallel.Stopping()
    for _ in range(12):
        now[0] += 0.1
        assert stopping(None) is None
    assert looks == [0.1, 0.6, 1.1]
    others[0] = signal.SIGINT
    found = []
    for _ in range(5):
        now[0] += 0.1
        found.append(stopping(None))
    assert found == [None, None, None, signal.SIGINT, None]


@pytest.mark.parametrize(("words", "found"), [([], 4), (["device.processes=4"], 4), (["device.processes=8"], None)])
def test_no_more_processes_than_gpus(words: list[str], found: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if found is None:
        with pytest.raises(ValueError, match=r"^device.processes = 8, but torch finds 4 CUDA devices here\. Use at most 4\.$"):
            parallel.processes_asked(["device=ddp", *words])
        assert parallel.processes_asked(["device=ddp", "device.name=cpu", *words]) == 8
        with pytest.raises(
            ValueError, match=r"^device.name = cuda:1, but each process of device=ddp takes a device of its own\."
        ):
            parallel.processes_asked(["device=ddp", "device.name=cuda:1"])
    else:
        assert parallel.processes_asked(["device=ddp", *words]) == found


@pytest.mark.slow
def test_a_sweep_of_several_processes_ends_with_a_job_that_one_of_them_refuses():
    assert fsl("train", *SMALL, "steps=2", "device=cpu", "out=run").returncode == 0
    Path("sweep/0").mkdir(parents=True)
    Path("run/result.json").rename("sweep/0/result.json")
    done = fsl("evaluate", "-m", "checkpoint=run/best.pt", "seed=0,1", *TWO, "hydra.sweep.dir=sweep")
    assert done.returncode == 2 and done.stderr == "out = sweep/0 already holds a run or a result. Choose another folder.\n"
    assert done.stdout.count("Launching 2 jobs locally") == 1


@pytest.mark.slow
def test_a_process_that_fails_alone_says_why():
    script = """
import os, torch
from fsl_cli import cli, speed
if os.environ["RANK"] == "1":
    def call(self, batch): raise torch.OutOfMemoryError("Tried to allocate 2 GiB.")
    speed.Stepper.__call__ = call
cli.main()
"""
    Path("one.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "one.py"]
    done = subprocess.run([*launch, "train", *SMALL, "device=cpu", "out=run"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Process 1: Out of memory (Tried to allocate 2 GiB.). Lower device.task_chunk" in done.stderr


@pytest.mark.slow
def test_two_processes_refuse_in_one_sentence():
    done = fsl("train", *SMALL, *TWO, "task.tasks=1", "out=run")
    assert done.returncode == 2
    assert done.stderr.startswith("task.tasks = 1, but 2 processes share each meta-batch") and done.stderr.count("\n") == 1


@pytest.mark.slow  # the training above shares its test episodes out, too
def test_evaluation_shares_its_episodes_out():
    assert fsl("train", *SMALL, "steps=2", "device=cpu", "out=run").returncode == 0
    for place, words in (("one", ["device=cpu"]), ("two", TWO)):
        done = fsl("evaluate", "checkpoint=run/best.pt", "episodes=31", *words, f"out={place}")
        assert done.returncode == 0, done.stderr
    assert Path("one/episodes.csv").read_text().count("\n") == 32
    one, two = ([row.split(",")[:2] for row in Path(p, "episodes.csv").read_text().splitlines()] for p in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_both_stages_of_a_training_run_in_two_processes():
    stage = "pretrain_with={steps:2,eval_every:2,algo.batch:16,algo.head_epochs:1}"
    words = [*SMALL, "algo=mtl", "pretrain=train", stage, "steps=2", "eval_every=2", "algo.inner_steps=2"]
    done = fsl("train", *words, *TWO, "out=run")
    assert done.returncode == 0, done.stderr
    assert Path("run/pretrain/result.json").exists() and Path("run/result.json").exists()
