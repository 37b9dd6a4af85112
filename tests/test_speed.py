"""How a step is run changes how fast it is, and nothing else."""

import copy
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed, fsl
from support_algos import ALGOS, EPISODIC, blobs, gradients, make, training_batch
from support_runs import TRAINING

from fsl_cli import checkpoint, device, speed, tuning
from fsl_cli.algos.protonet import ProtoNet
from fsl_cli.datasets.packed import Classes
from fsl_cli.episodes import TRAIN, EpisodeSampler
from fsl_cli.errors import out_of_memory
from fsl_cli.models.conv4 import Conv4
from fsl_cli.scoring import score
from fsl_cli.speed import UNMEASURED
from fsl_cli.store import Ahead, Store


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("algo", ALGOS)
def test_the_chunk_changes_neither_gradients_nor_running_statistics(algo: str, chunk: int):
    torch.manual_seed(1)
    whole = make(algo, "conv4").train()
    cut = copy.deepcopy(whole)
    batch = training_batch(whole, 5)
    cut.task_chunk = chunk
    for built in (whole, cut):
        built.backward(batch)
    for name, value in gradients(whole).items():
        torch.testing.assert_close(gradients(cut)[name], value, rtol=1e-8, atol=1e-11)
    for name, value in whole.named_buffers():
        torch.testing.assert_close(cut.get_buffer(name), value, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "algo",
    [algo if algo in ("maml", "reptile", "protonet", "mtl") else pytest.param(algo, marks=pytest.mark.slow) for algo in EPISODIC],
)
def test_measuring_leaves_the_algorithm_as_it_was(algo: str):
    built = make(algo, "mlp").train()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    batch = training_batch(built, 4)
    chosen = tuning.measure(
        built, batch, dict.fromkeys(UNMEASURED, "auto") | ({} if tuning.divisible(built, batch) else {"workers": 1})
    )
    assert chosen["task_chunk"] in (1, 2, 4)
    assert chosen["channels_last"] in (True, False)
    assert chosen["threads"] in tuning.halvings(torch.get_num_threads())
    assert not gradients(built)
    assert all(value.equal(before[name]) for name, value in built.state_dict().items())


def test_the_fastest_way_is_found_on_a_machine_that_slows_down(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def seconds(algo: Any, batch: Any, choice: speed.Choice, captured: bool) -> float | None:
        calls.append(choice["task_chunk"])
        cost = {1: 1.3, 2: 1.1, 4: 1.0, 8: 20.0, 16: None}[choice["task_chunk"]]
        return cost and cost * 1.05 ** len(calls)

    monkeypatch.setattr(tuning, "_seconds", seconds)
    asked = UNMEASURED | {"threads": 1, "task_chunk": "auto"}
    chosen = tuning.measure(make("maml", "mlp"), blobs(16, 3, 2, 4), asked)
    assert chosen == asked | {"task_chunk": 4}
    assert calls.count(8) == calls.count(16) == 1  # out of the race, and out of memory
    assert calls.count(4) == 1 + tuning.ROUNDS
    calls.clear()
    monkeypatch.setattr(tuning, "PATIENCE", 0.0)  # steps of many seconds each
    assert tuning.measure(make("maml", "mlp"), blobs(16, 3, 2, 4), asked) == chosen
    assert calls.count(4) == 2  # the first one warms up


def test_what_was_chosen_is_kept_for_the_next_run_and_typed_numbers_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built, batch = make("maml", "mlp").train(), blobs(4, 3, 2, 4)
    calls = []

    def measured(*_: Any) -> speed.Choice:
        calls.append(1)
        return {"threads": 1, "workers": 1, "task_chunk": 2, "channels_last": True}

    monkeypatch.setattr(tuning, "measure", measured)
    cfg = composed("algo=maml", "steps=1000", f"cache_dir={tmp_path}", "device=cpu")
    assert tuning.fastest(cfg, built, batch, None) == measured()
    assert tuning.fastest(cfg, built, batch, None) == measured()
    assert len(calls) == 3  # twice by this test
    kept = {"threads": 2, "workers": 2, "task_chunk": 4, "channels_last": False}
    assert tuning.fastest(cfg, built, batch, kept) == kept
    typed = composed("algo=maml", "device=cpu", f"cache_dir={tmp_path}", "device.threads=null", "device.task_chunk=3",
                     "device.channels_last=true", "device.workers=2")  # fmt: skip
    assert tuning.fastest(typed, built, batch, None) == UNMEASURED | {"workers": 2, "task_chunk": 3, "channels_last": True}
    short = composed("algo=maml", "steps=5", "task.tasks=7", f"cache_dir={tmp_path}", "device=cpu")
    assert tuning.fastest(short, built, batch, None) == UNMEASURED | {"task_chunk": 4}
    assert len(calls) == 3


@pytest.mark.parametrize(("key", "way"), [("graph", "captured"), ("compile", "compiled")])
def test_a_step_that_changes_in_training_is_neither_replayed_nor_compiled(key: str, way: str):
    with pytest.raises(
        ValueError, match=rf"device\.{key} = true, but a step of this algorithm changes .* set algo\.multi_step=0\.$"
    ):
        speed.Stepper(make("mamlpp", "mlp"), UNMEASURED, **{way: True})


@pytest.mark.parametrize(("algo", "chunk"), [("maml", None), ("protonet", None), ("protonet", 1)])
def test_a_compiled_step_is_traced_once_for_the_whole_training(algo: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch):
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    fast = make(algo, "mlp").train()
    plain = copy.deepcopy(fast)
    plain.task_chunk = chunk
    stepper = speed.Stepper(fast, UNMEASURED | {"task_chunk": chunk}, compiled=True)
    for step in range(3):
        fast.progress = plain.progress = step / 3
        batch = training_batch(plain, 4)
        for way in (stepper, plain.backward):
            way(batch)
        for name, value in gradients(plain).items():
            torch.testing.assert_close(gradients(fast)[name], value, rtol=1e-7, atol=1e-10)
    assert len(traced) == 1


def test_every_job_of_a_sweep_starts_with_all_threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    assert device.choose("cpu") == torch.device("cpu")
    torch.set_num_threads(before + 1)  # what an earlier job was fastest with
    device.choose("cpu")
    assert torch.get_num_threads() == before


def test_of_several_cuda_devices_the_one_that_is_named_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    assert [device.choose(name) for name in ("cuda:1", "cuda")] == [torch.device("cuda", 1), torch.device("cuda")]
    assert made == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match=r"device\.name = cuda:2, but torch finds 2 CUDA devices"):
        device.choose("cuda:2")


def test_fewer_copies_of_a_large_network_are_adapted_at_once(monkeypatch: pytest.MonkeyPatch):
    built = make("maml", "mlp")
    monkeypatch.setattr(speed, "ADAPTED", 2 * sum(parameter.numel() for parameter in built.parameters()) + 1)
    assert [speed.at_once(*pair) for pair in ((built, 8), (built, 1), (make("protonet", "mlp"), 8))] == [2, 1, 8]


@pytest.mark.parametrize(
    "text",
    ["[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_out_of_memory_is_known_by_what_libraries_say(text: str):
    assert out_of_memory(RuntimeError(text)) and out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("shapes"))


def hungry(call: Any, most: int) -> Any:
    """`call` on a device whose memory holds `most` tasks."""

    def called(batch: Any) -> Any:
        if speed.tasks(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(batch)

    return called


def test_out_of_memory_halves_the_chunk_and_says_so_once(caplog: pytest.LogCaptureFixture):
    algo, batch = make("maml", "mlp").train(), blobs(8, 3, 2, 4)
    plain = copy.deepcopy(algo)
    plain.backward(batch)
    loss = algo.loss
    algo.loss = hungry(loss, 2)
    with caplog.at_level(logging.INFO):
        stepper = speed.Stepper(algo, UNMEASURED | {"task_chunk": 8})
        stepper(batch)
        assert algo.task_chunk == stepper.fastest["task_chunk"] == 2
        for name, value in gradients(plain).items():
            torch.testing.assert_close(gradients(algo)[name], value)
        algo.zero_grad()
        stepper(batch)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory: device.task_chunk is 4 from here on.",
        "Out of memory: device.task_chunk is 2 from here on.",
    ]
    algo.loss = hungry(loss, 0)
    with pytest.raises(torch.OutOfMemoryError):
        stepper(batch)


def test_out_of_memory_halves_the_episodes_that_are_scored_at_once(caplog: pytest.LogCaptureFixture):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 1, 16, 16), dtype=np.uint8)
    classes = Classes([str(c) for c in range(4)], np.arange(4) * 6, np.full(4, 6), np.zeros(4, dtype=np.int64))
    setting = (Store(pixels, torch.device("cpu")), EpisodeSampler(classes, 3, 2, 3, 1, 0, TRAIN), 11)
    algo = make("maml", "conv4").float()
    expected = score(algo, *setting).measured
    predictions = algo.predictions
    algo.predictions = hungry(predictions, 2)
    with caplog.at_level(logging.INFO):
        torch.testing.assert_close(score(algo, *setting).measured, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory: 4 episodes are scored at once from here on.",
        "Out of memory: 2 episodes are scored at once from here on.",
    ]
    algo.predictions = hungry(predictions, 0)
    with pytest.raises(torch.OutOfMemoryError):
        score(algo, *setting)


def test_what_was_fastest_on_another_device_is_measured_again():
    content = {"config": "device: {name: cuda}", "fastest": UNMEASURED}
    assert checkpoint.fastest(content, torch.device("cuda")) == UNMEASURED
    assert checkpoint.fastest(content, torch.device("cpu")) is None


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("device.precision=tf32", "device.precision = tf32, but only CUDA devices have it"),
        ("device.graph=true", "device.graph = true, but only CUDA devices have graphs"),
        ("device.task_chunk=fast", "device.task_chunk = fast, but it must be a whole number of at least 1, auto, or null"),
        ("device.threads=0", "device.threads = 0, but it must be a whole number of at least 1, auto, or null"),
        ("device.workers=null", "device.workers = None, but it must be a whole number of at least 1, or auto"),
        ("device.workers=0", "device.workers = 0, but it must be a whole number of at least 1, or auto"),
        ("device.processes=2", "device.processes = 2, but only device=ddp starts processes"),
        ("device.memory=-1", "device.memory = -1.0, but it must be a number of GiB"),
    ],
)
def test_what_the_device_cannot_do_is_refused(word: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    assert fsl(monkeypatch, "train", *TRAINING, "steps=2", word, "out=run") == 2
    assert sentence in capfd.readouterr().err


def memory_map(path: Path, classes: int, each: int, shape: tuple[int, ...]) -> tuple[np.ndarray, Classes]:
    """A sparse file: 20 GB that take no room on the disk, with every item of class `c` of one value where it is touched."""
    items = np.lib.format.open_memmap(path, "w+", np.uint8, (classes * each, *shape))
    starts = np.arange(classes) * each
    return items, Classes([str(c) for c in range(classes)], starts, np.full(classes, each), np.zeros(classes, dtype=np.int64))


def test_the_limit_of_a_container_bounds_the_memory_for_the_data(tmp_path: Path):
    job = tmp_path / "slurm" / "job"
    job.mkdir(parents=True)
    for folder, most in ((job, "max"), (job.parent, "5000")):
        for name, content in (("max", most), ("current", "4500"), ("stat", "anon 3500\ninactive_file 1000\n")):
            (folder / f"memory.{name}").write_text(content)
    assert list(device.left(job)) == [1500]


def test_a_data_set_larger_than_memory_is_gathered_from_its_memory_map(tmp_path: Path):
    items, classes = memory_map(tmp_path / "items.npy", 50_000, 20, (3, 84, 84))
    assert items.nbytes > 20e9
    sampler = EpisodeSampler(classes, 5, 1, 3, 2, 0, TRAIN)
    store = Store(items, torch.device("cpu"), device.data_budget(torch.device("cpu"), 1.0))
    assert store.resident is None
    for step in range(3):
        drawn = sampler.indices(step).items
        items[drawn.ravel()] = (drawn.ravel() % 251)[:, None, None, None].astype(np.uint8)
    ahead = Ahead(lambda step: store.episodes(sampler.indices(step), 1))
    for step in (0, 1, 2, 0):  # in a row, and jumping back as a resumed run would
        drawn = sampler.indices(step).items
        batch = ahead(step)
        expected = torch.as_tensor(drawn[:, :, 1:] % 251).flatten(1).float() / 255
        torch.testing.assert_close(batch.query.inputs.flatten(2).amax(-1), expected)
        torch.testing.assert_close(batch.query.inputs.flatten(2).amin(-1), expected)


def test_a_run_beyond_its_memory_budget_computes_the_same(monkeypatch: pytest.MonkeyPatch, workplace: None):
    words = [*TRAINING, "algo=protonet", "steps=6", "device.task_chunk=2", "device.threads=1"]
    for name, budget in (("inside", "null"), ("outside", "0")):
        assert fsl(monkeypatch, "train", *words, f"device.memory={budget}", f"out={name}") == 0
    one, two = (torch.load(f"{name}/last.pt", weights_only=True)["algo"] for name in ("inside", "outside"))
    assert all(value.equal(two[name]) for name, value in one.items())


@pytest.mark.slow
def test_gathering_from_the_memory_map_costs_little_of_a_step(tmp_path: Path):
    items, classes = memory_map(tmp_path / "items.npy", 50_000, 20, (3, 84, 84))
    algo = device.settle(ProtoNet(Conv4((3, 84, 84), 64)), torch.device("cpu")).train()
    sampler = EpisodeSampler(classes, 10, 5, 5, 1, 0, TRAIN)
    inside = Store(np.asarray(items[:4000]), torch.device("cpu"))
    few = Classes(classes.names[:200], classes.starts[:200], classes.counts[:200], classes.turns[:200])
    near = EpisodeSampler(few, 10, 5, 5, 1, 0, TRAIN)
    outside = Store(items, torch.device("cpu"), 1 << 30)
    ahead = Ahead(lambda step: outside.episodes(sampler.indices(step), 5))
    times: dict[str, list[float]] = {"inside": [], "outside": []}
    for step in range(24):
        for name, batches in (("inside", lambda k: inside.episodes(near.indices(k), 5)), ("outside", ahead)):
            start = time.perf_counter()
            algo.backward(batches(step % 12))  # the second half is warm in the page cache
            times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values[12:])) for name, values in times.items()}
    assert medians["outside"] < 1.2 * medians["inside"], medians


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["protonet", "maml", "reptile", "snail"])
def test_a_compiled_step_gives_the_same_gradients(algo: str):
    torch.manual_seed(1)
    plain = make(algo, "conv4").train()
    fast = copy.deepcopy(plain)
    batch = training_batch(plain, 4)
    plain.backward(batch)
    speed.Stepper(fast, UNMEASURED, compiled=True)(batch)
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(fast)[name], value, rtol=1e-7, atol=1e-10)
