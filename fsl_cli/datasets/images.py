"""Image files of any kind -> items `[C, H, W]`: what the data sets of photographs and `fsl predict` share."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

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


def open_image(path: Path) -> Image.Image:
    """The picture in a file, upright as its EXIF says, transparency on white, in mode L or RGB.

    Raises:
        ValueError: the file is no image, is cut off, or is too large to be honest.
    """
    try:
        with Image.open(path) as file:
            return plain(file)
    except BROKEN as error:
        raise ValueError(f"{path} is not an image that can be read ({error}). Replace or remove it.") from error


def plain(image: Image.Image) -> Image.Image:
    """A picture upright as its EXIF says, transparency on white, in mode L or RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("P", "PA", "LA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
    if upright.mode == "RGBA":
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    if upright.mode[0] in "IF":  # deeper than 8 bits: Pillow would cut off what is brighter than 255
        values = np.asarray(upright, dtype=np.float64)
        upright = Image.fromarray(np.uint8(np.clip(values * _gain(values, upright.mode), 0, 255)))
    return upright.convert("L" if upright.mode in ("1", "L") else "RGB")


def _gain(values: np.ndarray, mode: str) -> float:
    """What brings grey values deeper than 8 bits to 0-255: the range is told by the mode, or by the values themselves."""
    most = values.max(initial=0)
    if mode.startswith("F"):
        return 255 if most <= 1 else 1 if most <= 255 else 255 / most
    return 1 / 257 if mode != "I" or 255 < most <= 65535 else 1 if most <= 255 else 255 / most


def to_item(image: Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """A picture as a uint8 item `[channels, size, size]`: the shorter side is scaled to `size`, the middle is kept."""
    square = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
