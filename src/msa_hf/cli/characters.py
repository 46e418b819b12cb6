"""Characters on their way in and out: arguments that are text, and output that any terminal, file or pipe takes."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Sequence

from ..user_errors import UserError

ESCAPED = "msa_hf.escaped"


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse an argument that is no text: a question, a key or the name of something new.

    What is there may have any name that the system allows.

    Raises:
        UserError: naming the argument and its bytes.
    """
    for place, argument in enumerate(arguments, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            _, _, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
            if not os.path.exists(value):
                raise UserError(
                    f"argument {place} is not UTF-8 text: {os.fsencode(argument)!r} (byte "
                    f"{os.fsencode(argument[error.start])[0]:#04x}); is the terminal's encoding another one?"
                ) from error


def show_all_characters() -> None:
    """Let the standard streams write what they cannot encode as JSON would: an escape, instead of an error."""
    codecs.register_error(ESCAPED, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)


def shown(text: str) -> str:
    """A text for a terminal: what would command it, such as escape sequences in a document, becomes `�`."""
    return "".join("�" if unicodedata.category(item) == "Cc" and item not in "\n\t" else item for item in text)


def in_one_line(text: str) -> str:
    """A text for a line of a terminal."""
    return shown(" ".join(text.split()))


def print_error(error: Exception) -> None:
    """One line on stderr."""
    print(f"msa-hf: error: {in_one_line(str(error))}", file=sys.stderr)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4)), error.end
