"""Where the network stays as it is, training reads embeddings that were computed once, and computes the same."""

import time

import numpy as np
import pytest
import torch
from support_algos import SHAPE, make

from fsl_cli.algos.base import Algorithm
from fsl_cli.datasets.augment import Augment
from fsl_cli.datasets.packed import LYING, Classes
from fsl_cli.episodes import BatchSampler, EpisodeSampler
from fsl_cli.features import FeatureStore, constant, training_store
from fsl_cli.models.norm import freeze
from fsl_cli.store import Store


def classes() -> Classes:
    """Five classes, the last two a quarter turn of the third and of its mirror image."""
    starts, counts = np.array([0, 5, 12, 12, 12]), np.array([5, 7, 6, 6, 6])
    return Classes(list("abcde"), starts, counts, np.array([0, 0, 0, 1, 5]), 0, "train")


def sampler() -> EpisodeSampler:
    return EpisodeSampler(classes(), 3, 2, 2, 4, 0, 0, "task.train_")


def store(augment: Augment | None = None) -> Store:
    items = np.random.default_rng(0).integers(0, 256, (18, *SHAPE), dtype=np.uint8)
    return Store(items, torch.device("cpu"), augment=augment)


def frozen(algo: str, model: str = "conv4", *words: str) -> Algorithm:
    built = make(algo, model, *words).float()
    freeze(built.model)
    return built.train()


@pytest.mark.parametrize("algo", ["snail", "mann", "cnp", "relationnet", "matchingnet algo.context=true", "logistic"])
def test_gradients_are_those_of_embedding_the_items_in_every_step(algo: str):
    name, *words = algo.split()
    plain, quick = (frozen(name, "conv4_maps" if name == "relationnet" else "conv4", *words) for _ in range(2))
    images, drawn = store(), sampler()
    features = training_store(quick, images, drawn, 100, 1e9)
    assert isinstance(features, FeatureStore) and quick.embedded
    shown = images.episodes(drawn.indices(9), 2)
    with torch.no_grad():  # evaluation embeds what it is given
        torch.testing.assert_close(plain.eval().predictions(shown), quick.eval().predictions(shown))
    plain.train()
    quick.train()
    for step in range(2):
        indices = drawn.indices(step)
        shown, given = images.episodes(indices, 2), features.episodes(indices, 2)
        assert given.support.inputs.shape == (4, 6, plain.model.out_features)
        assert given.query.targets.equal(shown.query.targets)
        outcomes = plain.backward(shown), quick.backward(given)
        torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)
    own = [(a.grad, b.grad) for a, b in zip(plain.parameters(), quick.parameters(), strict=True) if a.grad is not None]
    assert own
    for pair in own:
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "built",
    [
        make("snail", "conv4"),  # learns its network
        frozen("mtl"),  # factors of it
        make("maml", "conv4"),  # adapts it
        frozen("snail", "resnet12", "model.drop_rate=0.5"),  # drops values at random
    ],
    ids=["snail", "mtl", "maml", "dropblock"],
)
def test_what_changes_in_training_is_embedded_in_every_step(built: Algorithm):
    images = store()
    assert not constant(built.float(), images, np.arange(18) * len(LYING))
    assert training_store(built, images, sampler(), 100, 1e9) is images
    assert not built.embedded


def test_embeddings_are_kept_only_where_it_pays_and_they_fit():
    built, images, drawn = frozen("snail"), store(), sampler()
    assert training_store(built, images, drawn, 0, 1e9) is images  # fewer items are asked for than there are
    assert training_store(built, images, drawn, 100, 100.0) is images
    augmented = store(Augment(flip=True))
    assert training_store(built, augmented, drawn, 100, 1e9) is augmented
    batches = BatchSampler(classes(), 8, 0, 0)
    assert training_store(built, images, batches, 100, 1e9) is images


@pytest.mark.slow
def test_a_training_on_a_frozen_network_is_faster_from_embeddings():
    built, images, drawn = frozen("relationnet", "resnet10"), store(), sampler()
    features = training_store(built, images, drawn, 100, 1e9)
    times = []
    for source, embedded in ((images, False), (features, True)):
        built.embedded = embedded
        start = time.perf_counter()
        for step in range(20):
            built.backward(source.episodes(drawn.indices(step), 2))
        times.append(time.perf_counter() - start)
    assert times[1] < 0.5 * times[0]
