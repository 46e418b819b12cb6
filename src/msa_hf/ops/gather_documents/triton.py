"""`gather_documents` in Triton: rows are found by PyTorch, copied by one program each for keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...model import chunks_msa
from ..triton_common import both, from_float8, rounded
from .reference import result_dtype

BLOCK = 1024  # numbers that a program copies at once


@triton.jit
def _gather(
    content,
    scales,
    rows,
    valid,
    keys,
    values,
    width,
    groups,
    dim,
    first,
    chunks,
    QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # sample * width + row
    part = tl.program_id(1)
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    size = groups * dim
    inside = element < size
    chunk = tl.load(rows + place) - first
    real = both(tl.load(valid + place) != 0, both(chunk >= 0, chunk < chunks))
    source = chunk * 2 + part
    numbers = tl.load(content + source * size + element, mask=both(inside, real), other=0)
    if QUANTIZED:
        numbers = from_float8(numbers) * tl.load(scales + source, mask=real, other=0.0)
    if numbers.dtype != keys.dtype.element_ty:
        numbers = rounded(numbers.to(tl.float32), keys.dtype.element_ty)
    sample, row = place // width, place % width
    head = element // dim
    target = ((sample * groups + head) * width + row) * dim + element % dim
    if part == 0:
        tl.store(keys + target, numbers, mask=inside)
    else:
        tl.store(values + target, numbers, mask=inside)


def gather_documents(
    documents: Tensor,
    offsets: Tensor,
    content: Tensor,
    scales: Tensor | None,
    width: int,
    dtype: torch.dtype | None = None,
    first: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, slots, valid = chunks_msa.chunk_rows(documents, offsets, width)
    batch, (groups, dim) = documents.shape[0], content.shape[2:]
    shape, kind = (batch, groups, width, dim), result_dtype(content, dtype)
    make = documents.new_empty if content.shape[0] else documents.new_zeros
    keys, values = make(shape, dtype=kind), make(shape, dtype=kind)
    if keys.numel() and content.shape[0]:
        content = content.contiguous()
        factors = scales.contiguous() if scales is not None else valid
        if scales is not None:
            content = content.view(torch.uint8)
        with torch.cuda.device_of(documents):
            _gather[(batch * width, 2, triton.cdiv(groups * dim, BLOCK))](
                content,
                factors,
                rows,
                valid.view(torch.uint8),
                keys,
                values,
                width,
                groups,
                dim,
                first or 0,
                content.shape[0],
                QUANTIZED=scales is not None,
                BLOCK=min(BLOCK, triton.next_power_of_2(groups * dim)),
            )
    return keys, values, valid, slots
