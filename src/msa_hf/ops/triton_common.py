"""Helpers that the Triton kernels of several operations share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Kernels run on the CPU only where Triton interprets them, for tests. It has no arithmetic in bfloat16.
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def both(first, second):
    """Two masks in one. Compared once more, because interpreters of some versions of Triton make a number of it."""
    return (first & second) != 0


@triton.jit
def from_float8(bits):
    """float8_e4m3fn, as bits, in float32; not every device knows that format, but half precision holds the same fields
    with three more digits and another bias."""
    half = (((bits & 0x80).to(tl.uint16) << 8) | ((bits & 0x7F).to(tl.uint16) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def rounded(numbers, dtype: tl.constexpr):
    """float32 to the nearest number of another dtype; the interpreter would take the one towards zero."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = numbers.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        numbers = tl.where(numbers == numbers, nearest, numbers)
    return numbers.to(dtype)


def with_dense_rows(states: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a dense copy."""
    return states if states.stride(-1) == 1 or states.shape[-1] == 1 else states.contiguous()
