"""Chunks: pooling the tokens of documents into them, and gathering those of chosen documents.

Plain PyTorch, differentiable; sums are taken in float32.
"""

import torch
from torch import Tensor


def chunk_counts(lengths: Tensor, chunk_size: int) -> Tensor:
    """Chunks per document: `ceil(length / chunk_size)`; the last chunk may be partial."""
    return (lengths + chunk_size - 1) // chunk_size


def pool_chunks(states: Tensor, lengths: Tensor, chunk_size: int) -> Tensor:
    """Mean of every chunk of every document (paper, 3.1), accumulated in float32.

    Args:
        states: [N, L, ...] states of right-padded documents, any floating dtype. What stands behind a document's
            length, NaN too, has no effect.
        lengths: [N] int64, tokens of each document, at least 1.
        chunk_size: tokens per chunk. Chunks start with the document; a partial last one is the mean of its real tokens.

    Returns:
        [C, ...] float32, C = sum of `ceil(length / chunk_size)`, documents in order.
    """
    documents, width = states.shape[:2]
    chunks = (width + chunk_size - 1) // chunk_size
    real = torch.arange(chunks * chunk_size, device=states.device) < lengths[:, None]
    padded = torch.nn.functional.pad(states.float(), (0, 0) * (states.dim() - 2) + (0, chunks * chunk_size - width))
    padded = torch.where(real.view(*real.shape, *(1,) * (states.dim() - 2)), padded, 0.0)
    sums = padded.unflatten(1, (chunks, chunk_size)).sum(2)
    counts = real.view(documents, chunks, chunk_size).sum(2)
    means = sums / counts.clamp(min=1).view(documents, chunks, *(1,) * (states.dim() - 2))
    return means[counts > 0]


def chunk_rows(documents: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the chunks of chosen documents lie.

    Args:
        documents: [B, n] int64, positions in the bank, -1 for none.
        offsets: [N + 1] int64 on the same device, chunks of document i are `offsets[i]:offsets[i + 1]`.

    Returns:
        rows [B, R] int64 chunk numbers, documents in ascending order; slots [B, R] int64, the column of `documents`
        that each row came from; valid [B, R] bool. R is the most rows of any sample; rows that are not valid are 0.
    """
    order = documents.masked_fill(documents < 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    ascending = documents.gather(1, order)
    start = offsets[ascending.clamp(min=0)]
    count = torch.where(ascending >= 0, offsets[ascending.clamp(min=0) + 1] - start, 0)
    ends = count.cumsum(1)
    total = ends[:, -1] if documents.shape[1] else ends.new_zeros(documents.shape[0])
    width = int(total.max()) if total.numel() else 0
    position = torch.arange(width, device=documents.device).expand(documents.shape[0], width).contiguous()
    slot = torch.searchsorted(ends, position, right=True).clamp(max=max(documents.shape[1] - 1, 0))
    valid = position < total[:, None]
    if width == 0:
        return position, position, valid
    rows = start.gather(1, slot) + position - (ends - count).gather(1, slot)
    return rows.masked_fill(~valid, 0), order.gather(1, slot), valid
