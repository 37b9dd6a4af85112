"""Threads that share the tasks of a meta-batch: on a CPU, one task has too little work to keep several cores busy."""

import copy
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from fsl_cli.algos.base import Algorithm, Batch, Outcome
from fsl_cli.episodes import Episode, chunks


class Workers:
    """`algo.backward`, shared by `count` worker threads, among which torch's CPU threads are divided.

    Each worker has its own copy of the modules, because `torch.func` swaps their weights and `statistics` sets their mode.
    The assignment of tasks and the order of sums are fixed, so that repeated runs agree bit for bit.
    """

    def __init__(self, algo: Algorithm, count: int) -> None:
        self.algo = algo
        self.copies = [copy.deepcopy(algo) for _ in range(count)]
        share = max(1, torch.get_num_threads() // count)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,))

    def __call__(self, batch: Batch) -> Outcome:
        assert isinstance(batch, Episode)
        tasks = len(batch.support.targets)
        parts = list(chunks(batch, -(-tasks // len(self.copies))))
        used = self.copies[: len(parts)]
        drawn = torch.get_rng_state()
        running = [self.pool.submit(self._part, *work) for work in zip(used, [part for part, _ in parts], strict=True)]
        wait(running)
        outcomes = [work.result() for work in running]
        if not torch.get_rng_state().equal(drawn):
            raise ValueError(
                f"device.workers = {len(self.copies)}, but this network drops values at random in training, and threads would "
                "draw them in another order each time. Set device.workers=1."
            )
        shares = [share for _, share in parts]
        self._gather(used, shares)
        return Outcome(*(_mean(values, shares) for values in zip(*outcomes, strict=True)))

    def _part(self, worker: Algorithm, part: Episode) -> Outcome:
        """One worker's part of the step, from the current weights and buffers."""
        for mine, theirs in zip(worker.parameters(), self.algo.parameters(), strict=True):
            mine.data, mine.grad = theirs.data, None
        for mine, theirs in zip(worker.buffers(), self.algo.buffers(), strict=True):
            mine.copy_(theirs)
        worker.forget()
        worker.progress, worker.task_chunk = self.algo.progress, self.algo.task_chunk
        return worker.train().backward(part)

    @torch.no_grad()
    def _gather(self, used: list[Algorithm], shares: list[float]) -> None:
        """Adds the mean gradient of the parts to `.grad`, and averages their buffers (Reptile's moments), all by `shares`."""
        for parameter, *copies in zip(self.algo.parameters(), *(worker.parameters() for worker in used), strict=True):
            found = [own.grad for own in copies]
            if all(gradient is not None for gradient in found):
                gradient = _mean(found, shares)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for buffer, *copies in zip(self.algo.buffers(), *(worker.buffers() for worker in used), strict=True):
            if buffer.is_floating_point():
                buffer.copy_(_mean(copies, shares))


def _mean(values: list[torch.Tensor] | tuple[torch.Tensor, ...], shares: list[float]) -> torch.Tensor:
    """The weighted mean, summed in the order of the parts."""
    return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)
