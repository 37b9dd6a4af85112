"""The pickle and npz releases, made here in their real forms; a pickle that names code is refused and runs nothing."""

import io
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support_files import LISTS, dump, pixels, ren

from fsl_cli.datasets import tables

KNOWN = {name for names in LISTS.values() for name in names}


def png(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def gidaris(folder: Path, split: str, protocol: int) -> None:
    labels = [c for c in range(len(LISTS[split])) for _ in range(3)]
    names = OrderedDict((name, c) for c, name in enumerate(LISTS[split]))
    content = {"data": pixels(split), "labels": labels, "catname2label": names}
    phase = "_phase_train" if split == "train" else ""
    dump(folder / f"miniImageNet_category_split_{split}{phase}.pickle", content, protocol)
    if split == "train":
        dump(folder / "miniImageNet_category_split_train_phase_val.pickle", content, protocol)


def tiered(folder: Path, split: str, protocol: int) -> None:
    labels = np.repeat(np.arange(len(LISTS[split])), 3)
    dump(folder / f"{split}_images_png.pkl", [png(image)[:, None] for image in pixels(split)], protocol)
    dump(folder / f"{split}_labels.pkl", {"label_specific": labels, "label_general": np.zeros(len(labels))}, protocol)


def npz(folder: Path, split: str, protocol: int) -> None:
    np.savez_compressed(folder / f"{split}.npz", images=pixels(split), labels=np.repeat(np.array(LISTS[split]), 3))


def grouped(folder: Path, split: str, protocol: int) -> None:
    np.savez(folder / f"{split}.npz", x=pixels(split).reshape(-1, 3, 8, 8, 3).transpose(0, 1, 4, 2, 3))


RELEASES = {"ren": ren, "gidaris": gidaris, "tiered": tiered, "npz": npz, "grouped": grouped}
NAMED = {"ren", "gidaris", "npz"}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_gives_its_images_by_class(release, protocol, tmp_path):
    for split in LISTS:
        RELEASES[release](tmp_path, split, protocol)
    sources = [path for path in sorted(tmp_path.iterdir()) if tables.is_table(path)]
    raw = tables.read(sources, KNOWN, 8, 3, str(tmp_path / "cache"))
    numbered = ["test/0000", "train/0000", "train/0001", "val/0000"]
    assert raw.names == (["n01", "n02", "n03", "n04"] if release in NAMED else numbered)
    assert raw.counts == [3] * 4
    order = [
        split if release in NAMED else name.split("/")[0]
        for name, split in zip(raw.names, ("train", "train", "val", "test"), strict=True)
    ]
    seen = {"train": 0, "val": 0, "test": 0}
    for c, split in enumerate(order):
        expected = pixels(split)[seen[split] : seen[split] + 3].transpose(0, 3, 1, 2)
        assert np.array_equal(raw.items[3 * c : 3 * c + 3], expected), (release, split)
        seen[split] += 3


def test_a_pickle_of_python_2_is_read(tmp_path):
    array = np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3)
    state = "".join(chr(value) for value in array.tobytes())  # Python 2 wrote bytes as str: latin1
    text = state.encode("latin1")
    content = (
        b"\x80\x02}q\x01U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq\x06"
        b"\x87q\x07Rq\x08(K\x01(K\x01K\x08K\x08K\x03tq\x09cnumpy\ndtype\nq\x0aU\x02u1q\x0bK\x00K\x01\x87q\x0cRq\x0d(K\x03U\x01|q\x0e"
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U" + bytes([len(text)]) + text + b"q\x10tq\x11bs."
    )
    (tmp_path / "train.pkl").write_bytes(content)
    assert np.array_equal(tables.load(tmp_path / "train.pkl")["data"], array)


def test_numbers_texts_and_containers_come_back_as_they_were(tmp_path):
    content = {
        "a": np.arange(6, dtype=">i4").reshape(2, 3, order="F"), "b": np.array(["x", "yz"]),
        "c": [1, 2.5, None, "t", b"b", {"k": {1}}],
        "d": np.float32(2.5), "e": defaultdict(list, {"k": [1]}), "f": np.array([1.5, -2]), "g": {"k": [np.array([5])]},
    }  # fmt: skip
    for protocol in (0, 2, 4, 5):
        dump(tmp_path / "a.pkl", content, protocol)
        found = tables.load(tmp_path / "a.pkl")
        assert np.array_equal(found["a"], content["a"]) and list(found["b"]) == ["x", "yz"] and found["c"] == content["c"]
        assert (found["d"], found["e"], list(found["f"]), found["g"]) == (2.5, {"k": [1]}, [1.5, -2], {"k": [5]})


class Runs:
    """What a hostile pickle holds: a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


HEAD = b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n"


def hostile() -> dict[str, bytes]:
    import os
    import subprocess

    return {
        "os.system": pickle.dumps(Runs(os.system, "touch ran")),
        "eval": pickle.dumps({"image_data": Runs(eval, "open('ran', 'w')")}),
        "Popen": pickle.dumps([Runs(subprocess.Popen, ["touch", "ran"])]),
        "builtins.getattr": pickle.dumps(Runs(getattr, "a", "b")),
        "numpy.load": pickle.dumps(Runs(np.load, "ran")),
        "dotted name": b"\x80\x04\x8c\x05numpy\x94\x8c\x0cos.path.join\x94\x93.",
        "object array from bytes": HEAD + b"(I1\ntcnumpy\ndtype\n(VO8\ntRI00\nVAAAAAAAA\ntb.",
        "strange dtype": pickle.dumps(np.zeros(2, dtype=[("a", "u1"), ("b", "O")])),
        "wrong shape": HEAD + b"(I999999999999\ntcnumpy\ndtype\n(Vu1\ntRI00\nVA\ntb.",
        "no pickle": b"<!DOCTYPE html>",
        "cut off": pickle.dumps({"image_data": np.zeros((9, 9))})[:-40],
        "empty": b"",
        "a list in itself": b"(lp0\ng0\na.",
        "persistent": b"Pos\n.",
        "codec": pickle.dumps(Runs(__import__("_codecs").encode, "a", "hex")),
    }


@pytest.mark.parametrize("name", hostile())
def test_a_hostile_or_broken_pickle_is_refused_and_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.pkl"
    path.write_bytes(hostile()[name])
    with pytest.raises(ValueError) as caught:
        tables.read([path], KNOWN, 8, 3, str(tmp_path / "cache"))
    assert str(path) in str(caught.value) and str(caught.value).endswith(".")
    assert not (tmp_path / "ran").exists()


def test_an_npz_with_objects_in_it_is_refused(tmp_path):
    np.savez(tmp_path / "train.npz", images=np.array([Runs(eval, "1")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"train\.npz is not a pickle or npz of arrays"):
        tables.load(tmp_path / "train.npz")
    with zipfile.ZipFile(tmp_path / "val.npz", "w") as file:
        file.writestr(
            "images.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999,), }"
        )
    with pytest.raises(ValueError, match=r"val\.npz is not a pickle or npz of arrays"):
        tables.load(tmp_path / "val.npz")
    np.savez_compressed(tmp_path / "test.npz", images=pixels("test"))
    content = bytearray((tmp_path / "test.npz").read_bytes())
    content[60:90] = b"\xff" * 30
    (tmp_path / "test.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"test\.npz is not a pickle or npz of arrays .*decompressing"):
        tables.load(tmp_path / "test.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images.pkl", {"image_data": pixels("val")}, "which split"),
        ("train.pkl", {"pictures": pixels("val")}, "has pictures, expected images under one of image_data, images, data, x"),
        ("train.pkl", {"data": 5}, "has data, expected images under one of"),
        ("train.pkl", {"image_data": pixels("val")}, "has 3 images and classes for 0 of them"),
        ("train.pkl", {"image_data": pixels("val"), "class_dict": {"n01": [0, 1]}}, "has 3 images and classes for 2 of them"),
        ("train.pkl", {"image_data": pixels("val"), "class_dict": {"n01": [0, 1, 7]}}, "classes that cannot be read"),
        ("train.pkl", {"image_data": pixels("val") / 255, "labels": [0, 0, 0]}, r"float64 \[8, 8, 3\], expected uint8"),
    ],
)
def test_an_array_that_is_no_known_release_is_refused(name, content, message, tmp_path):
    dump(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        tables.read([tmp_path / name], KNOWN, 8, 3, str(tmp_path / "cache"))


def test_what_opencv_wrote_for_the_authors_of_tiered_imagenet_is_blue_first(tmp_path):
    tiered(tmp_path, "val", 2)
    (tmp_path / "val_images_png.pkl").unlink()
    np.savez(tmp_path / "val_images.npz", images=pixels("val")[..., ::-1])
    raw = tables.read(sorted(tmp_path.glob("val*")), KNOWN, 8, 3, str(tmp_path / "cache"))
    assert np.array_equal(raw.items, pixels("val").transpose(0, 3, 1, 2))


def test_a_few_bytes_do_not_fill_the_memory(tmp_path, monkeypatch):
    shared: Any = [0]
    for _ in range(60):
        shared = [shared, shared]
    dump(tmp_path / "train.pkl", {"image_data": shared})
    assert len(tables.load(tmp_path / "train.pkl")["image_data"]) == 2
    monkeypatch.setattr(tables.archives, "FREE", 100_000)
    np.savez_compressed(tmp_path / "train.npz", images=np.zeros(10_000_000, np.uint8))
    with pytest.raises(ValueError, match=r"train\.npz is not a pickle or npz .*far more"):
        tables.load(tmp_path / "train.npz")
