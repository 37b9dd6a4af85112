"""`fsl export`: what it writes answers as the classifier does, without fsl."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, fsl, full_disk, message
from support_algos import SHAPE, make

import fsl_cli
from fsl_cli import export
from fsl_cli.classifier import Trained
from fsl_cli.datasets.packed import Dataset

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    "algo", ["protonet", pytest.param("maml", marks=pytest.mark.slow), pytest.param("finetune", marks=pytest.mark.slow)]
)
def test_an_exported_classifier_answers_the_same_without_fsl(algo, models, drawings, monkeypatch, capfd):
    words = (f"checkpoint={models}/{algo}/best.pt", "support=support", "device=cpu", "output=kept")
    assert fsl(monkeypatch, "adapt", *words) == 0
    assert fsl(monkeypatch, "export", "classifier=kept") == 0
    assert "images uint8 [n, 1, 28, 28] -> probabilities [n, 3]" in capfd.readouterr().out
    classifier = fsl_cli.load_classifier("kept", "device=cpu")
    items = classifier.trained.items(file for files in drawings.values() for file in files)
    np.save("items.npy", items)
    script = (
        "import json, sys, numpy, torch\n"
        "extra = {'classes.json': ''}\n"
        "model = torch.export.load('kept.pt2', extra_files=extra).module()\n"
        "items = torch.from_numpy(numpy.load('items.npy'))\n"
        "parts = [model(part) for part in (items[:1], items[1:3], items[3:])]\n"
        "assert not [name for name in sys.modules if name.startswith('fsl')]\n"
        "print(json.dumps([json.loads(extra['classes.json']), torch.cat(parts).tolist()]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    names, answers = json.loads(ran.stdout)
    assert names == list(CLASSES)
    with torch.no_grad():
        expected = classifier.probabilities(classifier.trained.inputs(items))
    torch.testing.assert_close(torch.tensor(answers), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("algo", "model", "norm"),
    [
        ("cnp", "conv4", "running"),
        pytest.param("relationnet", "conv4_maps", "running", marks=pytest.mark.slow),
        pytest.param("snail", "conv4", "running", marks=pytest.mark.slow),
        pytest.param("protonet", "conv4", "support", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_images_goes_through_an_exported_file(algo, model, norm):
    network = make(algo, model).float().eval()
    network.use_norm(norm)
    items = np.random.default_rng(0).integers(0, 256, (9, *SHAPE), dtype=np.uint8)
    classifier = Trained(network, Dataset.item, SHAPE, {"choices": {"algo": algo}}).learn(items, "abcabcabc")
    assert export.compare(classifier, export.write_torch(classifier, Path("kept.pt2"))) < 1e-4


def test_what_the_exporter_cannot_follow_ends_in_a_sentence(models, drawings, monkeypatch, capfd):
    def failing(*_):
        raise RuntimeError("Constraints violated (images)!\nSuggested fixes:")

    monkeypatch.setattr(export, "write_torch", failing)
    fsl_cli.load(models / "protonet" / "best.pt").adapt(["support/oak/0.png"] * 2, ["a", "b"]).save("kept")
    said = message(monkeypatch, capfd, "export", "classifier=kept", code=1)
    assert said == (
        "classifier = kept: algo = protonet under norm = running cannot be exported by format=torch (Constraints violated "
        "(images)!). Use fsl predict, or adapt with another algorithm or norm."
    )


def test_onnx_packages_that_are_missing_are_named(models, drawings, monkeypatch, capfd):
    fsl_cli.load(models / "protonet" / "best.pt").adapt(["support/oak/0.png"] * 2, ["a", "b"]).save("kept")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else find(name, *rest))
    said = message(monkeypatch, capfd, "export", "classifier=kept", "format=onnx")
    assert said == "format = onnx needs packages that are not installed: pip install onnx onnxscript onnxruntime."


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_an_onnx_file_answers_the_same(algo, models, drawings, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra [onnx]")
    words = (f"checkpoint={models}/{algo}/best.pt", "support=support", "device=cpu", "output=kept")
    assert fsl(monkeypatch, "adapt", *words) == 0
    ran = subprocess.run([sys.executable, "-m", "fsl_cli", "export", "classifier=kept", "format=onnx"], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    onnxruntime = importlib.import_module("onnxruntime")
    classifier = fsl_cli.load_classifier("kept", "device=cpu")
    items = classifier.trained.items(file for files in drawings.values() for file in files)
    session = onnxruntime.InferenceSession("kept.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
    (answers,) = session.run(None, {"images": items})
    with torch.no_grad():
        expected = classifier.probabilities(classifier.trained.inputs(items))
    np.testing.assert_allclose(answers, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root can make files")
def test_a_place_that_cannot_be_written_is_refused_before_any_work(monkeypatch, capfd):
    for words in (["export", "classifier=none"], ["adapt", "support=none"]):
        said = message(monkeypatch, capfd, *words, "output=/proc/x.pt2")
        assert said.startswith("output = /proc/x.pt2 cannot be written (/proc/x.pt2: ")


def test_a_full_disk_ends_an_export_in_a_sentence(models, drawings, monkeypatch, capfd):
    fsl_cli.load(models / "protonet" / "best.pt").adapt(["support/oak/0.png"] * 2, ["a", "b"]).save("kept")
    with full_disk(10_000):
        said = message(monkeypatch, capfd, "export", "classifier=kept", "out=run", code=1)
    assert said.startswith("File too large. If it is where the run writes, choose another folder")
    assert not list(Path().glob("*kept.pt2"))
