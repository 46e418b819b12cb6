"""Documents of a training step: rows taken apart, and pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEMPLATE = -2  # `doc_ids` of template tokens


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
        """Write [S, L, ...] states back to their places in the flattened rows `into` [B * T, ...]."""
        return into.index_put((self.index[self.mask],), states[self.mask].to(into.dtype))


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


def unpack_rows(doc_ids: Tensor, attention_mask: Tensor) -> PackedRows:
    """Take packed rows apart.

    Args:
        doc_ids: [B, T] int64: 1, 2, ... documents, 0 routing tokens, -1 other active tokens, -2 template tokens: those
            that open the row are the prefix, later ones are active.
        attention_mask: [B, T] bool.

    Raises:
        ValueError: for prefixes of different lengths, which one cache of positions cannot hold.
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
    names, number = torch.unique(row[is_document] * (width + 1) + doc_ids[is_document], return_inverse=True)
    return PackedRows(
        prefix=prefix,
        documents=_blocks(number, flat[is_document], len(names)),
        active=_blocks(row[is_active], flat[is_active], batch),
        document_row=names // (width + 1),
        document_number=names % (width + 1) - 1,
    )


def pooled_documents(documents: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The `documents` argument of a training step as ids [N, L] int64, right-padded with 0, and lengths [N] int64.

    Args:
        documents: token id lists (or 1-d tensors), or what a tokenizer returns with `padding=True,
            return_tensors="pt"`: a mapping with `input_ids` and `attention_mask` [N, L].

    Raises:
        ValueError: for no documents or an empty one, naming it.
    """
    if isinstance(documents, Mapping):
        ids, mask = documents["input_ids"], documents["attention_mask"].bool()
        rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] if not _right_padded(mask) else None
        if rows is None:
            lengths = mask.sum(1)
            ids, lengths = ids.masked_fill(~mask, 0).to(device), lengths.to(device)
            return _checked(ids, lengths)
        documents = rows
    if not isinstance(documents, Sequence) or isinstance(documents, str):
        raise ValueError(
            f"`documents` must be token id lists or a mapping with `input_ids` and `attention_mask`, got {type(documents)}."
        )
    tensors = [torch.as_tensor(document, dtype=torch.long, device=device).flatten() for document in documents]
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=device, dtype=torch.long)
    if not tensors:
        raise ValueError("`documents` is empty: a training step needs at least one document.")
    return _checked(torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths)


def _right_padded(mask: Tensor) -> bool:
    return bool((mask.long().diff(dim=1) <= 0).all())


def _checked(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    if not len(lengths):
        raise ValueError("`documents` is empty: a training step needs at least one document.")
    if int(lengths.min()) < 1:
        raise ValueError(f"Document {int(lengths.argmin())} of `documents` has no tokens; leave it out.")
    return ids, lengths
