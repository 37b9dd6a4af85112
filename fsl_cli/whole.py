"""Atomic writing: even if the process is killed, a path holds the whole new file or what was there before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole(path: Path, mode: str = "w", newline: str | None = None) -> Iterator[IO[Any]]:
    """Opens a file under a temporary name, and renames it to `path` once it is completely on disk."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open(mode, newline=newline, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
