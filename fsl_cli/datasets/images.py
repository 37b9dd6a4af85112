"""Image files of any kind -> items `[C, H, W]`: what the data sets of photographs and `fsl predict` share."""

import io
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def is_image(name: str) -> bool:
    """Whether a file is called as an image is; what macOS and file managers leave behind is none."""
    path = PurePath(name)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def check_shape(size: int, channels: int) -> None:
    """Refuses items that no model here could use."""
    if not 8 <= size <= 512:
        raise ValueError(f"dataset.size = {size}, expected 8 to 512 pixels. Use 84, as the published protocols do.")
    if channels not in (1, 3):
        raise ValueError(f"dataset.channels = {channels}, expected 3 for colour or 1 for grey. Choose one of them.")


def open_image(path: Path | str, content: bytes | None = None, least: int | None = None) -> Image.Image:
    """The picture in a file, upright as its EXIF says, transparency on white, in mode L or RGB.

    `content`: what the file holds, where it lies in an archive; the path is then only what a message calls it. `least`: the
    side in pixels that is enough; a large JPEG is then decoded at a half, a quarter or an eighth of its size, which is faster.

    Raises:
        ValueError: the file is no image, is cut off, or is too large to be honest.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            if least is not None:
                file.draft(None, (least, least))
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
