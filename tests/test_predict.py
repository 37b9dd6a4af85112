"""`fsl predict`, `fsl adapt` and the same from Python, on small checkpoints and drawings saved as files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, fsl, message
from PIL import Image
from support_algos import SHAPE, make
from support_runs import SMALL, rows, summary

import fsl_cli
from fsl_cli.calibration import left_out
from fsl_cli.classifier import Classifier
from fsl_cli.datasets.strokes import Strokes
from fsl_cli.episodes import Examples

pytestmark = pytest.mark.usefixtures("workplace")

PREDICT = ("predict", "device=cpu")


def probabilities(out: str) -> dict[str, dict[str, float]]:
    return {row["file"]: row["ranking"] for row in summary(out)["predictions"]}


def test_a_checkpoint_recognises_new_classes_from_files(models, drawings, monkeypatch, capfd):
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support/", "query=query/", "leave_one_out=true")
    assert fsl(monkeypatch, *words, "out=run") == 0
    said = capfd.readouterr().out
    assert "3 classes of 2 to 4 images each" in said
    assert "Leave-one-out accuracy on the support images" in said
    assert [row["file"] for row in rows("run")] == sorted(file for files in drawings.values() for file in files)
    right = [row["file"] in drawings[row["prediction"]] for row in rows("run")]
    assert sum(right) >= 7
    found = summary("run")
    assert (found["algo"], found["model"], found["dataset"], found["norm"]) == ("protonet", "conv4", "strokes", "running")
    assert found["support_images"] == dict(zip(CLASSES, (2, 4, 3), strict=True))
    assert found["leave_one_out"]["images"] == 9
    for row, entry in zip(rows("run"), found["predictions"], strict=True):
        assert float(row["probability"]) == entry["probability"] == max(entry["ranking"].values())
        assert sum(entry["ranking"].values()) == pytest.approx(1)
        assert row["prediction"] == row["class"] != row["runner_up"]
        for shown in (row["file"], row["prediction"], row["runner_up"]):
            assert shown in said


@pytest.mark.usefixtures("drawings")
def test_protomaml_has_a_head_for_the_classes_there_are(monkeypatch):
    words = ("algo=protomaml", "task.way=2", "steps=1", "algo.eval_inner_steps=1", "out=trained")
    assert fsl(monkeypatch, "train", *SMALL, *words) == 0
    assert fsl(monkeypatch, *PREDICT, "checkpoint=trained/best.pt", "support=support", "query=query", "out=answers") == 0
    assert len(summary("answers")["support_images"]) == 3


@pytest.mark.parametrize("algo", ["protonet", "maml", "finetune"])
def test_an_adapted_classifier_answers_as_predict_does_bit_for_bit(algo, models, drawings, monkeypatch):
    source = (f"checkpoint={models}/{algo}/best.pt", "support=support")
    assert fsl(monkeypatch, *PREDICT, *source, "query=query", "out=direct") == 0
    assert fsl(monkeypatch, "adapt", "device=cpu", *source, "output=kept/my classifier, 1", "out=adapt") == 0
    assert fsl(monkeypatch, *PREDICT, "classifier=kept/my classifier, 1", "query=query", "out=kept/run") == 0
    assert probabilities("direct") == probabilities("kept/run")
    classifier = fsl_cli.load(models / algo / "best.pt", "device=cpu").adapt(
        *zip(*[(path, path.parent.name) for path in sorted(Path("support").rglob("*.png"))], strict=True)
    )
    files = list(probabilities("direct"))
    for images in (files, [Image.open(file) for file in files], [np.asarray(Image.open(file)) for file in files]):
        answers = classifier(images)
        assert {file: dict(answer.ranking) for file, answer in zip(files, answers, strict=True)} == probabilities("direct")
    content = torch.load("kept/my classifier, 1", weights_only=True)
    assert content["classifier"]["names"] == list(CLASSES)
    assert content["choices"]["algo"] == algo


def test_unreadable_files_are_named_and_the_rest_is_done(models, drawings, monkeypatch, capfd):
    Path("query/0 0.bmp").write_bytes(Path("query/0 0.bmp").read_bytes()[:90])
    Path("support/oak/1.png").write_bytes(b"")
    Path("query/notes.txt").write_text("ignored")
    Path("query/.hidden.png").write_text("ignored")
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query", "out=run")
    said = message(monkeypatch, capfd, *words, code=1)
    assert said.startswith("2 of the files could not be read as images and were skipped: ")
    for name in ("query/0 0.bmp", "support/oak/1.png"):
        assert name in said
        assert name in summary("run")["skipped"]
    assert len(rows("run")) == 8
    assert summary("run")["support_images"]["oak"] == 3
    Path("table.csv").write_text("text")
    for query in ("query/0 0.bmp", "table.csv"):
        said = message(monkeypatch, capfd, *words[:-2], f"query={query}", "out=other", code=1)
        assert said.startswith(f"query = {query}: nothing in it could be read as an image. {query} is not an image that can be")
        assert not Path("other/predictions.csv").exists()
    Path("empty").mkdir()
    said = message(monkeypatch, capfd, *PREDICT, words[2], "support=nowhere", "query=empty", "out=other")
    assert said.startswith("query = empty has no images")  # before anything is learned


def test_pictures_that_pillow_cannot_open_are_named(models, drawings, monkeypatch, capfd):
    image = Image.open("support/oak/0.png")
    image.save("query/more/raw.DNG", "TIFF")  # as the preview in a raw file of a camera is
    Path("query/photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Path("query/drawing.svg").write_text("<svg/>")
    Path("query/gone.jpg").symlink_to("nowhere.jpg")
    Path("support/oak/photo.HEIF").write_bytes(b"\0\0\0\x18ftypmif1")
    for ignored in ("query/Thumbs.db", "query/.DS_Store", "query/.hidden.heic", "support/oak/.DS_Store", "support/oak/Thumbs.db"):
        Path(ignored).write_bytes(b"ignored")
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query", "out=run")
    said = message(monkeypatch, capfd, *words, code=1)
    assert said.startswith("5 of the files could not be read as images and were skipped: support/oak/photo.HEIF, ")
    reasons = {
        "support/oak/photo.HEIF": "of no format that Pillow knows here",
        "query/photo.heic": "of no format that Pillow knows here",
        "query/drawing.svg": "of no format that Pillow knows here",
        "query/more/raw.DNG": "a camera's raw file",
        "query/gone.jpg": "a link to nowhere.jpg, which is not there",
    }
    assert summary("run")["skipped"].keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in summary("run")["skipped"][name]
    assert len(rows("run")) == 9


def test_answers_that_are_not_sure_enough_are_unknown(models, drawings, monkeypatch):
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query")
    assert fsl(monkeypatch, *words, "out=all") == 0
    middle = sorted(float(row["probability"]) for row in rows("all"))[4]
    assert fsl(monkeypatch, *words, "out=some", f"reject_below={middle}") == 0
    for before, after in zip(rows("all"), rows("some"), strict=True):
        assert after["class"] == before["prediction"]
        assert after["prediction"] == (before["prediction"] if float(before["probability"]) >= middle else "unknown")
    assert [row["prediction"] for row in rows("some")].count("unknown") == 4


def test_a_class_called_unknown_is_not_taken_for_a_refusal(models, drawings, monkeypatch, capfd):
    Path("support/oak").rename("support/unknown")
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query")
    for below in ("0.6", "auto"):
        said = message(monkeypatch, capfd, *words, f"reject_below={below}", f"out={below}")
        assert said.startswith(
            "reject_below answers unknown where no class is probable enough, but a class is called unknown too."
        )
        assert not Path(below, "predictions.json").exists()
    assert fsl(monkeypatch, *words, "out=all") == 0
    assert "unknown" in summary("all")["support_images"]


def test_auto_refuses_unknown_classes_more_often_than_known_ones(models, cache_dir):
    source = fsl_cli.load(models / "protonet" / "best.pt", "device=cpu")
    items = Strokes(cache_dir, 1, 1, 24, tremor=0.1).load().items[40:].reshape(24, 20, 1, 28, 28)  # easy, for a small model
    refused = []
    for first in range(0, 24, 4):  # each time four classes are known, and the other twenty are not
        known, unknown = items[first : first + 4], np.delete(items, range(first, first + 4), 0)
        classifier = source.learn(known[:, :5].reshape(-1, 1, 28, 28), [name for name in "abcd" for _ in range(5)])
        found = classifier.rejection()
        assert found.known == found.unknown == 20
        queries = (known[:, 5:].reshape(-1, 1, 28, 28), unknown[:, :3].reshape(-1, 1, 28, 28))
        answers = [classifier.classify(part, found.threshold) for part in queries]
        refused.append([np.mean([answer.label == "unknown" for answer in part]) for part in answers])
    of_known, of_unknown = np.mean(refused, 0)
    assert of_unknown > of_known + 0.1


@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_auto_chooses_what_predict_refuses_by(algo, models, drawings, monkeypatch, capfd):
    words = (f"checkpoint={models}/{algo}/best.pt", "support=support")
    assert fsl(monkeypatch, *PREDICT, *words, "query=query", "reject_below=auto", "out=auto") == 0
    said = capfd.readouterr().out
    found = summary("auto")
    assert f"reject_below = {found['reject_below']:.6g}, chosen on the support images: it keeps" in said
    assert found["rejection"]["threshold"] == found["reject_below"]
    assert (found["rejection"]["known"], found["rejection"]["unknown"]) == (9, 9)
    assert fsl(monkeypatch, *PREDICT, *words, "query=query", f"reject_below={found['reject_below']!r}", "out=typed") == 0
    assert rows("typed") == rows("auto")
    assert fsl(monkeypatch, "adapt", "device=cpu", *words, "output=kept") == 0
    assert fsl(monkeypatch, *PREDICT, "classifier=kept", "query=query", "reject_below=auto", "out=kept_run") == 0
    assert summary("kept_run")["rejection"] == found["rejection"]


@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_leaving_a_class_out_is_what_learning_from_the_others_answers(algo, models, drawings):
    source = fsl_cli.load(models / algo / "best.pt", "device=cpu")
    files = sorted(Path("support").rglob("*.png"))
    items, labels = source.items(files), [file.parent.name for file in files]
    whole = source.learn(items, labels)
    with torch.no_grad():
        logits = left_out(source.algo, whole.support, source.embeds, source.way is not None, 50)
    assert logits.shape == (9, 2)
    if algo == "protonet":
        for slot, name in enumerate(CLASSES):
            rest = [row for row in range(9) if labels[row] != name]
            part = source.learn(items[rest], [labels[row] for row in rest])
            mine = torch.tensor([row for row in range(9) if labels[row] == name])
            with torch.no_grad():
                expected = part.predictor(source.inputs(items[mine.numpy()]))
            torch.testing.assert_close(logits[sum(labels.count(c) for c in CLASSES[:slot]) :][: len(mine)], expected)
    assert len(left_out(source.algo, whole.support, source.embeds, source.way is not None, 4)) == 4


def test_the_order_of_the_support_images_changes_no_answer(models, drawings):
    source = fsl_cli.load(models / "finetune" / "best.pt", "device=cpu")
    files = [f"support/{name}/{number}.png" for name in CLASSES for number in (0, 1)]
    queries = [file for some in drawings.values() for file in some]
    found = []
    for order in (files, [*files[::2], *files[1::2]]):
        found.append([answer.ranking for answer in source.adapt(order, [Path(file).parent.name for file in order])(queries)])
    assert found[0] == found[1]


def test_what_auto_cannot_be_measured_on_is_refused(models, drawings):
    source = fsl_cli.load(models / "protonet" / "best.pt", "device=cpu")
    files = [f"support/{name}/{number}.png" for name in CLASSES for number in (0, 1)]
    few = "reject_below = auto leaves support images out, alone and with their classes, and needs three classes, one with two"
    for chosen in (files[:4], files[::2]):
        with pytest.raises(ValueError, match=few):
            source.adapt(chosen, [Path(file).parent.name for file in chosen]).rejection()
    classifier = source.adapt(files, [name for name in CLASSES for _ in range(2)])
    source.algo, source.way = make("cnp", "mlp").float().eval(), 3
    support = Examples(torch.randn(6, *SHAPE), classifier.support.targets)
    with pytest.raises(ValueError, match="leaves classes out, but algo = protonet needs all of them"):
        Classifier(source, Examples(source.algo.embed(support.inputs).detach(), support.targets), [*CLASSES], 1.0).rejection()


def test_answers_do_not_depend_on_the_other_files(models, drawings, monkeypatch):
    words = (*PREDICT, f"checkpoint={models}/maml/best.pt", "support=support")
    assert fsl(monkeypatch, *words, "query=query", "out=all") == 0
    assert fsl(monkeypatch, *words, "query=query/1 0.bmp", "out=one") == 0
    assert summary("one")["norm"] == "support"
    alone, among = probabilities("one")["query/1 0.bmp"], probabilities("all")["query/1 0.bmp"]
    assert alone == pytest.approx(among, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["query=query"], ["support has no value", "support=my_classes/"]),
        (["support=support"], ["query has no value"]),
        (["support=nowhere", "query=query"], ["support = nowhere: there is no such file or folder."]),
        (["support=support", "query=nowhere"], ["query = nowhere: there is no such file or folder."]),
        (["support=support/oak", "query=query"], ["0.png lies in no class folder", "support/oak/CLASS"]),
        (["support=query/0 0.bmp", "query=query"], ["query/0 0.bmp is a file"]),
        (["support=lonely", "query=query"], ["lonely has 1 class folders, expected two or more"]),
        (["support=empty", "query=query"], ["class folder empty/none has no images"]),
        (["support=deep", "query=query"], ["deep/a/more/0.png lies deeper than deep/CLASS/IMAGE", "give support=deep/a if"]),
        (["support=broken", "query=query"], ["none of the images in class folder broken/b can be read"]),
        (["support=support", "query=lonely/a"], ["query = lonely/a has no images"]),
        (["support=support", "query=query", "reject_below=2"], ["reject_below = 2, but it must be a probability"]),
        (["support=support", "query=query", "reject_below=some"], ["reject_below = some, but it must be a probability"]),
        (["support=support", "query=query", "norm=transductive"], ["norm = transductive would let each answer depend"]),
        (["support=support", "query=query", "norm=one_query"], ["norm = 'one_query', but ProtoNet"]),
        (["support=support", "query=query", "size=4"], ["size = 4, expected 8 to 512 pixels"]),
        (["support=oddly", "query=query"], ["support: the name of oddly/a\\xe9/0.png is not in UTF-8"]),
        (["support=support", "query=query", "querry=a"], ["no key querry", "Did you mean query?"]),
        (["support=support", "query=query", "device=ddp"], ["device = ddp, but predictions are made by one process"]),
        (["support=support", "query=query", "classifier=x"], ["Give checkpoint or classifier, not both."]),
        (
            ["support=support", "query=query", "model=mlp"],
            ["Leave algo, model, task.way and task.shot as they were trained.", "train again"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_repair(words, parts, models, drawings, monkeypatch, capfd):
    for folder in ("lonely/a", "empty/none", "broken/a", "broken/b", "deep/b"):
        Path(folder).mkdir(parents=True)
    for copy in ("empty/some", "broken/a", "deep/a/more", "deep/a", "deep/b"):
        Path(copy).mkdir(parents=True, exist_ok=True)
        Path(copy, "0.png").write_bytes(Path("support/oak/0.png").read_bytes())
    Path("broken/b/0.png").write_text("nothing")
    for copy in (os.fsdecode(b"oddly/a\xe9/0.png"), "oddly/b/0.png"):
        Path(copy).parent.mkdir(parents=True, exist_ok=True)
        Path(copy).write_bytes(Path("support/oak/0.png").read_bytes())
    said = message(monkeypatch, capfd, *PREDICT, f"checkpoint={models}/protonet/best.pt", "out=run", *words)
    for part in parts:
        assert part in said
    assert not Path("run/predictions.json").exists()


def test_links_to_folders_and_names_with_brackets_are_followed(models, drawings, monkeypatch):
    Path("[links] {x}").mkdir()
    Path("[links] {x}", "more").symlink_to(Path("query").resolve())
    Path("[links] {x}", "round").symlink_to(Path("[links] {x}").resolve())
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=[links] {x}", "out=run")
    assert fsl(monkeypatch, *words) == 0
    found = [row["file"] for row in rows("run")]
    assert found == sorted(f"[links] {{x}}/more/{file.removeprefix('query/')}" for files in drawings.values() for file in files)


def test_links_to_what_holds_a_folder_are_not_followed(models, drawings, monkeypatch):
    Path("query/loop").symlink_to("..")
    Path("query/more/loop").symlink_to("../..")
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query", "out=run")
    assert fsl(monkeypatch, *words) == 0
    assert [row["file"] for row in rows("run")] == sorted(file for files in drawings.values() for file in files)


def test_a_line_break_in_a_name_ends_no_row_of_the_table(models, drawings, monkeypatch, capfd):
    Path("query/0 0.bmp").rename("query/0\n0.bmp")
    assert fsl(monkeypatch, *PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query", "out=run") == 0
    assert "query/0\\n0.bmp" in capfd.readouterr().out
    assert "query/0\n0.bmp" in probabilities("run")


def test_files_with_names_that_are_no_text_are_named_and_skipped(models, drawings, monkeypatch, capfd):
    for name in (b"query/caf\xe9.bmp", b"query/caf\xe8.bmp"):
        Path(os.fsdecode(name)).write_bytes(Path("query/0 0.bmp").read_bytes())
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query", "out=run")
    said = message(monkeypatch, capfd, *words, code=1)
    assert said.startswith("2 of the files could not be read as images and were skipped: query/caf\\xe8.bmp, query/caf\\xe9.bmp.")
    assert "is not in UTF-8. Rename the file" in summary("run")["skipped"]["query/caf\\xe9.bmp"]
    assert len(rows("run")) == 9


def test_a_head_of_another_width_is_named(models, drawings, monkeypatch, capfd):
    for number in (0, 1):
        Path("support/more").mkdir(exist_ok=True)
        Path(f"support/more/{number}.png").write_bytes(Path(f"support/oak/{number}.png").read_bytes())
    said = message(monkeypatch, capfd, *PREDICT, f"checkpoint={models}/maml/best.pt", "support=support", "query=query")
    assert "4 classes, but algo = maml has a head for the task.way = 3" in said


def test_files_of_the_wrong_kind_are_told_apart(models, drawings, monkeypatch, capfd):
    best = f"{models}/protonet/best.pt"
    assert fsl(monkeypatch, "adapt", "device=cpu", f"checkpoint={best}", "support=support", "output=kept") == 0
    said = message(monkeypatch, capfd, "adapt", f"checkpoint={best}", "support=support", "output=kept")
    assert "output = kept is there already" in said
    assert "output has no value" in message(monkeypatch, capfd, "adapt", f"checkpoint={best}", "support=support")
    assert "or fsl export, as classifier=kept." in message(monkeypatch, capfd, *PREDICT, "checkpoint=kept", "query=query")
    assert f"or fsl adapt, as checkpoint={best}." in message(monkeypatch, capfd, *PREDICT, f"classifier={best}", "query=query")
    said = message(monkeypatch, capfd, *PREDICT, "classifier=kept", "query=query", "support=support")
    assert "support = support, but the classifier has learned its classes" in said
    for word in ("size=56", "algo=centroid", "algo.scale=2", "model.filters=3"):
        said = message(monkeypatch, capfd, *PREDICT, "classifier=kept", "query=query", word)
        assert f"{word.replace('=', ' = ')}, but the classifier has learned its classes, and how sure to be" in said
    said = message(monkeypatch, capfd, *PREDICT, "classifier=support", "query=query")
    assert said == "classifier = support is a folder. Name a file that fsl adapt wrote."
    for word in ("adapt", "export"):
        given = ["support=support", f"checkpoint={best}"] if word == "adapt" else ["classifier=kept"]
        said = message(monkeypatch, capfd, word, *given, "output=kept/x.pt2")
        assert said.startswith("output = kept/x.pt2 cannot be written (kept: ")
    assert "norm = support, but" in message(monkeypatch, capfd, *PREDICT, "classifier=kept", "query=query", "norm=support")
    assert "there is no such file. Name a file that fsl adapt wrote" in message(monkeypatch, capfd, "export", "classifier=no")
    assert "classifier has no value" in message(monkeypatch, capfd, "export")
    said = message(monkeypatch, capfd, "export", "classifier=kept", "output=model.onnx")
    assert "format=torch writes files that end in .pt2" in said
    Path("short").write_bytes(Path("kept").read_bytes()[:5000])
    assert "is not a whole classifier" in message(monkeypatch, capfd, *PREDICT, "classifier=short", "query=query")


def test_without_a_checkpoint_only_pretrained_weights_will_do(drawings, monkeypatch, capfd):
    words = (*PREDICT, "support=support", "query=query")
    assert "model = conv4 has no weights yet" in message(monkeypatch, capfd, *words, "model=conv4")
    assert "algo = maml must be trained first" in message(monkeypatch, capfd, *words, "algo=maml")
