"""The user's own files that cannot be read, or have odd names: none is left out in silence."""

import os
from pathlib import Path

import pytest
from conftest import fsl, message
from support_runs import rows, summary

PREDICT = ("predict", "device=cpu")

pytestmark = pytest.mark.usefixtures("workplace")


def test_a_class_whose_folder_is_a_link_to_nothing_is_not_left_out(models, drawings, monkeypatch, capfd):
    Path("support/willow").symlink_to("/nowhere/willow")
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "query=query")
    said = message(monkeypatch, capfd, *words, "support=support")
    assert said == "support: support/willow is a link to /nowhere/willow, which is not there. Mend or remove it."
    Path("support/willow").unlink()
    Path("query/photos").symlink_to("/nowhere/photos")
    said = message(monkeypatch, capfd, *words, "support=support", "out=run", code=1)
    assert said.startswith("1 of the files could not be read as images and were skipped: query/photos.")
    assert "a link to /nowhere/photos, which is not there" in summary("run")["skipped"]["query/photos"]


def test_what_may_not_be_read_is_named_and_not_left_out(models, drawings, monkeypatch, capfd):
    best = f"checkpoint={models}/protonet/best.pt"
    scan, access = os.scandir, os.access

    def closed(place):
        if Path(place).name in ("more", ".Trashes"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    Path("query/.Trashes").mkdir()
    monkeypatch.setattr(os, "scandir", closed)  # root may read all
    said = message(monkeypatch, capfd, *PREDICT, best, "support=support", "query=query")
    assert said == "query/more cannot be read (Permission denied). Mend that, or remove it."
    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "secret" and access(path, mode))
    for kind in ("support", "query"):
        Path("secret").mkdir(exist_ok=True)
        words = {"support": "support", "query": "query"} | {kind: "secret"}
        said = message(monkeypatch, capfd, *PREDICT, best, *(f"{key}={value}" for key, value in words.items()))
        assert said == f"{kind} = secret is there, but you may not read it. Allow it, or name another."
    Path("secret").rmdir()
    Path("secret").write_bytes(b"")
    said = message(monkeypatch, capfd, *PREDICT, "checkpoint=secret", "support=support", "query=query")
    assert said == "checkpoint = secret is there, but you may not read it. Allow it, or name another."


def test_names_of_files_may_begin_with_a_quote_or_a_tilde(models, drawings, monkeypatch, capfd):
    words = (*PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support")
    for number, name in enumerate(("'tis.bmp", "'q'.bmp", '"', "./~x.bmp")):
        Path(name).write_bytes(Path("query/0 0.bmp").read_bytes())
        assert fsl(monkeypatch, *words, f"query={name}", f"out=run{number}") == 0
        assert rows(f"run{number}")[0]["file"] == name.removeprefix("./")
    said = message(monkeypatch, capfd, *words, "query=~nobody here/x.png")
    assert said.startswith("query = ~nobody here/x.png, but there is no user of that name.")


def test_files_that_claim_to_be_no_images_are_named(models, drawings, monkeypatch, capfd):
    Path("support/notes.txt").write_text("mine")  # beside the classes, where a README often is
    classes = sorted(path for path in Path("support").iterdir() if path.is_dir())
    for folder in (*classes[:2], Path("query")):
        (folder / "Thumbs.db").write_bytes(b"")
        (folder / ".hidden").write_bytes(b"")
    Path("support/.ipynb_checkpoints").mkdir()
    assert fsl(monkeypatch, *PREDICT, f"checkpoint={models}/protonet/best.pt", "support=support", "query=query", "out=run") == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
    assert lines == [
        "query: files whose names do not end as those of images are left out: query/Thumbs.db",
        f"support: files whose names do not end as those of images are left out: {classes[0]}/Thumbs.db, {classes[1]}/Thumbs.db",
        "support: folders whose names begin with a dot are left out: .ipynb_checkpoints",
    ]
    assert not any("Thumbs" in row["file"] for row in rows("run"))
