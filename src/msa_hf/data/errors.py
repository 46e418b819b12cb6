"""The error about users' files that cannot be taken."""

from __future__ import annotations

from ..user_errors import UserError


class DataError(UserError, ValueError):
    """A file of the user's that cannot be taken; the message names file, line, cause and remedy."""
