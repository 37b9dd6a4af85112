"""How a training step is run: in chunks that fit the memory, by several threads, compiled, or captured as a CUDA graph."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from fsl_cli.algos.base import Algorithm, Batch, Outcome
from fsl_cli.episodes import Episode
from fsl_cli.errors import out_of_memory
from fsl_cli.structures import leaves, map_tensors
from fsl_cli.workers import Workers

log = logging.getLogger(__name__)

Choice = dict[str, Any]  # threads and task_chunk (None: all), workers, channels_last
UNMEASURED: Choice = {"threads": None, "workers": 1, "task_chunk": None, "channels_last": False}

SCORED, SCORED_CUDA, SCORED_VALUES = 8, 32, 250  # most tasks mapped at once in scoring: CPU, CUDA, regression
ADAPTED = 2**25  # most weights adapted at once in evaluation, over all its episodes; adapting takes several times their memory
WARM_UP = 3  # steps before a CUDA graph is captured, in which libraries choose their kernels


class Stepper:
    """Runs `algo.backward`; if memory runs out, halves the chunk and repeats the step."""

    def __init__(self, algo: Algorithm, fastest: Choice, compiled: bool = False, captured: bool = False) -> None:
        """`captured` replays the whole step from a CUDA graph; every batch must have the shapes of the first."""
        self.algo, self.fastest = algo, fastest
        use(algo, fastest)
        if compiled:
            refuse_changing(algo, "compile")
        if fastest["workers"] > 1 and (captured or compiled):
            raise ValueError(
                f"device.workers = {fastest['workers']}, but a step that is compiled or captured is computed as a whole. "
                "Set device.workers=1."
            )
        self.captured = captured
        self.backward = step_function(algo, fastest, captured)
        if compiled:
            for name in algo.compiled:
                setattr(algo, name, torch.compile(getattr(algo, name)))

    def __call__(self, batch: Batch) -> Outcome:
        self.algo.train()
        while True:
            try:
                return self.backward(batch)
            except RuntimeError as error:
                if not (out_of_memory(error) and self._can_halve(batch)):
                    raise
                reset(self.algo, {})  # buffers need no reset: a step changes them only at its end
                self.algo.task_chunk = max(1, min(self.algo.task_chunk or tasks(batch), tasks(batch)) // 2)
                self.fastest["task_chunk"] = self.algo.task_chunk  # for the checkpoints
                log.info(f"Out of memory: device.task_chunk is {self.algo.task_chunk} from here on.")
            self.backward = step_function(self.algo, self.fastest, self.captured)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _can_halve(self, batch: Batch) -> bool:
        return isinstance(batch, Episode) and min(self.algo.task_chunk or tasks(batch), tasks(batch)) > 1


class Capture:
    """`algo.backward` as a CUDA graph: one launch replaces thousands, which can take longer than the arithmetic."""

    def __init__(self, algo: Algorithm) -> None:
        refuse_capture(algo)
        self.algo, self.calls = algo, 0
        self.stream = torch.cuda.Stream()  # for the warm-up steps and the capture
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> Outcome:
        self.calls += 1
        if self.calls <= WARM_UP:  # real steps, on the side stream that a capture requires
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outcome = self.algo.backward(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outcome
        if self.graph is None:
            self._record(batch)
        assert self.graph is not None
        if any(static.shape != tensor.shape for static, tensor in zip(leaves(self.batch), leaves(batch), strict=True)):
            raise ValueError(
                "device.graph = true, but the batches differ in shape: way or shot is a range, or the items are texts of "
                "different lengths. Set it to false, or way and shot to one number."
            )
        for static, tensor in zip(leaves(self.batch), leaves(batch), strict=True):
            static.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return Outcome(*(value.clone() for value in self.outcome))

    def _record(self, batch: Batch) -> None:
        self.batch = map_tensors(batch, torch.clone)  # the memory that the graph reads
        for parameter in self.algo.parameters():
            parameter.grad = None  # so that the graph sets gradients instead of adding to them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outcome = self.algo.backward(self.batch)
        self.graph = graph
        self.gradients = [(p, p.grad) for p in self.algo.parameters() if p.grad is not None]


def refuse_capture(algo: Algorithm) -> None:
    """Refuses an algorithm or a device for which a CUDA graph is impossible."""
    refuse_changing(algo, "graph")
    if algo.recompute:
        raise ValueError(
            "device.graph = true, but algo.recompute = true computes parts of a step while the rest is differentiated, which "
            "no graph holds. Leave one of them false."
        )
    if not next(algo.parameters()).is_cuda:
        raise ValueError("device.graph = true, but only CUDA devices have graphs. Leave it false on a CPU.")


def refuse_changing(algo: Algorithm, key: str) -> None:
    """Refuses `device.KEY=true` for an algorithm whose steps change during training."""
    if changing := changes(algo):
        raise ValueError(
            f"device.{key} = true, but a step of this algorithm changes in the course of the training. Leave it false, or set "
            f"{' '.join(f'algo.{name}=0' for name in changing)}."
        )


def changes(algo: Algorithm) -> tuple[str, ...]:
    """The options in use that make steps change during training."""
    return (*algo.spans, *(["hard_tasks"] if algo.hard_tasks else []))


def step_function(algo: Algorithm, choice: Choice, captured: bool = False) -> Callable[[Batch], Outcome]:
    """The function that accumulates the gradient of a batch: the algorithm's `backward`, its CUDA graph, or worker threads."""
    if captured:
        return Capture(algo)
    return Workers(algo, choice["workers"]) if choice["workers"] > 1 else algo.backward


def use(algo: Algorithm, choice: Choice) -> None:
    """Applies a Choice to `algo`: chunk sizes of training and evaluation, CPU threads, memory layout."""
    algo.task_chunk = choice["task_chunk"]
    cuda = next(algo.parameters()).is_cuda
    most = SCORED_VALUES if algo.regression else SCORED_CUDA if cuda else min(SCORED, choice["task_chunk"] or SCORED)
    algo.score_chunk = at_once(algo, most)
    torch.set_num_threads(choice["threads"] or torch.get_num_threads())
    algo.to(memory_format=torch.channels_last if choice["channels_last"] else torch.contiguous_format)


def at_once(algo: Algorithm, most: int) -> int:
    """How many episodes evaluation adapts at once: `most`, or fewer if each adapts a copy of a large network."""
    weights = 0 if algo.bulk else sum(parameter.numel() for parameter in algo.parameters())
    return max(1, min(most, ADAPTED // max(1, weights)))


def tasks(batch: Batch) -> int:
    """The number of tasks in a meta-batch; a pre-training batch counts as one."""
    return len(batch.support.targets) if isinstance(batch, Episode) else 1


def reset(algo: Algorithm, buffers: dict[str, torch.Tensor]) -> None:
    """Undoes an unfinished, skipped or trial step: clears gradients and gathered statistics, and restores `buffers`."""
    algo.zero_grad()
    algo.forget()
    with torch.no_grad():
        for name, buffer in buffers.items():
            algo.get_buffer(name).copy_(buffer)


def batch_on_gpu(batch: Batch) -> bool:
    """Whether the batch lies on a CUDA device."""
    return next(leaves(batch)).is_cuda
