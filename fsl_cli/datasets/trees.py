"""Reads images in folders or archives as items sorted by class: a first pass finds them, a second one decodes them."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fsl_cli.datasets import archives
from fsl_cli.datasets.images import OTHERS, SUFFIXES, is_image, open_image, to_item
from fsl_cli.datasets.packed import Raw, blank


class Found(NamedTuple):
    """An image file: the number of its source, and its name there."""

    source: int
    name: str


Tree = dict[str, list[Found]]  # the images of each class; classes and images sorted by name


def survey(sources: list[Path], label: Callable[[str], str | None]) -> Tree:
    """Finds the images; `label` maps a file name to its class, or to None to leave it out."""
    tree: dict[str, dict[str, Found]] = {}
    for number, source in enumerate(sources):
        for name, _ in archives.walk(source, lambda _: False):
            where = label(name) if is_image(name, SUFFIXES | OTHERS) else None
            if where is None:
                continue
            archives.refuse_odd_name(source / name, "dataset")
            if not is_image(name):
                raise ValueError(f"{source / name} is no image that is read here. Convert it to png or jpg, or remove it.")
            images, own = tree.setdefault(where, {}), PurePosixPath(name).name
            if own in images:
                first, second = sources[images[own].source] / images[own].name, source / name
                raise ValueError(f"class {where} has {own} twice, in {first} and in {second}. Remove one of them.")
            images[own] = Found(number, name)
    return {where: [tree[where][own] for own in sorted(tree[where])] for where in sorted(tree)}


def named(tree: Tree, labels: Mapping[str, str]) -> Tree:
    """The images of a tree that are named in `labels`, name -> class.

    The lists of mini-ImageNet name images of ImageNet by their rank within a class: n0153282900000005.jpg is the fifth image of
    class n01532829, ordered by the number in its name (CLASS_NUMBER).
    """
    wanted: dict[str, list[str]] = {where: [] for where in tree}
    for name, where in labels.items():
        wanted.get(where, []).append(name)
    chosen = {}
    for where, images in tree.items():
        ranked = sorted(images, key=lambda found: _number(found.name.rpartition("_")[2]))
        own = {f"{where}{place:08d}.jpg": found for place, found in enumerate(ranked, start=1)}
        own |= {PurePosixPath(found.name).name: found for found in images}
        chosen[where] = [own[name] for name in wanted[where] if name in own]
    return {where: images for where, images in chosen.items() if images}


def _number(name: str) -> int:
    digits = PurePosixPath(name).stem
    return int(digits) if digits.isdecimal() else 0


def read(sources: list[Path], tree: Tree, size: int, channels: int, cache_dir: str, key: str) -> Raw:
    """Reads all images found, as items `[channels, size, size]`; `key`: the option that names the sources."""
    places = {found: place for place, found in enumerate(found for images in tree.values() for found in images)}
    items = blank(cache_dir, (len(places), channels, size, size))
    left = set(places)
    for number, source in enumerate(sources):
        here = {found.name: place for found, place in places.items() if found.source == number}
        for name, content in archives.walk(source, here.__contains__):
            if content is not None:
                image = open_image(f"{key}: {source / name}", content, least=2 * size)
                items[here[name]] = to_item(image, size, channels)
                left.discard(Found(number, name))
    if left:
        gone = min(left)
        raise ValueError(
            f"{sources[gone.source] / gone.name} was there and is gone. Leave the files alone while they are packed."
        )
    return Raw(items, list(tree), [len(images) for images in tree.values()])
