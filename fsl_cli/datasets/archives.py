"""The files below a folder or in an archive (zip, tar, tar.xz, tar.gz, tar.bz2), one after another, never unpacked to disk.

Archives come from strangers: members that point outside, links, devices, encryption and bombs are refused.
"""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO

SUFFIXES = (".zip", ".tar", ".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2")
PACKERS = {b"\xfd7zXZ\x00": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
LARGEST = 64 * 2**20  # bytes of one file
FREE, RATIO = 64 * 2**20, 100  # an archive may unpack to 64 MiB, or to 100 times its own size if that is more
BROKEN = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)

Wanted = Callable[[str], bool]


class RefusedError(ValueError):
    """A hostile archive: it was not made to hold data."""


def matching(data_dir: str | Path, source: str) -> list[Path]:
    """The files and folders whose paths match the pattern `source` below `data_dir`; the pattern may be absolute."""
    below = glob.escape(os.path.expanduser(data_dir))  # noqa: PTH111 - a pattern, as all here
    pattern = os.path.join(below, os.path.expanduser(source))  # noqa: PTH111, PTH118
    return sorted(Path(path) for path in glob.glob(pattern))  # noqa: PTH207


def absent(name: str, data_dir: str | Path, source: str, what: str, home: str) -> ValueError:
    """The error for missing files: `what` was expected for data set `name`, which can be had from `home`."""
    if Path(source).expanduser().is_absolute():
        return ValueError(
            f"dataset.source = {source}: there is no such {what}. Get {name} from {home}, or name the place it is at."
        )
    if not Path(data_dir).expanduser().is_dir():
        return ValueError(
            f"data_dir = {data_dir}: there is no such folder. Name the one that {name} ({home}) lies in: data_dir=PATH, or "
            "FSL_DATA_DIR in the environment."
        )
    return ValueError(
        f"data_dir: {data_dir} has no {source} ({what}). Get {name} from {home} and put it there, or say where it is with "
        "dataset.source=PATH."
    )


def is_archive(path: Path) -> bool:
    """Whether a file has the suffix of an archive."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def walk(source: Path, wanted: Wanted) -> Iterator[tuple[str, bytes | None]]:
    """Every file of a folder (sorted) or an archive (in its order): its name, and its content if it is wanted."""
    if source.is_dir():
        for name in listing(source):
            yield name, (source / name).read_bytes() if wanted(name) else None
        return
    try:
        # is_zipfile also accepts a tar whose last member is a zip.
        zipped = zipfile.is_zipfile(source) and not tarfile.is_tarfile(source)
        yield from _in_zip(source, wanted) if zipped else _in_tar(source, wanted)
    except RefusedError as error:
        raise ValueError(f"{source} has {error}: it is no honest archive, and is not read. Get it from elsewhere.") from error
    except BROKEN as error:
        raise ValueError(f"{source} cannot be read as an archive ({error}). Copy or download it again.") from error


def listing(folder: Path) -> list[str]:
    """The sorted names, with `/`, of the files below a folder; follows links except to a parent, and visits a folder once."""

    def refuse(error: OSError) -> None:
        """Refuses a folder that cannot be listed, whose files would be missing silently, unless it is hidden."""
        parts = Path(error.filename).relative_to(folder).parts
        if not any(part.startswith((".", "lost+found")) for part in parts):
            raise ValueError(f"{error.filename} cannot be read ({error.strerror}). Mend that, or remove it.") from error

    names, seen = [], {str(above) for above in Path(os.path.realpath(folder)).parents}
    for place, inner, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()  # of two links to one folder, the first counts on every file system
        below = Path(place).relative_to(folder)
        names += [(below / name).as_posix() for name in files]
    return sorted(names)


def refuse_odd_name(path: Path, key: str) -> None:
    """Refuses a file name that is not valid text and could not be written anywhere; `key`: of the config."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key}: the name of {writable(path)} is not in UTF-8. Rename the file or folder.") from error


def writable(path: Path) -> str:
    """The name of a file as text, with escapes for bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def fingerprint(source: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of an archive, or of every file of a folder; changes with the content."""
    files = [(name, source / name) for name in listing(source)] if source.is_dir() else [(source.name, source)]
    return [(name, status.st_size, status.st_mtime_ns) for name, path in files for status in [_status(path)]]


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        raise ValueError(f"{path} is a link to {path.readlink()}, which is not there. Mend or remove it.") from None


def _in_zip(source: Path, wanted: Wanted) -> Iterator[tuple[str, bytes | None]]:
    with zipfile.ZipFile(source) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if sum(member.file_size for member in members) > limit(source):
            raise RefusedError("far more in it than its size allows")
        for member in members:
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise RefusedError(f"the link or device {member.filename!r} in it")
            name = _inside(member.filename)
            yield name, archive.read(member) if _take(name, member.file_size, wanted) else None


def _in_tar(source: Path, wanted: Wanted) -> Iterator[tuple[str, bytes | None]]:
    with source.open("rb") as file:
        start = file.read(6)
    packer = next((packer for magic, packer in PACKERS.items() if start.startswith(magic)), open)
    with closing(packer(source, "rb")) as stream, tarfile.open(fileobj=_Bounded(stream, limit(source)), mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            name = _inside(member.name)
            if not member.isreg() or member.issparse():
                raise RefusedError(f"the link or device {member.name!r} in it")
            content = archive.extractfile(member) if _take(name, member.size, wanted) else None
            yield name, content.read() if content else None


class _Bounded(io.BufferedIOBase):
    """A stream that raises RefusedError once more than `left` bytes have been read."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        self.stream, self.left = stream, left

    def read(self, size: int | None = -1, /) -> bytes:
        content = self.stream.read(-1 if size is None else size)
        self.left -= len(content)
        if self.left < 0:
            raise RefusedError("far more in it than its size allows")
        return content


def limit(source: Path) -> int:
    """How many bytes an archive of this size may unpack to."""
    return max(FREE, RATIO * source.stat().st_size)


def _take(name: str, size: int, wanted: Wanted) -> bool:
    if not wanted(name):
        return False
    if size > LARGEST:
        raise RefusedError(f"{name!r} with {size:,} bytes in it")
    return True


def _inside(name: str) -> str:
    """A member's name as a path below the archive; refuses one that leads elsewhere."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        raise RefusedError(f"{name!r}, a path outside of it,")
    return path.as_posix()
