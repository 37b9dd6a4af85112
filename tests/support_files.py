"""Files as users have them: folders and archives of images, csv lists, pickles of arrays."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LISTS = {"train": ["n01", "n02"], "val": ["n03"], "test": ["n04"]}
CLASSES = [name for names in LISTS.values() for name in names]


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def picture(seed: int, kind: str = "PNG", width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def images(classes: list[str], each: int = 3, kind: str = "PNG") -> dict[str, bytes]:
    return {f"{c}/{c}{k:02d}.{kind.lower()}": picture(100 * int(c[1:]) + k, kind) for c in classes for k in range(each)}


FILES = images(CLASSES)


def pixels(split: str) -> np.ndarray:
    """Three images `[8, 8, 3]` of each class of a split."""
    seed = list(LISTS).index(split)
    return np.random.default_rng(seed).integers(0, 256, (3 * len(LISTS[split]), 8, 8, 3), dtype=np.uint8)


def dump(path: Path, content: Any, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol))


def ren(folder: Path, split: str, protocol: int) -> None:
    numbers = {name: list(range(3 * c, 3 * c + 3)) for c, name in enumerate(LISTS[split])}
    dump(folder / f"mini-imagenet-cache-{split}.pkl", {"image_data": pixels(split), "class_dict": numbers}, protocol)
