"""What training does to images: each by its own draws, the same on every machine, and nothing where nothing is asked."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as transforms

from fsl_cli.datasets.augment import DRAWS, Augment
from fsl_cli.datasets.image_folder import ImageFolder
from fsl_cli.episodes import Indices
from fsl_cli.store import Store

IMAGES = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(0))


def draws(**values: float) -> torch.Tensor:
    """Draws that change nothing, but for those named."""
    names = ("down", "across", "flip", "brightness", "contrast", "saturation")
    return torch.tensor([values.get(name, 0.5) for name in names]).expand(len(IMAGES), DRAWS)


def test_draws_in_the_middle_change_nothing():
    assert torch.equal(Augment(crop=2, flip=True)(IMAGES, draws()), IMAGES)
    assert torch.allclose(Augment(jitter=0.4)(IMAGES, draws()), IMAGES, atol=1e-6)


@pytest.mark.parametrize(("down", "across", "top", "left"), [(0, 0, 0, 0), (0.999, 0.999, 4, 4), (0.3, 0.7, 1, 3)])
def test_a_crop_is_a_part_of_the_image_with_a_black_border(down, across, top, left):
    cut = Augment(crop=2)(IMAGES, draws(down=down, across=across))
    padded = torch.nn.functional.pad(IMAGES, [2] * 4)
    assert torch.equal(cut, padded[:, :, top : top + 6, left : left + 7])


def test_a_flip_mirrors_left_and_right():
    flip = Augment(flip=True)
    assert torch.equal(flip(IMAGES, draws(flip=0.1)), IMAGES.flip(-1))
    both = Augment(crop=2, flip=True)(IMAGES, draws(flip=0.1, down=0, across=0))
    assert torch.equal(both, Augment(crop=2)(IMAGES, draws(down=0, across=0)).flip(-1))


def test_jitter_is_that_of_torchvision_in_the_order_brightness_contrast_saturation():
    ours = Augment(jitter=0.4)(IMAGES, draws(brightness=0.9, contrast=0.2, saturation=0.7))
    theirs = transforms.adjust_brightness(IMAGES, 1.32)
    theirs = torch.stack([transforms.adjust_contrast(image, 0.76) for image in theirs])
    assert torch.allclose(
        ours, transforms.adjust_saturation(theirs, 1.16), atol=2e-4
    )  # their grey weights have three digits more


def test_grey_images_keep_their_shape():
    grey = Augment(crop=1, flip=True, jitter=0.4)(IMAGES[:, :1], draws(saturation=0.9))
    assert grey.shape == (5, 1, 6, 7)


def test_each_image_is_changed_by_its_own_draws():
    every = torch.rand(5, DRAWS, generator=torch.Generator().manual_seed(1))
    augment = Augment(crop=2, flip=True, jitter=0.4)
    together = augment(IMAGES, every)
    alone = torch.cat([augment(IMAGES[k : k + 1], every[k : k + 1]) for k in range(5)])
    assert torch.allclose(together, alone) and together.min() >= 0 and together.max() <= 1
    assert not torch.allclose(together, IMAGES, atol=0.1)


def items() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)


def test_a_store_without_augmentation_is_bit_equal_and_evaluation_never_augments():
    indices = Indices(np.arange(12).reshape(2, 2, 3), np.zeros((2, 2, 3), int))
    plain = Store(items(), torch.device("cpu"))
    assert plain.vary(indices, 0, 0) is indices
    expected = torch.tensor(items()[:12]).float() / 255
    assert torch.equal(plain.gather(indices).flatten(0, 2), expected)
    store = Store(items(), torch.device("cpu"), augment=Augment(crop=2, flip=True, jitter=0.4))
    assert torch.equal(store.gather(indices).flatten(0, 2), expected)
    varied = store.gather(store.vary(indices, 0, 0))
    assert varied.shape == (2, 2, 3, 3, 8, 8) and not torch.equal(varied.flatten(0, 2), expected)


def test_draws_belong_to_the_seed_and_the_step_and_several_processes_share_them():
    store = Store(items(), torch.device("cpu"), augment=Augment(flip=True))
    indices = Indices(np.arange(12).reshape(4, 3), np.zeros((4, 3), int))
    once, again = store.vary(indices, 3, 7), store.vary(indices, 3, 7)
    assert np.array_equal(once.draws, again.draws)  # pyright: ignore[reportArgumentType]
    for other in (store.vary(indices, 3, 8), store.vary(indices, 4, 7)):
        assert not np.array_equal(once.draws, other.draws)  # pyright: ignore[reportArgumentType]
    assert torch.equal(store.gather(once)[2:], store.gather(once.rows(slice(2, 4))))


def test_a_crop_that_could_miss_the_image_is_refused():
    with pytest.raises(ValueError, match=r"dataset\.crop = 32, but the images have 32 pixels"):
        ImageFolder(root="own", cache_dir="cache", fractions=[0.6, 0.2, 0.2], size=32, crop=32)
