"""Sources that banks are placed from: documents at once, tensors part by part, from wherever they lie now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...model.bank_format_msa import TensorLayout, commit_id, data_files
from ...model.bank_reader_msa import BankReader, KnowsOrigin, read_bank
from ...model.hub_msa import bank_directory
from ...model.memory_msa import BankHome, BankOrigin, DenseLayer, DocumentTable, MemoryBank
from ..store.store import BankStore
from .parts import FileLayer, LayerPart


@dataclass(frozen=True)
class BankSource:
    """A bank whose tensors can be read one layer and one part after the other.

    Attributes:
        documents, offsets, prefix, origin, counts, next_id: as `MemoryBank`; the prefix on any device.
        dtype: of all tensors.
        shapes: memory layer -> (groups, head_dim).
        parts: memory layer -> its chunks, in order and without gaps, on the CPU: views, or rows of files that are read
            when they are looked at.
        directory: where it lies, None in memory.
        bytes: of the files in the directory, 0 in memory.
        model: that is known to have made it, or None.
        home, indexes: as `MemoryBank`.
    """

    documents: DocumentTable
    offsets: Tensor
    prefix: Mapping[int, tuple[Tensor, Tensor]]
    origin: BankOrigin
    counts: tuple[int, int]
    next_id: int | None
    dtype: torch.dtype
    shapes: dict[int, tuple[int, int]]
    parts: Callable[[int], Sequence[LayerPart]]
    directory: Path | None = None
    bytes: int = 0
    model: PreTrainedModel | None = None
    home: BankHome | None = None
    indexes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """Chunks of all rows, those of deleted documents too."""
        return int(self.offsets[-1])


def source_of(
    bank: str | Path | MemoryBank | BankStore,
    model: KnowsOrigin | None = None,
    tokenizer: object = None,
    verify: bool = True,
) -> BankSource:
    """The source of a `MemoryBank`, of a `BankStore` as it is now, or of a directory.

    Args:
        model, tokenizer, verify: as `MemoryBank.from_pretrained`, for a directory.

    Raises:
        TypeError: for what is no bank.
        ValueError: for a bank that is a part, has been placed, or does not lie in host memory; and what
            `MemoryBank.from_pretrained` raises.
    """
    if isinstance(bank, str | Path):
        return _of_directory(bank_directory(bank, model, tokenizer), model, tokenizer, verify)
    if isinstance(bank, BankStore):
        return _of_memory(bank.snapshot()) if bank.directory is None else _of_open(bank)
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"`bank` must be a MemoryBank, a BankStore or a directory, got {type(bank).__name__}.")
    if not bank.is_whole:
        raise ValueError(f"A {type(bank).__name__} is shared or placed already; place the bank that it was made from.")
    if bank.device.type != "cpu":
        raise ValueError(
            f"The bank lies on {bank.device}, where it would take up the memory that it is placed in: place "
            '`bank.to("cpu")`, or encode with `bank_device="cpu"`.'
        )
    return _of_memory(bank)


def _of_memory(bank: MemoryBank) -> BankSource:
    return BankSource(
        bank.documents,
        bank.offsets,
        bank.prefix,
        bank.origin,
        (bank.num_chunks, bank.num_tokens),
        bank.next_id,
        bank.dtype,
        {layer: _shape(memory) for layer, memory in bank.layers.items()},
        lambda layer: [bank.layers[layer]],
        home=bank.home,
        indexes=bank.indexes,
    )


def _shape(memory: DenseLayer) -> tuple[int, int]:
    groups, dim = memory.pooled_kv.shape[2:]
    return groups, dim


def _of_open(bank: BankStore) -> BankSource:
    """Of the files that it has open: they may be removed meanwhile."""
    with bank._mutex:
        state, prefix = bank.state, bank.whole_prefix()
        home, indexes = bank._followers.home, bank._followers.searchers()
    layout = TensorLayout.of_manifest(state.manifest)

    def parts(layer: int) -> list[LayerPart]:
        found: list[LayerPart] = []
        for segment in state.segments:
            for shard in segment.shards:
                if layer in shard.layers and shard.file is not None:
                    found.append(FileLayer.of(replace(shard), layer, layout.shapes[layer], layout.dtype))
                elif layer in shard.layers:  # damaged: nothing of it is ever chosen
                    found.append(DenseLayer(*layout.zeros(layer, shard.end - shard.first)))
        return found

    return BankSource(
        DocumentTable(state.table, state.hidden, state.find),
        torch.from_numpy(state.offsets),
        prefix,
        bank.origin,
        (state.chunks, state.tokens),
        state.manifest["next_id"],
        layout.dtype,
        layout.shapes,
        parts,
        bank.directory,
        sum(entry["bytes"] for entry in data_files(state.manifest)),
        bank.model,
        home,
        indexes,
    )


def _of_directory(directory: Path, model: KnowsOrigin | None, tokenizer: object, verify: bool) -> BankSource:
    return read_bank(directory, model, tokenizer, verify, lambda reader: _of_reader(reader, model))


def _of_reader(reader: BankReader, model: KnowsOrigin | None) -> BankSource:
    rows = reader.rows()
    reader.check_side_files()
    prefix = reader.prefix(torch.device("cpu"))
    shards = reader.shards()  # opened now: who replaces the bank may remove them
    layout, chunks = reader.layout, int(rows.offsets[-1])

    def parts(layer: int) -> list[LayerPart]:
        mine = [shard for shard in shards if layer in shard.layers]
        return [FileLayer.of(shard, layer, layout.shapes[layer], layout.dtype) for shard in mine]

    with reader.contradictions():
        documents = DocumentTable(rows.table, rows.deleted)
        nothing = {layer: DenseLayer(*layout.zeros(layer, chunks)) for layer in layout.shapes}
        bank = MemoryBank(nothing, rows.offsets, prefix, documents, reader.origin, next_id=rows.next_id)  # compares
    home = BankHome(reader.directory, commit_id(reader.manifest))
    return replace(
        _of_memory(bank), parts=parts, directory=reader.directory, bytes=reader.bytes, model=model, home=home
    )
