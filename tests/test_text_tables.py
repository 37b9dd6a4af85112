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
        ("a.csv", '" TEXT ",Intent\nwhere is my card,card\nhello,greeting\n'),
        ("a.csv", 'text, label\n"where is my card", "card"\nhello, greeting\n'),
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
        (b"hello;greeting\nbye;parting", "line 1: 1 columns, expected two, text,label, parted by a comma"),
        (b"hello, there;greeting\nbye, then;parting", "semicolons do not part columns, and stand in the last one of every line"),
        (b'text;label\n"hello, there";greeting', "part columns by commas"),
        (b"text,label\nhello,greeting\nonly", "line 3: 1 columns"),
        (b"text,name\nhello,greeting", "has the columns text, name, expected text and one of label"),
        (b"sentence,intent\nwhere is my card,card\nhello,greeting", "has the columns sentence, intent, expected text and label"),
        (b"label,utterance\ncard,where is my card\ngreeting,hello", "has the columns label, utterance, expected text and label"),
        (b"id,Question ,target\n1,where,card\n2,hello,greeting", "has the columns id, Question, target, expected text and"),
        (b"where is it,question\nhello,greeting", "if that is a text, put a line text,label above it"),
        (b"hello,greeting\n,card", "line 2: the text is empty"),
        (b"hello,greeting\ncard,  ", "line 2: the label is empty"),
        (b"hello,greeting\nhi,greeting", "fewer than two labels"),
        (b'hello,greeting\n"hi,greeting', "it is no csv"),
        (b"hello,gr\xfc\xdfe", "not in UTF-8"),
    ],
)
def test_wrong_tables_are_refused_with_the_line(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_labelled(tmp_path / "a.csv")
    assert str(caught.value).endswith(".")


def test_a_class_may_be_called_as_columns_are(tmp_path: Path):
    for first in ("", "text,label\n"):
        (tmp_path / "a.csv").write_text(first + "where is it,question\nhello,greeting\nwho is it,question\n")
        assert [sentence.label for sentence in read_labelled(tmp_path / "a.csv")] == ["question", "greeting", "question"]


def test_questions_are_lines_or_a_column(tmp_path: Path):
    for name, content in {
        "a.txt": "one, two\n\n three\n",
        "b.csv": '"one, two"\nthree\n',
        "c.csv": 'n,text\n1,"one, two"\n2,three\n',
    }.items():
        (tmp_path / name).write_text(content)
        assert read_texts(tmp_path / name) == ["one, two", "three"]
    (tmp_path / "e.txt").write_text("one\u2028two\x0c three\r\nfour\x85\rfive", newline="")
    assert len(read_texts(tmp_path / "e.txt")) == 3
    for content, words in {
        "\n": "is empty",
        "a,b\n": "several columns",
        "text;x\na;1\n": "semicolons do not part columns",
        "n,text\n1,one\n2,\n3,three\n": "d.csv, line 3: the text is empty. Fill it in, or remove the line",
        "question\none\ntwo\n": "has the columns question, expected text. Call",
        "n,Utterance\n1,one\n": "has the columns n, Utterance, expected text",
    }.items():
        (tmp_path / "d.csv").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_texts(tmp_path / "d.csv")
