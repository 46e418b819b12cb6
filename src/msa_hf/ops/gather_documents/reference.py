"""`gather_documents` in PyTorch, and the shapes of its results for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model import chunks_msa
from ..formats import index_rows, is_scaled


def result_dtype(content: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float32 if is_scaled(content.dtype, "gather_documents") else content.dtype


def most_rows(documents: Tensor, offsets: Tensor) -> int:
    """The most chunks that the documents of a sample have together; waits for the device."""
    if not documents.numel() or offsets.shape[0] < 2:
        return 0
    present = documents.clamp(min=0)
    counts = torch.where(documents >= 0, offsets[present + 1] - offsets[present], 0)
    return int(counts.sum(1).max())


def gather_documents(
    documents: Tensor,
    offsets: Tensor,
    content: Tensor,
    scales: Tensor | None,
    width: int,
    dtype: torch.dtype | None = None,
    first: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if documents.device.type == "cpu" and (most := most_rows(documents, offsets)) > width:
        raise ValueError(f"`width` is {width}, but the documents of a sample have {most} chunks.")
    rows, slots, valid = chunks_msa.chunk_rows(documents, offsets, width)
    here = valid
    if first is not None:
        rows = rows - first
        here = valid & (rows >= 0) & (rows < content.shape[0])
        rows = rows.masked_fill(~here, 0)
    batch, device = documents.shape[0], documents.device
    dtype = result_dtype(content, dtype)
    if not content.shape[0]:
        states = torch.zeros(batch, width, *content.shape[1:], dtype=dtype, device=device)
    else:
        flat = rows.flatten().to(content.device)
        if scales is None:
            states = content.index_select(0, flat).to(device, dtype)
        else:
            states = index_rows(content, flat).to(device).float()
            states = (states * scales.index_select(0, flat).to(device)[..., None, None]).to(dtype)
        states = states.unflatten(0, (batch, width))
        states = torch.where(here[..., None, None, None], states, states.new_zeros(()))
    keys, values = (part.transpose(1, 2).contiguous() for part in states.unbind(2))
    return keys, values, valid, slots


def fake_gather_documents(
    documents: Tensor,
    offsets: Tensor,
    content: Tensor,
    scales: Tensor | None,
    width: int,
    dtype: torch.dtype | None = None,
    first: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, (groups, dim) = documents.shape[0], content.shape[2:]
    shape, kind = (batch, groups, width, dim), result_dtype(content, dtype)
    return (
        documents.new_empty(shape, dtype=kind),
        documents.new_empty(shape, dtype=kind),
        documents.new_empty(batch, width, dtype=torch.bool),
        documents.new_empty(batch, width),
    )
