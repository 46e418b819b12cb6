"""The size of a bank: documents, chunks and layers, in bytes of a format."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...ops.formats import FORMATS, content_formats, own_format

if TYPE_CHECKING:
    from ...model.memory_msa import MemoryBank

GB = 10**9


@dataclass(frozen=True)
class BankShape:
    """The numbers that decide a bank's size.

    Attributes:
        documents, chunks: how many.
        layers: (groups, head_dim) of each memory layer.
        dtype: format of its keys and content: nothing is kept wider.
        text_bytes: of the documents' table, which stays on disk.
    """

    documents: int
    chunks: int
    layers: tuple[tuple[int, int], ...]
    dtype: str = "bf16"
    text_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple((int(groups), int(dim)) for groups, dim in self.layers))
        if (
            min(self.documents, self.text_bytes) < 0
            or self.chunks < self.documents
            or bool(self.documents) != bool(self.chunks)
        ):
            raise ValueError(
                f"Every document has at least one chunk, and `text_bytes` is not negative; got {self.documents} "
                f"documents, {self.chunks} chunks, {self.text_bytes} bytes."
            )
        if not self.layers or min(itertools.chain(*self.layers)) < 1:
            raise ValueError(f"`layers` must be (groups, head_dim) of at least one layer, got {list(self.layers)}.")
        require_known("dtype", [self.dtype], content_formats())

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        layers: Sequence[tuple[int, int]],
        *,
        document_tokens: int = 1024,
        chunk_size: int = 64,
        dtype: str = "bf16",
        text_bytes: int = 0,
    ) -> BankShape:
        """The shape of `tokens` tokens in documents of `document_tokens`, the last one shorter where it must be."""
        if tokens < 0 or document_tokens < 1 or chunk_size < 1:
            raise ValueError("`tokens` must be at least 0, `document_tokens` and `chunk_size` at least 1.")
        whole, rest = divmod(tokens, document_tokens)
        chunks = whole * -(-document_tokens // chunk_size) + -(-rest // chunk_size)
        return cls(whole + (rest > 0), chunks, tuple(layers), dtype, text_bytes)

    @classmethod
    def of(cls, bank: MemoryBank) -> BankShape:
        """The shape of a `MemoryBank`."""
        sizes = [memory.pooled_kv.shape for memory in bank.layers.values()]
        layers = tuple((groups, dim) for *_, groups, dim in sizes)
        return cls(len(bank), bank.num_chunks, layers, own_format(bank.dtype).name)

    def key_bytes(self, format: str, layers: slice = slice(None)) -> int:
        """Bytes of the routing keys with their scales, of some layers."""
        return self.chunks * sum(FORMATS[format].vector_bytes(groups * dim) for groups, dim in self.layers[layers])

    def content_bytes(self, format: str) -> int:
        """Bytes of the pooled keys and values with their scales."""
        return 2 * self.key_bytes(format)

    @property
    def index_bytes(self) -> int:
        """Bytes of each document's first chunk (int64, and the end) and whether it is there (bool)."""
        return 8 * (self.documents + 1) + self.documents

    @property
    def saved_bytes(self) -> int:
        """Bytes of keys, content and texts as the bank is saved, without headers."""
        return self.key_bytes(self.dtype) + self.content_bytes(self.dtype) + self.text_bytes

    def share(self, gpus: int) -> BankShape:
        """The largest of `gpus` even shares."""
        chunks, documents, text = (-(-n // gpus) for n in (self.chunks, self.documents, self.text_bytes))
        return replace(self, chunks=chunks, documents=documents, text_bytes=text)


def require_known(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [item for item in given if item not in known]:
        raise ValueError(f"`{name}` must be among {', '.join(known)}, got {unknown[0]!r}.")
