"""A model that costs nothing: what it remembers of a text is a function of the text, so that a bank can be checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msa_hf.bank import BankStore
from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable, MemoryBank

CHUNK, GROUPS, DIM, LAYER = 16, 2, 4, 0
WIDTH = 3 * GROUPS * DIM
ORIGIN = BankOrigin("0" * 64, None, "synthetic", CHUNK, (LAYER,), "cosine", False, (1, 2))
PREFIX = torch.arange(GROUPS * 2 * DIM, dtype=torch.float32).view(GROUPS, 2, DIM)


def numbers_of(text: str, chunks: int) -> Tensor:
    """What stands for a text in the bank, [chunks, WIDTH] float32: numbers that no other text has."""
    raw = hashlib.shake_128(text.encode()).digest(2 * WIDTH * chunks)
    return torch.from_numpy(np.frombuffer(raw, np.int16).astype(np.float32) / 32768).view(chunks, WIDTH)


def memory_of(numbers: Tensor) -> DenseLayer:
    keys, content = numbers[:, : GROUPS * DIM], numbers[:, GROUPS * DIM :]
    return DenseLayer(keys.contiguous(), content.reshape(-1, 2, GROUPS, DIM).contiguous())


class StubModel:
    """Encodes one token per character; `EncodingModel` asks for no more than this."""

    device = torch.device("cpu")

    def memory_origin(self, tokenizer: object = None) -> BankOrigin:
        return ORIGIN

    def encode_prefix(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {LAYER: (PREFIX, -PREFIX)}

    def encode_documents(self, documents: Iterable[Any], tokenizer: object = None, **options: Any) -> MemoryBank:
        rows, parts = [], []
        for number, item in enumerate(documents):
            given = item if isinstance(item, dict) else {"input_ids": item}
            text = given.get("text") or str(given.get("input_ids"))
            chunks = -(-len(text) // CHUNK)
            parts.append(numbers_of(text, chunks))
            rows.append(Document(str(given.get("key", number)), given.get("text"), None, len(text), chunks))
        offsets = torch.tensor([0, *(row.chunks for row in rows)]).cumsum(0)
        numbers = torch.cat(parts) if parts else torch.empty(0, WIDTH)
        return MemoryBank({LAYER: memory_of(numbers)}, offsets, self.encode_prefix(), DocumentTable(rows), ORIGIN)


def open_bank(directory: Path, **options: Any) -> BankStore:
    """A bank with the model that costs nothing."""
    return BankStore(StubModel(), directory, **options)
