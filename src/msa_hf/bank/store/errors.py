"""Why a bank that is open cannot be written to; `lock.py` has the error of one that cannot be opened for it."""

from __future__ import annotations

from ...model.bank_format_msa import BankError


class BankDamaged(BankError, RuntimeError):
    """A bank with damaged files cannot be written to before it is decided what becomes of their documents."""


class BankNotWritable(BankError, RuntimeError):
    """This `BankStore` may not write: it is closed, read only, forked, or its bank was replaced."""
