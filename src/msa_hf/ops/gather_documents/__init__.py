"""From chosen documents to the rows that a layer attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Operation, alignment, choose, not_floating
from ..formats import is_scaled, scaled_names
from . import reference
from .reference import most_rows, result_dtype

__all__ = ["gather_documents", "most_rows", "result_dtype"]


def gather_documents(
    documents: Tensor,
    offsets: Tensor,
    content: Tensor,
    width: int,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    first: int | None = None,
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
        first: the bank's chunk that `content` begins with, where it is a part of them, which lies on the device of
            `documents`: rows of chunks that are not in it are zero, and valid. None: it has all chunks.
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
    if first is not None and (first < 0 or content.device != documents.device):
        raise ValueError(f"A part of the chunks must begin at 0 or later, got {first}, and lie on {documents.device}.")
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
    return GATHER_DOCUMENTS.on(namespace)(documents, offsets, content, scales, width, dtype, first)


def _cuda_limit(*, content: torch.dtype, dtype: torch.dtype, **_: object) -> str | None:
    return not_floating(dtype, *([] if content == torch.float8_e4m3fn else [content]))


def _triton_limit(*, content: torch.dtype, dtype: torch.dtype, source: str, **_: object) -> str | None:
    if source == "host":
        return "the content lies in memory that is not pinned"
    return _cuda_limit(content=content, dtype=dtype)


# Features: content, dtype (dtypes), multiple (of D), source ("device", "pinned" or "host").
GATHER_DOCUMENTS = Operation(
    "gather_documents",
    "(Tensor documents, Tensor offsets, Tensor content, Tensor? scales, SymInt width, ScalarType? dtype=None, "
    "int? first=None) -> (Tensor keys, Tensor values, Tensor valid, Tensor slots)",
    __name__,
    reference.gather_documents,
    checks.check_gather_documents,
    reference.fake_gather_documents,
    {"cuda": _cuda_limit, "triton": _triton_limit},
)
