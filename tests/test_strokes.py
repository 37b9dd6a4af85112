"""Drawn characters: what they are like, and that they never change."""

import numpy as np
import pytest

from fsl_cli.datasets.packed import Packed
from fsl_cli.datasets.strokes import Strokes


@pytest.fixture(scope="module")
def strokes(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Strokes(str(tmp_path_factory.mktemp("cache")), 130, 20, 20, drawings=6).load()


def test_strokes_have_the_classes_asked_for_and_disjoint_splits(strokes):
    assert strokes.items.shape == (170 * 6, 1, 28, 28) and strokes.items.dtype == np.uint8
    assert [list(found) for found in strokes.splits.values()] == [[*range(130)], [*range(130, 150)], [*range(150, 170)]]
    assert len(set(strokes.names)) == 170 and strokes.names[130] == "val/character0001"
    assert strokes.turns == {} and len(strokes.classes("test")) == 20
    firsts = {item.tobytes() for item in strokes.items}
    assert len(firsts) == len(strokes.items), "no drawing appears twice, in one split or in two"


def test_strokes_are_the_same_each_time(strokes, tmp_path):
    again = Strokes(str(tmp_path), 130, 20, 20, drawings=6).load()
    assert np.array_equal(again.items, strokes.items)


def test_a_strokes_class_does_not_depend_on_how_many_are_asked_for(strokes, tmp_path):
    fewer = Strokes(str(tmp_path), 3, 2, 4, drawings=5).load()
    many = strokes.items.reshape(170, 6, 1, 28, 28)
    few = fewer.items.reshape(9, 5, 1, 28, 28)
    for split in strokes.splits:
        ours = fewer.splits[split]
        assert np.array_equal(few[ours], many[strokes.splits[split][: len(ours)], :5])


def test_strokes_have_as_much_ink_as_omniglot(strokes):
    assert set(np.unique(strokes.items)) == {0, 255}
    ink = (strokes.items > 0).mean((1, 2, 3))
    assert 0.07 < ink.mean() < 0.09 and ink.min() > 0.005 and ink.max() < 0.35  # omniglot: 0.081


def test_strokes_can_be_told_apart_but_not_by_pixels_alone(strokes):
    drawn = (strokes.items > 0).reshape(170, 6, -1).astype(np.float32)
    distances = np.square(drawn[:, 1, None] - drawn[None, :, 0]).sum(-1)  # [query class, support class]
    nearer = distances.diagonal()[:, None] < distances
    accuracy = np.mean([nearer[c, np.random.default_rng(c).permutation(170)[:4]].all() for c in range(170)])
    assert 0.3 < accuracy < 0.7  # omniglot, 5-way 1-shot with nearest neighbour on pixels: 0.38; chance is 0.2


def nearest_by_pixels(found: Packed) -> float:
    """The accuracy of nearest neighbours on pixels, one drawing of each of 40 classes against another."""
    drawn = (found.items > 0).reshape(40, 4, -1).astype(np.float32)
    return float((np.square(drawn[:, 1, None] - drawn[None, :, 0]).sum(-1).argmin(1) == np.arange(40)).mean())


def test_strokes_may_be_harder_and_as_ever_they_keep_their_place_in_the_cache(tmp_path):
    options = [{}, {"tremor": 2.0}, {"noise": 0.1}, {"strokes": 1}, {"tremor": 0.0}]
    usual, shaky, noisy, poor, still = (Strokes(str(tmp_path), 36, 2, 2, drawings=4, **given).load() for given in options)
    assert (tmp_path / "strokes-28-7e698b6763f4feaf").is_dir()
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".lock"]) == 5
    assert len({item.tobytes() for item in still.items}) == 40
    assert nearest_by_pixels(still) == 1 > nearest_by_pixels(usual) > nearest_by_pixels(shaky)
    assert ((noisy.items > 0) ^ (usual.items > 0)).mean() == pytest.approx(0.1, abs=0.01)
    assert (poor.items > 0).mean() < 0.9 * (usual.items > 0).mean()
    again = Strokes(str(tmp_path / "other"), 3, 2, 2, drawings=3, strokes=4, tremor=1, noise=0).load()
    assert np.array_equal(again.items[0], usual.items[0])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"val_classes": 0}, "val_classes"),
        ({"drawings": 1}, "drawings"),
        ({"size": 500}, "size"),
        ({"strokes": 5}, "strokes"),
        ({"tremor": -1.0}, "tremor"),
        ({"noise": 0.6}, "noise"),
    ],
)
def test_strokes_options_are_checked_at_once(options, key):
    with pytest.raises(ValueError, match=rf"^dataset\.{key} = [\d.-]+, expected .*\."):
        Strokes("nowhere", **options)
