"""A part of a bank as a bank of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch

from ...model.memory_msa import DenseLayer, DocumentTable, MemoryBank


def select_partition(bank: MemoryBank, keys: Iterable[str]) -> MemoryBank:
    """A bank of the documents with these keys alone, in the order of the bank; keys that no document has are left out.

    Nothing of other documents is in it: whoever searches, routes or attends cannot find them. Its tensors are copies
    and take what these documents take. Documents keep their ids. Indexes for words and vectors are not in it:
    `msa_hf.retrieval.add_lexical_index` makes one.

    Raises:
        ValueError: for a bank whose layers do not lie in memory as a whole, as one in tiers.
    """
    if not bank.is_whole:
        raise ValueError("A part can be taken of a bank in memory alone, not of one in tiers; load it as MemoryBank.")
    positions = []
    for key in keys:
        with contextlib.suppress(KeyError):
            positions.append(bank.documents.position(key))
    chosen = torch.tensor(sorted(set(positions)), dtype=torch.int64)
    rows = bank.documents.rows_of(chosen)
    counts = bank.offsets[rows + 1] - bank.offsets[rows]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    # Chunk j of the part lies as far behind its document's first chunk as in the bank.
    chunks = torch.arange(int(offsets[-1])) + (bank.offsets[rows] - offsets[:-1]).repeat_interleave(counts)
    chunks = chunks.to(bank.device)
    layers = {
        layer: DenseLayer(memory.routing_keys[chunks], memory.pooled_kv[chunks])
        for layer, memory in bank.layers.items()
    }
    documents = DocumentTable([bank.documents[position] for position in chosen.tolist()])
    return MemoryBank(layers, offsets, bank.prefix, documents, bank.origin, next_id=bank.next_id)
