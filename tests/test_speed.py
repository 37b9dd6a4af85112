"""How a step is run changes how fast it is, and nothing else."""

import contextlib
import copy
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import composed, fsl
from support_algos import ALGOS, EPISODIC, blobs, gradients, make, training_batch
from support_runs import FREE, TRAINING

from fsl_cli import checkpoint, device, speed, tuning
from fsl_cli.algos.base import Algorithm, Batch, Outcome, map_tensors
from fsl_cli.algos.protonet import ProtoNet
from fsl_cli.config import build
from fsl_cli.datasets.packed import Classes
from fsl_cli.episodes import TRAIN, Episode, EpisodeSampler
from fsl_cli.errors import out_of_memory
from fsl_cli.models.conv4 import Conv4
from fsl_cli.scoring import score
from fsl_cli.store import Ahead, Store

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
        built, batch, dict.fromkeys(FREE, "auto") | ({} if tuning.divisible(built, batch) else {"workers": 1})
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
    asked = FREE | {"threads": 1, "task_chunk": "auto"}
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
    assert tuning.fastest(typed, built, batch, None) == FREE | {"workers": 2, "task_chunk": 3, "channels_last": True}
    short = composed("algo=maml", "steps=5", "task.tasks=7", f"cache_dir={tmp_path}", "device=cpu")
    assert tuning.fastest(short, built, batch, None) == FREE | {"task_chunk": 4}
    assert len(calls) == 3


@pytest.mark.parametrize(("key", "way"), [("graph", "captured"), ("compile", "compiled")])
def test_a_step_that_changes_in_training_is_neither_replayed_nor_compiled(key: str, way: str):
    with pytest.raises(
        ValueError, match=rf"device\.{key} = true, but a step of this algorithm changes .* set algo\.multi_step=0\.$"
    ):
        speed.Stepper(make("mamlpp", "mlp"), FREE, **{way: True})


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
    stepper = speed.Stepper(fast, FREE | {"task_chunk": chunk}, compiled=True)
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


def test_out_of_memory_halves_the_chunk_and_says_so_once(caplog: pytest.LogCaptureFixture):
    algo, batch = make("maml", "mlp").train(), blobs(8, 3, 2, 4)
    plain = copy.deepcopy(algo)
    plain.backward(batch)
    loss = algo.loss

    def hungry(batch: Batch) -> Outcome:
        if speed.tasks(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(batch)

    most = 2
    algo.loss = hungry
    with caplog.at_level(logging.INFO):
        stepper = speed.Stepper(algo, FREE | {"task_chunk": 8})
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
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        stepper(batch)


def test_out_of_memory_halves_the_episodes_that_are_scored_at_once(caplog: pytest.LogCaptureFixture):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 1, 16, 16), dtype=np.uint8)
    classes = Classes([str(c) for c in range(4)], np.arange(4) * 6, np.full(4, 6), np.zeros(4, dtype=np.int64))
    setting = (Store(pixels, torch.device("cpu")), EpisodeSampler(classes, 3, 2, 3, 1, 0, TRAIN), 11)
    algo = make("maml", "conv4").float()
    expected = score(algo, *setting).measured
    predictions = algo.predictions

    def hungry(batch: Episode) -> torch.Tensor:
        if speed.tasks(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predictions(batch)

    most = 2
    algo.predictions = hungry
    with caplog.at_level(logging.INFO):
        torch.testing.assert_close(score(algo, *setting).measured, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory: 4 episodes are scored at once from here on.",
        "Out of memory: 2 episodes are scored at once from here on.",
    ]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        score(algo, *setting)


class Graph:
    """In place of a CUDA graph: what is captured is not computed, and a replay computes it into the captured tensors."""

    def __init__(self) -> None:
        self.replay: Callable[[], None] = lambda: None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU stand in for a CUDA device with graphs."""
    stream = MagicMock()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    backward = Algorithm.backward
    recording: list[Graph] = []

    @contextlib.contextmanager
    def graph(made: Graph, **_: Any) -> Iterator[None]:
        recording.append(made)
        yield
        recording.clear()

    def recorded(algo: Algorithm, batch: Batch) -> Outcome:
        if not recording:
            return backward(algo, batch)
        assert all(parameter.grad is None for parameter in algo.parameters()), "what is captured would add to old gradients"
        before = {name: buffer.clone() for name, buffer in algo.named_buffers()}
        outcome = backward(algo, batch)
        captured = [parameter.grad for parameter in algo.parameters()]
        speed.reset(algo, before)
        for parameter, gradient in zip(algo.parameters(), captured, strict=True):
            parameter.grad = gradient

        def replay() -> None:
            kept = [parameter.grad for parameter in algo.parameters()]
            algo.zero_grad()
            again = backward(algo, batch)
            for parameter, gradient, old in zip(algo.parameters(), captured, kept, strict=True):
                if gradient is not None and parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = old
            for old, new in zip(outcome, again, strict=True):
                old.detach().copy_(new)

        for value in (*outcome, *(gradient for gradient in captured if gradient is not None)):
            value.detach().fill_(torch.nan)  # a capture computes nothing
        recording[0].replay = replay
        return outcome

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(Algorithm, "backward", recorded)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("name", ["maml", "protonet", "finetune"])
def test_a_replayed_step_is_a_step_on_the_batch_that_is_given(name: str):
    torch.manual_seed(1)
    plain = make(name, "conv4").train()
    fast = copy.deepcopy(plain)
    step = speed.way(fast, FREE, captured=True)
    outcomes = []
    for number in range(speed.WARM_UP + 3):
        torch.manual_seed(number)
        batch = training_batch(plain, 4)
        plain.zero_grad()
        fast.zero_grad()
        expected = plain.backward(batch)
        outcomes.append((expected, step(batch)))
        for key, value in gradients(plain).items():
            torch.testing.assert_close(gradients(fast)[key], value, rtol=1e-8, atol=1e-11)
        for key, value in plain.named_buffers():
            torch.testing.assert_close(fast.get_buffer(key), value)
        with torch.no_grad():
            for built in (plain, fast):
                for parameter in built.parameters():
                    parameter.mul_(0.999)
    for expected, found in outcomes:  # none was overwritten by a later replay
        torch.testing.assert_close(found.loss.detach(), expected.loss.detach())
    with pytest.raises(ValueError, match="the batches differ in shape"):
        step(map_tensors(training_batch(plain, 4), lambda tensor: tensor[:2]))


def test_recomputed_steps_are_not_captured():
    algo = make("maml", "mlp", "algo.recompute=true")
    with pytest.raises(ValueError, match=r"algo\.recompute = true computes parts"):
        speed.Stepper(algo, FREE, captured=True)


def test_bfloat16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has no bfloat16"):
        device.arithmetic(torch.device("cuda"), "bf16")


def test_what_was_fastest_on_another_device_is_measured_again():
    content = {"config": "device: {name: cuda}", "fastest": FREE}
    assert checkpoint.fastest(content, torch.device("cuda")) == FREE
    assert checkpoint.fastest(content, torch.device("cpu")) is None


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_bfloat16_learns_what_float32_learns(monkeypatch: pytest.MonkeyPatch):
    results = {}
    for precision in ("fp32", "bf16"):
        words = [*TRAINING, "algo=protonet", "steps=60", "val_episodes=60", "eval_every=60", "device.task_chunk=2"]
        assert fsl(monkeypatch, "train", *words, f"device.precision={precision}", f"out={precision}") == 0
        lines = Path(precision, "metrics.jsonl").read_text().splitlines()
        results[precision] = json.loads(lines[-1])["accuracy"]
    assert results["fp32"] > 0.3
    assert results["bf16"] == pytest.approx(results["fp32"], abs=0.06)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("broken", "code"), [({3}, 0), ({3, 4}, 1)])
def test_bfloat16_leaves_out_a_step_whose_gradient_is_not_finite(
    broken: set[int], code: int, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    call, count = speed.Stepper.__call__, iter(range(1, 100))

    def overflowing(self: speed.Stepper, batch: Batch) -> Outcome:
        result = call(self, batch)
        if next(count) in broken:
            for parameter in self.algo.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf)
        return result

    monkeypatch.setattr(speed.Stepper, "__call__", overflowing)
    words = [*TRAINING, "algo=protonet", "steps=6", "log_every=2", "device.precision=bf16", "out=run"]
    assert fsl(monkeypatch, "train", *words) == code
    said = capfd.readouterr()
    assert "Step 3 is left out" in said.out
    if code == 0:
        kept = torch.load("run/last.pt", weights_only=True)
        assert kept["step"] == 6
        assert all(value.isfinite().all() for value in kept["algo"].values())
    else:
        assert "No step up to 4 since the last log had a finite gradient" in said.err


def test_bfloat16_is_used_in_the_embedding_and_nowhere_else():
    algo = device.settle(ProtoNet(Conv4((1, 16, 16), 4)), torch.device("cpu"), "bf16")
    inputs = torch.rand(6, 1, 16, 16)
    seen = []
    network = algo.get_submodule("model")
    algo.get_submodule("model.blocks.0").register_forward_hook(lambda *found: seen.append(found[2].dtype))
    features = algo.train().embed(inputs)
    assert (seen, features.dtype) == ([torch.bfloat16], torch.float32)
    del network.forward
    exact = algo.embed(inputs)
    assert 0 < float((features - exact).detach().abs().max()) < 0.2


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
    speed.Stepper(fast, FREE, compiled=True)(batch)
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(fast)[name], value, rtol=1e-7, atol=1e-10)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("algo", [algo for algo in ALGOS if not speed.changes(make(algo, "mlp"))])
def test_a_captured_step_gives_the_same_gradients(algo: str):
    place = torch.device("cuda")
    torch.manual_seed(1)
    plain = make(algo, "conv4").to(place).train()
    fast = copy.deepcopy(plain)
    stepper = speed.Stepper(fast, FREE, captured=True)
    for _ in range(speed.WARM_UP + 3):
        batch = training_batch(plain, 4)
        batch = map_tensors(batch, lambda tensor: tensor.to(place))
        plain.zero_grad()
        fast.zero_grad()
        expected, found = plain.backward(batch), stepper(batch)
        torch.testing.assert_close(found.loss, expected.loss)
        for name, value in gradients(plain).items():
            torch.testing.assert_close(gradients(fast)[name], value, rtol=1e-7, atol=1e-9)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), value, rtol=1e-7, atol=1e-9)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_precisions_agree_within_noise_on_cuda(precision: str):
    cfg = composed("algo=maml", "task.way=3", "model.filters=8")
    torch.manual_seed(0)
    built = build(cfg.algo, "algo", model=build(cfg.model, "model", item_shape=(1, 16, 16)), classes=5)
    batch = map_tensors(blobs(4, 3, 2, 4), lambda tensor: tensor.float().cuda())
    exact = device.settle(copy.deepcopy(built), torch.device("cuda"), "fp32").train().loss(batch).loss
    found = device.settle(copy.deepcopy(built), torch.device("cuda"), precision).train().loss(batch).loss
    assert torch.isfinite(found)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05)
