"""`fsl data`, augmentation in training, and evaluation on other data than the model was trained on, as a user types them."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fsl, message, stopped
from PIL import Image
from support_files import images, write_folder
from support_runs import ALGOS, SMALL, result, trained

from fsl_cli import checkpoint

pytestmark = pytest.mark.usefixtures("workplace")

STROKES = ["dataset.train_classes=12", "dataset.val_classes=6", "dataset.test_classes=6"]


def test_prepare_packs_and_describes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    assert fsl(monkeypatch, "data", "prepare", *STROKES, "cache_dir=packed") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:6] == [
        "strokes: 480 images of 1x28x28 in 24 classes of 20 to 20 images, 0 MiB",
        "train: 12 classes, 240 images",
        "val: 6 classes, 120 images",
        "test: 6 classes, 120 images",
        "check: 0 classes are in two splits",
        "check: 0 images are equal to an earlier one, 0 of them to one of another class, 0 to one of another split",
    ]
    assert lines[6].startswith("Ready in ") and lines[6].endswith(" s, packed under packed")
    assert [path.name for path in Path().iterdir()] == ["packed"], "nothing else is written"


def test_prepare_finds_what_stands_twice(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    files = images([f"n{c:02d}" for c in range(8)])
    copies = {"n01/again.png": files["n01/n0100.png"], "n02/again.png": files["n01/n0100.png"]}
    write_folder(Path("own"), files | copies)
    assert fsl(monkeypatch, "data", "prepare", "dataset=image_folder", "dataset.root=own", "dataset.size=8") == 0
    out = capfd.readouterr().out
    assert "image_folder: 26 images of 3x8x8 in 8 classes of 3 to 4 images" in out
    assert "2 images are equal to an earlier one, 1 of them to one of another class, 1 to one of another split" in out


def test_show_draws_an_episode(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    words = [*STROKES, "split=val", "task.way=3", "task.shot=2", "task.queries=4", "out=pictures/episode.png"]
    assert fsl(monkeypatch, "data", "show", *words) == 0
    said = capfd.readouterr().out
    assert said.startswith("pictures/episode.png: 3-way 2-shot on strokes val, rows val/character")
    picture = np.asarray(Image.open("pictures/episode.png"))
    assert picture.shape == (3 * 32, 6 * 32, 3)
    assert fsl(monkeypatch, "data", "show", *words, "out=other.png", "episode=1") == 0
    assert not np.array_equal(picture, np.asarray(Image.open("other.png")))
    said = message(monkeypatch, capfd, "data", "show", *words)
    assert said == "out = pictures/episode.png is there already. Choose another name, or remove it."


def test_show_names_a_split_that_has_classes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    write_folder(Path("own"), images(["n01", "n02", "n03"]))
    words = ["dataset=image_folder", "dataset.root=own", "dataset.test_only=true", "task.way=3", "task.queries=1"]
    said = message(monkeypatch, capfd, "data", "show", *words)
    assert said == "split = 'train', but image_folder has classes in test. Choose split=test."
    assert fsl(monkeypatch, "data", "show", *words, "split=test") == 0


def test_show_names_its_picture_itself(monkeypatch: pytest.MonkeyPatch):
    assert fsl(monkeypatch, "data", "show", *STROKES) == 0
    (found,) = Path("runs/data").iterdir()
    assert found.name.endswith("_strokes.png")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "fsl data needs one of two words next: fsl data prepare dataset=NAME"),
        (["dataset=strokes"], "fsl data needs one of two words next"),
        (["show", *STROKES, "split=all"], "split = 'all', but strokes has classes in train, val, test. Choose"),
        (["show", *STROKES, "episode=-1"], "episode = -1"),
        (["show", *STROKES, "out=a.jpg"], "out = a.jpg, but the picture is a PNG. Name it so: out=a.png."),
        (["prepare", "dataset=image_folder"], "dataset.root has no value"),
        (["prepare", "dataset=mini_imagenet", "data_dir=."], "has no mini*mage[nN]et*"),
        (["prepare", "dataset=image_folder", "dataset.root=nowhere"], "dataset.root = nowhere is no folder"),
        (["prepare", "dataset=mini_imagenett"], "Did you mean mini_imagenet?"),
    ],
)
def test_mistakes_are_told(words: list[str], expected: str, monkeypatch: Any, capfd: Any):
    assert expected in message(monkeypatch, capfd, "data", *words)


def test_help_and_composed_config(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    assert fsl(monkeypatch, "data", "--help") == 0
    assert "image_folder" in capfd.readouterr().out
    assert fsl(monkeypatch, "data", "prepare", "dataset=cub", "--cfg", "job") == 0
    assert "action: prepare" in capfd.readouterr().out


@pytest.fixture
def own() -> list[str]:
    """The user's own colour images: 20 classes of 6."""
    write_folder(Path("own"), images([f"n{c:02d}" for c in range(20)], 6))
    words = ["root=own", "size=16", "fractions=[0.4,0.3,0.3]", "crop=2", "flip=true", "jitter=0.4"]
    return ["dataset=image_folder", *(f"dataset.{word}" for word in words)]


QUICK = [word for word in SMALL if not word.startswith("dataset.")]


@pytest.mark.parametrize(
    ("algo", "memory"),
    [
        ("protonet", "null"),
        ("finetune", "0"),
        pytest.param("protonet", "0", marks=pytest.mark.slow),
        pytest.param("finetune", "null", marks=pytest.mark.slow),
    ],
)
def test_training_on_own_augmented_images_resumes_bit_identical(algo: str, memory: str, own: list[str], monkeypatch: Any):
    words = [*own, *QUICK, *ALGOS[algo], "task.way=3", "task.queries=3", "steps=6", f"device.memory={memory}"]
    assert fsl(monkeypatch, "train", f"algo={algo}", "out=whole", *words) == 0
    with stopped(monkeypatch, 3):
        assert fsl(monkeypatch, "train", f"algo={algo}", "out=stopped", *words) == 128 + signal.SIGTERM
    assert fsl(monkeypatch, "train", "resume=stopped/last.pt") == 0
    whole, resumed = (checkpoint.load(f"{name}/last.pt", "resume")["algo"] for name in ("whole", "stopped"))
    assert all(value.equal(resumed[name]) for name, value in whole.items())
    if memory == "null":
        plain = [word for word in words if word.split("=")[0] not in ("dataset.crop", "dataset.flip", "dataset.jitter")]
        assert fsl(monkeypatch, "train", f"algo={algo}", "out=plain", *plain) == 0
        assert not all(value.equal(whole[name]) for name, value in checkpoint.load("plain/last.pt", "out")["algo"].items())


def test_evaluation_on_other_data_follows_the_size_and_channels_of_the_model(own: list[str], monkeypatch: Any, capfd: Any):
    assert trained(monkeypatch, "protonet", "grey") == 0
    words = ["checkpoint=grey/best.pt", "episodes=10", "device=cpu", "dataset=image_folder", "dataset.root=own",
             "dataset.test_only=true", "task.way=4", "task.queries=3"]  # fmt: skip
    assert fsl(monkeypatch, "evaluate", *words, "out=crossed") == 0
    found = result("crossed")
    assert (found["dataset"], found["classes"]) == ("image_folder", 20)
    assert (found["dataset_options"]["size"], found["dataset_options"]["channels"]) == (28, 1)
    said = message(monkeypatch, capfd, "evaluate", *words, "dataset.size=16", "out=typed")
    assert "items are of shape [1, 16, 16], but those of the checkpoint were of shape [1, 28, 28]" in said

    colours = [*own, *QUICK, *ALGOS["protonet"], "steps=2", "task.way=3", "out=colour"]
    assert fsl(monkeypatch, "train", "algo=protonet", *colours) == 0
    assert json.loads(Path("colour/result.json").read_text())["dataset_options"]["flip"]
    words = ["checkpoint=colour/best.pt", "episodes=10", "device=cpu", "dataset=strokes", *STROKES]
    assert fsl(monkeypatch, "evaluate", *words, "out=strokes") == 0
    assert (result("strokes")["dataset_options"]["size"], result("strokes")["dataset_options"]["channels"]) == (16, 3)


@pytest.mark.data
def test_an_episode_of_the_real_caltech101_is_drawn(data_dir: str, monkeypatch: pytest.MonkeyPatch):
    words = ["dataset=caltech101", f"data_dir={data_dir}", "split=test", "dataset.size=16", "out=episode.png"]
    assert fsl(monkeypatch, "data", "show", *words) == 0
    assert np.asarray(Image.open("episode.png")).shape == (5 * 20, 16 * 20, 3)
