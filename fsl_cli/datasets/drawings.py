"""Drawings of any kind and size -> two-valued items: what the data sets of characters make of a user's image."""

import numpy as np
from PIL import Image, ImageFilter

PAPER = 105  # side of a page of Omniglot in pixels; pages of a larger one, or with a thin pen, are brought to it
PEN = 4  # pixels, the least width of a pen on that page: as wide as Omniglot's, so that picking pixels leaves no gaps
FINE = 4  # a large page is brought to so many times PAPER first, where the pen is measured and widened
MOST = 8192  # pixels, the longest side that is completed to a square as it is: what that takes grows with its square
TRACE = 16  # of 255: from this share of ink on, a pixel of that is ink


def to_drawing(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """A drawing, dark on light or light on dark, as a uint8 item `[C, H, W]` of two values, ink = 255.

    The page is completed to a square; whichever of its two tones covers less of it is the ink. Pixels are picked, as in
    the published protocols of Omniglot, whose own files give exactly the items of the data set.
    """
    if max(image.size) > MOST:
        image = image.convert("L")
        image.thumbnail((MOST, MOST), Image.Resampling.BOX)
    grey = np.asarray(image.convert("L"))
    ink = grey > _threshold(grey)
    ink ^= ink.mean() > 0.5
    side = max(ink.shape)
    page = np.zeros((side, side), np.uint8)
    top, left = (side - ink.shape[0]) // 2, (side - ink.shape[1]) // 2
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = 255 * ink
    drawn = Image.fromarray(page)
    channels, height, width = shape
    if side > PAPER or (height < side < PAPER and _pen(page) < side / height):  # else picking pixels loses nothing
        drawn = _on_paper(drawn)
    pixels = np.asarray(drawn.resize((width, height), Image.Resampling.NEAREST))
    return np.repeat(pixels[None], channels, axis=0)


def _on_paper(page: Image.Image) -> Image.Image:
    """A large square page, ink = 255, in the size of Omniglot's, with a pen that is no thinner than there."""
    fine = FINE * PAPER
    page = _inked(page.resize((fine, fine), Image.Resampling.BOX), TRACE)
    lacking = FINE * PEN - _pen(np.asarray(page))
    if lacking > 1:
        page = page.filter(ImageFilter.MaxFilter(2 * round(lacking / 2) + 1))
    return _inked(page.resize((PAPER, PAPER), Image.Resampling.BOX), 128)


def _inked(page: Image.Image, least: int) -> Image.Image:
    return Image.fromarray(np.where(np.asarray(page) >= least, 255, 0).astype(np.uint8))


def _pen(page: np.ndarray) -> float:
    """The width in pixels of the lines on a page: a line has two edges along its length."""
    ink = page > 0
    edges = (ink[1:] != ink[:-1]).sum() + (ink[:, 1:] != ink[:, :-1]).sum()
    return 2 * float(ink.sum()) / max(int(edges), 1)


def _threshold(grey: np.ndarray) -> int:
    """The grey value that parts the pixels into two tones with the least variance within them (Otsu 1979)."""
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, total = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return int(np.nan_to_num(between).argmax())
