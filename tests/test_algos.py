"""The contract of every algorithm in configs/algo, found by listing the folder, with every model of configs/model."""

from typing import Any

import pytest
import torch
from support_algos import ALGOS, EPISODIC, MODELS, TEXTS, blobs, gradients, make, task, training_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fsl_cli.episodes import Episode, Examples
from fsl_cli.speed import use
from fsl_cli.structures import leaves, map_tensors

# The other models are options of these two, or have quick tests of their own (test_text.py, test_resnets.py).
QUICK_MODELS = ("conv4", "mlp")
REFUSED = {("cavia", "bag_of_words")}  # nowhere in this network could a context enter
# Outer steps and learning rate of what learns slowly.
SLOW = {"cnp": (150, 0.003), "mann": (400, 0.01), "metanet": (120, 0.01), "snail": (150, 0.003)}


def pairs(algos: list[str]) -> list[Any]:
    """Every algorithm with every model; most of them are slow tests."""
    marks = {model: [] if model in QUICK_MODELS else [pytest.mark.slow] for model in MODELS}
    return [pytest.param(algo, model, marks=marks[model]) for algo in algos for model in MODELS if (algo, model) not in REFUSED]


@pytest.mark.parametrize(("algo", "model"), sorted(REFUSED))
def test_what_does_not_go_together_is_refused_in_a_sentence(algo: str, model: str):
    with pytest.raises(ValueError, match=r"^algo\.adapts = context, but (the model has neither|a model of texts)"):
        make(algo, model)


@pytest.mark.parametrize(("algo", "model"), pairs(ALGOS))
def test_logits_have_a_row_per_query_and_a_column_per_class(algo: str, model: str):
    built = make(algo, model).eval()
    episode = blobs(2, 3, 2, 4, texts=model in TEXTS)
    with torch.no_grad():
        assert built.predictions(episode).shape == (2, 12, 3)
        for protocol in built.norms:
            built.use_norm(protocol)
            predictor = built.fit(Examples(episode.support.inputs[0], episode.support.targets[0]))
            assert predictor(episode.query.inputs[0]).shape == (12, 3)


@pytest.mark.parametrize("algo", ALGOS)
def test_adapting_changes_nothing_and_answers_twice_the_same(algo: str):
    built = make(algo, "conv4").eval()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    episode = blobs(2, 3, 2, 4)
    with torch.no_grad():
        first, second = built.predictions(episode), built.predictions(episode)
    assert first.equal(second)
    for name, value in built.state_dict().items():
        assert value.equal(before[name]), name


@pytest.mark.parametrize(("algo", "model"), pairs(EPISODIC))
def test_mapped_loss_and_gradients_equal_a_loop_over_tasks(algo: str, model: str):
    mapped = make(algo, model).train()
    batch = blobs(4, 3, 2, 4, texts=model in TEXTS)
    mapped.task_chunk = 3  # a full chunk and a rest
    together = mapped.backward(batch)
    losses, sums = [], {}
    for number in range(4):
        looped = make(algo, model).train()
        losses.append(looped.backward(task(batch, number)).loss)
        for name, value in gradients(looped).items():
            sums[name] = sums.get(name, 0) + value / 4
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), rtol=1e-10, atol=1e-12)
    assert set(sums) == set(gradients(mapped))
    for name, value in gradients(mapped).items():
        torch.testing.assert_close(value, sums[name], rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("algo", "model"), pairs([*ALGOS, "finetune algo.head=linear", "finetune algo.backbone=full", "maml algo.adapts=head"])
)
def test_mapped_predictions_equal_one_task_at_a_time_under_every_norm_protocol(algo: str, model: str):
    name, *options = algo.split()
    built = make(name, model, *options).eval()
    batch = blobs(3, 3, 2, 4, texts=model in TEXTS)
    with torch.no_grad():
        for protocol in built.norms:
            built.use_norm(protocol)
            mapped = built.predictions(batch)
            for number in range(3):
                predictor = built.fit(Examples(batch.support.inputs[number], batch.support.targets[number]))
                torch.testing.assert_close(mapped[number], predictor(batch.query.inputs[number]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_query_is_answered_alone_unless_the_protocol_is_transductive(algo: str):
    built = make(algo, "conv4").eval()
    batch = blobs(1, 3, 2, 4)
    support = Examples(batch.support.inputs[0], batch.support.targets[0])
    with torch.no_grad():
        for protocol in built.norms:
            built.use_norm(protocol)
            predictor = built.fit(support)
            whole, alone = predictor(batch.query.inputs[0])[:2], predictor(batch.query.inputs[0][:2])
            assert torch.allclose(whole, alone, rtol=1e-6, atol=1e-8) == (protocol != "transductive"), protocol


@pytest.mark.parametrize("algo", [pytest.param(a, marks=pytest.mark.slow) if a in SLOW else a for a in ALGOS])
def test_separable_blobs_are_learned(algo: str):
    built = make(algo, "mlp", "model.hidden=[64]")
    steps, lr = SLOW.get(algo, (40, 1.0 if algo == "reptile" else 0.01))
    optimizer = (torch.optim.SGD if algo == "reptile" else torch.optim.Adam)(built.parameters(), lr=lr)
    enough, right = 0.6 if algo in SLOW else 0.9, 0.0  # chance: 1/3
    batch = blobs(20, 3, 2, 5)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        built.train().backward(training_batch(built, 8))
        optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():
                answers = built.eval().predictions(batch).argmax(-1)
            right = (answers == batch.query.targets.argmax(-1)).double().mean().item()
            if right >= enough:
                break
    assert right >= enough


@pytest.mark.parametrize("algo", ALGOS)
def test_the_state_dict_carries_everything(algo: str):
    trained, fresh = make(algo, "conv4"), make(algo, "conv4", seed=1)
    assert any(not value.equal(trained.state_dict()[name]) for name, value in fresh.state_dict().items())
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained.train().backward(training_batch(trained, 2))
    optimizer.step()
    fresh.load_state_dict(trained.state_dict())
    episode = blobs(2, 3, 2, 4)
    with torch.no_grad():
        assert trained.eval().predictions(episode).equal(fresh.eval().predictions(episode))


@pytest.mark.parametrize("algo", ALGOS)
def test_the_memory_layout_changes_no_answer_and_no_gradient(algo: str):
    plain, changed = make(algo, "conv4"), make(algo, "conv4")
    use(changed, {"threads": 1, "task_chunk": None, "channels_last": True})
    episode, batch = blobs(2, 3, 2, 4), training_batch(plain, 3)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval().predictions(episode), changed.eval().predictions(episode))
    plain.train().backward(batch)
    changed.train().backward(batch)
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(changed)[name], value, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("algo", ALGOS)
def test_cuda_gives_the_gradients_of_the_cpu(algo: str):
    on_cpu, on_cuda = make(algo, "conv4").train(), make(algo, "conv4").train().cuda()
    batch = training_batch(on_cpu, 3)
    parts = batch if isinstance(batch, Episode) else (batch,)
    moved = [Examples(*(tensor.cuda() for tensor in part)) for part in parts]
    on_cpu.backward(batch)
    on_cuda.backward(Episode(*moved) if isinstance(batch, Episode) else moved[0])
    for name, value in gradients(on_cuda).items():
        torch.testing.assert_close(value.cpu(), gradients(on_cpu)[name], rtol=1e-8, atol=1e-10)


FAKE = FakeTensorMode()  # tensors without contents; one mode for all tests, since algorithms keep some tensors
ELSEWHERE = "lazy"  # a device that is not here, in place of CUDA: torch refuses to mix its tensors with those of the CPU


class NoCopies(TorchDispatchMode):
    """Refuses what brings a tensor from the host or a value to it: a GPU waits for either, and no CUDA graph can hold them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = {part.device.type for part in [*args, out] if isinstance(part, Tensor) and part.dim() > 0}
        assert places <= {ELSEWHERE}, f"{func} has tensors on {sorted(places)}"
        assert "nonzero" not in func.__name__ and "scalar_dense" not in func.__name__, f"{func} waits for the device"
        return out


def moved(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=ELSEWHERE)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_step_stays_on_its_device_and_copies_nothing_to_it(algo: str):
    built = make(algo, "conv4")
    with FAKE:
        for module in built.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(moved(weight), weight.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, moved(buffer))
        batch, episode = training_batch(built, 3), blobs(2, 3, 2, 4)
        batch, episode = (map_tensors(part, lambda tensor: tensor.to(ELSEWHERE)) for part in (batch, episode))
        built.train().backward(batch)  # may copy what it then keeps
        with NoCopies():
            built.backward(batch)
        assert all(tensor.device.type == ELSEWHERE for tensor in leaves(built.eval().predictions(episode)))
