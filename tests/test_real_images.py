"""`fsl predict` end to end on real characters and photographs."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import fsl
from support_runs import rows

pytestmark = pytest.mark.usefixtures("workplace")


def problem(folder: Path, classes: dict[str, list[bytes]], shot: int, suffix: str) -> int:
    """Writes `support/` and `query/` of one problem, the first `shot` images of each class to learn from; counts queries."""
    queries = 0
    for slot, (name, contents) in enumerate(classes.items()):
        (folder / "support" / name).mkdir(parents=True)
        (folder / "query").mkdir(exist_ok=True)
        for number, content in enumerate(contents):
            place = (
                folder / "support" / name / f"{number}{suffix}"
                if number < shot
                else folder / "query" / f"{slot}-{number}{suffix}"
            )
            place.write_bytes(content)
            queries += number >= shot
    return queries


def solve(folder: Path, classes: list[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> float:
    """The accuracy of `fsl predict` on a problem that `problem` wrote."""
    place = (f"support={folder / 'support'}", f"query={folder / 'query'}", f"out={folder / 'run'}")
    assert fsl(monkeypatch, "predict", "device=cpu", *place, *words) == 0
    found = rows(str(folder / "run"))
    return float(np.mean([row["prediction"] == classes[int(Path(row["file"]).name.split("-")[0])] for row in found]))


def members(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """The image files of an archive by the folder that holds them."""
    folders: dict[str, list[str]] = {}
    for name in sorted(archive.namelist()):
        if name.endswith((".png", ".jpg")):
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    return folders


@pytest.mark.slow
@pytest.mark.data
def test_real_characters_never_seen_in_training_are_recognised(data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["algo=protonet", "dataset=omniglot", f"data_dir={data_dir}", "out=trained", "device=cpu", "task.train_queries=5"]
    assert fsl(monkeypatch, "train", *words, "steps=1000", "eval_every=1000", "val_episodes=50", "episodes=50") == 0
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(Path(data_dir) / "omniglot-py" / "images_evaluation.zip") as archive:
        characters = members(archive)
        accuracies = []
        for number in range(20):
            chosen = rng.choice(sorted(characters), 5, replace=False)
            drawn = {name.replace("/", " "): [archive.read(f) for f in rng.permutation(characters[name])[:6]] for name in chosen}
            assert problem(tmp_path / str(number), drawn, 1, ".png") == 25
            accuracies.append(solve(tmp_path / str(number), list(drawn), monkeypatch, "checkpoint=trained/best.pt"))
    assert np.mean(accuracies) >= 0.95, accuracies


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("shot", "least"), [(1, 0.85), (5, 0.93)])
def test_real_photographs_are_recognised_without_training(
    shot, least, data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra [pretrained]")
    source = Path(data_dir) / "caltech101.zip"
    if not source.exists():
        pytest.skip("needs caltech101.zip in FSL_DATA_DIR")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(source) as archive:
        objects = members(archive)
        accuracies = []
        for number in range(40):
            chosen = rng.choice(sorted(objects), 5, replace=False)
            drawn = {Path(name).name: [archive.read(f) for f in rng.permutation(objects[name])[: shot + 3]] for name in chosen}
            assert problem(tmp_path / str(number), drawn, shot, ".jpg") == 15
            accuracies.append(solve(tmp_path / str(number), list(drawn), monkeypatch))
    assert np.mean(accuracies) >= least, accuracies
