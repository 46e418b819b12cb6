"""What backends do not take: `<backend>_<operation>(*, device, ...) -> reason or None`.

A reason completes the sentence "route_documents cannot run on the backend 'cuda': ...". Where a backend has no function
here it takes everything. Features of the operations:

- route_documents: queries, keys (dtypes), multiple (the largest power of two up to 64 that divides E), width (the least
  power of two from E), k (likewise).
- rescore_documents: as these, of the exact keys, and source ("device", "pinned" or "host") and contiguous of them.
- pool_chunks, pool_chunks_backward: states (dtype), multiple (of D), width (of G * D), routing_dtype (dtype or None).
- gather_documents: content, dtype (dtypes), multiple (of D), source ("device", "pinned" or "host").

`width` and `k` are rounded up to powers of two because torch.compile may not know the number.
"""

from __future__ import annotations

from typing import Any

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def _floating(*dtypes: torch.dtype) -> str | None:
    wrong = [str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in FLOATING]
    return f"it takes float32, bfloat16 and float16, not {wrong[0]}" if wrong else None


def cuda_route_documents(*, queries: torch.dtype, keys: torch.dtype, **_: Any) -> str | None:
    return _floating(queries, *([] if keys in (torch.int8, torch.float8_e4m3fn) else [keys]))


def cuda_rescore_documents(
    *, queries: torch.dtype, keys: torch.dtype, width: int, k: int, source: str, contiguous: bool, **_: Any
) -> str | None:
    if source == "host":
        return "the exact keys lie in memory that is not pinned"
    if not contiguous:
        return "the exact keys are not contiguous"
    too_large = "E is above 8192" if width > 8192 else "k is above 1024" if k > 1024 else None
    return _floating(queries, keys) or too_large


def cuda_pool_chunks(*, states: torch.dtype, width: int, **_: Any) -> str | None:
    # The means of a chunk lie in 96 KB of shared memory; its gradient too, in the backward.
    return _floating(states) or ("G * D is above 16384" if width > 16384 else None)


def cuda_pool_chunks_backward(*, states: torch.dtype, width: int, **_: Any) -> str | None:
    return _floating(states) or ("G * D is above 8192" if width > 8192 else None)


def cuda_gather_documents(*, content: torch.dtype, dtype: torch.dtype, **_: Any) -> str | None:
    return _floating(dtype, *([] if content == torch.float8_e4m3fn else [content]))


def triton_pool_chunks(*, states: torch.dtype, **_: Any) -> str | None:
    return _floating(states)


triton_pool_chunks_backward = triton_pool_chunks


def triton_gather_documents(*, content: torch.dtype, dtype: torch.dtype, source: str, **_: Any) -> str | None:
    if source == "host":
        return "the content lies in memory that is not pinned"
    return _floating(dtype, *([] if content == torch.float8_e4m3fn else [content]))


def triton_route_documents(*, queries: torch.dtype, keys: torch.dtype, **_: Any) -> str | None:
    return _floating(queries, *([] if keys in (torch.int8, torch.float8_e4m3fn) else [keys]))
