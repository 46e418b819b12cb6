"""From chosen documents to the rows that a layer attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model import chunks_msa
from .dispatch import alignment, choose, operator
from .formats import index_rows, is_scaled, scaled_names


def gather_documents(
    documents: Tensor,
    offsets: Tensor,
    content: Tensor,
    width: int,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chunks of chosen documents, of each sample in ascending order of documents, then padding; inference only.

    Args:
        documents: [B, n] int64, positions in the bank, -1 for none.
        offsets: [N + 1] int64 on the device of `documents`, chunks of document i are `offsets[i]:offsets[i + 1]`.
        content: [C, 2, G, D] keys and values of the chunks, on that device or in host memory (pinned, for kernels to
            read it directly); float8_e4m3fn with `scales`.
        width: rows to return per sample, at least the most that a sample's documents have. On the CPU a smaller one is
            refused; on a device, which nobody waits for, what does not fit is left out.
        scales: [C, 2] float32 of the keys and values of each chunk, for float8 content: value = scale * number.
        dtype: of the result (default: that of `content`, or float32 for float8).
        backend: `"cuda"`, `"triton"`, `"cpp"` or `"pytorch"`; default the best that takes the call.

    Returns:
        keys, values [B, G, width, D]; valid [B, width] bool; slots [B, width] int64, the column of `documents` that a
        row belongs to. All zero where a row is padding.

    Raises:
        ValueError: for tensors that contradict each other.
        BackendError: where the backend asked for does not take the call.
    """
    if documents.dim() != 2 or documents.dtype != torch.int64:
        raise ValueError("`documents` must be [B, n] int64.")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.device != documents.device:
        raise ValueError(f"`offsets` must be [N + 1] int64 on the device of `documents`, {documents.device}.")
    if content.dim() != 4 or content.shape[1] != 2:
        raise ValueError(f"`content` must be [C, 2, G, D], got {list(content.shape)}.")
    if content.device != documents.device and content.device.type != "cpu":
        raise ValueError(f"`content` must lie on {documents.device} or in host memory, not on {content.device}.")
    if is_scaled(content.dtype, "gather_documents") != (scales is not None):
        names = scaled_names("gather_documents")
        raise ValueError(f"`scales` belong to {names} content, and only to it; this is {content.dtype}.")
    if scales is not None and (scales.shape != content.shape[:2] or scales.dtype != torch.float32):
        raise ValueError(f"`scales` must be [{content.shape[0]}, 2] float32.")
    if scales is not None and scales.device != content.device:
        raise ValueError(f"`scales` must lie beside `content`, on {content.device}.")
    if width < 0:
        raise ValueError(f"`width` must be at least 0, got {width}.")
    source = "device" if content.device == documents.device else "pinned" if content.is_pinned() else "host"
    namespace = choose(
        "gather_documents",
        documents.device.type,
        backend,
        content=content.dtype,
        dtype=result_dtype(content, dtype),
        multiple=alignment(content.shape[3]),
        source=source,
    )
    return operator("gather_documents", namespace)(documents, offsets, content, scales, width, dtype)


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


def reference_gather_documents(
    documents: Tensor,
    offsets: Tensor,
    content: Tensor,
    scales: Tensor | None,
    width: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if documents.device.type == "cpu" and (most := most_rows(documents, offsets)) > width:
        raise ValueError(f"`width` is {width}, but the documents of a sample have {most} chunks.")
    rows, slots, valid = chunks_msa.chunk_rows(documents, offsets, width)
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
        states = torch.where(valid[..., None, None, None], states, states.new_zeros(()))
    keys, values = (part.transpose(1, 2).contiguous() for part in states.unbind(2))
    return keys, values, valid, slots


def fake_gather_documents(
    documents: Tensor, offsets: Tensor, content: Tensor, scales: Any, width: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, (groups, dim) = documents.shape[0], content.shape[2:]
    shape, kind = (batch, groups, width, dim), result_dtype(content, dtype)
    return (
        documents.new_empty(shape, dtype=kind),
        documents.new_empty(shape, dtype=kind),
        documents.new_empty(batch, width, dtype=torch.bool),
        documents.new_empty(batch, width),
    )
