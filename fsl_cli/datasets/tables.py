"""Images in one array: the pickle and npz releases of mini- and tieredImageNet, read without running code in them.

A release has a file for each split, or one for images and one for labels, with the split in its name. It contains

    image_data + class_dict     uint8 [n, H, W, C], and the numbers of the images of each class   (Ren et al. 2018)
    data or images + labels     the same with a class number for each image, names in catname2label (Gidaris, Lee et al.)
    images without labels       uint8 [classes, each, H, W, C]
    a bare list                 PNG or JPEG files as arrays of bytes, labels in the other file      (tieredImageNet)
    images + label_specific     the output of the authors' program for the latter, by OpenCV: blue, green, red
"""

import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsl_cli.datasets import archives
from fsl_cli.datasets.images import open_image, to_item
from fsl_cli.datasets.packed import SPLITS, Raw, blank

EDITION = 2  # of the packed form: increase it when the same files give other pixels
SUFFIXES = (".pkl", ".pickle", ".npz")
IMAGES, LABELS = ("image_data", "images", "data", "x"), ("labels", "label_specific", "targets", "y")
OTHER_PHASE = re.compile("phase_(val|test)")  # further images of the training classes, not part of any published protocol
PLAIN = re.compile("[<>|=]?[biu][1248]|[<>|=]?f[248]|[<>|=]?[SU][0-9]{1,6}|[|]?O[48]?")
# What the unpickler raises for files other than those above.
BROKEN = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, MemoryError, OSError,
          RecursionError, OverflowError, ImportError, UnicodeError, zipfile.BadZipFile, zlib.error)  # fmt: skip


def is_table(path: Path) -> bool:
    """Whether a file may hold an array of images."""
    return path.is_file() and path.suffix.lower() in SUFFIXES and not OTHER_PHASE.search(path.name)


def read(sources: list[Path], known: set[str], size: int, channels: int, cache_dir: str) -> Raw:
    """Reads all images as items `[channels, size, size]`. A class whose name is not `known` is named split/number."""
    counts: dict[str, int] = {}
    for _, labels in _parts(sources, known):
        for name in labels:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(counts)
    ends = np.cumsum([counts[name] for name in names])
    places = {name: int(end) - counts[name] for name, end in zip(names, ends, strict=True)}
    items = blank(cache_dir, (int(ends[-1]), channels, size, size))
    for images, labels in _parts(sources, known):
        for image, name in zip(images, labels, strict=True):
            items[places[name]] = to_item(_picture(image), size, channels)
            places[name] += 1
    return Raw(items, names, [counts[name] for name in names])


def _parts(sources: list[Path], known: set[str]) -> Iterator[tuple[Any, list[str]]]:
    """The images of each split, and the names of their classes."""
    by_split: dict[str, list[Path]] = {}
    for path in sources:
        words = [split for split in SPLITS if split in path.stem.lower()]
        if len(words) != 1:
            raise ValueError(f"{path} holds classes of which split? Put one of train, val and test into the file's name.")
        by_split.setdefault(words[0], []).append(path)
    for split, paths in by_split.items():
        table: dict[str, Any] = {}
        for path in paths:
            content = load(path)
            table |= content if isinstance(content, dict) else {"images": content}
        where = " and ".join(map(str, paths))
        images = next((table[key] for key in IMAGES if key in table), None)
        if images is None or _count(images) == 0:
            found = ", ".join(map(str, table)) or "nothing"
            raise ValueError(f"{where} has {found}, expected images under one of {', '.join(IMAGES)}. Use a known release.")
        shape = getattr(images, "shape", ())
        if len(shape) == 5:
            table.setdefault("labels", np.repeat(np.arange(shape[0]), shape[1]))
            images = images.reshape(-1, *shape[2:])
        if "label_specific" in table and len(shape) == 4:
            images = images[..., ::-1]
        try:
            labels = _labels(table, len(images))
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{where} has classes that cannot be read ({error}). Use a known release.") from error
        named = len(labels) - labels.count(None)
        if named != len(images):
            raise ValueError(f"{where} has {len(images)} images and classes for {named} of them. Use all files of the release.")
        yield images, [name if name in known else f"{split}/{name}" for name in labels]


def _count(images: Any) -> int:
    """The number of images; 0 for a scalar."""
    try:
        return len(images)
    except TypeError:
        return 0


def _labels(table: dict[str, Any], count: int) -> list[str | None]:
    """The class of each image, by name if the file has names, else by number."""
    if isinstance(table.get("class_dict"), dict):
        labels: list[str | None] = [None] * count
        for name, numbers in table["class_dict"].items():
            for number in _plain(numbers):
                labels[int(number)] = str(name)
        return labels
    given = next((table[key] for key in LABELS if key in table), ())
    table_of_names = table.get("catname2label")
    names = {int(number): str(name) for name, number in table_of_names.items()} if isinstance(table_of_names, dict) else {}
    return [label if isinstance(label, str) else names.get(int(label), f"{int(label):04d}") for label in given]


def _picture(image: Any) -> Image.Image:
    """An image `[H, W, C]`, `[C, H, W]` or `[H, W]`, or the bytes of an image file."""
    if isinstance(image, bytes) or (isinstance(image, np.ndarray) and (image.ndim == 1 or image.shape[1] == 1)):
        return open_image("dataset: an image in the array", bytes(image))
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3)):
        found = f"{getattr(image, 'dtype', type(image).__name__)} {list(np.shape(image))}"
        raise ValueError(f"dataset: an image in the array is {found}, expected uint8 [H, W, C]. Use a known release.")
    if image.ndim == 3 and image.shape[-1] not in (1, 3):
        image = image.transpose(1, 2, 0)
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else np.ascontiguousarray(image))


def load(path: Path) -> Any:
    """The content of a pickle or npz file: arrays, numbers, texts and plain containers only."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                if sum(member.file_size for member in file.zip.infolist()) > archives.limit(path):
                    raise ValueError("far more is in it than its size allows")
                return {key: file[key] for key in file.files}
        with path.open("rb") as file:
            content = _plain(Restricted(file, encoding="latin1").load())
    except BROKEN as error:
        raise ValueError(
            f"{path} is not a pickle or npz of arrays and plain values ({error}), and was not read, since another could run "
            "foreign code. Use a published release of the data set."
        ) from error
    return {_text(key): value for key, value in content.items()} if isinstance(content, dict) else content


class _Kind:
    """Replaces numpy.dtype while a pickle is read, so that nothing in the file reaches numpy unchecked."""

    def __init__(self, name: str, *_: object) -> None:
        self.name, self.order = _text(name), "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def dtype(self) -> np.dtype:
        """The numpy type; refuses all but numbers, texts and objects, whose content `_plain` restricts."""
        code = self.order + self.name if self.name[:1] in "biufSU" else self.name
        if not PLAIN.fullmatch(code):
            raise pickle.UnpicklingError(f"it has numbers of type {code!r}")
        return np.dtype(code)


class _Array:
    """Replaces numpy.ndarray while a pickle is read."""

    value: Any = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, kind, fortran, content = state[-4:]
        self.value = _array(content, kind, shape, "F" if fortran else "C")


def _array(content: Any, kind: _Kind, shape: tuple[int, ...], order: str) -> Any:
    dtype = kind.dtype()
    if dtype.hasobject:
        return _plain(content) if isinstance(content, list) else None
    if isinstance(content, str):  # written by Python 2
        content = content.encode("latin1")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(kind: _Kind, content: Any) -> Any:
    return _array(content, kind, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _dictionary(*_: object) -> dict[Any, Any]:
    return {}


ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "defaultdict"): _dictionary,
}
for _core in ("numpy.core", "numpy._core"):
    ADMITTED[_core + ".multiarray", "_reconstruct"] = _Array
    ADMITTED[_core + ".multiarray", "scalar"] = _scalar
    ADMITTED[_core + ".numeric", "_frombuffer"] = _array
for _builtins in ("builtins", "__builtin__"):
    ADMITTED[_builtins, "list"] = list
    ADMITTED[_builtins, "set"] = set


class Restricted(pickle.Unpickler):
    """Builds arrays and plain containers, and refuses everything else by name."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return ADMITTED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}") from None


def _plain(value: Any, made: dict[int, Any] | None = None) -> Any:
    made = {} if made is None else made  # shared objects are built once, or a few bytes could fill the memory
    if not isinstance(value, dict | list | tuple | _Array):
        return value
    if id(value) not in made:
        if isinstance(value, _Array):
            made[id(value)] = _plain(value.value, made)
        elif isinstance(value, dict):
            made[id(value)] = {key: _plain(part, made) for key, part in value.items()}
        else:
            made[id(value)] = [_plain(part, made) for part in value]
    return made[id(value)]


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
