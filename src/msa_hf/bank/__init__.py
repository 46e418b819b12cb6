"""Banks that change: documents are added, replaced and deleted, one commit after the other (docs/bank_format.md); banks
that several processes share (docs/parallel.md); and banks in tiers (docs/scaling.md)."""

from ..model.bank_format_msa import BankError, BankFormatError
from ..moved import renamed
from .sharded.bank import ShardedBank, shard_bank
from .sharded.collectives import RankFailed
from .store.lock import BankLocked
from .store.segments import Damage
from .store.store import BankDamaged, BankNotWritable, BankStore
from .tiered.bank import TieredBank, place_bank

__all__ = [
    "BankDamaged",
    "BankError",
    "BankFormatError",
    "BankLocked",
    "BankNotWritable",
    "BankStore",
    "Damage",
    "RankFailed",
    "ShardedBank",
    "TieredBank",
    "place_bank",
    "shard_bank",
]

__getattr__ = renamed(__name__, {"OpenBank": "BankStore"})
