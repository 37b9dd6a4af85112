"""Photographs with a published split, from class folders, archives of them, csv files or arrays."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support_files import CLASSES, FILES, LISTS, images, picture, ren, write_folder, write_tar, write_zip

from fsl_cli.datasets import class_splits, photos
from fsl_cli.datasets.packed import SPLITS, Packed
from fsl_cli.datasets.photos import Photos

SIZES = {"imagenet": (864, 36, 100), "mini_imagenet": (64, 16, 20), "tiered_imagenet": (351, 97, 160), "cub": (100, 50, 50),
         "caltech101": (60, 16, 24), "cifar_fs": (64, 16, 20), "fc100": (60, 20, 20)}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data_dir; the split is LISTS, whatever its name."""
    monkeypatch.setattr(photos, "listed", lambda name: LISTS)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def load(data: Path, number: int | None = 12, **options: object) -> Packed:
    given = {"name": "toy", "home": "https://toy.org", "source": "toy*", "size": 8, "images": number, **options}
    return Photos(data_dir=str(data), cache_dir=str(data.parent / "cache"), **given).load()  # pyright: ignore[reportArgumentType]


def expected() -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(FILES[name]))).transpose(2, 0, 1) for name in sorted(FILES)])


WITHIN = ("archives in a folder", "csv beside an archive")


def within(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def csvs(folder: str) -> dict[str, bytes]:
    lines = {split: [f"{c}{k:02d}.png,{c}" for c in names for k in range(3)] for split, names in LISTS.items()}
    return {f"{folder}/{split}.csv": "\n".join(["filename,label", *lines[split]]).encode() for split in SPLITS}


def sources(data: Path) -> dict[str, object]:
    flat = {f"toy/images/{Path(name).name}": content for name, content in FILES.items()} | csvs("toy")
    split = {f"toy/{s}/{name}": FILES[name] for s, names in LISTS.items() for name in FILES if name[:3] in names}
    noise = {"toy/n01/.DS_Store": b"", "toy/n99/a.png": picture(1), "toy/__MACOSX/n01/._n0100.png": b"mac", "toy/read.me": b"hi"}
    return {
        "folder": lambda: write_folder(data, within("toy", FILES)),
        "train, val, test": lambda: write_folder(data, split),
        "noise": lambda: write_folder(data, within("toy", FILES) | noise),
        "csv": lambda: write_folder(data, flat),
        "csv zip": lambda: write_zip(data / "toy.zip", flat),
        "zip": lambda: write_zip(data / "toy.zip", within("toy", FILES)),
        "tar": lambda: write_tar(data / "toy.tar", within("any/where", FILES), "w"),
        "several": lambda: [
            write_tar(data / "toy_a.tar.xz", within("toy", images(CLASSES[:2]))),
            write_zip(data / "toy_b.zip", within("toy", images(CLASSES[2:]))),
        ],
        "archives in a folder": lambda: [
            (data / "toy").mkdir(),
            *(write_tar(data / "toy" / f"{s}.tar", {n: FILES[n] for n in FILES if n[:3] in names}) for s, names in LISTS.items()),
        ],
        "csv beside an archive": lambda: [
            write_folder(data, csvs("toy")),
            write_zip(data / "toy" / "images.zip", {Path(name).name: content for name, content in FILES.items()}),
        ],
        "pickles": lambda: [ren(data / "toy", split, 2) for split in SPLITS],
    }


@pytest.mark.parametrize("kind", ["folder", "train, val, test", "noise", "csv", "csv zip", "zip", "tar", "several", *WITHIN])
def test_every_form_of_the_files_gives_the_same_array(data, kind):
    sources(data)[kind]()  # pyright: ignore[reportCallIssue]
    found = load(data)
    assert found.names == CLASSES and list(found.counts) == [3] * 4 and np.array_equal(found.items, expected())
    assert {split: list(own) for split, own in found.splits.items()} == {"train": [0, 1], "val": [2], "test": [3]}
    assert not [path for path in (data.parent / "cache").iterdir() if not path.name.startswith(("toy-", ".toy-"))], (
        "nothing else is left"
    )


def test_pickles_in_a_folder_are_found(data):
    (data / "toy").mkdir()
    sources(data)["pickles"]()  # pyright: ignore[reportCallIssue]
    found = load(data)
    assert found.names == CLASSES and [len(own) for own in found.splits.values()] == [2, 1, 1]


def test_arrays_without_names_are_split_by_their_files(data):
    for split, names in LISTS.items():
        np.savez(data / f"toy_{split}.npz", images=np.zeros((len(names), 3, 8, 8, 3), np.uint8))
    found = load(data)
    assert found.names == ["test/0000", "train/0000", "train/0001", "val/0000"]
    assert {split: list(own) for split, own in found.splits.items()} == {"train": [1, 2], "val": [3], "test": [0]}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_usual_format_is_read(data, kind):
    write_folder(data / "toy", images(CLASSES, kind=kind))
    pixels = load(data).items.astype(int)
    assert np.abs(pixels - expected()).mean() < (1 if kind in ("WEBP", "BMP", "TIFF") else 60)


def test_an_absolute_source_and_grey_items_of_another_size(data, tmp_path):
    write_folder(tmp_path / "elsewhere", FILES)
    found = load(data, source=str(tmp_path / "elsewhere"), size=16, channels=1)
    assert found.items.shape == (12, 1, 16, 16)


def test_changed_files_are_packed_anew_and_unchanged_ones_are_not(data, monkeypatch):
    write_folder(data / "toy", FILES)
    before = np.array(load(data).items)
    with monkeypatch.context() as patched:
        patched.setattr(photos.trees, "read", lambda *args: pytest.fail("the files were read again"))
        load(data)
    (data / "toy" / "n01" / "n0100.png").write_bytes(picture(7, width=9))
    assert not np.array_equal(before, load(data).items)


def test_all_classes_can_be_test_classes(data):
    write_folder(data / "toy", FILES)
    found = load(data, test_only=True)
    assert len(found.classes("test")) == 4
    with pytest.raises(ValueError, match=r"^dataset: of the 4 classes of toy none is a train class .*test_only"):
        found.classes("train")


def refused(data: Path, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        load(data, **options)  # pyright: ignore[reportArgumentType]
    assert str(caught.value).endswith(".")
    return str(caught.value)


def test_missing_files_are_named_with_their_home(data):
    message = refused(data)
    assert f"data_dir: {data} has no toy*" in message and "https://toy.org" in message and "dataset.source=PATH" in message


def test_another_number_of_images_is_refused_and_can_be_asked_for(data):
    write_folder(data / "toy", images(CLASSES[:2], 2) | images(CLASSES[2:]))
    message = refused(data)
    assert "has 10 images, expected 12 (class n01 has 2, class n03 has 3)" in message and "dataset.images=10" in message
    assert list(load(data, 10).counts) == list(load(data, None).counts) == [2, 2, 3, 3]


def ilsvrc(each: int) -> dict[str, bytes]:
    """The files of the four classes and another one, as ImageNet calls them; number 7 of each class is missing there."""
    numbers = [*range(1, 7), *range(8, 40)][:each]
    return {f"train/{c}/{c}_{k}.JPEG": picture(100 * int(c[1:]) + k, "JPEG") for c in [*CLASSES, "n99"] for k in numbers}


def test_a_folder_of_imagenet_is_read(data):
    write_folder(data / "ILSVRC2012", ilsvrc(3) | {"val/ILSVRC2012_val_00000001.JPEG": picture(1)})
    assert load(data, source="ILSVRC*/train").names == CLASSES
    assert load(data, source=str(data / "ILSVRC2012" / "train")).names == CLASSES


def test_what_imagenet_has_more_is_left_out_by_csv_files_that_name_the_images(data):
    write_folder(data / "ILSVRC2012", ilsvrc(12))
    (data / "toy").mkdir()
    (data / "toy" / "images").symlink_to(data / "ILSVRC2012" / "train")
    message = refused(data)
    assert "has 48 images, expected 12 " in message and "put csv files that name what is beside the class folders" in message
    lines = [f"{c}{place:08d}.jpg,{c}" for c in CLASSES for place in (2, 7, 11)]  # by place in the order of the numbers
    (data / "toy" / "all.csv").write_text("\n".join(["filename,label", *lines]))
    pixels = [ilsvrc(12)[f"train/{c}/{c}_{number}.JPEG"] for c in CLASSES for number in (2, 8, 12)]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1) for content in pixels])
    assert np.array_equal(load(data).items, expected)


def test_csv_files_may_name_some_of_the_images_by_their_own_names(data):
    names = {f"{c}{k:02d}.png": f"{c}{place:08d}.jpg" for c in CLASSES for place, k in enumerate([3, 0, 4, 1, 2], start=1)}
    every = {f"{c[:3]}/{names[c]}": content for c, content in ((Path(n).name, x) for n, x in images(CLASSES, 5).items())}
    lines = "\n".join(f"{names[Path(name).name]},{name[:3]}" for name in FILES)
    write_folder(data / "toy", every | {"list.csv": lines.encode()})
    assert sorted(item.tobytes() for item in load(data).items) == sorted(item.tobytes() for item in expected())


def test_a_missing_class_is_refused_by_name(data):
    write_folder(data / "toy", images(["n01", "n03", "n04"]))
    assert "has 1 train classes, expected the 2 of toy (first missing: n02)" in refused(data)


def test_the_same_image_in_two_archives_is_refused(data):
    for name in ("toy_a.zip", "toy_b.zip"):
        write_zip(data / name, FILES)
    assert "class n01 has n0100.png twice" in refused(data)


@pytest.mark.parametrize(
    "content", [b"", b"no image", picture(1)[:60], picture(1, "JPEG", 64, 64)[:500]], ids=["empty", "text", "png", "jpeg"]
)
@pytest.mark.parametrize("writer", ["folder", "zip"])
def test_a_corrupt_image_is_named(data, content, writer):
    files = FILES | {"n02/n0201.png": content}
    write_folder(data / "toy", files) if writer == "folder" else write_zip(data / "toy.zip", files)
    said = refused(data)
    where = data / ("toy" if writer == "folder" else "toy.zip") / "n02" / "n0201.png"
    assert said.startswith(f"dataset.source: {where} is not an image that can be read (")
    assert said.endswith("). Replace it by a JPEG or PNG, or remove it.")
    assert "BytesIO" not in said
    cache = data.parent / "cache"
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"], "nothing is left behind"


@pytest.mark.parametrize("name", ["toy/101_Categories.tar.gz", "toy/train.pkl"])
def test_what_is_packed_twice_is_named(data, name):
    source = write_zip(data / "toy.zip", {name: b"more"})
    repair = "Unpack toy.zip, and set dataset.source to its folder."
    assert refused(data) == f"dataset.source: {source / name} is not read where it is. {repair}"
    source.unlink()
    write_folder(data, {f"toy/deeper/{name}": b"more"})
    assert refused(data).endswith(f"{name} is not read where it is. Set dataset.source to its folder.")


def test_a_table_of_something_else_is_no_list(data):
    flat = {f"toy/images/{Path(name).name}": content for name, content in FILES.items()} | csvs("toy")
    write_folder(data, flat | {"toy/boxes.csv": b'"' + b"1" * 200_000})
    assert load(data).names == CLASSES


@pytest.mark.parametrize("name", SIZES)
def test_checked_in_splits_have_the_published_sizes_and_share_no_class(name):
    lists = class_splits.listed(name)
    assert tuple(len(lists[split]) for split in SPLITS) == SIZES[name]
    assert len({where for split in SPLITS for where in lists[split]}) == sum(SIZES[name])


def test_the_split_of_imagenet_is_in_the_order_of_a_hash_and_knows_the_classes_of_its_parts():
    lists = class_splits.listed("imagenet")
    names = {name for split in SPLITS for name in lists[split]}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert lists == {"train": sorted(order[:864]), "val": sorted(order[864:900]), "test": sorted(order[900:])}
    for part in ("mini_imagenet", "tiered_imagenet"):
        assert {name for own in class_splits.listed(part).values() for name in own} <= names


def test_cub_and_unlisted_sets_are_split_by_the_same_rule():
    cub, rule = class_splits.listed("cub"), class_splits.by_number(200)
    names = sorted(name for names in cub.values() for name in names)
    assert {split: [names[c] for c in own] for split, own in rule.items()} == cub
    assert {split: len(own) for split, own in class_splits.by_number(47).items()} == {"train": 24, "val": 12, "test": 11}


@pytest.mark.data
def test_the_real_mini_imagenet_files_have_the_published_names(data_dir):
    """Only the names: decoding them takes a minute."""
    lists = class_splits.listed("mini_imagenet")
    given = json.loads((Path(data_dir) / "splits" / "mini_imagenet.json").read_text())
    assert all(sorted(given[split]) == lists[split] for split in SPLITS)


@pytest.mark.data
def test_the_real_caltech101_is_packed_and_split(data_dir, tmp_path):
    given = {"data_dir": data_dir, "cache_dir": str(tmp_path), "source": "caltech*101*", "size": 8, "images": 6359}
    found = Photos(name="caltech101", home="https://data.caltech.edu", **given).load()
    assert found.items.shape == (6359, 3, 8, 8) and found.counts.min() == 31 and found.counts.max() == 120
    assert [len(found.classes(split)) for split in SPLITS] == [60, 16, 24]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("source", "number"), [("mini_imagenet_*", 60000), ("mini_imagenet_*[at].tar.xz", 40800)])
def test_the_real_mini_imagenet_is_packed_whole(data_dir, tmp_path, source, number):
    given = {"data_dir": data_dir, "cache_dir": str(tmp_path), "source": source, "images": number}
    found = Photos(name="mini_imagenet", home="", **given).load()
    assert found.items.shape[1:] == (3, 84, 84) and [len(found.classes(split)) for split in SPLITS] == [64, 16, 20]
    assert set(found.counts[found.splits["test"]]) == {600}


def test_the_number_of_images_is_read_anew(data: Path):
    labels = ["filename,label", *(f"{c}{k:02d}.png,{c}" for names in LISTS.values() for c in names for k in range(2))]
    write_folder(data, within("toy", FILES) | {"toy/chosen.csv": "\n".join(labels).encode()})
    for number, expected in ((None, 12), (8, 8), (None, 12)):
        assert load(data, number).counts.sum() == expected
