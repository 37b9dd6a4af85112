"""Texts: the published data sets and the user's tables, the models that read them, and the commands on them."""

import csv
import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed, fsl, message, stopped
from support_files import write_folder, write_zip
from support_runs import SMALL_TEXT, result, rows, summary, table

import fsl_cli
from fsl_cli.classifier import Prediction
from fsl_cli.config import build
from fsl_cli.datasets.class_splits import listed
from fsl_cli.datasets.packed import SPLITS, Packed
from fsl_cli.datasets.texts import read_labelled, to_texts
from fsl_cli.episodes import EpisodeSampler
from fsl_cli.models.texts import TextEmbedding
from fsl_cli.predict import table as table_of
from fsl_cli.sources import open_store

pytestmark = pytest.mark.usefixtures("workplace")

SIZES = {"clinc150": (50, 50, 50), "banking77": (25, 25, 27)}


def labels(name: str) -> list[str]:
    lists = listed(f"{name}_fold1")
    return sorted(label for split in SPLITS for label in lists[split])


def clinc() -> dict[str, bytes]:
    parts = {"train": 100, "val": 20, "test": 30}
    table = {
        part: [[f"{label}  of {part} {k}", label] for k in range(n) for label in labels("clinc150")] for part, n in parts.items()
    }
    return {"clinc150/data_full.json": json.dumps(table | {"oos_test": [["what else", "oos"]]}).encode()}


def banking() -> dict[str, bytes]:
    files = {}
    for part in ("train", "test"):
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(["text", "category"])
        for number, label in enumerate(labels("banking77")):
            each = 40 if part == "test" else 130 if number < 70 else 129
            table.writerows([f"{label}, of\n{part} {k}", label] for k in range(each))
        files[f"banking77/{part}.csv"] = buffer.getvalue().encode()
    return files


FILES = {"clinc150": clinc, "banking77": banking}


def load(name: str, folder: Path, *words: str) -> Packed:
    cfg = composed(f"dataset={name}", f"data_dir={folder}", f"cache_dir={folder}/cache", *words)
    return build(cfg.dataset, "dataset").load()


@pytest.mark.parametrize("name", FILES)
def test_the_published_files_are_packed_by_class_and_part(name: str, tmp_path: Path):
    write_folder(tmp_path / "text_intents", FILES[name]())
    data = load(name, tmp_path)
    assert data.names == labels(name)
    assert data.item_shape == ()
    assert data.counts.sum() == len(data.items) == {"clinc150": 22_500, "banking77": 13_083}[name]
    assert tuple(len(data.splits[split]) for split in SPLITS) == SIZES[name]
    texts = to_texts(data.items)
    assert [text.split(",")[0].split(" ")[0] for text in texts] == [
        label for label, n in zip(data.names, data.counts, strict=True) for _ in range(n)
    ]
    assert texts[0].endswith("of train 0") and texts[-1].endswith("of test 39" if name == "banking77" else "of test 29")
    (tmp_path / "zipped").mkdir()
    write_zip(
        tmp_path / "zipped" / "text_intents.zip", {f"text_intents/{path}": content for path, content in FILES[name]().items()}
    )
    np.testing.assert_array_equal(load(name, tmp_path / "zipped").items, data.items)


@pytest.mark.parametrize("name", FILES)
def test_the_five_class_splits_are_constants_that_divide_the_same_classes(name: str):
    folds = [listed(f"{name}_fold{fold}") for fold in range(1, 6)]
    for lists in folds:
        assert tuple(len(set(lists[split])) for split in SPLITS) == SIZES[name]
        assert sorted(label for split in SPLITS for label in lists[split]) == labels(name)
    assert len({tuple(lists["test"]) for lists in folds}) == 5
    assert (
        folds[0]["test"][:2]
        == {
            "clinc150": ["accept_reservations", "account_blocked"],
            "banking77": ["Refund_not_showing_up", "apple_pay_or_google_pay"],
        }[name]
    )


@pytest.mark.parametrize("name", FILES)
def test_supports_come_from_the_training_part_and_queries_from_the_test_part(name: str, tmp_path: Path):
    write_folder(tmp_path / "text_intents", FILES[name]())
    data = load(name, tmp_path, "dataset.parts=true", "dataset.test_only=true")
    texts, way, held = np.array(to_texts(data.items)), sum(SIZES[name]), {"clinc150": 30, "banking77": 40}[name]
    assert data.counts.sum() == {"clinc150": 19_500, "banking77": 13_083}[name]
    drawn = texts[EpisodeSampler(data.classes("test"), way, 10, held, 1, 0, 12).fixed(0, 2).items]  # [2, way, 10 + held]
    assert all(" of train " in text for text in drawn[:, :, :10].ravel())
    assert all(" of test " in text for text in drawn[:, :, 10:].ravel())
    assert all(len(set(row)) == 10 + held for row in drawn.reshape(-1, 10 + held))
    first = texts[EpisodeSampler(data.classes("test"), way, 1, 1, 500, 0, 0).indices(0).items]
    assert len(np.unique(first[..., 1])) == way * held and len(np.unique(first[..., 0])) >= 0.9 * (len(texts) - way * held)
    for shot, queries, words in (
        (130, 1, "task.shot = 130, but the training part"),
        (1, held + 1, "the test part of a class has"),
    ):
        with pytest.raises(ValueError, match=words):
            EpisodeSampler(data.classes("test"), way, shot, queries, 1, 0, 12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["train"].pop(), r"has 14,999 \+ 3,000 \+ 4,500 sentences"),
        (lambda t: t["train"].append([*t["train"].pop()[:1], "cats"]), r"has 151 classes, expected 150 \(first other: cats\)"),
        (lambda t: t["test"].append(t["test"].pop()[:1] + t["test"][0][1:]), "has classes without 30 test sentences"),
        (lambda t: t.pop("val"), "cannot be read"),
    ],
)
def test_other_sentences_than_the_published_are_refused(change: Any, words: str, tmp_path: Path):
    content = json.loads(clinc()["clinc150/data_full.json"])
    change(content)
    write_folder(tmp_path / "text_intents", {"data_full.json": json.dumps(content).encode()})
    with pytest.raises(ValueError, match=words):
        load("clinc150", tmp_path)


def test_missing_files_and_folds_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no text_intents\* .* Get clinc150 from https://github.com/clinc/oos-eval"):
        load("clinc150", tmp_path)
    (tmp_path / "text_intents").mkdir()
    with pytest.raises(ValueError, match=r"has 0 \+ 0 \+ 0 sentences"):
        load("banking77", tmp_path)
    with pytest.raises(ValueError, match=r"dataset\.fold = 6"):
        load("clinc150", tmp_path, "dataset.fold=6")


def test_own_classes_are_split_by_a_hash_of_their_names_or_by_lists(tmp_path: Path):
    (tmp_path / "own.csv").write_text("".join(f"text {k},n{c:02d}\n" for k in range(2) for c in range(1, 9)))
    data = load("text_csv", tmp_path, f"dataset.file={tmp_path}/own.csv")
    members = {split: {data.names[c] for c in numbers} for split, numbers in data.splits.items()}
    assert members == {"train": {"n01", "n04", "n05", "n07", "n08"}, "val": {"n06"}, "test": {"n02", "n03"}}
    (tmp_path / "lists.json").write_text(json.dumps({"train": ["n04"], "val": [], "test": ["n02"]}))
    words = (f"dataset.file={tmp_path}/own.csv", f"dataset.lists={tmp_path}/lists.json")
    assert load("text_csv", tmp_path, *words).splits["test"].tolist() == [1]
    assert len(load("text_csv", tmp_path, *words, "dataset.test_only=true").splits["test"]) == 8
    (tmp_path / "lists.json").write_text(json.dumps({"train": ["cat"], "val": [], "test": []}))
    with pytest.raises(ValueError, match=r"'cat', which is no label in"):
        load("text_csv", tmp_path, *words)
    with pytest.raises(ValueError, match="there is no such file"):
        load("text_csv", tmp_path, "dataset.file=none.csv")


@pytest.mark.parametrize("model", ["conv4", "mlp", "bag_of_words", "text_encoder"])
def test_models_refuse_what_they_cannot_read(model: str):
    texts = model in ("bag_of_words", "text_encoder")
    with pytest.raises(ValueError, match="takes texts" if texts else "the data set are texts"):
        build(composed(f"model={model}").model, "model", item_shape=(1, 28, 28) if texts else ())


def test_a_bag_of_words_is_the_sum_of_its_vectors_whatever_the_padding():
    model = build(composed("model=bag_of_words", "model.features=5", "model.length=6").model, "model", item_shape=())
    tokens = torch.from_numpy(model.encode(["Pay, pay!", "pay", "paying", "?!", "a b c d e f g"]))
    assert tokens.count_nonzero(1).tolist() == [2, 1, 2, 0, 6]
    found = model(tokens)
    vector = model.vectors[tokens[1, 0]]
    torch.testing.assert_close(found[:2], torch.stack([2**0.5 * vector, vector]))
    torch.testing.assert_close(model(tokens[:3, :2]), found[:3])
    assert found[3].abs().max() == 0


def test_batches_are_as_long_as_their_longest_text(tmp_path: Path):
    (tmp_path / "own.csv").write_text("a b c,x\na,x\na b,y\nd,y\n")
    data = load("text_csv", tmp_path, f"dataset.file={tmp_path}/own.csv", "dataset.test_only=true")
    model: TextEmbedding = build(composed("model=bag_of_words").model, "model", item_shape=())
    store = open_store(data, torch.device("cpu"), 1e9, model)
    episode = store.episodes(EpisodeSampler(data.classes("test"), 2, 1, 1, 3, 0, 0).indices(0), 1)
    assert episode.support.inputs.shape == (3, 2, 3) and episode.support.inputs.dtype == torch.int64


@pytest.mark.parametrize(
    ("algo", "words"),
    [
        ("protonet", []),
        ("maml", ["norm=support", "algo.inner_steps=1", "algo.eval_inner_steps=2"]),
        pytest.param("finetune", ["algo.batch=16"], marks=pytest.mark.slow),
    ],
)
def test_texts_are_trained_on_evaluated_and_predicted(algo: str, words: list[str], monkeypatch: Any, capfd: Any):
    table("own.csv", 16)
    train = [word for word in words if word.startswith("algo.")]
    data = ["dataset=text_csv", "dataset.file=own.csv", "dataset.fractions=[0.5,0.25,0.25]"]
    assert fsl(monkeypatch, "train", f"algo={algo}", *data, *SMALL_TEXT, *train, "steps=8", "eval_every=8", "out=run") == 0
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "episodes=8", "device=cpu", "out=again") == 0
    assert result("again")["accuracy"] == result("run")["accuracy"] > 0.5
    assert any(b"val/episode/text_summary" in path.read_bytes() for path in Path("run/tensorboard").iterdir())
    table("other.csv", 3)
    other = ["dataset=text_csv", "dataset.file=other.csv", "dataset.test_only=true", "episodes=5", "device=cpu"]
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", *other) == 0
    table("intents.csv", 2, 3, header="")
    Path("questions.txt").write_text("word1 and w0x1 w0x2\nw1x1 and w1x0\n\nw1x1 and w1x0\n")
    asked = ["checkpoint=run/best.pt", "support=intents.csv", "device=cpu", *(word for word in words if word not in train)]
    assert fsl(monkeypatch, "predict", *asked, "query=questions.txt", "leave_one_out=true", "out=found") == 0
    assert "2 classes of 3 texts each" in capfd.readouterr().out
    assert [row["text"] for row in rows("found")] == ["word1 and w0x1 w0x2", "w1x1 and w1x0", "w1x1 and w1x0"]
    assert [row["prediction"] for row in rows("found")] == ["class 00", "class 01", "class 01"]
    assert summary("found")["support_texts"] == {"class 00": 3, "class 01": 3}
    assert fsl(monkeypatch, "adapt", *asked, "output=kept") == 0
    assert (
        fsl(
            monkeypatch,
            "predict",
            "classifier=kept",
            "query=questions.txt",
            "device=cpu",
            "reject_below=0.999999",
            "out=kept_run",
        )
        == 0
    )
    assert [row["probability"] for row in rows("kept_run")] == [row["probability"] for row in rows("found")]
    assert rows("kept_run")[0]["prediction"] == "unknown"
    said = message(monkeypatch, capfd, "export", "classifier=kept")
    assert said.startswith("classifier = kept takes texts, and only those of images can be exported.")


def test_a_long_text_is_shown_by_its_beginning_whether_or_not_it_has_blanks():
    answer = Prediction("a", 0.9, [("a", 0.9), ("b", 0.1)])
    for text in ("字" * 100, "word " * 30, "w" * 100):
        shown = table_of([(text, answer)], "text")[1]
        assert shown.startswith(text[:70]) and " ...  a " in shown
    assert table_of([("a  short\ttext", answer)], "text")[1].startswith("a short text  a ")


def test_python_takes_texts_and_says_what_is_wrong(monkeypatch: Any):
    table("own.csv", 16)
    data = ["dataset=text_csv", "dataset.file=own.csv", "dataset.fractions=[0.5,0.25,0.25]", "steps=2", "eval_every=2"]
    assert fsl(monkeypatch, "train", *data, *SMALL_TEXT, "out=run") == 0
    trained = fsl_cli.load("run/best.pt", "device=cpu")
    classifier = trained.adapt(["where is my card", "hello there"], ["card", "greeting"])
    assert [answer.label for answer in classifier(["my card is gone", "hello"])] == ["card", "greeting"]
    for texts in ([""], [3]):
        with pytest.raises(ValueError, match="expected a text with at least one word"):
            classifier(texts)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^Text 2 \('a a a .* has 30,002 bytes, expected at most 20,000"):
        classifier(["hello", "a " * 15_000 + "aa"])
    with pytest.raises(ValueError, match=r"^The texts are 'hello', expected a list of them"):
        classifier("hello")
    with pytest.raises(ValueError, match="There are no texts"):
        classifier([])
    with pytest.raises(ValueError, match="size = 64, but texts have none"):
        fsl_cli.load("run/best.pt", "device=cpu", "size=64")


def test_mistakes_with_texts_end_in_a_sentence(monkeypatch: Any, capfd: Any):
    table("own.csv", 16)
    Path("images").mkdir()
    words = ["dataset=text_csv", "dataset.file=own.csv"]
    assert "model=conv4 takes images" in message(monkeypatch, capfd, "train", *words, *SMALL_TEXT[2:], "model=conv4")
    drawn = [f"dataset.{split}_classes=9" for split in SPLITS]
    assert "takes texts" in message(monkeypatch, capfd, "train", "model=bag_of_words", "device=cpu", *drawn)
    data = [*words, "dataset.fractions=[0.5,0.25,0.25]", "steps=1", "eval_every=1"]
    assert fsl(monkeypatch, "train", *data, *SMALL_TEXT, "out=run") == 0
    ask = ["predict", "checkpoint=run/best.pt", "device=cpu"]
    assert "support = images is a folder" in message(monkeypatch, capfd, *ask, "support=images", "query=own.csv")
    assert "query = images is a folder" in message(monkeypatch, capfd, *ask, "support=own.csv", "query=images")
    Path("latin.csv").write_bytes(b"hello,gr\xfc\xdfe")
    Path("single.csv").write_text("hello\nbye")
    Path("wide.csv").write_bytes("hello,a\nbye,b".encode("utf-16"))
    Path("commas.csv").write_text("text,label\nis it raining, or not,weather\nplay jazz,music\n")
    for support, reason in (
        ("latin", "is not in UTF-8 (byte 8), expected"),
        ("wide", "is in UTF-16, expected"),
        ("single", "line 1: 1 columns, expected two"),
        ("commas", "line 2: 3 columns, but the first line names 2. Put a text that has commas in double quotes."),
    ):
        said = message(monkeypatch, capfd, *ask, f"support={support}.csv", "query=own.csv")
        assert said.startswith(f"support = {support}.csv") and reason in said
    said = message(monkeypatch, capfd, *ask, "support=own.csv", "query=latin.csv")
    assert said.startswith("query = latin.csv is not in UTF-8")
    Path("blanks.csv").write_text("text,label\nhello,a,\nbye,b\n")  # as a spreadsheet may write it
    assert [sentence.label for sentence in read_labelled(Path("blanks.csv"))] == ["a", "b"]
    long = "words " * 5_000
    Path("long.csv").write_text(f"text,label\nhello,a\n\n{long},b\n")
    Path("long.txt").write_text(f"hello\n\n{long}\n")
    for key, files in (
        ("support", ("long.csv", "own.csv")),
        ("query", ("own.csv", "long.csv")),
        ("query", ("own.csv", "long.txt")),
    ):
        said = message(monkeypatch, capfd, *ask, f"support={files[0]}", f"query={files[1]}")
        place = files[key == "query"] + (", line 4" if "long.csv" in files else ", line 3")
        assert said.startswith(f"{key} = {place} ('words words words words words '...) has 29,999 bytes, expected at most 20,000")
    assert "model = bag_of_words has no weights yet" in message(
        monkeypatch, capfd, "predict", "model=bag_of_words", "support=own.csv", "query=own.csv", "device=cpu"
    )


def test_an_episode_of_texts_is_shown_as_text(monkeypatch: Any, capfd: Any):
    table("own.csv")
    words = ["dataset=text_csv", "dataset.file=own.csv", "split=test", "task.way=2", "task.queries=1", "dataset.test_only=true"]
    assert fsl(monkeypatch, "data", "show", *words, "out=shown.png") == 0
    lines = Path("shown.txt").read_text().splitlines()
    assert [line.split(":")[0].strip()[:5] for line in lines] == ["class", "suppo", "query"] * 2
    assert fsl(monkeypatch, "data", "prepare", *words[:2]) == 0
    assert "text_csv: 96 texts in 12 classes of 8 to 8 texts" in capfd.readouterr().out


@pytest.mark.data
def test_the_real_files_are_whole(data_dir: str, tmp_path: Path):
    clinc = load("clinc150", Path(data_dir), f"cache_dir={tmp_path}")
    assert (len(clinc.items), len(clinc.names), set(clinc.counts.tolist())) == (22_500, 150, {150})
    assert to_texts(clinc.items[:1]) == ["can i make a reservation for redrobin"]
    banking = load("banking77", Path(data_dir), f"cache_dir={tmp_path}", "dataset.fold=5")
    assert (len(banking.items), len(banking.names), banking.counts.min(), banking.counts.max()) == (13_083, 77, 75, 227)


def test_runs_on_texts_that_have_changed_are_neither_compared_nor_gone_on_with(monkeypatch: Any, capfd: Any):
    table("own.csv", 16)
    data = [
        "dataset=text_csv",
        "dataset.file=own.csv",
        "dataset.fractions=[0.5,0.25,0.25]",
        *SMALL_TEXT,
        "steps=4",
        "eval_every=4",
    ]
    for seed in (0, 1):
        assert fsl(monkeypatch, "train", *data, f"seed={seed}", f"out=runs/{seed}") == 0
    with stopped(monkeypatch, 2):
        assert fsl(monkeypatch, "train", *data, "out=half") == 128 + signal.SIGTERM
    Path("own.csv").write_text(Path("own.csv").read_text().replace("w", "v"))
    assert fsl(monkeypatch, "train", *data, "seed=2", "out=runs/2") == 0
    capfd.readouterr()
    assert fsl(monkeypatch, "report", "out=report") == 0
    said = capfd.readouterr().out
    assert said.count("text_csv data=") == 2 and "0, 1" in said
    assert "dataset: its classes or items have changed since the run began" in message(monkeypatch, capfd, "train", "resume=half")
