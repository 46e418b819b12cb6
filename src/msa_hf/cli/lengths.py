"""The remedy for a document of too many tokens, as a command has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..user_errors import UserError

IN_PYTHON = "Pass too_long="  # how the remedy of `encode_documents` begins
CUT = "Cut it into shorter documents."  # that of commands without another one


@contextlib.contextmanager
def length_remedy(remedy: str) -> Iterator[None]:
    """Say what helps on the command line where a document has too many tokens."""
    try:
        yield
    except (ValueError, UserError) as error:
        cause, found, _ = str(error).partition(IN_PYTHON)
        if not found:
            raise
        raise UserError(cause + remedy) from error
