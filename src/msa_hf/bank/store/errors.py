"""Why a bank that is open cannot be written to; `lock.py` has the error of one that cannot be opened for it."""

from __future__ import annotations

from ...model.bank_format_msa import BankError
from ...model.bank_lock_msa import BankNotWritable

__all__ = ["BankDamaged", "BankNotWritable"]


class BankDamaged(BankError, RuntimeError):
    """A bank with damaged files cannot be written to before it is decided what becomes of their documents."""
