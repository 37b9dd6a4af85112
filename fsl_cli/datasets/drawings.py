"""Converts drawings of any kind and size to two-valued items, as in the data sets of characters."""

import numpy as np
from PIL import Image, ImageFilter

PAPER = 105  # pixels, the side of an Omniglot page; larger pages, or pages with a thin pen, are converted to it
PEN = 4  # pixels, the least pen width on that page, which is Omniglot's: nearest-neighbour scaling then leaves no gaps
FINE = 4  # a large page is first scaled to this many times PAPER, where the pen is measured and widened
MOST = 8192  # pixels: a page with a longer side is shrunk before it is padded to a square, to limit memory
TRACE = 16  # of 255: a scaled pixel with at least this much ink counts as ink


def to_drawing(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """A drawing, dark on light or light on dark, as a uint8 item `[C, H, W]` of two values, ink = 255.

    The page is padded to a square; the tone that covers less of it is the ink. Scaling is nearest-neighbour, as in the published
    protocols of Omniglot, so that Omniglot's own files give exactly the items of the data set.
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
    if side > PAPER or (height < side < PAPER and _pen(page) < side / height):  # otherwise scaling loses no line
        drawn = _on_paper(drawn)
    pixels = np.asarray(drawn.resize((width, height), Image.Resampling.NEAREST))
    return np.repeat(pixels[None], channels, axis=0)


def _on_paper(page: Image.Image) -> Image.Image:
    """Scales a large square page, ink = 255, to Omniglot's size, and its pen to at least Omniglot's width."""
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
    """The grey value that splits the pixels into two tones with the least variance within each (Otsu 1979)."""
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, total = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return int(np.nan_to_num(between).argmax())
