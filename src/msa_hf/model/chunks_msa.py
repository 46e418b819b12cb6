"""Chunks: pooling the tokens of documents into them, and gathering those of chosen documents.

Plain PyTorch, differentiable; sums are taken in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .routing_msa import normalize_heads


@dataclass(frozen=True)
class ContextRows:
    """The chunks of chosen documents, as a layer attends to them.

    Attributes:
        keys, values: [B, G, R, D], documents in ascending order; R is at least the most rows of any sample.
        row_mask: [B, R] bool, rows that are there. What stands in others has no meaning.
        document_index: [B, R] int64, the column of the selection that a row came from; 0 for rows that are not there.
    """

    keys: Tensor
    values: Tensor
    row_mask: Tensor
    document_index: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "ContextRows":
        """The same on another device, with keys and values in another dtype."""
        keys, values = self.keys.to(device, dtype), self.values.to(device, dtype)
        return ContextRows(keys, values, self.row_mask.to(device), self.document_index.to(device))


def chunk_counts(lengths: Tensor, chunk_size: int) -> Tensor:
    """Chunks per document: `ceil(length / chunk_size)`; the last chunk may be partial."""
    return -(-lengths // chunk_size)


def pool_chunks(states: Tensor, lengths: Tensor, chunk_size: int) -> Tensor:
    """Mean of every chunk of every document (paper, 3.1), accumulated in float32.

    Args:
        states: [N, L, ...] states of right-padded documents, any floating dtype. What stands behind a document's
            length, NaN too, has no effect.
        lengths: [N] int64, tokens of each document, at least 1.
        chunk_size: tokens per chunk. Chunks start with the document; a partial last one is the mean of its real tokens.

    Returns:
        [C, ...] float32 (float64 for float64), C = sum of `ceil(length / chunk_size)`, documents in order.
    """
    documents, width = states.shape[:2]
    chunks = (width + chunk_size - 1) // chunk_size
    real = torch.arange(chunks * chunk_size, device=states.device) < lengths[:, None]
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    padded = torch.nn.functional.pad(states, (0, 0) * (states.dim() - 2) + (0, chunks * chunk_size - width))
    padded = torch.where(real.view(*real.shape, *(1,) * (states.dim() - 2)), padded, 0.0)
    sums = padded.unflatten(1, (chunks, chunk_size)).sum(2)
    counts = real.view(documents, chunks, chunk_size).sum(2)
    means = sums / counts.clamp(min=1).view(documents, chunks, *(1,) * (states.dim() - 2))
    return means[counts > 0]


def pool_documents(
    keys: Tensor, values: Tensor, router_keys: Tensor, lengths: Tensor, chunk_size: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The pooled rows that a memory layer keeps of right-padded documents.

    Args:
        keys, values: [N, G, L, D], keys after RoPE.
        router_keys: [N, L, G, D].
        lengths: [N] int64 on any device, tokens of each document.
        chunk_size: tokens per chunk.
        normalize: L2-normalize the routing keys.

    Returns:
        content [C, 2, G, D] and routing keys [C, G * D] in the dtype of `values`.
    """
    lengths = lengths.to(keys.device)
    pooled_keys, pooled_values, routing_keys = (
        pool_chunks(states, lengths, chunk_size)
        for states in (keys.transpose(1, 2), values.transpose(1, 2), router_keys)
    )
    if normalize:
        routing_keys = normalize_heads(routing_keys)
    content = torch.stack([pooled_keys, pooled_values], dim=1).to(values.dtype)
    return content, routing_keys.flatten(1).to(values.dtype)


def gather_documents(
    documents: Tensor, offsets: Tensor, content: Tensor, width: int | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chunks of chosen documents, as a layer attends to them.

    Args:
        documents, offsets, width: as `chunk_rows`.
        content: [C, 2, G, D] on the same device.
        dtype: of the result (default: that of `content`).

    Returns:
        keys, values [B, G, R, D]; valid, slots [B, R] as `chunk_rows`. What stands in rows that are not valid has no
        meaning.
    """
    rows, slots, valid = chunk_rows(documents, offsets, width)
    chosen = content.index_select(0, rows.flatten()).to(dtype or content.dtype)
    # Laid out as the matrix products of every decoding step want them, so that none of them copies the rows.
    keys, values = (part.transpose(1, 2).contiguous() for part in chosen.unflatten(0, rows.shape).unbind(2))
    return keys, values, valid, slots


def chunk_rows(documents: Tensor, offsets: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The places of the chunks of chosen documents.

    Args:
        documents: [B, n] int64, positions in the bank, -1 for none.
        offsets: [N + 1] int64 on the same device, chunks of document i are `offsets[i]:offsets[i + 1]`.
        width: R, at least the most rows of any sample (default: that, for which the device is waited for).

    Returns:
        rows [B, R] int64 chunk numbers, documents in ascending order; slots [B, R] int64, the column of `documents`
        that each row came from; valid [B, R] bool. Rows that are not valid are 0, in slots too.
    """
    if not documents.shape[1] or offsets.shape[0] < 2:
        none = documents.new_zeros(documents.shape[0], width or 0)
        return none, none, none.bool()
    order = documents.masked_fill(documents < 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    ascending = documents.gather(1, order)
    start = offsets[ascending.clamp(min=0)]
    count = torch.where(ascending >= 0, offsets[ascending.clamp(min=0) + 1] - start, 0)
    ends = count.cumsum(1)
    if width is None:
        width = int(ends[:, -1].max()) if ends.numel() else 0
    position = torch.arange(width, device=documents.device).expand(documents.shape[0], width).contiguous()
    slot = torch.searchsorted(ends, position, right=True)
    valid = slot < documents.shape[1]
    slot = slot.masked_fill(~valid, 0)
    rows = start.gather(1, slot) + position - (ends - count).gather(1, slot)
    return rows.masked_fill(~valid, 0), order.gather(1, slot).masked_fill(~valid, 0), valid
