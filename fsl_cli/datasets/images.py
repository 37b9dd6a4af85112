"""Converts image files of any kind to items `[C, H, W]`; shared by the data sets of photographs and `fsl predict`."""

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

# What Pillow and its decoders raise for damaged or hostile files.
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

ARRAY_CHANNELS = (1, 3, 4)  # the numbers of channels that an array may have

SUFFIXES: Set[str] = {
    *(".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    *(".apng", ".dib", ".j2k", ".jpf", ".jpx", ".pbm", ".pcx", ".pnm", ".psd"),
}
RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}  # camera raw: at best, Pillow would read a preview
OTHERS = RAW | {".avif", ".heic", ".heif", ".jxl", ".svg"}  # pictures that Pillow may be unable to open


def is_image(name: str, suffixes: Set[str] = SUFFIXES) -> bool:
    """Whether a file has the suffix of an image and is not hidden."""
    return PurePath(name).suffix.lower() in suffixes and not hidden(name)


def hidden(name: str | PurePath) -> bool:
    """Whether a file is hidden, or one that macOS and file managers leave behind."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePath(name).parts)


def check_size(size: int, key: str) -> None:
    """Refuses a side in pixels that no model could use."""
    if not 8 <= size <= 512:
        raise ValueError(f"{key} = {size}, expected 8 to 512 pixels. Use 84, as the published protocols do.")


def check_shape(size: int, channels: int) -> None:
    """Refuses an item shape that no model could use."""
    check_size(size, "dataset.size")
    if channels not in (1, 3):
        raise ValueError(f"dataset.channels = {channels}, expected 3 for colour or 1 for grey. Choose one of them.")


def open_image(path: Path | str, content: bytes | None = None, least: int | None = None) -> Image.Image:
    """Opens a picture, rotated according to EXIF, with transparency on white, in mode L or RGB.

    `content`: the file's bytes, if it is in an archive; `path` then only serves for messages. `least`: the side in pixels
    that is needed; a large JPEG is then decoded at a half, a quarter or an eighth of its size, which is faster.

    Raises:
        ValueError: the file is no image, is truncated, or has too many pixels (a decompression bomb).
    """
    if PurePath(path).suffix.lower() in RAW - Image.registered_extensions().keys():
        raise _refusal(path, "a camera's raw file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # raised at half of the size that is refused
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
    """What is wrong with a file, without the file name in Pillow's message, which may be that of a buffer."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels: scale it down"
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no format that Pillow knows here"
    if isinstance(error, FileNotFoundError) and Path(path).is_symlink():
        return f"a link to {Path(path).readlink()}, which is not there"
    return str((isinstance(error, OSError) and error.strerror) or error)


def plain(image: Image.Image) -> Image.Image:
    """The picture rotated according to EXIF, with transparency on white, in mode L or RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":  # deeper than 8 bits: Pillow would clip at 255
        upright = Image.fromarray(_bytes(np.asarray(upright)))
    if upright.mode in ("P", "PA", "LA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
    if upright.mode == "RGBA":
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("L" if upright.mode in ("1", "L") else "RGB")


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Scales pixels deeper than 8 bits to uint8, from the narrowest of the usual ranges that holds the brightest pixel.

    The type does not tell the range: 12-bit images are stored in 16 bits, and arithmetic widens 8 bits. Floats may be in [0, 1].
    """
    values = pixels.astype(np.float64)
    most = values.max(initial=0, where=np.isfinite(values))
    values = np.nan_to_num(values, nan=0.0, posinf=most, neginf=0.0)
    ranges = ([1] if pixels.dtype.kind == "f" else []) + [2**bits - 1 for bits in (8, 12, 16)]
    top = next((top for top in ranges if most <= top), most)
    return np.clip(values * (255 / top), 0, 255).astype(np.uint8)


def to_item(image: Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """Converts a picture to a uint8 item `[channels, size, size]`: scales the shorter side to `size`, and crops the centre."""
    square = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_image(image: object, number: int) -> Image.Image:
    """Converts an array `[H, W]`, `[H, W, C]` or `[C, H, W]`, or a Pillow image, as `plain` does; `number`: for messages."""
    found = image
    if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.size and image.dtype.kind in "buif":
        if image.shape[0] in ARRAY_CHANNELS and image.shape[2:] and image.shape[2] not in ARRAY_CHANNELS:
            image = np.moveaxis(image, 0, 2)
        if image.dtype not in (np.bool_, np.uint8):
            image = _bytes(image)
        with suppress(TypeError):  # Pillow has no mode for this number of channels
            found = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if isinstance(found, Image.Image) and 0 not in found.size:
        try:
            return plain(found)
        except BROKEN as error:  # Pillow decodes an opened file only now
            raise _refusal(f"Image {number}", _reason("", error)) from error
    raise ValueError(
        f"Image {number} is {shown(image)}, expected a file name, a Pillow image, or an array or tensor [H, W], [H, W, C] or "
        "[C, H, W] of 1, 3 or 4 channels, with values from 0 to 255, or floats from 0 to 1. Convert it."
    )


def shown(value: Any) -> str:
    """Describes a value in a message."""
    kind = type(value).__name__
    return f"{kind} {value.dtype} {list(value.shape)}" if hasattr(value, "dtype") else reprlib.repr(value)
