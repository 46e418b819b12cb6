"""Products of a single row with matrices, in Triton: a program for every row of a matrix, all of its loads in flight.

A token is read at the rate of the memory where as many bytes are on their way as the memory takes in one round. Kernels
that loop over a row wait for it piece by piece, and one launch for every matrix waits for each to end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .graphs import MOST

NAMESPACE = "msa_hf_rows"  # of the operation, in torch.ops
LONG = 4096  # numbers of a row above which a program has four warps


@triton.jit
def row_products_kernel(
    row, first, second, third, out, first_end, second_end, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = the inner product of `row` [WIDTH] and row i of the matrices one below the other, summed in float32.

    Args:
        first, second, third: dense matrices [..., WIDTH]; the first two end with rows `first_end` and `second_end`.
        BLOCK: numbers that are loaded at a time.
    """
    place = tl.program_id(0)
    matrix = first
    start = place * 0
    if place >= second_end:
        matrix = third
        start += second_end
    elif place >= first_end:
        matrix = second
        start += first_end
    matrix += (place - start).to(tl.int64) * WIDTH
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in tl.static_range(0, WIDTH, BLOCK):  # written out, so that no load waits for a sum
        column = begin + tl.arange(0, BLOCK)
        real = column < WIDTH
        numbers = tl.load(matrix + column, mask=real, other=0.0, eviction_policy="evict_first")
        total += numbers.to(tl.float32) * tl.load(row + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, tl.sum(total, 0).to(out.dtype.element_ty))


def launch(kernel: Any, row: Tensor, matrices: list[Tensor]) -> Tensor:
    """`row_products` by this kernel, which is the one above, wrapped or as it is."""
    sizes, width = [matrix.shape[0] for matrix in matrices], row.shape[-1]
    first, second, third = (*matrices, *(matrices[-1:] * (MOST - len(matrices))))
    out = row.new_empty(*row.shape[:-1], sum(sizes))
    # Of the matrices of Qwen3-4B together the two fastest forms on an H200; which suits which length was not measured.
    block, warps = (2048, 4) if width > LONG else (512, 1)
    kernel[(sum(sizes),)](
        row, first, second, third, out, sizes[0], sum(sizes[:2]), WIDTH=width, BLOCK=block, num_warps=warps
    )
    return out


@torch.library.triton_op(f"{NAMESPACE}::row_products", mutates_args=())
def row_products(row: Tensor, matrices: list[Tensor]) -> Tensor:
    """The products of a row with up to three matrices, summed in float32.

    Args:
        row: [..., D], of which all dimensions but the last are 1; dense.
        matrices: [N, D] each, dense, in the dtype of the row.

    Returns:
        [..., sum of N], the products one behind the other.
    """
    return launch(torch.library.wrap_triton(row_products_kernel), row, matrices)
