"""Image files of any kind -> items `[C, H, W]`: what the data sets of photographs and `fsl predict` share."""

import io
import reprlib
import struct
import warnings
import zlib
from collections.abc import Set
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow and its decoders raise for damaged bytes and dishonest sizes.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

CHANNELS = (1, 3, 4)  # of an array that is a picture

SUFFIXES: Set[str] = {
    *(".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    *(".apng", ".dib", ".j2k", ".jpf", ".jpx", ".pbm", ".pcx", ".pnm", ".psd"),
}
RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}  # of cameras: Pillow would read a preview at best
OTHERS = RAW | {".avif", ".heic", ".heif", ".jxl", ".svg"}  # pictures that Pillow may be unable to open


def is_image(name: str, suffixes: Set[str] = SUFFIXES) -> bool:
    """Whether a file is called as an image is."""
    return PurePath(name).suffix.lower() in suffixes and not hidden(name)


def hidden(name: str | PurePath) -> bool:
    """Whether a file is what macOS and file managers leave behind."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePath(name).parts)


def check_size(size: int, key: str) -> None:
    """Refuses a side in pixels that no model here could use."""
    if not 8 <= size <= 512:
        raise ValueError(f"{key} = {size}, expected 8 to 512 pixels. Use 84, as the published protocols do.")


def check_shape(size: int, channels: int) -> None:
    """Refuses items that no model here could use."""
    check_size(size, "dataset.size")
    if channels not in (1, 3):
        raise ValueError(f"dataset.channels = {channels}, expected 3 for colour or 1 for grey. Choose one of them.")


def open_image(path: Path | str, content: bytes | None = None, least: int | None = None) -> Image.Image:
    """The picture in a file, upright as its EXIF says, transparency on white, in mode L or RGB.

    `content`: what the file holds, where it lies in an archive; the path is then only what a message calls it. `least`: the
    side in pixels that is enough; a large JPEG is then decoded at a half, a quarter or an eighth of its size, which is faster.

    Raises:
        ValueError: the file is no image, is cut off, or is too large to be honest.
    """
    if PurePath(path).suffix.lower() in RAW - Image.registered_extensions().keys():
        raise _refusal(path, "a camera's raw file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is half as large as is refused is read
            file = Image.open(path if content is None else io.BytesIO(content))
        with file:
            if least is not None:
                file.draft(None, (least, least))
            return plain(file)
    except BROKEN as error:
        raise _refusal(path, _reason(path, error)) from error


def _refusal(path: Path | str, reason: str) -> ValueError:
    return ValueError(f"{path} is not an image that can be read ({reason}). Replace it by a JPEG or PNG, or remove it.")


def _reason(path: Path | str, error: BaseException) -> str:
    """What is wrong with a file, without its name, which Pillow gives as that of a buffer if it lies in an archive."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels: scale it down"
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no format that Pillow knows here"
    if isinstance(error, FileNotFoundError) and Path(path).is_symlink():
        return f"a link to {Path(path).readlink()}, which is not there"
    return str((isinstance(error, OSError) and error.strerror) or error)


def plain(image: Image.Image) -> Image.Image:
    """A picture upright as its EXIF says, transparency on white, in mode L or RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":  # deeper than 8 bits: Pillow would cut off what is brighter than 255
        upright = Image.fromarray(_bytes(np.asarray(upright)))
    if upright.mode in ("P", "PA", "LA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
    if upright.mode == "RGBA":
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("L" if upright.mode in ("1", "L") else "RGB")


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels deeper than 8 bits scaled to uint8, from the narrowest common range that holds the brightest of them.

    Types do not tell the range: 12 bits usually come as 16, and so do 8 after a computation. Floats may range from 0 to 1.
    """
    values = pixels.astype(np.float64)
    most = values.max(initial=0, where=np.isfinite(values))
    values = np.nan_to_num(values, nan=0.0, posinf=most, neginf=0.0)
    ranges = ([1] if pixels.dtype.kind == "f" else []) + [2**bits - 1 for bits in (8, 12, 16)]
    top = next((top for top in ranges if most <= top), most)
    return np.clip(values * (255 / top), 0, 255).astype(np.uint8)


def to_item(image: Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """A picture as a uint8 item `[channels, size, size]`: the shorter side is scaled to `size`, the middle is kept."""
    square = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_image(image: object, number: int) -> Image.Image:
    """An array `[H, W]`, `[H, W, C]` or `[C, H, W]`, or a Pillow image, as `plain` gives it."""
    found = image
    if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.size and image.dtype.kind in "buif":
        if image.shape[0] in CHANNELS and image.shape[2:] and image.shape[2] not in CHANNELS:
            image = np.moveaxis(image, 0, 2)
        if image.dtype not in (np.bool_, np.uint8):
            image = _bytes(image)
        with suppress(TypeError):  # Pillow has no mode for so many channels
            found = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if isinstance(found, Image.Image) and 0 not in found.size:
        try:
            return plain(found)
        except BROKEN as error:  # of a file that Pillow opened, and reads only now
            raise _refusal(f"Image {number}", _reason("", error)) from error
    raise ValueError(
        f"Image {number} is {shown(image)}, expected a file name, a Pillow image, or an array or tensor [H, W], [H, W, C] or "
        "[C, H, W] of 1, 3 or 4 channels, with values from 0 to 255, or floats from 0 to 1. Convert it."
    )


def shown(value: Any) -> str:
    """What a message says that a value is."""
    kind = type(value).__name__
    return f"{kind} {value.dtype} {list(value.shape)}" if hasattr(value, "dtype") else reprlib.repr(value)
