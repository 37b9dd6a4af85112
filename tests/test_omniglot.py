"""Omniglot: its files however they lie, its splits and quarter turns, and what is refused."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsl_cli.data import describe
from fsl_cli.datasets import omniglot
from fsl_cli.datasets.omniglot import Omniglot
from fsl_cli.datasets.packed import Packed

CHARACTERS = {
    "images_background": ["Armenian/character01", "Latin/character01", "Latin/character02"],
    "images_evaluation": ["Angelic/character01", "Tibetan/character01"],
}
BACKGROUND, EVALUATION = "images_background", "images_evaluation"


def png(seed: int, mode: str = "1", side: int = 105) -> bytes:
    paper = np.random.default_rng(seed).random((side, side)) > 0.2
    buffer = io.BytesIO()
    Image.fromarray(paper).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def drawings(part: str) -> dict[str, bytes]:
    names = [f"{part}/{c}/{k:04d}_{d:02d}.png" for k, c in enumerate(CHARACTERS[part]) for d in range(1, 4)]
    return {name: png(hash_of(name)) for name in names}


def hash_of(name: str) -> int:
    return sum(ord(letter) * place for place, letter in enumerate(name, 1))


def archive(folder: Path, part: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in reversed(files.items()):  # the order in the archive must not matter
            file.writestr(name, content)
    return folder / f"{part}.zip"


def unpack(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Omniglot: 3 + 2 characters with 3 drawings each, as archives; nothing can be downloaded."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(omniglot, "CHARACTERS", {part: len(names) for part, names in CHARACTERS.items()})
    monkeypatch.setattr(omniglot, "DRAWINGS", 3)
    monkeypatch.setattr(omniglot, "TEST_CHARACTERS", {"lake": 2, "vinyals": 1, "shuffled": 1})
    monkeypatch.setattr(omniglot, "SHUFFLED_VAL", 1)
    monkeypatch.setattr("torchvision.datasets.omniglot.download_and_extract_archive", refuse)
    folder = tmp_path / "data" / "omniglot-py"
    for part in CHARACTERS:
        archive(folder, part, drawings(part))
    return folder


def load(raw: Path, cache: str = "cache", **options: str | bool) -> Packed:
    return Omniglot(str(raw.parent), str(raw.parent.parent / cache), **options).load()  # pyright: ignore[reportArgumentType]


def refusal(raw: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(raw)
    message = str(caught.value)
    assert message.endswith(".") and "expected" in message and str(raw) in message
    cache = raw.parent.parent / "cache"
    assert not cache.exists() or {path.suffix for path in cache.iterdir()} <= {".lock"}, "nothing is left behind"
    return message


@pytest.mark.data
@pytest.mark.parametrize(("split", "sizes"), [("lake", (792, 172, 659)), ("vinyals", (1028, 172, 423))])
def test_omniglot_has_the_published_classes_and_splits(data_dir, cache_dir, split, sizes):
    data = Omniglot(data_dir, cache_dir, split=split, rotations="none").load()
    assert data.items.shape == (32460, 1, 28, 28) and set(np.unique(data.items)) == {0, 255}
    assert 0.07 < (data.items > 0).mean() < 0.09, "ink is white on black"
    assert set(data.counts) == {20} and len(set(data.names)) == 1623
    assert data.names[0] == "Alphabet_of_the_Magi/character01" and data.names[964] == "Angelic/character01"
    parts = [data.splits[name] for name in ("train", "val", "test")]
    assert tuple(map(len, parts)) == sizes
    assert sorted(np.concatenate(parts)) == list(range(1623)), "disjoint and complete"
    alphabets = {data.names[c].split("/")[0] for c in parts[1]}
    assert alphabets == {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}


@pytest.mark.data
def test_the_shuffled_split_has_characters_of_all_alphabets_in_training(data_dir, cache_dir):
    data = Omniglot(data_dir, cache_dir, split="shuffled").load()
    parts = [data.splits[split] for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1100, 100, 423] and sorted(np.concatenate(parts)) == list(range(1623))
    assert len({data.names[c].split("/")[0] for c in parts[0]}) == 50
    assert [data.names[c] for c in parts[2][:2]] == [f"Alphabet_of_the_Magi/character{c}" for c in ("04", "05")]


@pytest.mark.data
def test_the_vinyals_test_split_begins_with_gurmukhi_42(data_dir, cache_dir):
    data = Omniglot(data_dir, cache_dir, split="vinyals").load()
    names = [data.names[c] for c in data.splits["test"]]
    assert names[:5] == [f"Gurmukhi/character{c}" for c in (42, 43, 44, 45)] + ["Kannada/character01"]
    assert names[-1] == data.names[-1] == "ULOG/character26"
    assert [len(data.classes(split)) for split in ("train", "val", "test")] == [4112, 688, 1692]


def test_omniglot_is_two_valued_inverted_and_resized_with_nearest_neighbour(raw):
    data = load(raw)
    with Image.open(io.BytesIO(drawings(BACKGROUND)[f"{BACKGROUND}/Latin/character01/0001_02.png"])) as image:
        expected = 255 * (1 - np.asarray(image.resize((28, 28), Image.Resampling.NEAREST), dtype=np.uint8))
    assert data.names[:3] == CHARACTERS[BACKGROUND] and data.items.dtype == np.uint8
    assert np.array_equal(data.items[4, 0], expected)


def test_splits_are_disjoint_constant_and_complete(raw):
    lake, again, vinyals = load(raw), load(raw), load(raw, split="vinyals")
    assert {split: list(found) for split, found in lake.splits.items()} == {"train": [1, 2], "val": [0], "test": [3, 4]}
    assert {split: list(found) for split, found in vinyals.splits.items()} == {"train": [1, 2, 3], "val": [0], "test": [4]}
    assert all(np.array_equal(lake.splits[split], again.splits[split]) for split in lake.splits)
    shuffled = load(raw, split="shuffled").splits
    assert {split: list(found) for split, found in shuffled.items()} == {"train": [0, 3, 4], "val": [2], "test": [1]}


@pytest.mark.parametrize(("rotations", "turned"), [("all", (8, 4, 8)), ("train", (8, 1, 2)), ("none", (2, 1, 2))])
def test_quarter_turns_are_classes_where_asked(raw, rotations, turned):
    data = load(raw, rotations=rotations)
    assert tuple(len(data.classes(split)) for split in ("train", "val", "test")) == turned


@pytest.mark.parametrize(("rotations", "turned"), [("all", (16, 4, 8)), ("train", (16, 1, 2)), ("none", (4, 1, 2))])
def test_mirror_images_are_classes_of_the_training_where_asked(raw, rotations, turned):
    data = load(raw, rotations=rotations, mirrored=True)
    assert tuple(len(data.classes(split)) for split in ("train", "val", "test")) == turned
    names = data.classes("train").names
    first = names[0]
    assert f"{first} mirrored" in names and (f"{first} mirrored, turned 90" in names) == (rotations != "none")
    copies = " and ".join(["quarter turns"] * (rotations != "none") + ["mirror images"])
    assert f"train: 2 classes ({turned[0]} with {copies}), 6 images" in describe(data)


def test_turned_classes_share_the_items_and_have_names_of_their_own():
    items = np.zeros((5, 1, 2, 2), np.uint8)
    splits = {"train": np.array([0]), "test": np.array([1])}
    data = Packed("toy", items, ["a", "b"], np.array([2, 3]), splits, {"test": (0, 1, 2, 3)})
    test = data.classes("test")
    assert test.names == ["b", "b turned 90", "b turned 180", "b turned 270"]
    assert list(test.starts) == [2] * 4 and list(test.counts) == [3] * 4 and list(test.turns) == [0, 1, 2, 3]
    assert data.classes("train").names == ["a"] and data.item_shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"^split = 'val', but toy has train, test\. Choose one of them\.$"):
        data.classes("val")


def test_archive_folder_and_any_mixture_give_identical_arrays(raw):
    expected = load(raw)
    unpack(raw, drawings(BACKGROUND))
    (raw / f"{BACKGROUND}.zip").unlink()
    mixed = load(raw, "mixed")
    unpack(raw, drawings(EVALUATION) | {f"{EVALUATION}/Tibetan/.DS_Store": b"", f"{EVALUATION}/notes.txt": b"mine"})
    (raw / f"{EVALUATION}.zip").unlink()
    folders = load(raw, "folders")
    for data in (mixed, folders):
        assert data.names == expected.names and np.array_equal(data.items, expected.items)


def test_macos_and_folder_entries_of_an_archive_are_ignored(raw):
    files = drawings(BACKGROUND)
    extra = {f"{BACKGROUND}/": b"", f"__MACOSX/{BACKGROUND}/Latin/character01/._0001_01.png": b"mac"}
    archive(raw, BACKGROUND, extra | files)
    assert len(load(raw).items) == 15
    assert not (raw / BACKGROUND).exists(), "nothing is unpacked on disk"


def test_an_incomplete_folder_gives_way_to_the_archive(raw):
    files = drawings(BACKGROUND)
    unpack(raw, dict(list(files.items())[:4]))
    assert len(load(raw).items) == 15


def test_the_packed_form_serves_when_the_raw_files_are_gone(raw):
    expected = np.array(load(raw).items)
    shutil.rmtree(raw)
    assert np.array_equal(load(raw).items, expected)


def test_without_files_and_network_one_sentence_says_what_to_do(raw):
    (raw / f"{EVALUATION}.zip").unlink()
    with pytest.raises(ValueError) as caught:
        load(raw)
    message = str(caught.value)
    assert f"data_dir: {raw} has no images_evaluation.zip" in message and "no network in tests" in message
    assert "Put images_background.zip and images_evaluation.zip" in message and message.endswith(".")
    assert [path.name for path in raw.iterdir()] == ["images_background.zip"], "no half download is left"


def test_a_download_arrives_whole_and_is_then_read_as_an_archive(raw, monkeypatch):
    content = (raw / f"{EVALUATION}.zip").read_bytes()
    (raw / f"{EVALUATION}.zip").unlink()

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        assert url.endswith("/python/images_evaluation.zip") and len(md5) == 32
        assert Path(root).parent.parent == raw, "it is drafted beside its place"
        (Path(root) / EVALUATION).mkdir(parents=True)
        (Path(root) / filename).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.omniglot.download_and_extract_archive", fetch)
    monkeypatch.setattr(
        "torchvision.datasets.Omniglot._check_integrity", lambda self: Path(self.root, f"{EVALUATION}.zip").is_file()
    )
    assert len(load(raw).items) == 15
    assert sorted(path.name for path in raw.iterdir()) == [f"{BACKGROUND}.zip", f"{EVALUATION}.zip"]


def test_a_truncated_archive_is_refused(raw):
    path = raw / f"{BACKGROUND}.zip"
    path.write_bytes(path.read_bytes()[:2000])
    message = refusal(raw)
    assert "images_background.zip has a broken archive of 2000 bytes" in message
    assert "expected 3 characters with 3 drawings each. Delete it" in message


def test_a_web_page_saved_as_archive_is_refused(raw):
    (raw / f"{EVALUATION}.zip").write_text("\n<!DOCTYPE html><title>404</title>")
    assert "images_evaluation.zip has a web page, expected 2 characters" in refusal(raw)


def test_an_archive_of_something_else_is_refused(raw):
    archive(raw, BACKGROUND, {"cats/tom.png": png(1), "../../evil.png": png(2)})
    assert "images_background.zip has 0 characters, expected 3 characters" in refusal(raw)


def test_an_archive_of_the_other_part_is_refused(raw):
    shutil.copy(raw / f"{EVALUATION}.zip", raw / f"{BACKGROUND}.zip")
    assert "images_background.zip has 0 characters" in refusal(raw)


def test_a_missing_drawing_is_refused(raw):
    files = drawings(BACKGROUND)
    files.pop(f"{BACKGROUND}/Latin/character02/0002_03.png")
    archive(raw, BACKGROUND, files)
    assert f"has {BACKGROUND}/Latin/character02 with 2 drawings, expected 3" in refusal(raw)


def test_an_incomplete_folder_without_archive_is_refused(raw):
    files = drawings(EVALUATION)
    unpack(raw, dict(list(files.items())[:3]))
    (raw / f"{EVALUATION}.zip").unlink()
    assert f"{raw / EVALUATION} has 1 characters, expected 2 characters" in refusal(raw)


def test_an_absurdly_large_member_is_refused_before_it_is_read(raw):
    name = f"{BACKGROUND}/Latin/character01/0001_01.png"
    archive(raw, BACKGROUND, drawings(BACKGROUND) | {name: bytes(10_000_000)})
    assert f"images_background.zip has {name} with 10000000 bytes" in refusal(raw)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (png(1)[:400], "truncated"),
        (b"no image at all", "cannot identify image file"),
        (png(1, "L"), "mode L, 105x105 pixels"),
        (png(1, side=28), "mode 1, 28x28 pixels"),
    ],
)
@pytest.mark.parametrize("where", ["archive", "folder"])
def test_a_broken_drawing_is_refused_by_name(raw, content, found, where):
    name = f"{BACKGROUND}/Latin/character01/0001_01.png"
    files = drawings(BACKGROUND) | {name: content}
    unpack(raw, files) if where == "folder" else archive(raw, BACKGROUND, files)
    message = refusal(raw)
    assert name in message and found in message and "expected a two-valued PNG of 105x105 pixels" in message


def test_a_damaged_byte_in_an_archive_is_noticed(raw):
    path = raw / f"{BACKGROUND}.zip"
    with zipfile.ZipFile(path) as file:
        info = file.infolist()[4]
    content = bytearray(path.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 0xFF
    path.write_bytes(content)
    assert info.filename in refusal(raw)


def test_the_size_is_checked_at_once():
    with pytest.raises(ValueError, match=r"^dataset\.size = 2, expected 8 to 224 pixels\. .*\.$"):
        Omniglot("nowhere", "nowhere", size=2)
