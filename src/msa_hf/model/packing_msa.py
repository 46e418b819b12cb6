"""Documents of a training step: rows taken apart, and pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

TEMPLATE = -2  # `doc_ids` of template tokens
# Token ids of documents; or what a tokenizer returns, a mapping with such `input_ids` and an `attention_mask`.
Pool = Sequence[Sequence[int] | Tensor] | Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class TokenBlocks:
    """Sequences cut out of a batch of rows, right-padded.

    Attributes:
        index: [S, L] int64 into the flattened rows; 0 where padded.
        mask: [S, L] bool, tokens that are there.
    """

    index: Tensor
    mask: Tensor

    def take(self, values: Tensor, fill: int = 0) -> Tensor:
        """[B, T] values of the rows -> [S, L]."""
        return values.flatten()[self.index].masked_fill(~self.mask, fill)

    def put(self, into: Tensor, states: Tensor) -> Tensor:
        """Rows `into` [B, T, ...] with [S, L, ...] states at their places."""
        index = self.index[self.mask]
        places = (index // into.shape[1], index % into.shape[1])
        return into.index_put(places, states[self.mask].to(into.dtype))


@dataclass(frozen=True)
class PackedRows:
    """Rows of the form prefix + documents + question + tail + answer, taken apart.

    Attributes:
        prefix, documents, active: the three kinds of sequences.
        document_row: [N] int64, the row of each document; `document_number` [N] int64, its number in the row from 0.
    """

    prefix: TokenBlocks
    documents: TokenBlocks
    active: TokenBlocks
    document_row: Tensor
    document_number: Tensor

    @cached_property
    def places(self) -> Tensor:
        """[B, n] int64, where row b's document i lies among the documents of all rows; -1 for none."""
        count = int(self.document_number.max()) + 1
        places = self.document_row.new_full((self.active.mask.shape[0], count), -1)
        places[self.document_row, self.document_number] = torch.arange(len(self.document_row), device=places.device)
        return places


@dataclass(frozen=True)
class PooledDocuments:
    """Documents shared by all questions of a batch.

    Attributes:
        ids: [N, L] int64, right-padded with 0.
        lengths: [N] int64, tokens of each document.
    """

    ids: Tensor
    lengths: Tensor


def _blocks(sequence: Tensor, index: Tensor, count: int) -> TokenBlocks:
    """Tokens at `index` [n], the j-th in sequence `sequence[j]` [n] (0 .. count - 1), as right-padded blocks."""
    order = sequence.argsort(stable=True)
    sequence, index = sequence[order], index[order]
    lengths = torch.bincount(sequence, minlength=count)
    width = int(lengths.max()) if count else 0
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(index), device=index.device) - starts[sequence]
    blocks = index.new_zeros(count, width)
    blocks[sequence, place] = index
    return TokenBlocks(blocks, torch.arange(width, device=index.device) < lengths[:, None])


def unpack_rows(doc_ids: Tensor, attention_mask: Tensor, limit: int | None = None) -> PackedRows:
    """Take packed rows apart.

    Args:
        doc_ids: [B, T] int64: 1, 2, ... documents, 0 routing tokens, -1 other active tokens, -2 template tokens: those
            that open the row are the prefix, later ones are active.
        attention_mask: [B, T] bool.
        limit: tokens that the longest document may have.

    Raises:
        ValueError: for no documents, one above the limit, or prefixes of different lengths, which one cache of
            positions cannot hold.
    """
    batch, width = doc_ids.shape
    if int(doc_ids.min()) < TEMPLATE:
        raise ValueError(f"`doc_ids` holds {int(doc_ids.min())}; tokens are -2, -1, 0 or a document from 1.")
    row = torch.arange(batch, device=doc_ids.device)[:, None].expand(batch, width)
    flat = torch.arange(batch * width, device=doc_ids.device).view(batch, width)
    before = ((doc_ids == TEMPLATE) | ~attention_mask).long().cumprod(1).bool() & attention_mask
    is_document = (doc_ids > 0) & attention_mask
    is_active = (doc_ids <= 0) & attention_mask & ~before
    prefix = _blocks(row[before], flat[before], batch)
    if not bool(prefix.mask.all()):
        raise ValueError("The rows of a packed batch must open with equally many template tokens (doc_ids -2).")
    numbers = int(doc_ids.max()) + 1
    names, number = torch.unique(row[is_document] * numbers + doc_ids[is_document], return_inverse=True)
    if not len(names):
        raise ValueError("A packed batch needs at least one document (`doc_ids` of 1 and more).")
    documents = _blocks(number, flat[is_document], len(names))
    document_row, document_number = names // numbers, names % numbers - 1
    if (place := _too_long(documents.mask.sum(1), limit)) is not None:
        raise ValueError(
            f"Document {int(document_number[place])} of row {int(document_row[place])} has "
            f"{int(documents.mask[place].sum())} tokens, but the model has {limit} positions; split it."
        )
    return PackedRows(
        prefix=prefix,
        documents=documents,
        active=_blocks(row[is_active], flat[is_active], batch),
        document_row=document_row,
        document_number=document_number,
    )


def pool_documents(documents: Pool, device: torch.device, limit: int | None = None) -> PooledDocuments:
    """Read the `documents` argument of a training step.

    Args:
        documents: token id lists, or 1-d tensors, or one tensor [N, L]; or what a tokenizer returns: a mapping with
            such `input_ids` and, where they are padded, an `attention_mask` like them.
        device: where the result is.
        limit: tokens that the longest document may have.

    Raises:
        ValueError: for anything else, no documents, and an empty or too long one, naming it.
    """
    mask = None
    if isinstance(documents, Mapping):
        if "input_ids" not in documents:
            raise ValueError(f"`documents` has no `input_ids`, only {sorted(documents)}.")
        mask = documents.get("attention_mask")
        documents = documents["input_ids"]
    if isinstance(documents, str) or not isinstance(documents, Sequence | Tensor):
        raise ValueError(
            "`documents` must be token id lists or a mapping with `input_ids` and `attention_mask`, "
            f"got {type(documents).__name__}."
        )
    if not len(documents):
        raise ValueError("`documents` is empty: a training step needs at least one document.")
    if isinstance(mask, Tensor) and isinstance(documents, Tensor) and right_padded(mask.bool()):
        real = mask.bool()
        pool = PooledDocuments(documents.long().masked_fill(~real, 0).to(device), real.sum(1).to(device))
    else:
        # Put together on the host and moved once, not document by document.
        host = torch.device("cpu")
        rows = [_document(number, document, host) for number, document in enumerate(documents)]
        if mask is not None:
            rows = [row[torch.as_tensor(keep, device=host).bool()] for row, keep in zip(rows, mask, strict=True)]
        pool = PooledDocuments(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device),
            torch.tensor([len(row) for row in rows], dtype=torch.long).to(device),
        )
    if int(pool.lengths.min()) < 1:
        raise ValueError(f"Document {int(pool.lengths.argmin())} of `documents` has no tokens; leave it out.")
    if (place := _too_long(pool.lengths, limit)) is not None:
        raise ValueError(
            f"Document {place} of `documents` has {int(pool.lengths[place])} tokens, but the model has {limit} "
            "positions; split it."
        )
    return pool


def _document(number: int, document: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    if isinstance(document, str) or not (hasattr(document, "__len__") and getattr(document, "ndim", 1) == 1):
        raise ValueError(
            f"Document {number} of `documents` must be a list of token ids, got {type(document).__name__}."
        )
    return torch.as_tensor(document, dtype=torch.long, device=device)


def right_padded(mask: Tensor) -> bool:
    """Tell whether padding stands behind the tokens in every row of a mask [N, L]."""
    return bool((mask.long().diff(dim=1) <= 0).all())


def _too_long(lengths: Tensor, limit: int | None) -> int | None:
    """The first document above the limit."""
    longest = int(lengths.argmax())
    return longest if limit is not None and int(lengths[longest]) > limit else None
