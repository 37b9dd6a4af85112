"""Class folders, archives of them, and csv files: the published splits and the user's own images."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_archives import write_folder, write_tar, write_zip
from test_tables import ren

from fsl_cli.datasets import class_splits, photos
from fsl_cli.datasets.image_folder import ImageFolder
from fsl_cli.datasets.packed import SPLITS, Packed
from fsl_cli.datasets.photos import Photos

LISTS = {"train": ["n01", "n02"], "val": ["n03"], "test": ["n04"]}
CLASSES = [name for names in LISTS.values() for name in names]
SIZES = {"mini_imagenet": (64, 16, 20), "tiered_imagenet": (351, 97, 160), "cub": (100, 50, 50), "caltech101": (60, 16, 24),
         "cifar_fs": (64, 16, 20), "fc100": (60, 20, 20)}  # fmt: skip


def picture(seed: int, kind: str = "PNG", width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def images(classes: list[str], each: int = 3, kind: str = "PNG") -> dict[str, bytes]:
    return {f"{c}/{c}{k:02d}.{kind.lower()}": picture(100 * int(c[1:]) + k, kind) for c in classes for k in range(each)}


FILES = images(CLASSES)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data_dir; the split is LISTS, whatever its name."""
    monkeypatch.setattr(photos, "listed", lambda name: LISTS)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def load(data: Path, number: int | None = 12, **options: object) -> Packed:
    given = {"source": "toy*", "size": 8, "images": number, **options}
    return Photos("toy", "https://toy.org", str(data), str(data.parent / "cache"), **given).load()  # pyright: ignore[reportArgumentType]


def expected() -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(FILES[name]))).transpose(2, 0, 1) for name in sorted(FILES)])


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
        "pickles": lambda: [ren(data / "toy", split, 2) for split in SPLITS],
    }


@pytest.mark.parametrize("kind", ["folder", "train, val, test", "noise", "csv", "csv zip", "zip", "tar", "several"])
def test_every_form_of_the_files_gives_the_same_array(data, kind):
    sources(data)[kind]()  # pyright: ignore[reportCallIssue]
    found = load(data)
    assert found.names == CLASSES and list(found.counts) == [3] * 4 and np.array_equal(found.items, expected())
    assert {split: list(own) for split, own in found.splits.items()} == {"train": [0, 1], "val": [2], "test": [3]}
    assert not [path for path in (data.parent / "cache").iterdir() if not path.name.startswith("toy-")], "nothing else is left"


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
    with pytest.raises(ValueError, match=r"^dataset: toy has no train classes as it is split here\. .*test_only"):
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
    assert "n02/n0201.png is not an image that can be read" in refused(data)
    cache = data.parent / "cache"
    assert not list(cache.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", SIZES)
def test_checked_in_splits_have_the_published_sizes_and_share_no_class(name):
    lists = class_splits.listed(name)
    assert tuple(len(lists[split]) for split in SPLITS) == SIZES[name]
    assert len({where for split in SPLITS for where in lists[split]}) == sum(SIZES[name])


def test_cub_and_unlisted_sets_are_split_by_the_same_rule():
    cub, rule = class_splits.listed("cub"), class_splits.by_number(200)
    names = sorted(name for names in cub.values() for name in names)
    assert {split: [names[c] for c in own] for split, own in rule.items()} == cub
    assert {split: len(own) for split, own in class_splits.by_number(47).items()} == {"train": 24, "val": 12, "test": 11}


# --- the user's own folder


def own(root: Path, **options: object) -> Packed:
    given = {"fractions": [0.6, 0.2, 0.2], "size": 8, **options}
    return ImageFolder(str(root), str(root.parent / "cache"), **given).load()  # pyright: ignore[reportArgumentType]


def own_refused(root: Path, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        own(root, **options)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def members(found: Packed) -> dict[str, set[str]]:
    return {split: {found.names[c] for c in numbers} for split, numbers in found.splits.items()}


def test_a_class_stays_in_its_split_when_others_come_and_go(tmp_path):
    names = [f"n{c:02d}" for c in range(60)]
    write_folder(tmp_path / "few", images(names[:30:2], 1))
    write_folder(tmp_path / "many", images(names, 1))
    few, many = members(own(tmp_path / "few")), members(own(tmp_path / "many"))
    assert all(few[split] == many[split] & {*names[:30:2]} for split in SPLITS)
    sizes = [len(many[split]) for split in SPLITS]
    assert sum(sizes) == 60 and 28 <= sizes[0] <= 44 and min(sizes) >= 5
    assert members(own(tmp_path / "many", fractions=[0, 0, 1]))["test"] == {*names}


def test_the_hash_split_is_a_constant(tmp_path):
    write_folder(tmp_path / "own", images(["n01", "n02", "n03", "n04", "n05", "n06", "n07", "n08"], 1))
    found = members(own(tmp_path / "own"))
    assert found == {"train": {"n01", "n04", "n05", "n07", "n08"}, "val": {"n06"}, "test": {"n02", "n03"}}


def test_three_folders_are_the_split(tmp_path):
    files = {f"{split}/{name}": FILES[name] for split, names in LISTS.items() for name in FILES if name[:3] in names}
    write_folder(tmp_path / "own", files)
    assert members(own(tmp_path / "own")) == {"train": {"train/n01", "train/n02"}, "val": {"val/n03"}, "test": {"test/n04"}}


def test_a_class_in_two_of_the_three_folders_is_refused(tmp_path):
    write_folder(tmp_path / "own", {f"{split}/cat/a.png": picture(1) for split in SPLITS})
    assert "has class 'cat' in test and in train" in own_refused(tmp_path / "own")


def test_lists_are_the_split(tmp_path):
    write_folder(tmp_path / "own", FILES)
    (tmp_path / "lists.json").write_text(json.dumps({"train": ["n04"], "val": ["n01"], "test": ["n02"]}))
    found = own(tmp_path / "own", lists=str(tmp_path / "lists.json"))
    assert members(found) == {"train": {"n04"}, "val": {"n01"}, "test": {"n02"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": ["n01"], "val": ["n01"], "test": []}', "'n01' twice"),
        ('{"train": ["cat"], "val": [], "test": []}', "'cat', which is no folder"),
        ('{"train": ["n01"]}', "cannot be used"),
        ("not json", "cannot be used"),
        (None, "cannot be used"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, text, message):
    write_folder(tmp_path / "own", FILES)
    if text is not None:
        (tmp_path / "lists.json").write_text(text)
    assert message in own_refused(tmp_path / "own", lists=str(tmp_path / "lists.json"))


def test_folders_within_folders_are_classes_of_their_own(tmp_path):
    write_folder(tmp_path / "own", {"Latin/a/1.png": picture(1), "Latin/b/1.png": picture(2), "Greek/a/1.png": picture(3)})
    assert own(tmp_path / "own").names == ["Greek/a", "Latin/a", "Latin/b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, r"dataset\.root = .* is no folder"),
        ({"a.png": picture(1), "cat/a.png": picture(1)}, r"has images in no class \(a\.png\), expected root/<class>/<image>"),
        ({"cat/a.png": picture(1)}, "has 1 folders with images, expected two classes or more"),
        ({"cat/a.txt": b"no image"}, "has 0 folders with images"),
        ({"cat/a.png": b"rubbish", "dog/a.png": picture(1)}, r"own/cat/a\.png is not an image"),
    ],
)
def test_mistakes_in_a_users_folder_are_told(tmp_path, files, message):
    if files is not None:
        write_folder(tmp_path / "own", files)
    assert re.search(message, own_refused(tmp_path / "own"))


def test_images_of_any_size_mode_and_direction_become_items(tmp_path):
    turned = Image.new("RGB", (20, 40), "red")
    turned.paste("blue", (0, 20, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    clear = io.BytesIO()
    Image.new("RGBA", (30, 10), (0, 0, 0, 0)).save(clear, "PNG")
    grey = picture(1, width=5, height=90, mode="L")
    write_folder(tmp_path / "own", {"a/1.png": buffer.getvalue(), "a/2.png": clear.getvalue(), "b/1.JPG": grey})
    items = own(tmp_path / "own", size=16).items
    assert items.shape == (3, 3, 16, 16)
    assert tuple(items[0, :, 1, 8]) == (0, 0, 255) and tuple(items[0, :, 14, 8]) == (255, 0, 0)
    assert (items[1] == 255).all(), "transparent is white"
    assert (items[2, 0] == items[2, 1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, r"^dataset\.size = 4, expected 8 to 512"),
        ({"channels": 2}, r"^dataset\.channels = 2, expected 3 for colour or 1 for grey"),
        ({"fractions": [0.5, 0.2]}, r"^dataset\.fractions = \[0\.5, 0\.2\], expected three that sum to 1"),
        ({"crop": -1}, r"^dataset\.crop = -1"),
        ({"jitter": 1.0}, r"^dataset\.jitter = 1\.0"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder("nowhere", "nowhere", **{"fractions": [0.6, 0.2, 0.2], **options})


# --- the real files


@pytest.mark.data
def test_the_real_mini_imagenet_files_have_the_published_names(data_dir):
    """Only the names: decoding them takes a minute."""
    lists = class_splits.listed("mini_imagenet")
    given = json.loads((Path(data_dir) / "splits" / "mini_imagenet.json").read_text())
    assert all(sorted(given[split]) == lists[split] for split in SPLITS)


@pytest.mark.data
def test_the_real_caltech101_is_packed_and_split(data_dir, tmp_path):
    given = ("https://data.caltech.edu", data_dir, str(tmp_path), "caltech*101*")
    found = Photos("caltech101", *given, size=8, images=6359).load()
    assert found.items.shape == (6359, 3, 8, 8) and found.counts.min() == 31 and found.counts.max() == 120
    assert [len(found.classes(split)) for split in SPLITS] == [60, 16, 24]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("source", "number"), [("mini_imagenet_*", 60000), ("mini_imagenet_*[at].tar.xz", 40800)])
def test_the_real_mini_imagenet_is_packed_whole(data_dir, tmp_path, source, number):
    found = Photos("mini_imagenet", "", data_dir, str(tmp_path), source, images=number).load()
    assert found.items.shape[1:] == (3, 84, 84) and [len(found.classes(split)) for split in SPLITS] == [64, 16, 20]
    assert set(found.counts[found.splits["test"]]) == {600}
