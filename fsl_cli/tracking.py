"""What a training run shows and keeps: progress bar or lines, metrics.jsonl, TensorBoard."""

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

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fsl_cli.algos.base import Algorithm
from fsl_cli.datasets.texts import transcript
from fsl_cli.episodes import Episode
from fsl_cli.functions import AnyStore, Sampler
from fsl_cli.store import Store

SKETCH = (480, 320)  # pixels
TRUTH, BEFORE, AFTER = (150, 150, 150), (120, 160, 240), (210, 40, 40)


class Tracker:
    """Writes to a run folder; continuing at `step` drops what an earlier process wrote after that step.

    `silent`: writes and shows nothing, for all but one of the processes that share a run.
    """

    def __init__(self, folder: Path, step: int, steps: int, silent: bool = False) -> None:
        self.lines = ExitStack()  # what is logged while the bar stands goes above it
        shown = sys.stderr.isatty() and not silent
        if silent:
            folder = Path(self.lines.enter_context(TemporaryDirectory()))
        self.lines.enter_context(alone(folder))
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= step] if step else []
            draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            draft.write_text("".join(line + "\n" for line in kept))
            draft.replace(self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if shown:
            self.lines.enter_context(logging_redirect_tqdm())
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not shown)

    def step(self) -> None:
        """One outer step is done."""
        self.bar.update()

    def show(self, values: Mapping[str, float]) -> None:
        """Puts values beside the progress bar."""
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Keeps values of one `kind` (train, val) at an outer step."""
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def curve(self, name: str, values: list[float]) -> None:
        """Keeps what queries are judged by before and after each inner step; the horizontal axis is the inner step."""
        for inner_step, value in enumerate(values):
            self.board.add_scalar(f"adaptation/{name}", value, inner_step)

    def picture(self, name: str, image: Tensor | str, step: int) -> None:
        """Keeps an image `[3, H, W]` in [0, 1], or a text in its place."""
        if isinstance(image, str):
            self.board.add_text(name, textwrap.indent(image, "    "), step)  # indented, Markdown leaves lines as they are
        else:
            self.board.add_image(name, image, step)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Keeps the settings of the run beside what it came to."""
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
    """Holds a run folder until the run ends, and refuses one in which another process is at work."""
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


def _step(line: str) -> int:
    """The step of a line of metrics.jsonl; a line that a dying process left half written counts as after all."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize


@torch.no_grad()
def first_episode(algo: Algorithm, store: AnyStore, sampler: Sampler) -> Tensor | str:
    """A picture of the first evaluation episode and what the algorithm says to it, or its texts."""
    indices = sampler.fixed(0, 1)
    episode = store.episodes(indices, sampler.shot)
    algo.eval()
    if isinstance(store, Store) and store.texts is not None:
        right = algo.predictions(episode)[0].argmax(-1) == episode.query.targets[0].argmax(-1)
        texts = [[store.texts[number] for number in row] for row in indices.items[0]]
        names = [f"class {slot}" for slot in range(1, sampler.way + 1)]
        return transcript(names, texts, sampler.shot, right.unflatten(0, (sampler.way, -1)).cpu().numpy())
    return sketch(episode, algo.curves(episode)) if algo.regression else picture(episode, algo.predictions(episode))


def picture(episode: Episode, logits: Tensor) -> Tensor:
    """One task as an image `[3, H, W]`: a row per class, support framed grey, queries green if right and red if wrong.

    Takes a meta-batch of one task of images `[1, n, C, H, W]` sorted by class, and its query logits `[1, q, way]`.
    """
    way = logits.shape[-1]
    right = (logits[0].argmax(-1) == episode.query.targets[0].argmax(-1)).cpu()
    colours = torch.where(right[:, None], torch.tensor([0.1, 0.7, 0.2]), torch.tensor([0.9, 0.1, 0.1]))  # [q, 3]
    grey = torch.full((episode.support.inputs.shape[1], 3), 0.5)
    framed = [_framed(part.inputs[0].cpu(), colour) for part, colour in zip(episode, (grey, colours), strict=True)]
    tiles = torch.cat([part.unflatten(0, (way, -1)) for part in framed], dim=1)  # [way, columns, 3, H, W]
    return tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def _framed(images: Tensor, colours: Tensor, width: int = 2) -> Tensor:
    """Images `[n, C, H, W]` in a frame of their colour `[n, 3]`."""
    rgb = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    height, breadth = rgb.shape[2] + 2 * width, rgb.shape[3] + 2 * width
    tiles = colours[:, :, None, None].expand(-1, -1, height, breadth).clone()
    tiles[:, :, width:-width, width:-width] = rgb
    return tiles


def sketch(episode: Episode, outputs: Tensor) -> Tensor:
    """One regression task as an image `[3, H, W]`: the true curve grey, support points black, the first prediction (before
    the inner steps) blue, the last one red.

    Takes a meta-batch of one task of inputs `[1, n, 1]`, and the values `[1, steps + 1, q, 1]` predicted at its queries.
    """
    x, order = episode.query.inputs[0, :, 0].cpu().sort()
    truth = episode.query.targets[0].cpu()[order, 0]
    predictions = outputs[0, :, :, 0].cpu()[:, order]
    curves = [(truth, TRUTH), *([(predictions[0], BEFORE)] if len(predictions) > 1 else []), (predictions[-1], AFTER)]
    width, height = SKETCH
    top = 1.5 * float(truth.abs().max()) + 0.1  # of the picture; predictions beyond it run along its edge
    left, right = float(x[0]), float(x[-1])

    def place(across: Tensor, up: Tensor) -> list[tuple[float, float]]:
        columns = (across - left) / max(right - left, 1e-6) * (width - 1)
        rows = (1 - up.nan_to_num().clamp(-top, top) / top) / 2 * (height - 1)
        return list(zip(columns.tolist(), rows.tolist(), strict=True))

    image = Image.new("RGB", SKETCH, "white")
    pen = ImageDraw.Draw(image)
    for values, colour in curves:
        pen.line(place(x, values), fill=colour, width=3)
    for across, up in place(episode.support.inputs[0, :, 0].cpu(), episode.support.targets[0, :, 0].cpu()):
        pen.ellipse((across - 5, up - 5, across + 5, up + 5), fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
