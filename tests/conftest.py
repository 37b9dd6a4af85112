import copy
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TORCH_LINALG_PREFER_CUSOLVER", "1")  # as the command does, before torch is imported
import torch
from hydra import compose, initialize_config_module
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig
from PIL import Image

from fsl_cli import cli, parallel, train
from fsl_cli.datasets.strokes import Strokes
from fsl_cli.schema import register

register()
CLASSES = ("birch", "oak", "élan (2), b")  # of the fixture drawings

torch.set_num_threads(1)  # the tests are small, and pytest-xdist runs one process per core
# Hydra composes from many small objects: a tenth of the tests' time went into looking for garbage.
gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def mode() -> Iterator[None]:
    """Hydra composes a config twice, the first time only to look for hydra.mode, which no test in this process sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        yield


@pytest.fixture
def data_dir() -> str:
    """The raw data sets; a test that needs them is skipped without FSL_DATA_DIR, and fails where CI promised them."""
    folder = os.environ.get("FSL_DATA_DIR", "")
    if folder and Path(folder).is_dir():
        return str(Path(folder).resolve())
    if os.environ.get("FSL_REQUIRE_DATA"):
        pytest.fail(f"FSL_DATA_DIR = {folder!r} is not a folder, and FSL_REQUIRE_DATA forbids to skip.")
    pytest.skip("needs the real data: set FSL_DATA_DIR to a folder with omniglot-py/ in it")


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """The config of a command, as Hydra composes it, without a run folder."""
    return copy.deepcopy(_composed(command, overrides))


@lru_cache(maxsize=512)
def _composed(command: str, overrides: tuple[str, ...]) -> DictConfig:
    """Composing takes a quarter of a second, a copy of what it gave four milliseconds."""
    with initialize_config_module("fsl_cli.configs", version_base="1.3"):
        return compose(command, overrides=["out=unused", *overrides])


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Packed data sets, made once for all tests; the processes of pytest-xdist share them, as those of a sweep do."""
    own = tmp_path_factory.getbasetemp()
    return str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache")


@pytest.fixture
def workplace(tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to run commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSL_CACHE_DIR", cache_dir)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Iterator[Path]:
    """A folder with small checkpoints of several algorithms."""
    from support_runs import trained  # which imports this module

    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FSL_CACHE_DIR", cache_dir)
        for algo in ("protonet", "maml", "finetune"):
            steps = 60 if algo == "protonet" else 2
            words = ("task.way=3", "seed=1", f"steps={steps}", f"eval_every={steps}", "episodes=2", "val_episodes=2")
            assert trained(patch, algo, algo, *words) == 0
        yield folder


@pytest.fixture
def drawings(cache_dir: str, tmp_path: Path) -> dict[str, list[str]]:
    """`support/<class>/` with 2, 4 and 3 drawings and `query/` with 3 of each class, ink on paper; the files of query."""
    items = Strokes(cache_dir, 1, 1, 24).load().items[40:].reshape(24, 20, 28, 28)
    files: dict[str, list[str]] = {name: [] for name in CLASSES}
    for slot, name in enumerate(CLASSES):
        (tmp_path / "support" / name).mkdir(parents=True)
        (tmp_path / "query" / "more").mkdir(parents=True, exist_ok=True)
        for number in range((2, 4, 3)[slot]):
            Image.fromarray(255 - items[slot, number]).save(tmp_path / "support" / name / f"{number}.png")
        for number in range(3):
            file = f"query/{'more/' if number else ''}{slot} {number}.bmp"
            Image.fromarray(items[slot, 10 + number]).resize((84, 84), Image.Resampling.NEAREST).save(tmp_path / file)
            files[name].append(file)
    return files


def fsl(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `fsl WORDS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["fsl", *words])
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def message(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *words: str, code: int = 2) -> str:
    """What `fsl WORDS` says on stderr, once it is seen to be one sentence or two and no traceback."""
    capfd.readouterr()
    assert fsl(monkeypatch, *words) == code
    said = capfd.readouterr().err.strip()
    assert "Traceback" not in said
    assert "Error executing job" not in said
    assert len(said.splitlines()) == 1, said
    return said


def in_two_parts(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], Any]) -> list[Any]:
    """What each of two processes takes of the meta-batch that each of them draws."""
    parts = []
    monkeypatch.setattr(parallel, "world", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        drawn = draw()
        parts.append(drawn.rows(parallel.share_of_tasks(len(drawn.items))))
    return parts


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Within it, no file can grow beyond `largest` bytes."""
    resource = pytest.importorskip("resource")  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, *steps: int, by: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """Within it, a training gets a signal after each of these steps."""
    step = train.train_step

    def stopping(state: train.Run, *rest: Any) -> None:
        step(state, *rest)
        if state.step in steps:
            os.kill(os.getpid(), by)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", stopping)
        yield
