"""Augmentation of training images on the device: random crop, mirror image, colour jitter.

The random numbers of an image are drawn beforehand, so that a resumed run, a GPU and several processes see the same images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

DRAWS = 6  # random numbers in [0, 1) for each image: crop down and across, flip, brightness, contrast, saturation
GREY = (0.299, 0.587, 0.114)  # of red, green and blue


@dataclass(frozen=True)
class Augment:
    """Changes images `[n, C, H, W]` in [0, 1], each by its own random numbers `[n, DRAWS]`.

    Args:
        crop: pixels of black border that are added before a random crop to the original size.
        flip: mirrors each image, left to right, with probability 1/2.
        jitter: largest change of brightness, contrast and saturation, each as a factor of 1 ± jitter.
    """

    crop: int = 0
    flip: bool = False
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ValueError(f"dataset.crop = {self.crop}, but it must not be negative. Use 8 at 84x84 pixels, or 0 for none.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"dataset.jitter = {self.jitter}, but it must be from 0 to less than 1. Use 0.4, or 0 for none.")

    def __bool__(self) -> bool:
        return bool(self.crop or self.flip or self.jitter)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        if self.crop or self.flip:
            images = self._cut(images, draws)
        return self._recolour(images, draws[:, 3:, None, None, None]) if self.jitter else images

    def _cut(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        top, left = (draws[:, :2] * (2 * self.crop + 1)).long().unbind(1)
        rows = torch.arange(height, device=images.device) + top[:, None]  # [n, H]
        columns = torch.arange(width, device=images.device) + left[:, None]  # [n, W]
        if self.flip:
            columns = torch.where(draws[:, 2, None] < 0.5, columns.flip(1), columns)
        padded = functional.pad(images, [self.crop] * 4)
        rows = rows[:, None, :, None].expand(-1, images.shape[1], -1, padded.shape[-1])
        return padded.gather(2, rows).gather(3, columns[:, None, None, :].expand_as(images))

    def _recolour(self, images: Tensor, draws: Tensor) -> Tensor:
        brightness, contrast, saturation = (1 + self.jitter * (2 * draws - 1)).unbind(1)  # each [n, 1, 1, 1]
        images = (images * brightness).clamp(0, 1)
        middle = _grey(images).mean((2, 3), keepdim=True)
        images = (middle + contrast * (images - middle)).clamp(0, 1)
        grey = _grey(images)
        return (grey + saturation * (images - grey)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Colour images `[n, 3, H, W]` as grey ones `[n, 1, H, W]`; grey ones as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (share * channel for share, channel in zip(GREY, images.split(1, dim=1), strict=True))
    return red + green + blue
