"""Lines of users' files: one reader for keys, questions and JSON Lines, whatever wrote the file."""

import io
import json
import sys
from pathlib import Path

import pytest

from msa_hf.data.errors import DataError
from msa_hf.data.lines import BadLine, input_lines, json_rows, read_lines, text_lines
from msa_hf.data.questions import read_questions
from msa_hf.evaluation.judged_questions import read_judged

WORDS = ["première", "zweite Zeile", "третья"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1251"])
def test_lines_are_the_same_in_every_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    words = [word.replace("è", "e") for word in WORDS] if encoding == "cp1251" else WORDS
    path = tmp_path / "keys"
    path.write_bytes(end.join(words).encode(encoding))
    assert list(text_lines(path, None if encoding.startswith("utf-8") else encoding)) == words
    assert [line.number for line in read_lines(path, encoding, first=2)] == [2, 3]  # type: ignore[union-attr]


def test_a_mark_is_left_out_wherever_files_were_put_together(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b\ufeffc"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"\ufeff{json.dumps(row, ensure_ascii=False)}\r\n" for row in rows))
    assert [row for _, row in json_rows(tmp_path / "rows.jsonl")] == rows


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    """Keys may hold what else Python takes for one."""
    keys = ["a\u2028b", "c\x0bd", "e\x85f", "g\x1ch"]
    (tmp_path / "keys").write_text("\n\n".join(keys) + "\n")
    assert list(text_lines(tmp_path / "keys")) == keys


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\ncafé\n".encode("latin-1"), r"keys, line 2: not UTF-8 text \(byte 0xe9 at 3\).*--encoding latin-1"),
        ("a\n".encode("utf-16"), r"keys, line 1: .*--encoding utf-16 "),
        ("a\n".encode("utf-16-le"), r"keys, line 1: .*zero bytes.*--encoding utf-16-le"),
        ("a\n".encode("utf-16-be"), r"keys, line 1: .*--encoding utf-16-be"),
        ("a\n".encode("utf-32"), r"keys, line 1: .*--encoding utf-32 "),
    ],
    ids=["latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"],
)
def test_another_encoding_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(text_lines(tmp_path / "keys"))


def test_what_follows_a_bad_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"a\n\xff\nb\n")
    kinds = [type(line) is BadLine for line in read_lines(tmp_path / "keys")]
    assert kinds == [False, True, False]


def test_an_encoding_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a")
    with pytest.raises(DataError, match=r"klingon.*such as latin-1"):
        list(text_lines(tmp_path / "keys", "klingon"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "half \\ud83d", "answer": "x"}', "line 2: 'question' is not Unicode: U\\+D83D at 5"),
        ('{"question": "q", "answer": "\\udc80"}', "line 2: 'answer' is not Unicode"),
        ('{"question": "q", "answer": NaN}', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
    ],
    ids=["half", "byte", "nan", "deep"],
)
def test_questions_are_looked_at(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": "a", "positives": []}\n' + line)
    with pytest.raises(DataError, match=message):
        read_judged(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "q.jsonl", {})


def test_questions_of_another_encoding_are_read_when_it_is_named(tmp_path: Path) -> None:
    row = {"question": "où ?", "answer": "là", "positives": []}
    (tmp_path / "q.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-16")
    assert read_questions(tmp_path / "q.jsonl", {}, "utf-16") == [row]
    assert read_judged(tmp_path / "q.jsonl", "utf-16")[0]["question"] == "où ?"


def test_the_input_is_read_as_bytes_or_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    content = "\ufeff first \r\n\n second"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode()), "ascii"))
    assert list(input_lines()) == ["first", "second"]
    monkeypatch.setattr(sys, "stdin", Terminal("asked\n"))
    monkeypatch.setattr(sys, "stderr", prompted := io.StringIO())
    assert list(input_lines("? ")) == ["asked"] and prompted.getvalue() == "? ? "
    for stream in (io.TextIOWrapper(io.BytesIO(b"ok\ncaf\xe9\n")), io.StringIO("ok\ncaf\udce9\n")):
        monkeypatch.setattr(sys, "stdin", stream)
        lines = input_lines()
        assert next(lines) == "ok"
        with pytest.raises(DataError, match="standard input, line 2"):
            next(lines)
