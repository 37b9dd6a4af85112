"""`fsl data prepare` packs a data set ahead of time and describes it; `fsl data show` draws one of its episodes."""

import hashlib
import logging
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from fsl_cli import folders
from fsl_cli.config import build, check
from fsl_cli.datasets.drawn import Drawn
from fsl_cli.datasets.packed import SPLITS, Packed
from fsl_cli.datasets.texts import to_texts, transcript
from fsl_cli.episodes import EVALUATION, EpisodeSampler
from fsl_cli.errors import run_and_report
from fsl_cli.overrides import asks_help
from fsl_cli.pictures import picture
from fsl_cli.schema import register
from fsl_cli.store import Store

log = logging.getLogger(__name__)

ACTIONS = ("prepare", "show")

register()


def prepare(overrides: list[str]) -> list[str]:
    """Turns the first word, prepare or show, into the option `action`."""
    if asks_help(overrides):
        return [word for word in overrides if word not in ACTIONS]
    if not overrides or overrides[0] not in ACTIONS:
        raise ValueError("fsl data needs one of two words next: fsl data prepare dataset=NAME, or fsl data show dataset=NAME.")
    return [f"action={overrides[0]}", *overrides[1:]]


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="data")
def main(cfg: DictConfig) -> None:
    """Runs one action."""
    run_and_report(run, cfg)


def run(cfg: DictConfig) -> None:
    """Packs the data set if necessary, and describes it or draws an episode."""
    check(cfg)
    start = time.perf_counter()
    data = build(cfg.dataset, "dataset").load()
    seconds = time.perf_counter() - start
    if isinstance(data, Drawn):
        raise ValueError(f"dataset = {data.name} is drawn anew in every episode: there is nothing to prepare or to show.")
    if cfg.action == "prepare":
        for line in describe(data):
            log.info(line)
        log.info(f"Ready in {seconds:.1f} s, packed under {cfg.cache_dir}")
    else:
        log.info(show(data, cfg))


def describe(data: Packed) -> list[str]:
    """Describes a packed data set, with the results of `checks`."""
    what = "images" if data.item_shape else "texts"
    size = " of " + "x".join(map(str, data.item_shape)) if data.item_shape else ""
    counts = np.asarray(data.counts)
    lines = [
        f"{data.name}: {counts.sum():,} {what}{size} in {len(counts):,} classes of "
        f"{counts.min()} to {counts.max()} {what}, {data.items.nbytes / 2**20:,.0f} MiB"
    ]
    for split in SPLITS:
        own = np.asarray(data.splits[split], dtype=np.int64)
        lying = data.turns.get(split, (0,))
        copies = [name for name, are in (("quarter turns", 1 in lying), ("mirror images", 4 in lying)) if are]
        turned = f" ({len(own) * len(lying):,} with {' and '.join(copies)})" if copies else ""
        lines.append(f"{split}: {len(own):,} classes{turned}, {counts[own].sum():,} {what}")
    return [*lines, *checks(data)]


def checks(data: Packed) -> list[str]:
    """Checks whether a class is in two splits, and how many items occur twice, within a class or across classes and splits."""
    members = [np.asarray(data.splits[split], dtype=np.int64) for split in SPLITS]
    split_of = np.full(len(data.counts), -1)
    for number, own in enumerate(members):
        split_of[own] = number
    shared = sum(map(len, members)) - (split_of >= 0).sum()
    first: dict[bytes, int] = {}
    classes = np.repeat(np.arange(len(data.counts)), data.counts).tolist()
    keys = (hashlib.blake2b(item.tobytes(), digest_size=16).digest() for item in data.items)
    pairs = np.array([(first.setdefault(key, own), own) for key, own in zip(keys, classes, strict=True)])  # [n, 2]
    what = "images" if data.item_shape else "texts"
    other_class, other_split = (pairs[:, 0] != pairs[:, 1]).sum(), np.not_equal(*split_of[pairs].T).sum()
    return [
        f"check: {shared} classes are in two splits",
        f"check: {len(pairs) - len(first)} {what} are equal to an earlier one, {other_class} of them to one of another class, "
        f"{other_split} to one of another split",
    ]


def show(data: Packed, cfg: DictConfig) -> str:
    """Draws an evaluation episode, or writes its texts; returns the line to print.

    In the picture, each class is a row, with supports framed grey and queries green.
    """
    task = cfg.task
    filled = [split for split in SPLITS if len(data.splits[split]) > 0]
    if cfg.split not in filled:
        raise ValueError(f"split = {cfg.split!r}, but {data.name} has classes in {', '.join(filled)}. Choose split={filled[0]}.")
    classes = data.classes(cfg.split)
    sampler = EpisodeSampler(classes, task.way, task.shot, task.queries, 1, cfg.seed, EVALUATION[cfg.split])
    indices = sampler.fixed(cfg.episode, cfg.episode + 1)
    ends = classes.starts + classes.counts
    firsts = zip(indices.items[0, :, 0], indices.turns[0, :, 0], strict=True)
    own = [(classes.starts <= item) & (item < ends) & (classes.turns == turn) for item, turn in firsts]
    names = [classes.names[int(mine.argmax())] for mine in own]
    if data.item_shape and Path(cfg.out).suffix.lower() != ".png":
        raise ValueError(f"out = {cfg.out}, but the picture is a PNG. Name it so: out={Path(cfg.out).with_suffix('.png')}.")
    out = folders.new(cfg.out if data.item_shape else Path(cfg.out).with_suffix(".txt"), "out")
    if data.item_shape:
        episode = Store(data.items, torch.device("cpu"), budget=0).episodes(indices, task.shot)
        pixels = (255 * picture(episode, episode.query.targets)).round().to(torch.uint8)  # [3, H, W]
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(out, "PNG")
    else:
        out.write_text(transcript(names, [to_texts(data.items[own]) for own in indices.items[0]], task.shot), encoding="utf-8")
        log.info(out.read_text(encoding="utf-8"))
    return f"{out}: {task.way}-way {task.shot}-shot on {data.name} {cfg.split}, rows {', '.join(names)}"
