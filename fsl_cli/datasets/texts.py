"""Texts as items, and csv files of texts; shared by the data sets of texts and `fsl predict`."""

import codecs
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fsl_cli.datasets.packed import Raw

LABELS = ("label", "category", "intent", "class")  # accepted headers of the label column
# Common headers of other tables, which must not be taken for a text or a class.
HEADINGS = {
    *("text", "sentence", "utterance", "question", "query", "message", "phrase", "content", "document", "comment", "review"),
    *("tweet", "prompt", "input", "example", "sample"),
    *("label", "intent", "class", "class_name", "category", "target", "tag", "topic"),
}
TABLES = (".csv", ".tsv")
LONGEST = 20_000  # bytes of a text, since all items of a data set are as wide as the longest


class Sentence(NamedTuple):
    """A text and its class."""

    text: str
    label: str


def is_table(path: str) -> bool:
    """Whether a file has the suffix of a table."""
    return path.lower().endswith(TABLES)


def to_items(texts: Iterable[str]) -> np.ndarray:
    """Converts texts to items: UTF-8 as numpy bytes `[n]`; every run of white space becomes one space."""
    items = []
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.split() or not _encodable(text):
            raise ValueError(f"Text {number} is {text!r}, expected a text with at least one word. Mend it or leave it out.")
        refuse_long(text, f"Text {number}")
        items.append(" ".join(text.split()).encode())
    return np.array(items, dtype=np.bytes_)


def refuse_long(text: str, place: str) -> None:
    """Refuses a text that would make all items of its data set too wide."""
    size = len(" ".join(text.split()).encode())
    if size > LONGEST:
        raise ValueError(
            f"{place} ({text[:30]!r}...) has {size:,} bytes, expected at most {LONGEST:,}: models read the beginning alone. "
            "Shorten it."
        )


def _encodable(text: str) -> bool:
    """Whether a string can be encoded: it must not contain surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def to_texts(items: np.ndarray) -> list[str]:
    """The texts of items `[n]`."""
    return [item.decode() for item in items.tolist()]


def to_raw(classes: Mapping[str, Sequence[str]]) -> Raw:
    """The texts of each class as items sorted by class, in their order within a class."""
    names = sorted(classes)
    return Raw(to_items(text for name in names for text in classes[name]), names, [len(classes[name]) for name in names])


def read_labelled(path: Path, content: bytes | None = None) -> list[Sentence]:
    """Reads a csv or tsv file with two columns, or with a header that names the columns text and label.

    `content`: the file's bytes, if it is in an archive; `path` then only serves for messages.

    Raises:
        ValueError: the file is not such a table.
    """
    rows = _rows(path, content)
    names = [cell.lower() for cell in rows[0][1]]
    if "text" in names:
        label = next((name for name in LABELS if name in names), None)
        if label is None:
            raise ValueError(
                f"{path} has the columns {', '.join(names)}, expected text and one of {', '.join(LABELS)}. Rename one."
            )
        columns, rows = (names.index("text"), names.index(label)), rows[1:]
    else:
        _refuse_headings(path, rows, "text and label")
        columns = (0, 1)
    sentences = []
    for line, cells in rows:
        if len(cells) <= max(columns) or (len(cells) != 2 and "text" not in names):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} columns, expected two, text,label, parted by a comma (in .tsv a tab). "
                "Put a text that has commas in double quotes, or call the columns text and label in a first line."
                + (" Semicolons do not part columns." if len(cells) == 1 and ";" in cells[0] else "")
            )
        text, label = (cells[column] for column in columns)
        if not text or not label:
            raise ValueError(f"{path}, line {line}: the {'label' if text else 'text'} is empty. Fill it in, or remove the line.")
        refuse_long(text, f"{path}, line {line}")
        sentences.append(Sentence(text, label))
    if len({sentence.label for sentence in sentences}) < 2:
        raise ValueError(f"{path} has texts of fewer than two labels, expected lines of text,label with two labels or more.")
    return sentences


def read_texts(path: Path) -> list[str]:
    """Reads the texts of a csv or tsv file (the column `text`, or the only one), or of any other file, one on each line.

    Raises:
        ValueError: the file has no texts, or another format.
    """
    if not is_table(path.name):
        # Lines as editors count them; str.splitlines would also split at other characters.
        lines = enumerate(io.StringIO(_decoded(path, None), newline=None), start=1)
        numbered = [(line, text.strip()) for line, text in lines if text.strip()]
    else:
        rows = _rows(path, None)
        names = [cell.lower() for cell in rows[0][1]]
        if "text" not in names:
            _refuse_headings(path, rows, "text")
            if any(len(cells) > 1 for _, cells in rows):
                raise ValueError(
                    f"{path} has several columns, none of which its first line calls text. Call the one of texts so."
                )
        column = names.index("text") if "text" in names else 0
        numbered = []
        for line, cells in rows["text" in names :]:
            if not "".join(cells[column : column + 1]):
                raise ValueError(f"{path}, line {line}: the text is empty. Fill it in, or remove the line.")
            numbered.append((line, cells[column]))
    if not numbered:
        raise ValueError(f"{path} has no texts, expected one for each line, or a csv file with a column text.")
    for line, text in numbered:
        refuse_long(text, f"{path}, line {line}")
    return [text for _, text in numbered]


def _refuse_headings(path: Path, rows: list[tuple[int, list[str]]], wanted: str) -> None:
    """Refuses a header with names other than `wanted`, which would be taken for a text."""
    names = rows[0][1]
    for column, name in enumerate(names):
        # A name that occurs further down is a class, such as `question`, in a table without a header.
        if name.lower() in HEADINGS and not any(name in cells[column : column + 1] for _, cells in rows[1:]):
            raise ValueError(
                f"{path} has the columns {', '.join(names)}, expected {wanted}. Call them so in the first line; if that is "
                f"a text, put a line {wanted.replace(' and ', ',')} above it."
            )


def _rows(path: Path, content: bytes | None) -> list[tuple[int, list[str]]]:
    """The nonempty rows of a table, each with the number of its last line."""
    text = io.StringIO(_decoded(path, content), newline="")
    reader = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, [" ".join(cell.split()) for cell in cells]) for cells in reader if "".join(cells).strip()]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: it is no csv ({error}). Close its quotation marks, and part columns by commas "
            "(in .tsv by tabs)."
        ) from error
    if not rows:
        raise ValueError(f"{path} is empty, expected lines of text,label.")
    names = [cell.lower() for cell in rows[0][1]]
    for line, cells in rows[1:] if "text" in names else ():
        if any(cells[len(names) :]):  # an unquoted comma would put the end of a text into the next column
            raise ValueError(
                f"{path}, line {line}: {len(cells)} columns, but the first line names {len(names)}. Put a text that has commas "
                "in double quotes."
            )
    headed = rows[0][1][0].lower().startswith("text;")
    parted = all(len(cells) == 2 and ";" in cells[1] for _, cells in rows)  # split only by the commas in their texts
    if path.suffix.lower() != ".tsv" and len(rows) > 1 and (headed or parted):
        raise ValueError(f"{path}: semicolons do not part columns, and stand in the last one of every line. Part them by commas.")
    return rows


def _decoded(path: Path, content: bytes | None) -> str:
    try:
        return (path.read_bytes() if content is None else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = (
            "in UTF-16"
            if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            else f"not in UTF-8 (byte {error.start})"
        )
        raise ValueError(f"{path} is {found}, expected a text in UTF-8. Save it so.") from error


def transcript(names: Sequence[str], texts: Sequence[Sequence[str]], shot: int, right: np.ndarray | None = None) -> str:
    """An episode as text: the texts `[way, shot + queries]` below their class names, the support first.

    `right` `[way, queries]`: whether each query was answered correctly.
    """
    lines = []
    for row, name in enumerate(names):
        lines.append(name)
        for number, text in enumerate(texts[row]):
            judged = "" if right is None or number < shot else ", right" if right[row, number - shot] else ", wrong"
            lines.append(f"    {'support' if number < shot else 'query' + judged}: {text}")
    return "\n".join(lines) + "\n"
