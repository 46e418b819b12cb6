"""A model for tests of banks that change: its tensors are a function of the document, and cost nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable, MemoryBank

CHUNK, GROUPS, DIM, LAYERS = 4, 2, 4, (1, 3)
ORIGIN = BankOrigin("f" * 64, None, "qwen3", CHUNK, LAYERS, "cosine", False, (5, 6))


def tokens_of(text: str | None, ids: Any) -> int:
    return len(ids) if text is None else len(text)


def vectors(seed: str, chunks: int, dtype: torch.dtype = torch.float32) -> dict[int, DenseLayer]:
    """What the model remembers of a text: numbers that no other text has."""
    width = 3 * GROUPS * DIM
    raw = b"".join(
        hashlib.shake_128(f"{seed}/{chunk}".encode()).digest(2 * width * len(LAYERS)) for chunk in range(chunks)
    )
    numbers = torch.from_numpy(np.frombuffer(raw, np.int16).astype(np.float32) / 32768).to(dtype)
    numbers = numbers.view(chunks, len(LAYERS), width)
    return {
        layer: DenseLayer(
            numbers[:, place, : GROUPS * DIM].contiguous(),
            numbers[:, place, GROUPS * DIM :].reshape(chunks, 2, GROUPS, DIM).contiguous(),
        )
        for place, layer in enumerate(LAYERS)
    }


class FakeModel:
    """Encodes one token per character; counts what it encoded."""

    device = torch.device("cpu")
    name_or_path = ""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.encoded: list[str] = []

    def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
        return ORIGIN

    def encode_prefix(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        shape = (GROUPS, len(ORIGIN.prefix_token_ids), DIM)
        return {layer: (torch.full(shape, layer + 0.5), torch.full(shape, -layer - 0.5)) for layer in range(4)}

    def encode_documents(self, documents: Iterable[Any], tokenizer: Any = None, **options: Any) -> MemoryBank:
        rows, parts = [], []
        for number, item in enumerate(documents):
            document = item if isinstance(item, dict) else {"input_ids": item}
            text, ids = document.get("text"), document.get("input_ids")
            seed = text if ids is None else str(list(ids))
            if seed == "refuse me":
                raise ValueError("cannot be encoded")
            count = tokens_of(text, ids) if ids is None else len(ids)
            chunks = -(-count // CHUNK)
            self.encoded.append(seed)
            parts.append(vectors(seed, chunks, self.dtype))
            rows.append(Document(str(document.get("key", number)), text, None, count, chunks))
        layers = {
            layer: DenseLayer(
                torch.cat([part[layer].routing_keys for part in parts]),
                torch.cat([part[layer].pooled_kv for part in parts]),
            )
            for layer in LAYERS
        }
        offsets = torch.tensor([0, *(row.chunks for row in rows)]).cumsum(0)
        prefix = {layer: tuple(part.to(self.dtype) for part in pair) for layer, pair in self.encode_prefix().items()}
        return MemoryBank(layers, offsets, prefix, DocumentTable(rows), ORIGIN)  # type: ignore[arg-type]

    def encoding_layers(self, *options: bool) -> None:
        return None

    def encode_rows(self, keys: Any, ids: Any, *, counted: Any, **options: Any) -> Any:
        """As documents, of which subclasses take note."""
        rows = [{"key": key, "input_ids": tokens.tolist()} for key, tokens in zip(keys, ids, strict=True)]
        bank = self.encode_documents(rows, None, **options)
        counted(list(range(len(rows))))
        return SimpleNamespace(layers=lambda: bank.layers)


def contents(bank: MemoryBank) -> dict[str, tuple[Any, ...]]:
    """key -> text, metadata, version, of all documents; makes sure that their tensors are those of their texts."""
    found = {}
    for position, document in enumerate(bank.documents):
        row = int(bank.documents.rows_of(torch.tensor(position)))
        chunks = slice(*bank.offsets[row : row + 2].tolist())
        assert document.text is not None
        expected = vectors(document.text, document.chunks, bank.dtype)
        for layer in LAYERS:
            assert torch.equal(bank.layer(layer).routing_keys[chunks], expected[layer].routing_keys), document.key
            assert torch.equal(bank.layer(layer).pooled_kv[chunks], expected[layer].pooled_kv), document.key
        assert bank.documents[position] == document and bank.documents.position(document.key) == position
        assert document.key not in found
        found[document.key] = (document.text, document.metadata, document.version)
    assert len(found) == len(bank) and bank.num_tokens == sum(len(text) for text, *_ in found.values())
    return found
