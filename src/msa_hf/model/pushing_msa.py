"""A bank on its way to the Hub: saved to a temporary directory, and sent from there."""

import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import CommitInfo

from .bank_card_msa import BankFacts, bank_card
from .bank_format_msa import BACKUP, MANIFEST, OWN_FILE, file_names
from .bank_log_msa import ENTRY_FILE
from .bank_manifest_msa import read_manifest
from .cards_msa import CARD, write_card
from .dense_layer_msa import DenseLayer
from .document_table_msa import DocumentTable
from .hub_msa import REPO_TYPE, SIDE_FILES
from .origin_msa import BankOrigin
from .publishing_msa import publish


class SavedBank(Protocol):
    """A bank, as far as it is sent: whatever can be saved."""

    @property
    def is_whole(self) -> bool: ...

    @property
    def documents(self) -> DocumentTable: ...

    @property
    def origin(self) -> BankOrigin: ...

    @property
    def layers(self) -> Mapping[int, DenseLayer]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def save_pretrained(self, directory: str | Path, max_shard_size: int | str) -> None: ...


def push_bank(
    bank: SavedBank,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    message: str,
    token: str | bool | None,
    model_id: str | None,
    license: str | None,
    max_shard_size: int | str,
) -> CommitInfo:
    """Save a bank to a temporary directory and put it on the Hub; see `MemoryBank.push_to_hub`."""
    if not bank.is_whole:
        raise ValueError("A placed or shared bank may hold a part, or fewer bits; push the one that it was made from.")
    with tempfile.TemporaryDirectory(prefix="msa-hf-push-") as made:
        folder = Path(made)
        needed = sum(item.routing_keys.nbytes + item.pooled_kv.nbytes for item in bank.layers.values())
        if needed > (free := shutil.disk_usage(folder).free):
            raise OSError(
                f"A copy of the bank takes {needed} bytes on its way to the Hub, but {folder.parent} has {free}: set "
                "TMPDIR to a directory with more room."
            )
        bank.save_pretrained(folder, max_shard_size)
        manifest = read_manifest(folder)
        texts = sum(text is not None for _, text in bank.documents.texts())
        facts = BankFacts(manifest, bank.origin, texts, bank.dtype)
        write_card(folder, bank_card(repo_id, facts, model_id, license))
        return publish(
            folder,
            [*sorted(file_names(manifest)), MANIFEST, CARD],
            repo_id,
            repo_type=REPO_TYPE,
            message=message,
            last=[MANIFEST],
            outdated=_belongs_to_a_bank,
            private=private,
            revision=revision,
            token=token,
        )


def _belongs_to_a_bank(name: str) -> bool:
    """Tell whether a file of a repository is of the bank that was there, or was kept with it for searching."""
    if name == BACKUP or OWN_FILE.fullmatch(name) or ENTRY_FILE.fullmatch(name):
        return True
    return name not in (CARD, "fusion.json") and any(fnmatch(name, pattern) for pattern in SIDE_FILES)
