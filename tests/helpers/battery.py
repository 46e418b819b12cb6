"""What the tests of all operations share: the backends of this machine, inputs that betray what reads beside them, and
how close numbers must be.

Expected values are computed here in float64 from the definitions, without the package.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_hf.ops import BACKENDS, BackendError, dispatch

NEVER = float("-inf")
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def places(operation: str, *devices: str) -> list[Any]:
    """Parameters (backend, device) for what this machine has; `test_dispatch.py` says what is missing and why."""
    return [
        pytest.param((name, device), id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for name, backend in BACKENDS.items()
        for device in devices or ("cpu", "cuda")
        if why_not(operation, name, device) is None and (backend.runs_on(device) or device in backend.also())
    ]


def why_not(operation: str, backend: str, device: str) -> str | None:
    """Why a backend cannot be tested on a device, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return dispatch.NO_CUDA
    return BACKENDS[backend].probe(operation)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialized holds NaN (integers: the largest), so that what a kernel does not
    write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def surrounded(tensor: Tensor, device: str, strided: bool = False) -> Tensor:
    """The same numbers inside a larger buffer of NaN, True or the largest number: whoever reads beside them is wrong.

    Args:
        strided: also behind every row, which leaves the rows apart.
    """
    poison: Any = torch.iinfo(tensor.dtype).max if not tensor.is_floating_point() and tensor.dtype != torch.bool else 1
    rows = tensor.reshape(tensor.shape[0], tensor.shape[1:].numel())
    behind = 16 // tensor.element_size() if strided else 0
    as_bytes = tensor.dtype == torch.float8_e4m3fn
    if as_bytes:
        rows, poison = rows.view(torch.uint8), 0x7F  # NaN
    elif tensor.is_floating_point():
        poison = float("nan")
    # 64 rows each way: kernels read in tiles. A multiple of 16 bytes before, as PyTorch's allocators align.
    buffer = rows.new_full((rows.shape[0] + 128, rows.shape[1] + behind), poison, device=device)
    inside = buffer[64 : 64 + rows.shape[0], : rows.shape[1]]
    inside.copy_(rows)
    if as_bytes:
        inside = inside.view(torch.float8_e4m3fn)
    return inside.unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else inside.squeeze(1)


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(list(counts), dtype=torch.int64).cumsum(0), (1, 0))


def split_up(total: int, pick: random.Random) -> list[int]:
    """`total` things in random documents: one each, all in one, or around an average."""
    kind = pick.randrange(5)
    if kind == 0:
        return [1] * total
    if kind == 1:
        return [total]
    most = pick.choice([2, 3, 7, 40, 300])
    counts = []
    while sum(counts) < total:
        counts.append(min(pick.randint(1, most), total - sum(counts)))
    return counts


def around(edges: Sequence[int], pick: random.Random, least: int = 1) -> int:
    """A size on, just below or just above an edge."""
    return max(pick.choice(edges) + pick.choice([-1, 0, 0, 1]), least)


def error_of(found: Tensor, exact: Tensor) -> float:
    """The largest difference."""
    return float((found.double() - exact.double()).abs().max()) if exact.numel() else 0.0


def takes(place: tuple[str, str], operation: str, **features: Any) -> bool:
    """Whether a backend takes a call; where it does not, it is refused with the reason when asked for by name."""
    backend, device = place
    reason = BACKENDS[backend].refuses(operation, device, features)
    if reason is not None:
        with pytest.raises(BackendError) as refusal:
            dispatch.choose(operation, device, backend, **features)
        assert reason in str(refusal.value)
    return reason is None
