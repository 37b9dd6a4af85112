"""torchvision's data sets through the one adapter: on small files in their real formats, and on a fake; no network."""

import csv
import inspect
import io
import pickle
import struct
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from conftest import composed
from PIL import Image

from fsl_cli.config import build
from fsl_cli.datasets.class_splits import listed
from fsl_cli.datasets.packed import SPLITS, Packed
from fsl_cli.datasets.torchvision_sets import Torchvision

NAMES = ("aircraft", "cifar_fs", "dtd", "emnist", "eurosat", "fashion_mnist", "fc100", "flowers102", "gtsrb", "kmnist", "svhn")


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load(tmp_path: Path, name: str, *words: str) -> Packed:
    """The data set as its YAML has it, with `words` in place of what is true of the whole files only."""
    cfg = composed(f"dataset={name}", f"data_dir={tmp_path / 'data'}", f"cache_dir={tmp_path / 'cache'}", *words)
    return build(cfg.dataset, "dataset").load()


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_fashion_mnist_files_are_read_and_both_parts_put_together(tmp_path):
    for part, seed in (("train", 1), ("t10k", 2)):
        write_idx(tmp_path / f"data/FashionMNIST/raw/{part}-images-idx3-ubyte", pixels(seed, 20, 28, 28))
        write_idx(tmp_path / f"data/FashionMNIST/raw/{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    found = load(tmp_path, "fashion_mnist", "dataset.images=40")
    assert found.items.shape == (40, 1, 28, 28) and found.names[:2] == ["T-shirt/top", "Trouser"] and set(found.counts) == {4}
    assert np.array_equal(found.items[4:6, 0], pixels(1, 20, 28, 28)[[1, 11]])
    assert np.array_equal(found.items[6:8, 0], pixels(2, 20, 28, 28)[[1, 11]])
    assert [len(found.splits[split]) for split in SPLITS] == [0, 0, 10]
    divided = load(
        tmp_path, "fashion_mnist", "dataset.images=40", "dataset.test_only=false", "dataset.size=32", "dataset.channels=3"
    )
    assert [list(divided.splits[split]) for split in SPLITS] == [[0, 2, 4, 6, 8], [1, 5, 9], [3, 7]]
    assert divided.item_shape == (3, 32, 32)


def test_emnist_is_set_upright(tmp_path):
    for part in ("train", "test"):
        write_idx(tmp_path / f"data/EMNIST/raw/emnist-balanced-{part}-images-idx3-ubyte", pixels(1, 47, 28, 28))
        write_idx(tmp_path / f"data/EMNIST/raw/emnist-balanced-{part}-labels-idx1-ubyte", np.arange(47, dtype=np.uint8))
    found = load(tmp_path, "emnist", "dataset.images=94")
    assert found.names[10] == "A" and np.array_equal(found.items[0, 0], pixels(1, 47, 28, 28)[0].T)


def test_cifar_100_gives_both_published_splits(tmp_path, monkeypatch):
    folder = tmp_path / "data/cifar-100-python"
    folder.mkdir(parents=True)
    fine = sorted(name for names in listed("cifar_fs").values() for name in names)
    for part, seed in (("train", 1), ("test", 2)):
        content = {"data": pixels(seed, 100, 3072), "fine_labels": list(range(100)), "coarse_labels": [0] * 100}
        (folder / part).write_bytes(pickle.dumps(content, 2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": fine, "coarse_label_names": []}, 2))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    for name, sizes in (("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])):
        found = load(tmp_path, name, "dataset.images=200")
        assert found.item_shape == (3, 32, 32) and [len(found.splits[split]) for split in SPLITS] == sizes
        assert {found.names[c] for c in found.splits["test"]} == set(listed(name)["test"])
        assert np.array_equal(found.items[0].ravel(), pixels(1, 100, 3072)[0])


def test_folders_of_eurosat_gtsrb_and_dtd_are_read(tmp_path):
    for c in range(10):
        write_image(tmp_path / f"data/eurosat/2750/Class{c}/Class{c}_1.jpg", pixels(c, 64, 64, 3))
    assert load(tmp_path, "eurosat", "dataset.images=10").names[3] == "Class3"

    rows = []
    for c in range(43):
        write_image(tmp_path / f"data/gtsrb/GTSRB/Training/{c:05d}/00000_00000.ppm", pixels(c, 30, 40, 3))
        write_image(tmp_path / f"data/gtsrb/GTSRB/Final_Test/Images/{c:05d}.ppm", pixels(c, 30, 40, 3))
        rows.append({"Filename": f"{c:05d}.ppm", "ClassId": c})
    table = io.StringIO()
    writer = csv.DictWriter(table, ["Filename", "ClassId"], delimiter=";")
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "data/gtsrb/GT-final_test.csv").write_text(table.getvalue())
    found = load(tmp_path, "gtsrb", "dataset.images=86")
    assert found.names[5] == "005" and [len(found.splits[split]) for split in SPLITS] == [22, 11, 10]

    for part in SPLITS:
        files = [f"kind{c:02d}/kind{c:02d}_{part}.jpg" for c in range(47)]
        for name in files:
            write_image(tmp_path / "data/dtd/dtd/images" / name, pixels(1, 50, 40, 3))
        (tmp_path / "data/dtd/dtd/labels").mkdir(exist_ok=True)
        (tmp_path / f"data/dtd/dtd/labels/{part}1.txt").write_text("\n".join(files))
    assert set(load(tmp_path, "dtd", "dataset.images=141").counts) == {3}


def test_mat_files_of_flowers102_and_svhn_are_read(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io", reason="needs the extra [mat]").savemat
    for module in ("flowers102", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).is_file())
    folder = tmp_path / "data/flowers-102"
    numbers = np.arange(1, 307)  # three images of each kind, one in each part
    for number in numbers:
        write_image(folder / f"jpg/image_{number:05d}.jpg", pixels(int(number), 50, 60, 3))
    savemat(folder / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    savemat(folder / "setid.mat", {"trnid": numbers[:102], "valid": numbers[102:204], "tstid": numbers[204:]})
    found = load(tmp_path, "flowers102", "dataset.images=306")
    assert (
        found.item_shape == (3, 84, 84)
        and set(found.counts) == {3}
        and found.names[:2] == ["pink primrose", "hard-leaved pocket orchid"]
    )
    assert [len(found.splits[split]) for split in SPLITS] == [51, 26, 25]

    for part, seed in (("train", 1), ("test", 2)):
        labels = np.arange(1, 21, dtype=np.uint8) % 10
        labels[labels == 0] = 10  # as the files name the digit 0
        savemat(tmp_path / f"data/{part}_32x32.mat", {"X": pixels(seed, 32, 32, 3, 20), "y": labels[:, None]})
    found = load(tmp_path, "svhn", "dataset.images=40")
    assert found.item_shape == (3, 32, 32) and set(found.counts) == {4}
    assert np.array_equal(found.items[0], pixels(1, 32, 32, 3, 20)[..., 9].transpose(2, 0, 1))  # the first image of a 0
    assert [len(found.splits[split]) for split in SPLITS] == [0, 0, 10]


def test_aircraft_and_kmnist_are_read(tmp_path):
    folder = tmp_path / "data/fgvc-aircraft-2013b/data"
    for part, start in (("train", 0), ("val", 100), ("test", 200)):
        for c in range(100):
            write_image(folder / f"images/{start + c:07d}.jpg", pixels(c, 60, 90, 3))
        (folder / f"images_variant_{part}.txt").write_text("".join(f"{start + c:07d} Type {c:03d}\n" for c in range(100)))
    (folder / "variants.txt").write_text("".join(f"Type {c:03d}\n" for c in range(100)))
    found = load(tmp_path, "aircraft", "dataset.images=300")
    assert found.names[7] == "Type 007" and set(found.counts) == {3} and found.item_shape == (3, 84, 84)
    assert [len(found.splits[split]) for split in SPLITS] == [50, 25, 25]

    for part in ("train", "t10k"):
        write_idx(tmp_path / f"data/KMNIST/raw/{part}-images-idx3-ubyte", pixels(1, 20, 28, 28))
        write_idx(tmp_path / f"data/KMNIST/raw/{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    assert load(tmp_path, "kmnist", "dataset.images=40").names[:2] == ["o", "ki"]


class Fake:
    """A torchvision data set of 4 classes without names, two images each."""

    content: Any = None

    def __init__(self, root: str, part: str = "a", download: bool = False) -> None:
        self.part = part
        if not Path(root, "fake").exists():
            if not download:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            print("Downloading")
            self.fetch(root)

    def fetch(self, root: str) -> None:
        Path(root, "fake").touch()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.full((9, 9), 10 * number + (self.part == "b"), np.uint8)), number % 4


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(torchvision.datasets, "Fake", Fake, raising=False)
    return Fake


def adapter(tmp_path: Path, **options: Any) -> Torchvision:
    given = {
        "classes": 4,
        "images": 16,
        "parts": [{"part": "a"}, {"part": "b"}],
        "files": ["fake/a.zip", "fake/b.zip"],
        "size": 8,
        "channels": 1,
        **options,
    }
    return Torchvision(name="fake", kind="Fake", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), **given)


def test_what_is_absent_is_downloaded_once_and_quietly(fake, tmp_path, capfd):
    found = adapter(tmp_path).load()
    assert found.names == ["000", "001", "002", "003"] and list(found.items[:, 0, 0, 0][:8]) == [0, 40, 1, 41, 10, 50, 11, 51]
    assert capfd.readouterr().out == ""
    (tmp_path / "data/fake").unlink()
    adapter(tmp_path).load()
    assert not (tmp_path / "data/fake").exists(), "the packed form serves"


def test_without_a_network_one_sentence_says_what_to_do(fake, tmp_path, monkeypatch):
    def refuse(self: Fake, root: str) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(fake, "fetch", refuse)
    with pytest.raises(
        ValueError,
        match=r"^data_dir: .* no whole fake, .* downloaded \(no network .*\)\. Put fake/a\.zip, fake/b\.zip there, .*\.$",
    ):
        adapter(tmp_path).load()


def test_a_missing_package_is_named(fake, tmp_path, monkeypatch):
    def refuse(self: Fake, root: str) -> None:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(fake, "fetch", refuse)
    with pytest.raises(ValueError, match=r"^dataset = fake needs the package scipy .* pip install scipy\.$"):
        adapter(tmp_path).load()


@pytest.mark.parametrize("content", ["page", "part"])
def test_a_download_that_was_stopped_ends_in_one_sentence(content, tmp_path):
    """FGVC-Aircraft has no checksum in torchvision: what lies there is unpacked as it is."""
    write_image(tmp_path / "fgvc-aircraft-2013b/data/images/1.png", pixels(1, 99, 99, 3))
    archive = tmp_path / "data/fgvc-aircraft-2013b.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "fgvc-aircraft-2013b", "fgvc-aircraft-2013b")
    archive.write_bytes(archive.read_bytes()[:9000] if content == "part" else b"<!DOCTYPE html>")
    for _ in range(2):  # what was unpacked of it is there the second time
        with pytest.raises(ValueError, match=r"has no whole aircraft, .*; or delete what is there of it, .*\.$"):
            load(tmp_path, "aircraft")
        archive.write_bytes(b"")


def test_two_sets_of_the_same_files_are_not_downloaded_at_once(fake, tmp_path, monkeypatch):
    running = []

    def fetch(self: Fake, root: str) -> None:
        assert not running, "another download is under way"
        running.append(1)
        time.sleep(0.3)
        Path(root, "fake").touch()
        running.clear()

    monkeypatch.setattr(fake, "fetch", fetch)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(lambda size: adapter(tmp_path, size=size).load(), (8, 9)))) == 2


def test_a_class_split_of_another_set_is_refused(fake, tmp_path):
    with pytest.raises(ValueError, match=r"^dataset\.split or name = 'lake', but there is no such class split\."):
        adapter(tmp_path, split="lake")
    with pytest.raises(ValueError, match=r"^dataset\.split = cub has '001\.Black_footed_Albatross', no class of fake\."):
        adapter(tmp_path, split="cub").load()


@pytest.mark.parametrize("options", [{"images": 17}, {"classes": 5}])
def test_other_numbers_than_published_are_refused(fake, tmp_path, options):
    with pytest.raises(ValueError, match=r"has 4 classes and 16 images of fake, expected "):
        adapter(tmp_path, **options).load()


def test_a_broken_image_is_named(fake, tmp_path, monkeypatch):
    def broken(self: Fake, number: int) -> None:
        raise OSError("image file is truncated")

    monkeypatch.setattr(fake, "__getitem__", broken)
    with pytest.raises(ValueError, match=r"^data_dir: image 0 of fake in .* cannot be read \(image file is truncated\)\. .*\.$"):
        adapter(tmp_path).load()


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_names_a_class_of_torchvision_and_parameters_that_it_has(name):
    node = composed(f"dataset={name}").dataset
    parameters = inspect.signature(getattr(torchvision.datasets, node.kind)).parameters
    known = {*parameters, *inspect.signature(torchvision.datasets.MNIST).parameters}  # EMNIST hands its own on
    assert "download" in known and all(key in known for part in node.parts for key in part)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_a_yaml_names_are_those_that_torchvision_downloads_and_where(name):
    node = composed(f"dataset={name}").dataset
    kind = getattr(torchvision.datasets, node.kind)
    source = Path(inspect.getfile(kind)).read_text()
    assert node.files
    for file in node.files:
        for part in Path(file).parts:
            assert f'"{part}"' in source or f'{part}"' in source or part in (kind.__name__, kind.__name__.lower())
