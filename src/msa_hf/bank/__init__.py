"""Banks that change: documents are added, replaced and deleted, one commit after the other (docs/bank_format.md)."""

from .lock import BankLocked
from .open_bank import BankDamaged, OpenBank
from .segments import Damage

__all__ = ["BankDamaged", "BankLocked", "Damage", "OpenBank"]
