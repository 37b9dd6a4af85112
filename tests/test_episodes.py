import zlib

import numpy as np
import pytest
import torch
from conftest import in_two_parts

from fsl_cli.datasets.packed import Classes
from fsl_cli.episodes import EVALUATION, TRAIN, BatchSampler, EpisodeSampler
from fsl_cli.store import Store


def classes(counts: list[int], turns: list[int] | None = None) -> Classes:
    starts = np.cumsum([0, *counts[:-1]])
    names = [f"class{number}" for number in range(len(counts))]
    return Classes(names, starts, np.array(counts), np.array(turns or [0] * len(counts)))


def sampler(way: int = 5, shot: int = 2, queries: int = 3, tasks: int = 4, seed: int = 0, stream: int = 0) -> EpisodeSampler:
    return EpisodeSampler(classes([7] * 20), way, shot, queries, tasks, seed, stream)


def test_support_and_query_of_a_class_are_disjoint_items_of_that_class():
    items = sampler().indices(3).items  # [tasks, way, shot + queries]
    assert items.shape == (4, 5, 5)
    for task in items:
        owners = task // 7
        assert (owners == owners[:, :1]).all()
        assert len(set(owners[:, 0].tolist())) == 5
        assert len(set(task.ravel().tolist())) == 25


def test_episodes_are_a_function_of_seed_stream_and_step_alone():
    one, two = sampler(), sampler()
    two.indices(0)
    np.testing.assert_array_equal(one.indices(9).items, two.indices(9).items)
    for other in (sampler(seed=1), sampler(stream=1)):
        assert (one.indices(9).items != other.indices(9).items).any()
    assert (one.indices(9).items != one.indices(10).items).any()


def test_processes_that_slice_the_meta_batch_train_on_the_episodes_of_one_process(monkeypatch: pytest.MonkeyPatch):
    parts = in_two_parts(monkeypatch, lambda: sampler(tasks=5).indices(2))
    np.testing.assert_array_equal(np.concatenate([part.items for part in parts]), sampler(tasks=5).indices(2).items)


def test_evaluation_episodes_do_not_depend_on_how_the_list_is_cut():
    fixed = sampler(tasks=1)
    whole = fixed.fixed(0, 12).items
    parts = np.concatenate([fixed.fixed(0, 5).items, fixed.fixed(5, 12).items])
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize(("split", "chosen", "digest"), [
    ("val", [401, 243, 321, 367, 187], 1714134492),
    ("test", [347, 348, 16, 357, 159], 3934832490),
])  # fmt: skip
def test_the_evaluation_episodes_are_those_of_earlier_results(split: str, chosen: list[int], digest: int):
    items = EpisodeSampler(classes([20] * 423), 5, 1, 15, 1, 0, EVALUATION[split]).fixed(0, 100).items
    assert (items[0, :, 0] // 20).tolist() == chosen
    assert zlib.crc32(items.astype("<i8").tobytes()) == digest, "results would no longer compare with those in RESULTS.md"


def test_training_draws_what_it_drew_before():
    drawn = EpisodeSampler(classes([20] * 423), 5, 1, 15, 4, 7, TRAIN).indices(3).items
    assert zlib.crc32(drawn.astype("<i8").tobytes()) == 3718450336
    assert BatchSampler(classes([20] * 423), 64, 7, TRAIN).indices(3)[0].items[:5].tolist() == [7503, 3716, 7012, 2818, 7866]


def test_classes_and_items_and_slots_are_drawn_evenly():
    drawn = EpisodeSampler(classes([10] * 10), 2, 1, 1, 4000, 0, 0).indices(0).items
    first_slot = np.bincount(drawn[:, 0, 0] // 10, minlength=10)
    first_item = np.bincount(drawn[:, :, 0].ravel() % 10, minlength=10)
    assert (abs(first_slot / 4000 - 0.1) < 0.02).all()
    assert (abs(first_item / 8000 - 0.1) < 0.02).all()


def test_unequal_classes_never_lend_each_other_items():
    table = classes([3, 9, 5, 4])
    items = EpisodeSampler(table, 4, 1, 2, 200, 0, 0).indices(0).items
    owners = np.searchsorted(table.starts, items, side="right") - 1
    assert (owners == owners[..., :1]).all()
    assert all(len(set(row.tolist())) == 3 for row in items.reshape(-1, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"way": 21}, "task.way = 21, but the chosen split has only 20 classes"),
        ({"way": 1}, "task.way = 1, but it must be at least 2"),
        ({"shot": 0}, "task.shot = 0"),
        ({"queries": 6}, "task.shot + task.queries = 2 + 6 = 8, but class 'class0' has 7 items"),
    ],
)
def test_impossible_episodes_are_refused_by_the_name_of_the_key(changes: dict[str, int], words: str):
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        sampler(**changes)


@pytest.mark.parametrize("batch", [0, 22])
def test_an_impossible_batch_is_refused(batch: int):
    with pytest.raises(ValueError, match=rf"^algo\.batch = {batch}, but it must be 1 to 21"):
        BatchSampler(classes([7] * 3), batch, 0, TRAIN)


def test_batches_pass_through_every_item_once_an_epoch():
    batches = BatchSampler(classes([4, 6, 2]), 4, 0, 0)
    drawn = np.concatenate([batches.indices(step)[0].items for step in range(3)])
    assert sorted(drawn.tolist()) == list(range(12))
    labels = np.concatenate([batches.indices(step)[1] for step in range(3)])
    np.testing.assert_array_equal(labels, np.searchsorted([4, 10], drawn, side="right"))
    assert (batches.indices(0)[0].items != batches.indices(3)[0].items).any()


@pytest.mark.parametrize("turns", [[0, 1], [4, 7]])
def test_gathered_items_are_scaled_turned_and_labelled(turns: list[int]):
    raw = np.arange(4 * 9, dtype=np.uint8).reshape(4, 1, 3, 3)
    table = classes([2, 2], turns=turns)
    store = Store(raw, torch.device("cpu"))
    drawn = EpisodeSampler(table, 2, 1, 1, 3, 0, 0).indices(0)
    episode = store.episodes(drawn, shot=1)
    assert episode.support.inputs.shape == (3, 2, 1, 3, 3)
    assert episode.support.targets.shape == (3, 2, 2)
    for task in range(3):
        for slot in range(2):
            image, turn = raw[drawn.items[task, slot, 0], 0], drawn.turns[task, slot, 0]
            expected = np.rot90(image if turn < 4 else image[:, ::-1], turn) / 255
            np.testing.assert_allclose(episode.support.inputs[task, slot, 0].numpy(), expected, rtol=1e-6)
        assert episode.query.targets[task].equal(torch.eye(2))


def test_way_and_shot_may_be_drawn_from_a_range_every_step():
    drawn = EpisodeSampler(classes([12] * 30), [5, 8], [1, 9], 3, 2, 0, 0)
    shapes = {drawn.indices(step).items.shape for step in range(200)}
    assert {shape[1] for shape in shapes} == {5, 6, 7, 8}
    assert {shape[2] - 3 for shape in shapes} == set(range(1, 10))
    np.testing.assert_array_equal(drawn.indices(7).items, drawn.indices(7).items)


@pytest.mark.parametrize("value", [[5], [8, 5], [1.5, 2], "ab", [5, 6, 7], [True, 2]])
def test_a_range_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"task.train_way = .*\[5,20\]"):
        EpisodeSampler(classes([12] * 30), value, 1, 3, 2, 0, 0, prefix="task.train_")


def test_equal_keys_are_ordered_by_their_place():
    drawn = EpisodeSampler(classes([20] * 5000), way=20, shot=1, queries=1, tasks=1, seed=0, stream=0)
    tied = 0
    for step in range(300):
        keys = np.random.Generator(np.random.PCG64(np.random.SeedSequence((0, 0, step)))).random(5000, dtype=np.float32)
        expected = np.argsort(keys, kind="stable")[:20]
        tied += len(np.unique(keys[expected])) < 20 or keys[expected[-1]] == np.sort(keys)[20]
        assert np.array_equal(drawn.classes_of(step)[0], expected)
    assert tied > 0
