"""The lock of a bank's directory, which every writer takes; checkpoints carry it too, as they save banks."""

from __future__ import annotations

from ...model.bank_lock_msa import BankLocked, WriterLock

__all__ = ["BankLocked", "WriterLock"]
