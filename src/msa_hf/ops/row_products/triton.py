"""Products of a single row with matrices, in Triton: a program for every row of a matrix, all of its loads in flight.

A token is read at the rate of the memory where as many bytes are on their way as the memory takes in one round. Kernels
that loop over a row wait for it piece by piece; one launch for every matrix waits for each to end, and small kernels
in between leave the memory idle. So a launch has up to three matrices, and the norm before and the sum or the gate
behind them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .graphs import MOST

NAMESPACE = "msa_hf_rows"  # of the operation, in torch.ops
LONG = 4096  # numbers of a row; longer ones are for more warps


@triton.jit
def _piece(numbers, column, WIDTH: tl.constexpr):
    """Numbers of a row of a matrix, which nobody reads again."""
    return tl.load(numbers + column, mask=column < WIDTH, other=0.0, eviction_policy="evict_first")


@triton.jit
def row_products_kernel(
    row,
    first,
    second,
    third,
    norm,
    residual,
    out,
    first_end,
    second_end,
    epsilon,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """out[i] = the inner product of `row` [WIDTH] and row i of the matrices one below the other, summed in float32.

    Args:
        first, second, third: dense matrices [..., WIDTH]; the first two end with rows `first_end` and `second_end`.
        norm: [WIDTH], by which the row is multiplied, as is the product by what makes the row's mean square 1.
        residual: is added to the products.
        HEAD, TAIL: powers of two, numbers that are loaded at once: all of WIDTH together.
        GATED: out[i] = silu(inner product with row i of the first) times that with row i of the second.
    """
    place = tl.program_id(0)
    matrix = first
    start = place * 0
    if not GATED:
        if place >= second_end:
            matrix = third
            start += second_end
        elif place >= first_end:
            matrix = second
            start += first_end
    begin = (place - start).to(tl.int64) * WIDTH
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    numbers = _piece(matrix + begin, head, WIDTH)
    more = _piece(matrix + begin, tail, WIDTH)
    if GATED:
        factors = _piece(second + begin, head, WIDTH)
        more_factors = _piece(second + begin, tail, WIDTH)
    if HAS_NORM:
        weights = tl.load(norm + head, mask=head < WIDTH, other=0.0)
        more_weights = tl.load(norm + tail, mask=tail < WIDTH, other=0.0)
    states = tl.load(row + head, mask=head < WIDTH, other=0.0).to(tl.float32)
    more_states = tl.load(row + tail, mask=tail < WIDTH, other=0.0).to(tl.float32)
    scale = 1.0
    if HAS_NORM:
        square = tl.sum(states * states, 0) + tl.sum(more_states * more_states, 0)
        scale = 1.0 / tl.sqrt(square / WIDTH + epsilon)
        states *= weights.to(tl.float32)
        more_states *= more_weights.to(tl.float32)
    dtype = out.dtype.element_ty
    total = tl.sum(numbers.to(tl.float32) * states, 0) + tl.sum(more.to(tl.float32) * more_states, 0)
    total = (total * scale).to(dtype).to(tl.float32)
    if GATED:
        factor = tl.sum(factors.to(tl.float32) * states, 0) + tl.sum(more_factors.to(tl.float32) * more_states, 0)
        gate = (total / (1.0 + tl.exp(-total))).to(dtype).to(tl.float32)
        total = gate * (factor * scale).to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + place).to(tl.float32)
    tl.store(out + place, total.to(dtype))


def launch(
    row: Tensor,
    matrices: list[Tensor],
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`row_products`."""
    sizes, width = [matrix.shape[0] for matrix in matrices], row.shape[-1]
    first, second, third = (*matrices, *(matrices[-1:] * (MOST - len(matrices))))
    rows = sizes[0] if gated else sum(sizes)
    out = row.new_empty(*row.shape[:-1], rows)
    head = 1 << (width.bit_length() - 1)
    with torch.cuda.device_of(row):
        row_products_kernel[(rows,)](
            row,
            first,
            second,
            third,
            first if norm is None else norm,
            first if residual is None else residual,
            out,
            sizes[0],
            sum(sizes[:2]),
            epsilon,
            WIDTH=width,
            HEAD=head,
            TAIL=triton.next_power_of_2(max(width - head, 1)),
            HAS_NORM=norm is not None,
            HAS_RESIDUAL=residual is not None,
            GATED=gated,
            num_warps=warps_for(width, gated),
        )
    return out


def warps_for(width: int, gated: bool) -> int:
    """The warps of a program. Of the matrices of Qwen3-4B the fastest on an H200; others were not measured."""
    return 4 if width > LONG else 1


@torch.library.custom_op(f"{NAMESPACE}::row_products", mutates_args=())
def row_products(
    row: Tensor,
    matrices: list[Tensor],
    norm: Tensor | None,
    epsilon: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """The products of a row with up to three matrices, summed in float32.

    Args:
        row: [..., D], of which all dimensions but the last are 1; dense.
        matrices: [N, D] each, dense, in the dtype of the row.
        norm: [D], of the dtype of the row, by which it is multiplied once its mean square was made 1; None for none.
        epsilon: is added to the mean square.
        residual: [..., sum of N] that is added to the products, dense; None for none.
        gated: of two matrices of one size, silu of the product with the first times the product with the second.

    Returns:
        [..., sum of N], the products one behind the other; [..., N] where gated.
    """
    return launch(row, matrices, norm, epsilon, residual, gated)


@row_products.register_fake
def _(
    row: Tensor,
    matrices: list[Tensor],
    norm: Tensor | None,
    epsilon: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    rows = matrices[0].shape[0] if gated else sum(matrix.shape[0] for matrix in matrices)
    return row.new_empty(*row.shape[:-1], rows)
