"""JSON: a line for each document, or an array of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ...model.bounds_msa import check_json
from ..errors import DataError
from ..lines import LONGEST, BadLine, TextReader, open_text, parse_object, read_lines
from .found import Found

BLOCK = 2**18  # characters that are read at a time, and decoded before it is known how many values they are
SPACE = re.compile(r"[ \t\r\n]*")


def read_lines_of_json(path: Path, encoding: str | None, first: int = 0) -> Iterator[Found]:
    """The objects of a JSON Lines file, by line."""
    for line in read_lines(path, encoding, first):
        if isinstance(line, BadLine):
            yield Found(line.number, line.error)
        elif line.text.strip():
            try:
                yield Found(line.number, parse_object(line.text, f"{path}, line {line.number}"))
            except DataError as error:
                yield Found(line.number, error)


def read_array(path: Path, encoding: str | None, first: int = 0) -> Iterator[Found]:
    """The objects of a JSON array, by their numbers, one held at a time; or the one object of a file."""
    with open_text(path, encoding) as file:
        text = _Window(file, path)
        opening = text.peek()
        if opening == "{":
            yield Found(0, parse_object(text.value(0), f"{path}, row 0"))
        elif opening == "[":
            text.skip()
            number = 0
            while text.peek() != "]":
                item = text.value(number)
                if number >= first:
                    try:
                        yield Found(number, parse_object(item, f"{path}, row {number}"))
                    except DataError as error:
                        yield Found(number, error)
                number += 1
                if text.peek() == ",":
                    text.skip()
                    if text.peek() == "]":
                        raise DataError(f"{path}, row {number}: not valid JSON (nothing behind a comma)")
                elif text.peek() != "]":
                    raise DataError(f"{path}, row {number}: not valid JSON (a comma or ] is missing before it)")
            text.skip()
        else:
            raise DataError(f"{path}: not a JSON array of objects; save it as one, or with an object a line as .jsonl")
        if text.peek():
            raise DataError(f"{path}: more behind its JSON value; a file with an object a line is named .jsonl")


class _Window:
    """A piece of a file that holds the value that is being read."""

    def __init__(self, file: TextReader, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder()

    def _more(self, size: int) -> bool:
        read = self._file.read(size)
        self._text, self._place = self._text[self._place :] + read, 0
        return bool(read)

    def peek(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            found = SPACE.match(self._text, self._place)
            assert found is not None
            self._place = found.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(BLOCK):
                return ""

    def skip(self) -> None:
        """Go past the character that `peek` showed."""
        self._place += 1

    def value(self, number: int) -> str:
        """The text of the next value."""
        size, place = BLOCK, f"{self._path}, row {number}"
        while True:
            try:
                if size > BLOCK:
                    check_json(self._text[self._place :])
                _, end = self._decoder.raw_decode(self._text, self._place)
                if end < len(self._text):
                    text, self._place = self._text[self._place : end], end
                    return text
            except json.JSONDecodeError as error:
                # What goes wrong well before the end of what was read does not come right by reading on.
                cause: Exception = error
                if error.pos < len(self._text) - 16 and not error.msg.startswith("Unterminated string"):
                    raise DataError(f"{place}: not valid JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not valid JSON ({error})") from error
            else:
                cause = EOFError("it is cut off")
            if size > LONGEST:
                raise DataError(f"{place}: more than {LONGEST >> 20} MiB long")
            if not self._more(size):
                if isinstance(cause, EOFError):  # a value that ends with the file
                    text, self._place = self._text[self._place :], len(self._text)
                    return text
                raise DataError(f"{place}: not valid JSON ({cause})") from cause
            size *= 2
