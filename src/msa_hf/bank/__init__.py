"""Banks that change: documents are added, replaced and deleted, one commit after the other (docs/bank_format.md); and
banks that several processes share (docs/parallel.md)."""

from .lock import BankLocked
from .open_bank import BankDamaged, OpenBank
from .parallel import RankFailed, ShardedBank, shard_bank
from .segments import Damage

__all__ = ["BankDamaged", "BankLocked", "Damage", "OpenBank", "RankFailed", "ShardedBank", "shard_bank"]
