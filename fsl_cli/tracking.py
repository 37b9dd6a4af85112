"""What a training run shows and records: progress bar, metrics.jsonl, TensorBoard."""

import json
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fsl_cli.whole import whole


class Tracker:
    """Writes to a run folder; continuing at `step` drops what an earlier process wrote after that step.

    `silent`: writes and shows nothing, for all but one of the processes that share a run.
    """

    def __init__(self, folder: Path, step: int, steps: int, silent: bool = False) -> None:
        self.lines = ExitStack()  # the lock, the folder if silent, and log lines above the progress bar
        shown = sys.stderr.isatty() and not silent
        if silent:
            folder = Path(self.lines.enter_context(TemporaryDirectory()))
        self.lines.enter_context(alone(folder))
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= step] if step else []
            with whole(self.path) as file:
                file.writelines(line + "\n" for line in kept)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if shown:
            self.lines.enter_context(logging_redirect_tqdm())
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not shown)

    def step(self) -> None:
        """Advances the progress bar by one outer step."""
        self.bar.update()

    def show(self, values: Mapping[str, float]) -> None:
        """Shows values beside the progress bar."""
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records values of one `kind` (train, val) at an outer step."""
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def curve(self, name: str, values: list[float]) -> None:
        """Records the measure before and after each inner step; the horizontal axis is the inner step."""
        for inner_step, value in enumerate(values):
            self.board.add_scalar(f"adaptation/{name}", value, inner_step)

    def picture(self, name: str, image: Tensor | str, step: int) -> None:
        """Records an image `[3, H, W]` in [0, 1], or a text."""
        if isinstance(image, str):
            self.board.add_text(name, textwrap.indent(image, "    "), step)  # indented as code, which keeps its line breaks
        else:
            self.board.add_image(name, image, step)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Records the settings of the run with its final metrics."""
        plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
        self.board.add_hparams(plain, {f"hparam/{name}": value for name, value in metrics.items()}, run_name=".")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        self.file.close()
        self.board.close()
        self.lines.close()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Locks a run folder, and refuses one that another process has locked."""
    if os.name != "posix":
        yield
        return
    import fcntl  # Windows has none

    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"out = {folder}: another process is at work on this run. Wait until it ends, or choose another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(held)


def busy(folder: Path) -> bool:
    """Whether another process has locked a run folder."""
    try:
        with alone(folder):
            return False
    except ValueError:
        return True


def _step(line: str) -> int:
    """The step of a line of metrics.jsonl; an incomplete line, of a killed process, comes after all steps and is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize
