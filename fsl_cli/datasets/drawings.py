"""Drawings of any kind and size -> two-valued items: what the data sets of characters make of a user's image."""

import numpy as np
from PIL import Image

PAPER = 105  # pixels of the square that a larger drawing is reduced to, as a whole, before pixels are picked: that of Omniglot
INK = 64  # of 255: from this share of ink on, a reduced pixel is ink, so that a thin pen on a large page stays


def to_drawing(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """A drawing, dark on light or light on dark, as a uint8 item `[C, H, W]` of two values, ink = 255.

    The page is completed to a square; whichever of its two tones covers less of it is the ink. Pixels are picked, as in
    the published protocols of Omniglot, whose own files give exactly the items of the data set.
    """
    grey = np.asarray(image.convert("L"))
    ink = grey > _threshold(grey)
    ink ^= ink.mean() > 0.5
    side = max(ink.shape)
    page = np.zeros((side, side), np.uint8)
    top, left = (side - ink.shape[0]) // 2, (side - ink.shape[1]) // 2
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = 255 * ink
    drawn = Image.fromarray(page)
    if side > PAPER:
        drawn = drawn.resize((PAPER, PAPER), Image.Resampling.BOX).point(lambda share: 255 * (share >= INK))
    channels, height, width = shape
    pixels = np.asarray(drawn.resize((width, height), Image.Resampling.NEAREST))
    return np.repeat(pixels[None], channels, axis=0)


def _threshold(grey: np.ndarray) -> int:
    """The grey value that parts the pixels into two tones with the least variance within them (Otsu 1979)."""
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, total = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return int(np.nan_to_num(between).argmax())
