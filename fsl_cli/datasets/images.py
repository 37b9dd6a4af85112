"""Image files of any kind -> items `[C, H, W]`: what the data sets of photographs and `fsl predict` share."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def open_image(path: Path) -> Image.Image:
    """The picture in a file, upright as its EXIF says, transparency on white, in mode L or RGB.

    Raises:
        ValueError: the file is no image, is cut off, or is too large to be honest.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode in ("P", "PA", "LA", "RGBa", "La") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
            if upright.mode == "RGBA":
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            return upright.convert("L" if upright.mode in ("1", "L", "I", "I;16", "F") else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read ({error}). Replace or remove it.") from error


def to_item(image: Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """A picture as a uint8 item `[channels, size, size]`: the shorter side is scaled to `size`, the middle is kept."""
    square = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
