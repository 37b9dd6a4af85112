"""Any image file becomes an item, upright and as the data set of the training would have made it; damaged ones are named."""

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsl_cli.datasets.drawings import to_drawing
from fsl_cli.datasets.images import as_image, open_image, plain, to_item
from fsl_cli.datasets.omniglot import Omniglot
from fsl_cli.datasets.strokes import Strokes

RAMP = Image.fromarray(np.arange(0, 240, 2, dtype=np.uint8).reshape(10, 12))  # 12 wide, 10 high
ROTATED = 274, 6  # the EXIF tag of the orientation, and "turn me by 90 degrees"


def saved(path: Path, image: Image.Image, **options) -> Image.Image:
    image.save(path, **options)
    return open_image(path)


def test_the_orientation_of_a_camera_is_honoured(tmp_path: Path):
    exif = Image.Exif()
    exif[ROTATED[0]] = ROTATED[1]
    found = saved(tmp_path / "a.jpg", RAMP, exif=exif, quality=100)
    assert found.size == (10, 12)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(RAMP.transpose(Image.Transpose.ROTATE_270))).max() < 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "HSV", "LAB", "YCbCr"])
def test_every_mode_becomes_grey_or_colour(mode: str, tmp_path: Path):
    wide = mode.startswith(("I", "F"))
    image = (RAMP if mode in ("1", "LA", "P", "F") else RAMP.convert("RGB")).convert(mode if not mode.startswith("I") else "L")
    if mode.startswith("I"):
        image = Image.fromarray(np.asarray(RAMP).astype(np.int32 if mode == "I" else np.uint16) * 257)
    found = saved(tmp_path / "a.tif", image) if mode not in ("HSV", "LA") else plain(image)
    assert found.mode in ("L", "RGB")
    if mode not in ("1", "LAB"):
        assert np.abs(np.asarray(found.convert("L")).astype(int) - np.asarray(RAMP)).max() <= (1 if wide else 6)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_deep_pictures_keep_their_contrast(kind: type, top: int):
    values = np.linspace(0, top, 100).round().reshape(10, 10).astype(kind)
    assert np.abs(np.asarray(plain(Image.fromarray(values))) - np.linspace(0, 255, 100).reshape(10, 10)).max() <= 1
    assert np.array_equal(np.asarray(as_image(values, 1)), np.asarray(plain(Image.fromarray(values))))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_spoils_no_other(odd: float, tmp_path: Path):
    values = np.linspace(0, 200, 100, dtype=np.float32).reshape(10, 10)
    whole = saved(tmp_path / "a.tif", Image.fromarray(values))
    values[0, 0] = odd
    found = saved(tmp_path / "b.tif", Image.fromarray(values))
    assert np.array_equal(np.asarray(found)[1:], np.asarray(whole)[1:]) and np.asarray(found).max() == 200


def test_large_pictures_are_read_and_huge_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with warnings.catch_warnings(record=True) as warned:
        assert open_image(tmp_path / "a.png").size == (20, 20)
    assert not warned
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"it has more than 0 megapixels: scale it down"):
        open_image(tmp_path / "a.png")


def test_what_is_transparent_is_white(tmp_path: Path):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    for name, image in {"a.png": clear, "b.webp": clear, "c.png": clear.convert("LA")}.items():
        options = {"lossless": True} if name.endswith("webp") else {}
        values = np.asarray(saved(tmp_path / name, image, **options).convert("L"))
        assert (values[0, 0], values[3, 3]) == (0, 255), name
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 1)
    values = np.asarray(saved(tmp_path / "d.gif", palette, transparency=0))
    assert values[0, 0].tolist() == [200, 100, 50]
    assert values[3, 3].tolist() == [255, 255, 255]
    deep = Image.fromarray(np.array([[0, 32768], [65535, 32768]], np.uint16))
    assert np.asarray(saved(tmp_path / "e.png", deep, transparency=1)).tolist() == [[0, 127], [255, 127]]


def test_damaged_files_of_every_format_are_named_and_nothing_else_is_raised(tmp_path: Path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    refused = 0
    path = tmp_path / "a"
    for form in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO", "PCX"):
        stream = io.BytesIO()
        noise.save(stream, form)
        for attempt in range(30):
            damaged = bytearray(stream.getvalue())
            for place in rng.integers(0, min(len(damaged), 400), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(bytes(damaged[: len(damaged) // 2] if attempt % 3 == 0 else damaged))
            with warnings.catch_warnings(action="ignore"):
                try:
                    open_image(path)
                except ValueError as error:
                    assert str(path) in str(error)
                    refused += 1
    assert refused > 60
    for content in (b"", b"not an image"):
        path.write_bytes(content)
        for place, given in ((path, None), ("toy.zip/a.png", content)):
            with pytest.raises(ValueError) as caught:
                open_image(place, given)
            reason = "its content is of no format that Pillow knows here"
            repair = "Replace it by a JPEG or PNG, or remove it."
            assert str(caught.value) == f"{place} is not an image that can be read ({reason}). {repair}"


def test_an_item_has_the_shape_that_was_trained_on():
    tall = Image.new("RGB", (30, 90), "red")
    assert to_item(tall, 20).shape == (3, 20, 20)
    assert to_item(tall, 20, 1).shape == (1, 20, 20)
    assert Omniglot.item(RAMP, (1, 28, 28)).shape == Strokes.item(RAMP.convert("RGB"), (1, 28, 28)).shape == (1, 28, 28)


def test_a_drawing_is_the_same_on_white_and_on_black_large_and_small(cache_dir: str):
    items = Strokes(cache_dir, 1, 1, 12, 3).load().items
    for item in items[6::3]:
        ink = Image.fromarray(255 - item[0])
        for drawing in (ink, Image.eval(ink, lambda v: 255 - v), ink.convert("RGB"), Image.eval(ink, lambda v: 90 + v // 3)):
            assert np.array_equal(to_drawing(drawing, (1, 28, 28)), item)
        large = to_drawing(ink.resize((840, 840), Image.Resampling.BICUBIC), (1, 28, 28))
        assert (large != item).mean() < 0.05
        wide = to_drawing(Image.fromarray(np.pad(255 - item[0], ((0, 0), (14, 14)), constant_values=255)), (1, 28, 28))
        assert wide.any(axis=(0, 2)).sum() < 20  # the page was completed to a square, not stretched
    assert not to_drawing(Image.new("L", (50, 50), 200), (1, 28, 28)).any()
    assert to_drawing(Image.new("L", (400_000, 4), 200), (1, 28, 28)).shape == (1, 28, 28)  # 149 GiB as a square of that side


def test_a_fine_pen_on_a_large_page_stays():
    for side, pen in ((1000, 3), (4000, 5), (80, 1), (300, 20)):
        page = np.full((side, side), 255, np.uint8)
        page[side // 10 : side * 9 // 10, side // 2 : side // 2 + pen] = 0
        item = to_drawing(Image.fromarray(page), (1, 28, 28))[0] > 0
        assert 21 <= item.any(1).sum() <= 24, side
        assert 1 <= item.any(0).sum() <= 2, side


@pytest.mark.data
def test_files_of_omniglot_give_the_items_of_the_data_set(data_dir: str, cache_dir: str):
    data = Omniglot(data_dir, cache_dir).load()
    with zipfile.ZipFile(Path(data_dir) / "omniglot-py" / "images_evaluation.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[:400:7]
        for name in names:
            number = data.names.index(name.removeprefix("images_evaluation/").rpartition("/")[0])
            drawing = 20 * number + int(name[-6:-4]) - 1
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert np.array_equal(Omniglot.item(image.convert("L"), (1, 28, 28)), data.items[drawing]), name
