"""The state of a training run, which its checkpoints store."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fsl_cli import checkpoint
from fsl_cli.algos.base import Algorithm
from fsl_cli.errors import RunError

log = logging.getLogger(__name__)

LEFT_OUT = 10  # consecutive steps without a finite gradient after which a run counts as diverged


@dataclass
class Run:
    """Everything that changes during a run, and nothing else: what a checkpoint restores."""

    algo: Algorithm
    optimizer: Optimizer
    schedule: LRScheduler
    step: int = 0
    best: float = math.nan  # validation accuracy, or mean squared error; NaN before the first validation
    best_step: int = 0
    misses: int = 0  # validations since the best one
    left_out: int = 0  # consecutive steps just skipped because the gradient was not finite
    seconds: float = 0.0  # spent in training steps, including those before a resume
    wall: float = 0.0  # seconds spent on the run in total, including those before a resume
    failures: list[int] = field(default_factory=list)  # classes that hard tasks draw from
    window: list[list[Tensor]] = field(default_factory=list)  # loss, measure, gradient norm of the steps since the last log

    def done(self, steps: int, early_stop: int | None) -> bool:
        """Whether the run is finished."""
        return self.step >= steps or (early_stop is not None and self.misses >= early_stop)

    def content(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        numbers = {name: getattr(self, name) for name in ("best", "best_step", "misses", "left_out", "seconds", "wall")}
        return {
            "step": self.step,
            "algo": self.algo.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": numbers | {"failures": self.failures} | {"window": self._rows()},
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Restores the state that `content` returned."""
        checkpoint.load_weights(self.algo, content, "resume")
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.step = content["step"]
        for name, value in content["progress"].items():
            setattr(self, name, value)
        self.window = [[torch.tensor(value) for value in row] for row in self.window]

    def leave_out(self) -> None:
        """Logs and counts a skipped step; too many in a row end the run."""
        log.info(f"Step {self.step} is left out: its gradient in bfloat16 is not finite.")
        self.left_out += 1
        if self.left_out == LEFT_OUT:
            raise RunError(
                f"None of the last {LEFT_OUT} steps up to {self.step} had a finite gradient: the run has diverged. Lower "
                "optimizer.lr (or algo.inner_lr), or set device.precision=fp32; last.pt, if there is one, is from before."
            )

    def _rows(self) -> list[list[float]]:
        """The window as numbers, read in a single copy, because every copy from a GPU waits for it."""
        if not self.window:
            return []
        place = self.window[-1][0].device  # rows restored from a checkpoint are on the CPU
        return torch.stack([torch.stack([value.to(place) for value in row]) for row in self.window]).tolist()

    def settled(self) -> list[list[float]]:
        """The window as numbers; a loss or gradient norm that is not finite ends the run."""
        rows = self._rows()
        for number, (loss, _, norm) in enumerate(rows, start=self.step - len(rows) + 1):
            if not np.isfinite([loss, norm]).all():
                raise RunError(
                    f"At step {number} the loss was {loss:.4g} and the gradient norm {norm:.4g}: the run has diverged. "
                    "Lower optimizer.lr (or algo.inner_lr), or set clip_norm; last.pt, if there is one, is from before."
                )
        return rows
