"""The csv files in which people keep texts, and the lines that are asked about."""

from pathlib import Path

import pytest

from fsl_cli.datasets.texts import read_labelled, read_texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "where is my card,card\nhello,greeting\n"),
        ("a.csv", "\ufefftext,label\r\nwhere  is my card,card\r\n\r\nhello,greeting\r\n"),
        ("a.csv", 'Category,id,Text\ncard,1,"where is my\ncard"\ngreeting,2,hello\n'),
        ("a.tsv", "text\tintent\nwhere is my card\tcard\nhello\tgreeting\n"),
    ],
)
def test_tables_of_several_forms_are_read(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_labelled(tmp_path / name) == [("where is my card", "card"), ("hello", "greeting")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"where, is my card,card\nhello,greeting", "line 1: 3 columns, expected two"),
        (b"text,label\nhello,greeting\nonly", "line 3: 1 columns"),
        (b"text,name\nhello,greeting", "has the columns text, name, expected text and one of label"),
        (b"hello,greeting\n,card", "line 2: the text is empty"),
        (b"hello,greeting\ncard,  ", "line 2: the label is empty"),
        (b"hello,greeting\nhi,greeting", "fewer than two labels"),
        (b'hello,greeting\n"hi,greeting', "it is no csv"),
        (b"hello,gr\xfc\xdfe", "not a text in UTF-8"),
    ],
)
def test_wrong_tables_are_refused_with_the_line(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_labelled(tmp_path / "a.csv")
    assert str(caught.value).endswith(".")


def test_questions_are_lines_or_a_column(tmp_path: Path):
    for name, content in {
        "a.txt": "one, two\n\n three\n",
        "b.csv": '"one, two"\nthree\n',
        "c.csv": 'n,text\n1,"one, two"\n2,three\n',
    }.items():
        (tmp_path / name).write_text(content)
        assert read_texts(tmp_path / name) == ["one, two", "three"]
    for content, words in {"\n": "has no texts", "a,b\n": "several columns"}.items():
        (tmp_path / "d.csv").write_text(content)
        with pytest.raises(ValueError, match=words if "," in content else "is empty"):
            read_texts(tmp_path / "d.csv")
