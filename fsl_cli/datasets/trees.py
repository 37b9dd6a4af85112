"""Images in folders or archives -> items sorted by class: a first walk finds them, a second one reads them."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fsl_cli.datasets import archives
from fsl_cli.datasets.images import is_image, open_image, to_item
from fsl_cli.datasets.packed import Raw, blank


class Found(NamedTuple):
    """An image file: the number of the source it lies in, and its name there."""

    source: int
    name: str


Tree = dict[str, list[Found]]  # the images of each class; classes and images sorted by name


def survey(sources: list[Path], label: Callable[[str], str | None]) -> Tree:
    """Finds the images; `label` gives the class for a file's name, or None to leave it out."""
    tree: dict[str, dict[str, Found]] = {}
    for number, source in enumerate(sources):
        for name, _ in archives.walk(source, lambda _: False):
            where = label(name) if is_image(name) else None
            if where is None:
                continue
            images, own = tree.setdefault(where, {}), PurePosixPath(name).name
            if own in images:
                first, second = sources[images[own].source] / images[own].name, source / name
                raise ValueError(f"class {where} has {own} twice, in {first} and in {second}. Remove one of them.")
            images[own] = Found(number, name)
    return {where: [tree[where][own] for own in sorted(tree[where])] for where in sorted(tree)}


def read(sources: list[Path], tree: Tree, size: int, channels: int, cache_dir: str) -> Raw:
    """Reads every image that was found, as items `[channels, size, size]`."""
    places = {found: place for place, found in enumerate(found for images in tree.values() for found in images)}
    items = blank(cache_dir, (len(places), channels, size, size))
    left = set(places)
    for number, source in enumerate(sources):
        here = {found.name: place for found, place in places.items() if found.source == number}
        for name, content in archives.walk(source, here.__contains__):
            if content is not None:
                items[here[name]] = to_item(open_image(source / name, content, least=2 * size), size, channels)
                left.discard(Found(number, name))
    if left:
        gone = min(left)
        raise ValueError(
            f"{sources[gone.source] / gone.name} was there and is gone. Leave the files alone while they are packed."
        )
    return Raw(items, list(tree), [len(images) for images in tree.values()])
