"""Mistakes of users, told in one line instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError


class UserError(Exception):
    """A mistake of the user; the message is all that is shown."""


@contextlib.contextmanager
def reported(foreign: bool = False, subject: str = "") -> Iterator[None]:
    """Turn the errors that tell a user what is wrong into `UserError`.

    Args:
        subject: what the message begins with, for errors that do not say what they are about.
        foreign: also a `ValueError` that another library raised, as for a checkpoint that transformers cannot read.
            Without it only those of this package count: elsewhere they are faults, which keep their traceback.
    """
    opening = f"{subject}: " if subject else ""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{opening}{error}") from error
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        home = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
        if not foreign and home.partition(".")[0] != "msa_hf":
            raise
        raise UserError(f"{opening}{error}") from error
