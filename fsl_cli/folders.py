"""The user's image files: `FOLDER/<class>/<image>` as support, a file or a folder as query."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from fsl_cli.datasets.archives import listing, refuse_odd_name, writable
from fsl_cli.datasets.images import OTHERS, hidden
from fsl_cli.errors import RunError

log = logging.getLogger(__name__)

T = TypeVar("T")

MESSAGE = 20  # most files that a message names


class Labelled(NamedTuple):
    """An image file and its class, the name of its folder."""

    path: Path
    name: str


def labelled(folder: str) -> list[Labelled]:
    """The images of `FOLDER/<class>/<image>`, sorted by class and name; classes may differ in size."""
    root = there(folder, "support")
    if not root.is_dir():
        raise ValueError(
            f"support = {folder} is a file, expected a folder with a folder of images for each class, or a model of texts."
        )
    gone = next((path for path in _sorted(root) if _leads_nowhere(path)), None)
    if gone is not None:  # it may stand for a class folder
        raise ValueError(f"support: {gone} is a link to {gone.readlink()}, which is not there. Mend or remove it.")
    stray = [path for path in _sorted(root) if _is_image(path)]
    if stray:
        raise ValueError(
            f"support = {folder}: {stray[0].name} lies in no class folder. Put each image into {Path(folder) / 'CLASS'}, "
            "a folder with the name of its class."
        )
    classes = [path for path in _sorted(root) if path.is_dir()]
    if len(classes) < 2:
        raise ValueError(f"support = {folder} has {len(classes)} class folders, expected two or more, with images in each.")
    files, others = [], []
    for path in classes:
        images, rest = _below(path)
        others += rest
        if not images:
            raise ValueError(f"support: class folder {path} has no images. Put at least one into it, or remove it.")
        deep = next((file for file in images if file.parent != path), None)
        if deep is not None:
            raise ValueError(
                f"support: {deep} lies deeper than {Path(folder) / 'CLASS' / 'IMAGE'}. Move it up into class folder {path}, or "
                f"give support={path} if the folders in there are the classes."
            )
        for file in images:
            refuse_odd_name(file, "support")
        files += [Labelled(file, path.name) for file in images]
    _tell(others, "support")
    closed = sorted(path.name for path in root.iterdir() if hidden(Path(path.name)) and path.is_dir())
    if closed:
        log.info(f"support: folders whose names begin with a dot are left out: {_some(closed)}")
    return files


def images(place: str) -> list[Path]:
    """The file `place`, or all images in and below the folder `place`, sorted."""
    root = there(place, "query")
    if root.is_file():
        return [root]
    found, others = _below(root)
    if not found:
        raise ValueError(f"query = {place} has no images. Name an image, or a folder with images in it.")
    _tell(others, "query")
    return found


def new(place: str | Path, key: str) -> Path:
    """The path of a file to be written; refuses one that exists or cannot be written, naming `key`."""
    path = Path(os.path.expanduser(place))  # noqa: PTH111 - Path would turn ./~x, a file, into ~x, a home
    if path.exists():
        raise ValueError(f"{key} = {place} is there already. Choose another name, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)  # check now: the content takes long to compute
        path.unlink()
    except OSError as error:
        raise ValueError(f"{key} = {place} cannot be written ({error.filename}: {error.strerror}). Choose another.") from error
    return path


class Reader:
    """Converts image files to items by `item`, and records those that cannot be read."""

    def __init__(self, item: Callable[[Path], np.ndarray]) -> None:
        self.item = item
        self.skipped: dict[str, str] = {}  # file -> reason

    def read(self, paths: list[Path], bar: tqdm) -> tuple[np.ndarray, list[bool]]:
        """Items `[n, *item]` of the readable files, and for each file whether it was readable."""
        items, kept = [], []
        for path in paths:
            try:
                refuse_odd_name(path, "query")  # in the support, such names have been refused before
                items.append(self.item(path))
            except ValueError as error:
                self.skipped[writable(path)] = str(error)
            kept.append(writable(path) not in self.skipped)
            bar.update()
        return np.stack(items) if items else np.empty(0, np.uint8), kept

    def raise_if_skipped(self, written: Path) -> None:
        """Raises RunError if files could not be read; to be called when everything else is done."""
        if self.skipped:
            raise RunError(
                f"{len(self.skipped)} of the files could not be read as images and were skipped: {_some(list(self.skipped))}. "
                f"Everything else is in {written}."
            )


def bar(total: int, what: str) -> tqdm:
    """A progress bar over files, shown on a terminal only."""
    return tqdm(total=total, desc=what, unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False)


def table(place: str, key: str, read: Callable[[Path], list[T]]) -> list[T]:
    """Reads the texts in the file `place` by `read`; errors name `key`."""
    path = there(place, key)
    if path.is_dir():
        what = "text,label" if key == "support" else "texts, one on each line"
        raise ValueError(f"{key} = {place} is a folder, but the model takes texts. Name a file of {what}.")
    try:
        return read(path)
    except ValueError as error:  # its message starts with the file name
        raise ValueError(f"{key} = {error}") from error


def there(place: str, key: str) -> Path:
    """The file or folder `place`; refuses one that is missing or unreadable, naming `key`."""
    path = Path(os.path.expanduser(place))  # noqa: PTH111 - Path would turn ./~x, a file, into ~x, a home
    if not path.exists():
        several = " To give several files, put them into one folder." if {*"*,["} & {*str(place)} else ""
        raise ValueError(f"{key} = {place}: there is no such file or folder.{several}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{key} = {place} is there, but you may not read it. Allow it, or name another.")
    return path


def _sorted(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not hidden(Path(path.name)))


def _below(root: Path) -> tuple[list[Path], list[Path]]:
    """The images in and below a folder, sorted, and the other files; follows links, except to a parent folder."""
    files = sorted(root / name for name in listing(root) if not hidden(name))
    return [file for file in files if _is_image(file)], [file for file in files if not _is_image(file)]


def _tell(others: list[Path], key: str) -> None:
    if others:
        names = _some([writable(path) for path in others])
        log.info(f"{key}: files whose names do not end as those of images are left out: {names}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:MESSAGE]) + (", ..." if len(names) > MESSAGE else "")


def _is_image(path: Path) -> bool:
    """Whether a file, or a broken link, may be an image: it has the suffix of one, or none."""
    claims = not path.suffix or path.suffix.lower() in Image.registered_extensions().keys() | OTHERS
    return claims and (path.is_file() or _leads_nowhere(path))


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
