"""The base of the data sets of photographs: options of shape and augmentation, and packing."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fsl_cli.datasets.augment import Augment
from fsl_cli.datasets.class_splits import Splits, only_test
from fsl_cli.datasets.images import check_shape
from fsl_cli.datasets.packed import Dataset, Packed, Raw, pack


@dataclass(kw_only=True)
class Resized(Dataset):
    """Images as `[n, channels, size, size]`: the shorter side is scaled to `size`, and the centre is cropped.

    Args:
        cache_dir: holds the packed form.
        size: side of the items in pixels.
        channels: 3, or 1 for grey.
        test_only: all classes are test classes, for a model trained on another data set.
        crop, flip, jitter: augmentation in training, see augment.py.
    """

    cache_dir: str
    size: int = 84
    channels: int = 3
    test_only: bool = False
    crop: int = 0
    flip: bool = False
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_shape(self.size, self.channels)
        self.augment = Augment(self.crop, self.flip, self.jitter)
        if self.crop >= self.size:
            raise ValueError(
                f"dataset.crop = {self.crop}, but the images have {self.size} pixels: a crop could miss them. Use 8 or so."
            )

    def packed(self, name: str, key: str, read: Callable[[], Raw], split: Callable[[list[str]], Splits]) -> Packed:
        """The data set packed under `key`, which `read` reads if necessary; `split` splits its class names."""
        items, names, counts = pack(self.cache_dir, f"{name}-{self.size}x{self.channels}-{key}", read)
        splits = only_test(len(names)) if self.test_only else split(names)
        return Packed(name, items, names, np.asarray(counts), splits, augment=self.augment)
