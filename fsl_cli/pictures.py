"""Pictures of episodes: images with right and wrong answers marked, curves of regression, texts."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fsl_cli.algos.base import Algorithm
from fsl_cli.datasets.texts import transcript
from fsl_cli.episodes import Episode
from fsl_cli.sources import AnyStore, Sampler
from fsl_cli.store import Store

SKETCH = (480, 320)  # pixels
TRUTH, BEFORE, AFTER = (150, 150, 150), (120, 160, 240), (210, 40, 40)


@torch.no_grad()
def first_episode(algo: Algorithm, store: AnyStore, sampler: Sampler) -> Tensor | str:
    """A picture of the first evaluation episode with the algorithm's answers; for texts, a transcript."""
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
    """One regression task as an image `[3, H, W]`: truth grey, support black, first prediction blue, last prediction red.

    The first prediction is the one before the inner steps.
    Takes a meta-batch of one task of inputs `[1, n, 1]`, and the values `[1, steps + 1, q, 1]` predicted at its queries.
    """
    x, order = episode.query.inputs[0, :, 0].cpu().sort()
    truth = episode.query.targets[0].cpu()[order, 0]
    predictions = outputs[0, :, :, 0].cpu()[:, order]
    curves = [(truth, TRUTH), *([(predictions[0], BEFORE)] if len(predictions) > 1 else []), (predictions[-1], AFTER)]
    width, height = SKETCH
    top = 1.5 * float(truth.abs().max()) + 0.1  # of the picture; predictions beyond it are drawn at its edge
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
