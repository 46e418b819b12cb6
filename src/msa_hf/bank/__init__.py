"""Banks that change: documents are added, replaced and deleted, one commit after the other (docs/bank_format.md); banks
that several processes share (docs/parallel.md); and banks in tiers (docs/scaling.md)."""

from .lock import BankLocked
from .open_bank import BankDamaged, OpenBank
from .parallel import ShardedBank, shard_bank
from .ranks import RankFailed
from .segments import Damage
from .tiers import TieredBank, place_bank

__all__ = [
    "BankDamaged",
    "BankLocked",
    "Damage",
    "OpenBank",
    "RankFailed",
    "ShardedBank",
    "TieredBank",
    "place_bank",
    "shard_bank",
]
