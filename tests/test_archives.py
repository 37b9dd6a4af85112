"""Folders and archives are read alike, and what was made to do harm is refused."""

import gzip
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support_files import write_folder, write_tar, write_zip

from fsl_cli.datasets import archives

FILES = {"set/cat/a.txt": b"one", "set/cat/b.bin": b"two" * 1000, "set/dog/c.txt": b""}


def everything(source: Path) -> dict[str, bytes | None]:
    return dict(archives.walk(source, lambda name: True))


def refusal(source: Path) -> str:
    with pytest.raises(ValueError) as caught:
        everything(source)
    message = str(caught.value)
    assert str(source) in message and message.endswith(".")
    return message


WRITERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "a.zip": write_zip,
    "a.tar": lambda path, files: write_tar(path, files, "w"),
    "a.tar.xz": write_tar,
    "a.tgz": lambda path, files: write_tar(path, files, "w:gz"),
    "a.tar.bz2": lambda path, files: write_tar(path, files, "w:bz2"),
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_the_same_files(tmp_path, name):
    source = WRITERS[name](tmp_path / name, FILES)
    assert everything(source) == FILES
    some = dict(archives.walk(source, lambda name: name.endswith(".txt")))
    assert some == {"set/cat/a.txt": b"one", "set/cat/b.bin": None, "set/dog/c.txt": b""}
    assert archives.is_archive(source) == (name != "folder")
    before = archives.fingerprint(source)
    assert before == archives.fingerprint(source)
    WRITERS[name](tmp_path / name, FILES | {"set/dog/c.txt": b"changed"})
    assert before != archives.fingerprint(source)


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "C:/evil.txt", "..\\evil.txt"])
def test_paths_outside_are_refused(tmp_path, name):
    for writer in (write_zip, write_tar):
        message = refusal(writer(tmp_path / f"{writer.__name__}.zip", {"set/cat/a.txt": b"one", name: b"evil"}))
        assert "outside" in message and "no honest archive" in message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("set/cat/a.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    assert "link or device 'set/cat/a.jpg'" in refusal(tmp_path / "a.tar")


def test_a_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        member = zipfile.ZipInfo("set/cat/a.jpg")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    assert "link or device 'set/cat/a.jpg'" in refusal(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.xz", "a.tgz"])
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(archives, "FREE", 100_000)
    source = WRITERS[name](tmp_path / name, {"set/cat/a.jpg": bytes(2_000_000)})
    assert source.stat().st_size < 10_000
    assert "far more in it than its size allows" in refusal(source)
    with pytest.raises(ValueError, match="far more"):
        list(archives.walk(source, lambda name: False))


def test_a_bomb_in_the_headers_of_a_tar_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE", 100_000)
    with (
        gzip.GzipFile(tmp_path / "a.tgz", "wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = {"comment": "x" * 2_000_000}
        archive.addfile(member)
    assert "far more" in refusal(tmp_path / "a.tgz")


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_file_too_large_for_an_image_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 1000)
    assert "'set/cat/b.bin' with 3,000 bytes" in refusal(WRITERS[name](tmp_path / name, FILES))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.xz", "a.tgz", "a.tar.bz2"])
def test_a_cut_off_archive_is_refused(tmp_path, name):
    source = WRITERS[name](tmp_path / name, FILES)
    source.write_bytes(source.read_bytes()[: -source.stat().st_size // 2 if name != "a.tar" else 600])
    assert "cannot be read as an archive" in refusal(source)


def test_a_web_page_is_no_archive(tmp_path):
    (tmp_path / "a.zip").write_text("<!DOCTYPE html><title>404</title>" * 40)
    assert "cannot be read as an archive" in refusal(tmp_path / "a.zip")


def test_an_encrypted_member_is_refused(tmp_path):
    source = write_zip(tmp_path / "a.zip", FILES)
    content = bytearray(source.read_bytes())
    for header, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + place] |= 1
    source.write_bytes(content)
    assert "encrypted" in refusal(source)


def test_links_in_a_users_own_folder_are_followed_and_loops_end(tmp_path):
    write_folder(tmp_path / "elsewhere", {"a.txt": b"one"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "mine")
    assert everything(tmp_path / "mine") == {"cat/a.txt": b"one"}


def test_a_tar_whose_last_file_is_a_zip_is_read_as_a_tar(tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"notes.txt": b"hi"}).read_bytes()
    source = write_tar(tmp_path / "a.tar", FILES | {"set/more.zip": inner}, "w")
    assert everything(source) == FILES | {"set/more.zip": inner}


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    write_folder(tmp_path, FILES)
    scandir = archives.os.scandir

    def refuse(path):
        if Path(path).name in ("dog", ".Trashes", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(archives.os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"dog cannot be read \(Permission denied\)\. Mend that, or remove it\.$"):
        archives.listing(tmp_path)
    monkeypatch.setattr(archives.os, "scandir", scandir)
    whole = archives.listing(tmp_path)
    monkeypatch.setattr(archives.os, "scandir", refuse)
    (tmp_path / "set/dog").rename(tmp_path / "set/cow")
    for hidden in (".Trashes", "lost+found"):  # as on a disk of its own
        (tmp_path / hidden).mkdir()
    assert len(archives.listing(tmp_path)) == len(whole)
