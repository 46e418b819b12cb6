"""Banks that change: documents are added, replaced and deleted, one commit after the other (docs/bank_format.md); banks
that several processes share (docs/parallel.md); and banks in tiers (docs/scaling.md)."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from ..model.bank_format_msa import BankError, BankFormatError, BankUnreadable
    from ..model.bank_writer_msa import restore_manifest
    from ..model.hub_msa import BankUnavailable, bank_directory
    from .coarse import CoarseBank, coarse_bank
    from .host_bank import host_bank
    from .sharded.bank import ShardedBank, shard_bank
    from .sharded.collectives import RankFailed
    from .store.errors import BankDamaged, BankNotWritable, CommitOutcomeUnknown, ErasureIncomplete
    from .store.lock import BankLocked
    from .store.segments import Damage
    from .store.store import BankStore
    from .tiered.bank import TieredBank, place_bank

__all__ = [
    "BankDamaged",
    "BankError",
    "BankFormatError",
    "BankLocked",
    "BankNotWritable",
    "BankStore",
    "BankUnavailable",
    "BankUnreadable",
    "CoarseBank",
    "CommitOutcomeUnknown",
    "Damage",
    "ErasureIncomplete",
    "RankFailed",
    "ShardedBank",
    "TieredBank",
    "bank_directory",
    "coarse_bank",
    "host_bank",
    "place_bank",
    "restore_manifest",
    "shard_bank",
]

__getattr__ = exports(
    __name__,
    {
        "..model.bank_format_msa": ["BankError", "BankFormatError", "BankUnreadable"],
        "..model.bank_writer_msa": ["restore_manifest"],
        "..model.hub_msa": ["BankUnavailable", "bank_directory"],
        ".coarse": ["CoarseBank", "coarse_bank"],
        ".host_bank": ["host_bank"],
        ".sharded.bank": ["ShardedBank", "shard_bank"],
        ".sharded.collectives": ["RankFailed"],
        ".store.errors": ["BankDamaged", "BankNotWritable", "CommitOutcomeUnknown", "ErasureIncomplete"],
        ".store.lock": ["BankLocked"],
        ".store.segments": ["Damage"],
        ".store.store": ["BankStore"],
        ".tiered.bank": ["TieredBank", "place_bank"],
    },
    old_names={"OpenBank": "BankStore"},
)
