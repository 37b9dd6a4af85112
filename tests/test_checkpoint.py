"""Checkpoints are written as a whole, and what is damaged, hostile or of another shape is refused."""

import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import message
from omegaconf import OmegaConf

from fsl_cli import checkpoint
from fsl_cli.whole import whole

pytestmark = pytest.mark.usefixtures("workplace")


def test_a_file_is_written_as_a_whole_or_stays_as_it_was(tmp_path: Path):
    path = tmp_path / "result.json"
    for text, error in (("new", None), ("half", RuntimeError)):
        with pytest.raises(error) if error else nullcontext(), whole(path) as file:
            file.write(text)
            if error:
                raise error
        assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_damaged_and_hostile_checkpoints_are_refused(models: Path, monkeypatch: Any, capfd: Any):
    whole = (models / "protonet/best.pt").read_bytes()
    Path("short.pt").write_bytes(whole[: len(whole) // 2])
    place = whole.index(b"_target_")  # not in the padding between two records
    Path("flipped.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    Path("page.pt").write_text("<html>404</html>")
    torch.save({"weights": torch.zeros(1)}, "other.pt")

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (Path("harmed"),))

    torch.save({"config": Harm()}, "hostile.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Harm()))
    for name, part in {
        "short": "truncated",
        "flipped": "damaged",
        "page": "truncated or another kind of file",
        "other": "not a checkpoint of this version",
        "hostile": "could run foreign code",
        "pickle": "another kind of file",
    }.items():
        assert part in message(monkeypatch, capfd, "evaluate", f"checkpoint={name}.pt"), name
        assert part in message(monkeypatch, capfd, "train", f"resume={name}.pt"), name
    assert not Path("harmed").exists()


@pytest.mark.parametrize("target", ["os.system", "pathlib.Path.touch", "fsl_cli.datasets.packed.Path", "fsl_cli.algos.nothing.X"])
def test_a_target_outside_the_allow_list_is_not_run(target: str, models: Path, monkeypatch: Any, capfd: Any):
    content = checkpoint.load(str(models / "protonet/best.pt"), "checkpoint")
    config = OmegaConf.create(content.pop("config"))
    config.algo = {"_target_": target, "command": "touch harmed"}
    content.pop("format")
    checkpoint.save(Path("changed.pt"), {**content, "config": OmegaConf.to_yaml(config)})
    assert "algo._target_" in message(monkeypatch, capfd, "evaluate", "checkpoint=changed.pt")
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    "change",
    [
        *({"config": config} for config in (None, "", "[1, 2]", "a: [", "${", "steps: 3")),
        *({"choices": {}}, {"data": {}}, {"fastest": 7}, {"step": "x"}, {"overrides": None}, {"progress": None}),
        *({"optimizer": {}}, {"algo": {1: 2}}, {"algo": None}, {"schedule": []}),
    ],
    ids=str,
)
def test_a_checkpoint_with_other_content_is_refused(change: dict[str, Any], models: Path, monkeypatch: Any, capfd: Any):
    content = torch.load(models / "protonet/best.pt", weights_only=True)
    torch.save({**content, **change}, "last.pt")
    for words in (["evaluate", "checkpoint=last.pt"], ["predict", "checkpoint=last.pt"], ["train", "resume=last.pt"]):
        assert "last.pt is not a checkpoint of this version of fsl" in message(monkeypatch, capfd, *words)


def test_a_device_is_not_read(monkeypatch: Any, capfd: Any):
    said = message(monkeypatch, capfd, "evaluate", f"checkpoint={os.devnull}")  # /dev/zero would fill the memory if it fails
    assert said == f"checkpoint = {os.devnull} is a device or a pipe. Name a file that fsl train wrote."
