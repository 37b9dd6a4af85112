"""The packed form of a data set: written whole or not at all, checked when it is opened."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fsl_cli.datasets import packed
from fsl_cli.datasets.packed import Raw, pack


def toy() -> Raw:
    return Raw(np.arange(24, dtype=np.uint8).reshape(6, 1, 2, 2), ["a", "b"], [2, 4])


def written(folder: Path) -> list[str]:
    """What lies in a cache beside the locks."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_failure_halfway_leaves_no_packed_folder(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.os, "fsync", fail)
    with pytest.raises(ValueError, match=r"^cache_dir = .*No space left on device.* with enough space\.$"):
        pack(str(tmp_path / "cache"), "toy", toy)
    assert written(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"rubbish", None])
def test_a_damaged_packed_form_is_packed_again(tmp_path, damage):
    pack(str(tmp_path), "toy", toy)
    items = tmp_path / "toy" / "items.npy"
    items.write_bytes(items.read_bytes()[:-3] if damage is None else damage)
    assert np.array_equal(pack(str(tmp_path), "toy", toy).items, toy().items)
    assert written(tmp_path) == ["toy"]


def test_a_packed_form_is_opened_without_reading_the_source(tmp_path):
    pack(str(tmp_path), "toy", toy)

    def fail() -> Raw:
        raise AssertionError("the source was read again")

    found = pack(str(tmp_path), "toy", fail)
    assert isinstance(found.items, np.memmap) and found.names == ["a", "b"] and found.counts == [2, 4]


def test_of_two_processes_one_packs_and_the_other_waits(tmp_path):
    calls = []

    def read() -> Raw:
        calls.append(1)
        time.sleep(0.3)
        return toy()

    with ThreadPoolExecutor(2) as pool:  # locks are those of open files: two threads have one each, as two processes have
        for found in pool.map(lambda _: pack(str(tmp_path), "toy", read), range(2)):
            assert np.array_equal(found.items, toy().items)
    assert (len(calls), written(tmp_path)) == (1, ["toy"])


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".toy-1234").mkdir()
    (tmp_path / ".toy-1234" / "items.npy").write_bytes(b"half")
    pack(str(tmp_path), "toy", toy)
    assert written(tmp_path) == ["toy"]
