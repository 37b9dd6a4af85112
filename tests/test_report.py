"""`fsl report`: runs of one method together, every method against the best, and nothing compared that is not comparable."""

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fsl, message
from support_runs import trained

pytestmark = pytest.mark.usefixtures("workplace")


def finished(folder: str, scores: list[float], options: dict[str, Any] | None = None, **changes: Any) -> None:
    """A run folder as `fsl train` leaves it, with these accuracies; `changes` are keys of its result, the others are settings."""
    result = {
        "accuracy": float(np.mean(scores)), "episodes": len(scores), "way": 5, "shot": 1, "queries": 15, "split": "test",
        "norm": "running", "inner_steps": None, "episode_seed": 0, "algo": "protonet", "dataset": "strokes", "model": "conv4",
        "dataset_options": options or {"size": 28}, "trained_by": "protonet", "train_seed": 0, "train_on_val": False,
    }  # fmt: skip
    settings = {key: changes.pop(key) for key in list(changes) if key not in {*result, "checkpoint", "precision"}}
    path = Path("runs", folder)
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps({**result, **changes}))
    (path / "config.yaml").write_text(json.dumps({"seed": changes.get("train_seed", 0), "device": {"threads": 1}, **settings}))
    (path / "episodes.csv").write_text("\n".join(["episode,accuracy", *(f"{k},{score}" for k, score in enumerate(scores))]))


def reported(monkeypatch: pytest.MonkeyPatch, out: str = "report") -> list[dict[str, str]]:
    assert fsl(monkeypatch, "report", f"out={out}") == 0
    with (Path(out) / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_are_put_together_and_methods_compared_on_the_same_episodes(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    for seed in (0, 1):
        assert trained(monkeypatch, "protonet", f"runs/p{seed}", f"seed={seed}") == 0
    assert trained(monkeypatch, "maml", "runs/m", "algo.inner_lr=0.1") == 0
    capfd.readouterr()
    rows = reported(monkeypatch)
    said = capfd.readouterr().out
    assert "strokes, test, 5-way 1-shot: 8 episodes of seed 0, 3 queries a class" in said
    assert Path("report/report.md").read_text().strip() in said
    assert {row["algo"]: row["train_seeds"] for row in rows} == {"protonet": "0, 1", "maml": "0"}

    def accuracies(name: str) -> np.ndarray:
        return np.genfromtxt(f"runs/{name}/episodes.csv", delimiter=",", names=True)["accuracy"]

    both = {"protonet": (accuracies("p0") + accuracies("p1")) / 2, "maml": accuracies("m")}
    first, second = (both[row["algo"]] for row in rows)
    assert first.mean() >= second.mean()
    assert [float(row["mean"]) for row in rows] == pytest.approx([first.mean(), second.mean()])
    behind = second - first
    assert float(rows[1]["behind"]) == pytest.approx(behind.mean())
    assert float(rows[1]["behind_ci95"]) == pytest.approx(1.96 * behind.std(ddof=1) / 8**0.5)


def test_what_rows_differ_by_is_named_and_the_newest_of_a_seed_counts(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    finished("a", [0.5, 0.7], lr=0.1, steps=9)
    finished("b", [0.6, 0.9], lr=0.2, steps=9, data_dir="elsewhere")
    finished("c", [0.8, 0.9], lr=0.2, steps=9)
    finished("c/pretrain", [0.1, 0.1])
    os.utime("runs/b/result.json", (10**9, 10**9))
    rows = reported(monkeypatch)
    assert [row["settings"] for row in rows] == ["lr=0.2", "lr=0.1"]
    assert [float(row["mean"]) for row in rows] == pytest.approx([0.85, 0.6])
    assert "| lr=0.1   | 0     | 60.00 ± 19.60 % | -25.00 ± 9.80 %  |" in capfd.readouterr().out


def test_other_optimizers_and_precisions_are_other_methods(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    adam = {"_target_": "torch.optim.Adam", "lr": 0.1}
    finished("a", [0.5, 0.7], optimizer=adam, precision="fp32")
    finished("b", [0.6, 0.8], optimizer=adam | {"_target_": "torch.optim.AdamW"}, precision="fp32")
    finished("c", [0.7, 0.9], optimizer=adam, precision="bf16")
    assert [row["settings"] for row in reported(monkeypatch)] == [
        'optimizer=Adam, device.precision="bf16"',
        'optimizer=AdamW, device.precision="fp32"',
        'optimizer=Adam, device.precision="fp32"',
    ]
    assert "3 runs are in" in capfd.readouterr().out


def test_the_spread_of_the_seeds_is_given_and_older_runs_are_counted(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    for name, seed, score in (("a", 0, 0.5), ("b", 1, 0.6), ("c", 2, 0.7), ("d", 2, 0.7)):
        finished(name, [score, score], train_seed=seed)
    os.utime("runs/c/result.json", (10**9, 10**9))
    (row,) = reported(monkeypatch)
    means = dict(zip(row["train_seeds"].split(", "), map(float, row["seed_means"].split(", ")), strict=True))
    assert means == pytest.approx({"0": 0.5, "1": 0.6, "2": 0.7})
    assert float(row["std_over_seeds"]) == pytest.approx(0.1)
    said = capfd.readouterr().out
    assert "50.00 % to 70.00 % | 10.00 %" in said
    assert "3 runs are in report/report.md and report.csv; 1 older of the same settings and seed left out" in said


def test_settings_that_follow_from_others_are_not_named(monkeypatch: pytest.MonkeyPatch):
    finished("a", [0.5, 0.7], steps=9, schedule={"T_max": 9})
    finished("b", [0.6, 0.9], steps=8, schedule={"T_max": 8})
    assert [row["settings"] for row in reported(monkeypatch)] == ["steps=8", "steps=9"]


def test_other_episodes_stand_in_another_table(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    finished("a", [0.5, 0.7], {"size": 28, "split": "lake"})
    finished("b", [0.6, 0.9], {"size": 28, "split": "vinyals"})
    finished("c", [0.6, 0.9], {"size": 28, "split": "lake"}, shot=5)
    finished("d", [0.6, 0.9], {"size": 28, "split": "lake"}, episode_seed=3)
    rows = reported(monkeypatch)
    assert [row["behind"] for row in rows] == ["0.0"] * 4
    said = capfd.readouterr().out
    assert "strokes split=lake, test, 5-way 1-shot: 2 episodes of seed 0" in said and "strokes split=vinyals, test" in said


def test_augmentation_is_no_part_of_a_test(monkeypatch: pytest.MonkeyPatch):
    finished("a", [0.5, 0.7], {"size": 84, "crop": 0, "flip": False, "jitter": 0.0}, algo="maml")
    finished("b", [0.6, 0.9], {"size": 84, "crop": 8, "flip": True, "jitter": 0.4})
    assert [float(row["behind"]) for row in reported(monkeypatch)] == pytest.approx([0, -0.15])


def test_an_evaluation_belongs_to_the_training_of_its_checkpoint(monkeypatch: pytest.MonkeyPatch):
    for seed in (0, 1):
        finished(f"t{seed}", [0.5, 0.7], train_seed=seed, steps=9)
        finished(f"e{seed}", [0.4, 0.6], train_seed=seed, shot=5, checkpoint=f"runs/t{seed}/best.pt", norm="support")
        finished(f"s{seed}", [0.4, 0.6], train_seed=seed, shot=5, checkpoint=f"gone/{seed}/best.pt")
    rows = [row for row in reported(monkeypatch) if row["shot"] == "5"]
    assert sorted((row["train_seeds"], row["settings"]) for row in rows) == [
        ("0", 'checkpoint="gone/0/best.pt"'),
        ("0, 1", ""),
        ("1", 'checkpoint="gone/1/best.pt"'),
    ]


def test_the_last_checkpoint_of_a_run_is_not_its_best(monkeypatch: pytest.MonkeyPatch):
    finished("t", [0.5, 0.7], train_seed=0)
    for name, scores in {"best": [0.5, 0.7], "last": [0.4, 0.6]}.items():
        finished(name, scores, train_seed=0, checkpoint=f"runs/t/{name}.pt")
    rows = {row["settings"]: row for row in reported(monkeypatch)}
    assert float(rows[""]["mean"]) == pytest.approx(0.6) and float(rows['checkpoint="last.pt"']["mean"]) == pytest.approx(0.5)


def test_what_cannot_be_read_is_named_and_nothing_to_report_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    assert message(monkeypatch, capfd, "report", "runs=nowhere").startswith("runs = nowhere is no folder.")
    Path("runs/bad").mkdir(parents=True)
    assert message(monkeypatch, capfd, "report", "out=r0").startswith("runs = runs holds no finished run")
    finished("good", [0.5, 0.7])
    Path("runs/bad/result.json").write_text("{")
    finished("old", [0.5, 0.7])
    Path("runs/old/result.json").write_text('{"accuracy": 0.5, "seed": 0}')
    finished("cut", [0.5, 0.7])
    Path("runs/cut/episodes.csv").write_text("episode,accuracy\n0,0.5")
    capfd.readouterr()
    assert len(reported(monkeypatch, "r1")) == 1
    said = capfd.readouterr()
    assert "Passed over: runs/bad: Expecting" in said.out + said.err
    assert "runs/cut/result.json is of 2 episodes, and episodes.csv beside it holds 1." in said.out + said.err
    assert "Passed over: runs/old/result.json has no dataset: another version of fsl wrote it." in said.out + said.err


def test_results_of_another_shape_are_passed_over(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    finished("good", [0.5, 0.7])
    for name, content in (("null", "null"), ("list", "[1, 2]")):
        finished(name, [0.5, 0.7])
        Path(f"runs/{name}/result.json").write_text(content)
    finished("seed", [0.5, 0.7], train_seed=[1])
    finished("algo", [0.5, 0.7], algo=None)
    finished("options", [0.5, 0.7], dataset_options=None)
    assert len(reported(monkeypatch)) == 1
    said = capfd.readouterr()
    for part in ("null/result.json holds null", "list/result.json holds [1, 2]", "has dataset_options = null", "has algo = null",
                 "runs/seed/result.json has train_seed = [1], which fsl does not write."):  # fmt: skip
        assert part in said.out + said.err, part


def test_a_report_is_not_written_into_a_run(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    finished("a", [0.5, 0.7])
    assert "out = runs/a already holds a run or a result." in message(monkeypatch, capfd, "report", "out=runs/a")
    assert not Path("runs/a/report.md").exists()


def test_the_table_of_omniglot_shows_finished_rows(monkeypatch: pytest.MonkeyPatch):
    row = Path("table/5way1shot/protonet")
    assert trained(monkeypatch, "protonet", str(row)) == 0
    result = json.loads((row / "result.json").read_text())
    result["dataset_options"] = {"split": "vinyals"}  # as Omniglot's
    (row / "result.json").write_text(json.dumps(result))
    script = Path(__file__).parents[1] / "scripts/omniglot_table.sh"
    where = {"TASKS": "5way1shot", "OUT": str(Path("table").absolute())}
    done = subprocess.run([script, "protonet"], env=os.environ | where, capture_output=True, text=True, check=True)
    accuracy = f"{100 * result['accuracy']:.2f} ± {100 * result['ci95']:.2f}"
    shape, steps = f"{result['way']}-way {result['shot']}-shot", f"{result['step']} / {result['steps']}"
    assert done.stdout.splitlines()[2].startswith(f"| `protonet` | vinyals | {shape} | 0 | {accuracy} | running | {steps} |")
