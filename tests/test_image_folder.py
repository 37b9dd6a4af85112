"""The user's own images: how their classes are split, what their files may be, and what is told when they are not right."""

import io
import json
import logging
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support_files import FILES, LISTS, images, picture, write_folder

from fsl_cli.datasets.class_splits import by_hash, from_file
from fsl_cli.datasets.image_folder import ImageFolder
from fsl_cli.datasets.images import open_image, to_item
from fsl_cli.datasets.packed import SPLITS, Packed


def own(root: Path, **options: object) -> Packed:
    given = {"fractions": [0.6, 0.2, 0.2], "size": 8, **options}
    return ImageFolder(root=str(root), cache_dir=str(root.parent / "cache"), **given).load()  # pyright: ignore[reportArgumentType]


def refused(root: Path, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        own(root, **options)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def members(found: Packed) -> dict[str, set[str]]:
    return {split: {found.names[c] for c in numbers} for split, numbers in found.splits.items()}


def blank(*classes: str) -> dict[str, bytes]:
    return {f"{name}/0.png": picture(0, "PNG") for name in classes}


def test_a_class_stays_in_its_split_when_others_come_and_go(tmp_path):
    names = [f"n{c:02d}" for c in range(60)]
    write_folder(tmp_path / "few", images(names[:30:2], 1))
    write_folder(tmp_path / "many", images(names, 1))
    few, many = members(own(tmp_path / "few")), members(own(tmp_path / "many"))
    assert all(few[split] == many[split] & {*names[:30:2]} for split in SPLITS)
    sizes = [len(many[split]) for split in SPLITS]
    assert sum(sizes) == 60 and 28 <= sizes[0] <= 44 and min(sizes) >= 5
    assert members(own(tmp_path / "many", fractions=[0, 0, 1]))["test"] == {*names}


def test_files_that_are_left_out_are_told(tmp_path, caplog):
    write_folder(tmp_path / "own", blank("a", "b") | {"a/notes.txt": b"of mine", "b/.DS_Store": b"of the system"})
    with caplog.at_level(logging.INFO):
        assert own(tmp_path / "own", test_only=True).names == ["a", "b"]
    (said,) = caplog.messages
    assert said == "dataset.root: files whose names do not end as those of images are left out: a/notes.txt"


def test_the_hash_split_is_a_constant(tmp_path):
    write_folder(tmp_path / "own", images(["n01", "n02", "n03", "n04", "n05", "n06", "n07", "n08"], 1))
    found = members(own(tmp_path / "own"))
    assert found == {"train": {"n01", "n04", "n05", "n07", "n08"}, "val": {"n06"}, "test": {"n02", "n03"}}


def test_three_folders_are_the_split(tmp_path):
    files = {f"{split}/{name}": FILES[name] for split, names in LISTS.items() for name in FILES if name[:3] in names}
    write_folder(tmp_path / "own", files)
    assert members(own(tmp_path / "own")) == {"train": {"train/n01", "train/n02"}, "val": {"val/n03"}, "test": {"test/n04"}}


def test_the_folder_for_validation_may_be_called_valid(tmp_path):
    write_folder(tmp_path / "own", blank("train/a", "valid/b", "test/c"))
    assert members(own(tmp_path / "own")) == {"train": {"train/a"}, "val": {"valid/b"}, "test": {"test/c"}}


@pytest.mark.parametrize("folders", [["test", "train"], ["test", "train", "val", "valid"], ["val", "valid"]])
def test_folders_called_as_splits_that_are_not_the_three_are_refused(tmp_path, folders):
    write_folder(tmp_path / "own", blank(*(f"{folder}/{name}" for folder in folders for name in ("a", "b"))))
    said = refused(tmp_path / "own")
    assert f"has the folders {', '.join(folders)}, expected train, val, test with other classes in each" in said


def test_what_stands_beside_the_three_folders_is_refused(tmp_path):
    split = blank("train/a", "train/b", "val/c", "test/d")
    write_folder(tmp_path / "own", split | blank("unlabelled"))
    assert "has the folders test, train, unlabelled, val, expected train, val, test" in refused(tmp_path / "own")
    write_folder(tmp_path / "sheet", split | {"train/contact sheet.png": picture(0, "PNG")})
    assert "has images of no class straight in train. Move them" in refused(tmp_path / "sheet")


def test_the_three_folders_may_have_capital_letters(tmp_path):
    write_folder(tmp_path / "own", blank("Train/a", "VAL/b", "Test/c"))
    assert members(own(tmp_path / "own")) == {"train": {"Train/a"}, "val": {"VAL/b"}, "test": {"Test/c"}}
    write_folder(tmp_path / "same", blank("Train/a", "Val/a", "Test/a"))
    assert "has class 'a' in " in refused(tmp_path / "same")


def test_accents_are_spelt_in_two_ways(tmp_path):
    names = ["Café", "Élan", "Zoë", "naïve", "über", "señor"]
    apart, joined = ([unicodedata.normalize(form, name) for name in names] for form in ("NFD", "NFC"))
    assert apart != joined
    first, second = by_hash(apart, [0.4, 0.3, 0.3]), by_hash(joined, [0.4, 0.3, 0.3])
    assert all(np.array_equal(first[split], second[split]) for split in SPLITS)
    lists = {"train": joined[:2], "val": apart[2:4], "test": joined[4:]}
    (tmp_path / "lists.json").write_text("\ufeff" + json.dumps(lists), encoding="utf-8")
    for found in (from_file(apart, tmp_path / "lists.json", "class"), from_file(joined, tmp_path / "lists.json", "class")):
        assert {split: numbers.tolist() for split, numbers in found.items()} == {"train": [0, 1], "val": [2, 3], "test": [4, 5]}


def test_two_folders_of_equal_names_sizes_and_times_are_two(tmp_path):
    for name, value in (("one", 10), ("two", 200)):
        for where in ("a", "b"):
            (tmp_path / name / where).mkdir(parents=True)
            file = tmp_path / name / where / "0.ppm"
            Image.new("RGB", (8, 8), (value, value, value)).save(file)
            os.utime(file, (10**9, 10**9))
    assert [own(tmp_path / name).items.max() for name in ("one", "two")] == [10, 200]


def test_a_single_folder_called_as_a_split_holds_the_classes(tmp_path):
    write_folder(tmp_path / "own", blank("train/a", "train/b", "train/c"))
    assert set.union(*members(own(tmp_path / "own")).values()) == {"train/a", "train/b", "train/c"}


def test_a_class_in_two_of_the_three_folders_is_refused(tmp_path):
    write_folder(tmp_path / "own", {f"{split}/cat/a.png": picture(1) for split in SPLITS})
    assert "has class 'cat' in test and in train" in refused(tmp_path / "own")


def test_lists_are_the_split(tmp_path):
    write_folder(tmp_path / "own", FILES)
    (tmp_path / "lists.json").write_text(json.dumps({"train": ["n04"], "val": ["n01"], "test": ["n02"]}))
    found = own(tmp_path / "own", lists=str(tmp_path / "lists.json"))
    assert members(found) == {"train": {"n04"}, "val": {"n01"}, "test": {"n02"}}


def test_a_name_that_is_not_in_utf_8_is_refused(tmp_path):
    write_folder(tmp_path / "own", FILES)
    odd = tmp_path / "own" / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    (odd / "a.png").write_bytes(b"")
    assert f"dataset: the name of {tmp_path}/own/caf\\xe9/a.png is not in UTF-8" in refused(tmp_path / "own")


def test_lists_may_hold_numbers(tmp_path):
    (tmp_path / "lists.json").write_text(json.dumps({"train": [7], "val": ["8"], "test": [10, "9"]}))
    found = from_file(["10", "7", "8", "9"], tmp_path / "lists.json", "class")
    assert {split: list(own) for split, own in found.items()} == {"train": [1], "val": [2], "test": [0, 3]}


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
    assert message in refused(tmp_path / "own", lists=str(tmp_path / "lists.json"))


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
        ({"cat/a.png": b"rubbish", "dog/a.png": picture(1)}, r"^dataset\.root: .*own/cat/a\.png is not .*\(its content is of no"),
    ],
)
def test_mistakes_in_a_users_folder_are_told(tmp_path, files, message):
    if files is not None:
        write_folder(tmp_path / "own", files)
    assert re.search(message, refused(tmp_path / "own"))


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
        ImageFolder(root="nowhere", cache_dir="nowhere", **{"fractions": [0.6, 0.2, 0.2], **options})


def test_formats_that_predict_reads_are_no_less_images_here(tmp_path):
    kinds = {"apng": "PNG", "dib": "DIB", "j2k": "JPEG2000", "pbm": "PPM", "pcx": "PCX", "pnm": "PPM"}
    write_folder(tmp_path / "own", {f"{c}/0.{suffix}": picture(c, kind) for suffix, kind in kinds.items() for c in range(2)})
    assert own(tmp_path / "own").counts.tolist() == [6, 6]


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size_and_looks_the_same(tmp_path):
    waves = np.sin(np.arange(400) / 40)
    large = Image.fromarray((120 * (waves[:, None, None] * waves[None, :300, None] * [1, 0.5, -1] + 1)).astype(np.uint8))
    large.save(tmp_path / "large.jpg", quality=95)
    draft = open_image(tmp_path / "large.jpg", least=32)
    assert draft.size == (38, 50)
    whole, fast = (to_item(picture, 16).astype(int) for picture in (open_image(tmp_path / "large.jpg"), draft))
    assert np.abs(whole - fast).mean() < 3


@pytest.mark.parametrize("name", ["n01/phone.HEIC", "n02/drawing.svg", "n03/raw.nef"])
def test_pictures_that_are_not_read_are_named(tmp_path, name):
    write_folder(tmp_path / "own", {**FILES, name: b"?", "n01/._phone.heic": b"", "n01/notes.txt": b"mine"})
    said = refused(tmp_path / "own")
    assert f"own/{name} is no image that is read here. Convert it to png or jpg" in said


def test_a_link_to_nothing_is_named(tmp_path):
    write_folder(tmp_path / "own", FILES)
    (tmp_path / "own" / "n01" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert re.search(
        r"own/n01/gone.png is a link to \S+nowhere.png, which is not there. Mend or remove it.", refused(tmp_path / "own")
    )


def test_a_class_in_two_of_the_three_folders_is_refused_for_a_test_of_all_classes_too(tmp_path):
    write_folder(tmp_path / "mine", {f"{split}/{c}/0.png": picture(1) for split in ("train", "val") for c in ("cat", "dog")})
    with pytest.raises(ValueError, match=r"has class 'cat' in train and in val, .*dataset\.root=.*mine/val\.$"):
        own(tmp_path / "mine", test_only=True)
    assert len(own(tmp_path / "mine" / "val", test_only=True).classes("test")) == 2
