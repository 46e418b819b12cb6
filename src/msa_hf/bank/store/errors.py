"""Why a bank that is open cannot be written to; `lock.py` has the error of one that cannot be opened for it."""

from __future__ import annotations

from ...model.bank_format_msa import BankError, CommitOutcomeUnknown
from ...model.bank_lock_msa import BankNotWritable

__all__ = ["BankDamaged", "BankNotWritable", "CommitOutcomeUnknown", "ErasureIncomplete"]


class BankDamaged(BankError, RuntimeError):
    """A bank with damaged files cannot be written to before it is decided what becomes of their documents."""


class ErasureIncomplete(BankError, RuntimeError):
    """A bank was compacted, but files that may hold deleted documents are there still.

    Attributes:
        files: their paths in the bank's directory; `.` where the directory itself could not be flushed.
    """

    def __init__(self, message: str, files: tuple[str, ...]) -> None:
        super().__init__(message)
        self.files = files
