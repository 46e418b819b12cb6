"""Banks that change: documents are added, replaced and deleted, one commit after the other (docs/bank_format.md); banks
that several processes share (docs/parallel.md); and banks in tiers (docs/scaling.md)."""

from .sharded.bank import ShardedBank, shard_bank
from .sharded.collectives import RankFailed
from .store.lock import BankLocked
from .store.open_bank import BankDamaged, OpenBank
from .store.segments import Damage
from .tiered.bank import TieredBank, place_bank

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
