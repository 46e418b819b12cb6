"""Lines and texts of users' files: the one place where bytes become text, and where it is said that they cannot.

Text is UTF-8 unless an encoding is named. A byte order mark at the beginning of any line is left out, as files that
were put together have them, and lines end with LF or CRLF.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from ..json_object import JsonObject
from ..model.bounds_msa import check_json
from ..model.unicode_msa import check_unicode
from .compressed import open_bytes
from .errors import DataError

LONGEST = 2**28  # bytes or characters of a line, and of a file that is one document
MARK = "\ufeff"
CONVERT = "convert it first, such as with iconv -f latin1 -t utf-8"
MARKS = (  # longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextReader(Protocol):
    """Of a file that was opened for reading text."""

    def __iter__(self) -> Iterator[str]: ...
    def __next__(self) -> str: ...
    def read(self, size: int | None = -1, /) -> str: ...
    def readline(self, size: int = -1, /) -> str: ...
    def reconfigure(self, *, newline: str | None = None) -> None: ...


class Line(NamedTuple):
    """A line of a file, without its end; `number` counts from 1."""

    number: int
    text: str


class BadLine(NamedTuple):
    """A line that cannot be taken, and why."""

    number: int
    error: DataError


def check_encoding(encoding: str | None) -> None:
    """Refuse the name of an encoding that nobody knows.

    Raises:
        DataError: if nobody does.
    """
    try:
        "".encode(encoding or "utf-8")
    except (LookupError, ValueError) as error:
        raise DataError(
            f"--encoding {encoding}: {error}; give one that Python knows, such as latin-1 or utf-16"
        ) from error


def remedy(data: bytes) -> str:
    """The remedy for bytes that are not UTF-8."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return f"it begins as {name.upper()} does: --encoding {name} (in Python encoding={name!r})"
    if b"\0" in data:
        name = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
        return f"it has zero bytes, as {name.upper()} has: --encoding {name} (in Python encoding={name!r})"
    return "name its encoding, such as --encoding latin-1 or cp1252 (in Python encoding='latin-1')"


def decode(data: bytes, place: str, encoding: str | None = None, cure: str | None = None) -> str:
    """A text as it stands in a file, lines ending with LF.

    Args:
        cure: what a message ends with, where an encoding cannot be named.

    Raises:
        DataError: for bytes that the encoding does not have, and for zero bytes, naming the place and the remedy.
    """
    name = "UTF-8" if encoding is None else encoding
    try:
        text = data.decode(name).removeprefix(MARK).replace("\r\n", "\n")
    except UnicodeError as error:
        what = f"{place}: not {name} text"
        if isinstance(error, UnicodeDecodeError):
            what += f" (byte {data[error.start]:#04x} at {error.start})"
        raise DataError(f"{what}; {cure or remedy(data)}") from error
    if "\0" in text:
        raise DataError(f"{place}: not {name} text (byte 0x00 at {data.find(0)}); {cure or remedy(data)}")
    return text


@contextlib.contextmanager
def open_text(path: Path, encoding: str | None = None) -> Iterator[TextReader]:
    """A file, decompressed where its name says so, as text whose line ends stay as they are.

    Raises:
        DataError: for a file that cannot be read or decoded, here and wherever the block reads on.
    """
    with open_bytes(path) as file:
        head = file.peek(4)
        if encoding is None and any(head.startswith(mark) for mark, _ in MARKS):
            raise DataError(f"{path}: not UTF-8 text (byte {head[0]:#04x} at 0); {remedy(head)}")
        text = io.TextIOWrapper(file, encoding or "utf-8-sig", errors="strict", newline="")  # type: ignore[type-var]
        try:
            yield text
        except UnicodeError as error:
            if encoding is None or "\n".encode(encoding) == b"\n":  # what was decoded together is many lines
                for line in read_lines(path, encoding):
                    if isinstance(line, BadLine):
                        raise line.error from error
            raise DataError(f"{path}: not {encoding or 'UTF-8'} text; {remedy(b'')}") from error
        finally:
            with contextlib.suppress(ValueError):  # closed already
                text.detach()


def read_text(path: Path, encoding: str | None = None) -> str:
    """A file that is one text.

    Raises:
        DataError: for one that cannot be read or decoded, or of more than `LONGEST` bytes.
    """
    with open_bytes(path) as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise DataError(f"{path}: a text of more than {LONGEST >> 20} MiB; cut it into several files")
    return decode(data, str(path), encoding)


def read_lines(path: Path, encoding: str | None = None, first: int = 1) -> Iterator[Line | BadLine]:
    """The lines of a file from number `first` on, blank ones among them; the file is not held in memory.

    What follows a line that cannot be decoded is read all the same, if lines can be told apart without decoding them.

    Raises:
        DataError: for a file that cannot be read.
    """
    check_encoding(encoding)
    if encoding is not None and "\n".encode(encoding) != b"\n":
        yield from _decoded_lines(path, encoding, first)
        return
    with open_bytes(path) as file:
        number = 0  # counted here: `enumerate` would hold every line until the next one is there
        while data := file.readline(LONGEST + 1):
            number += 1
            place = f"{path}, line {number}"
            if len(data) > LONGEST:
                raise DataError(f"{place}: more than {LONGEST >> 20} MiB long")
            if number < first:
                continue
            data = data.removesuffix(b"\n").removesuffix(b"\r")
            try:
                line: Line | BadLine = Line(number, decode(data, place, encoding))
            except DataError as error:
                line = BadLine(number, error)
            data = b""  # a long line is not held twice while it is looked at
            yield line


def _decoded_lines(path: Path, encoding: str, first: int) -> Iterator[Line]:
    """Lines of an encoding such as UTF-16, in which a line does not end with one byte."""
    with open_text(path, encoding) as file:
        file.reconfigure(newline="\n")
        for number, text in enumerate(iter(lambda: file.readline(LONGEST + 1), ""), start=1):
            if len(text) > LONGEST:
                raise DataError(f"{path}, line {number}: more than {LONGEST >> 20} MiB long")
            if number >= first:
                yield Line(number, text.removesuffix("\n").removesuffix("\r").removeprefix(MARK))


def text_lines(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The lines of a file that are not blank, such as a file of keys.

    Raises:
        DataError: for a line that cannot be taken, naming it.
    """
    for line in read_lines(path, encoding):
        if isinstance(line, BadLine):
            raise line.error
        if line.text.strip():
            yield line.text


def input_lines(prompt: str = "") -> Iterator[str]:
    """The lines of the standard input that are not blank, without white space around them, each as soon as it is there.

    Args:
        prompt: what stands before each where somebody types.

    Raises:
        DataError: for a line that is not UTF-8, naming it.
    """
    source: Iterable[str | bytes] = getattr(sys.stdin, "buffer", sys.stdin)
    lines = iter(source)
    number = 0
    while True:
        if prompt and sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        data, number = next(lines, None), number + 1
        if data is None:
            return
        place = f"standard input, line {number}"
        try:
            text = decode(data, place, cure=CONVERT) if isinstance(data, bytes) else data.removeprefix(MARK)
            check_unicode(text, place)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(str(error)) from error
        if text.strip():
            yield text.strip()


def parse_object(text: str, place: str) -> JsonObject:
    """The JSON object that a line holds.

    Raises:
        DataError: for anything else, NaN and too many values among them.
    """
    try:
        check_json(text)
        row = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object but {type(row).__name__}")
    return row


def json_rows(path: Path, encoding: str | None = None) -> Iterator[tuple[str, JsonObject]]:
    """The objects of a JSON Lines file, each with its place; blank lines are passed over.

    Raises:
        DataError: for a file that cannot be read and a line that holds no object.
    """
    for line in read_lines(path, encoding):
        if isinstance(line, BadLine):
            raise line.error
        if line.text.strip():
            place = f"{path}, line {line.number}"
            yield place, parse_object(line.text, place)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
