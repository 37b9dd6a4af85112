"""The packed form of a data set: written whole or not at all, checked when it is opened."""

import numpy as np
import pytest

from fsl_cli.datasets import packed
from fsl_cli.datasets.packed import Raw, pack


def toy() -> Raw:
    return Raw(np.arange(24, dtype=np.uint8).reshape(6, 1, 2, 2), ["a", "b"], [2, 4])


def test_a_failure_halfway_leaves_no_packed_folder(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.os, "fsync", fail)
    with pytest.raises(ValueError, match=r"^cache_dir = .*No space left on device.* with enough space\.$"):
        pack(str(tmp_path / "cache"), "toy", toy)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"rubbish", None])
def test_a_damaged_packed_form_is_packed_again(tmp_path, damage):
    pack(str(tmp_path), "toy", toy)
    items = tmp_path / "toy" / "items.npy"
    items.write_bytes(items.read_bytes()[:-3] if damage is None else damage)
    assert np.array_equal(pack(str(tmp_path), "toy", toy).items, toy().items)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_packed_form_is_opened_without_reading_the_source(tmp_path):
    pack(str(tmp_path), "toy", toy)

    def fail() -> Raw:
        raise AssertionError("the source was read again")

    found = pack(str(tmp_path), "toy", fail)
    assert isinstance(found.items, np.memmap) and found.names == ["a", "b"] and found.counts == [2, 4]


def test_two_processes_may_pack_the_same_data(tmp_path):
    def read() -> Raw:
        pack(str(tmp_path), "toy", toy)  # the other process is faster
        return toy()

    assert np.array_equal(pack(str(tmp_path), "toy", read).items, toy().items)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
