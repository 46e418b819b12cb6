"""What the compiled CPU operations refuse when they are called directly, and how they round."""

import pytest
import torch
from torch import Tensor

from msa_hf.ops import dispatch, quantize_keys

REASON = dispatch.load_extension()
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

OPS = torch.ops.msa_hf


def route(**changes: object) -> tuple[Tensor, Tensor]:
    call: dict[str, object] = {
        "queries": torch.ones(1, 2, 4),
        "routing_mask": torch.ones(1, 2, dtype=torch.bool),
        "keys": torch.ones(6, 4),
        "scales": None,
        "offsets": torch.tensor([0, 2, 6]),
        "alive": None,
        "k": 1,
    }
    return OPS.route_documents(*(call | changes).values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offsets": torch.tensor([0, 2, 7])}, "rise from 0 to 6"),
        ({"offsets": torch.tensor([1, 2, 6])}, "rise from 0 to 6"),
        ({"offsets": torch.tensor([0, 4, 2, 6])}, "rise from 0 to 6"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "begin with 0"),
        ({"keys": torch.ones(6, 5)}, r"`keys` must be \[\*, 4\], got \[6, 5\] Float"),
        ({"keys": torch.ones(6, 4, dtype=torch.int8)}, "`scales` belong to"),
        ({"keys": torch.ones(6, 4, dtype=torch.int8), "scales": -torch.ones(6)}, "not be negative"),
        ({"routing_mask": torch.ones(1, 3, dtype=torch.bool)}, r"`routing_mask` must be \[1, 2\] Bool"),
        ({"alive": torch.ones(3, dtype=torch.bool)}, r"`alive` must be \[2\] Bool"),
        ({"k": -1}, "`k` must not be negative"),
    ],
)
def test_contradictions_of_route_documents(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        route(**changes)


def test_pool_chunks_counts_chunks() -> None:
    states, offsets = torch.ones(9, 1, 2), torch.tensor([0, 4, 9])
    with pytest.raises(RuntimeError, match="`chunks` must be 3"):
        OPS.pool_chunks(states, states, states, offsets, 4, 4, True, None)
    with pytest.raises(RuntimeError, match="rise from 0 to 9"):
        OPS.pool_chunks(states, states, states, torch.tensor([0, 4, 10]), 4, 3, True, None)


@pytest.mark.parametrize(
    ("documents", "width", "said"), [([[2]], 9, "no document 2, only 2"), ([[0, 1]], 5, "`width` is 5, .* 6 chunks")]
)
def test_gather_documents_reads_nothing_beside(documents: list[list[int]], width: int, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        OPS.gather_documents(
            torch.tensor(documents), torch.tensor([0, 2, 6]), torch.ones(6, 2, 1, 1), None, width, None
        )


def awkward(generator: torch.Generator) -> Tensor:
    """Numbers of every size, ties between neighbors of each format, the ends of each, and what is no number."""
    bits = torch.randint(-(2**31), 2**31 - 1, (40000,), generator=generator).to(torch.int32)
    ties = (bits & ~0x1FFF) | 0x1000, (bits & ~0xFFFF) | 0x8000, bits & ~0xFFFFF | 0x80000
    sizes = torch.randn(20000, generator=generator) * 2.0 ** torch.randint(-30, 18, (20000,), generator=generator)
    ends = [0.0, -0.0, 448.0, 464.0, 65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25, 3e38, 3.4e38, 1e-45]
    special = [float("inf"), float("-inf"), float("nan")]
    return torch.cat([*(part.view(torch.float32) for part in (bits, *ties)), sizes, torch.tensor(ends + special)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_torch_does(dtype: torch.dtype) -> None:
    numbers = awkward(torch.Generator().manual_seed(0))
    content = numbers.repeat(2).view(1, 2, 1, -1)
    keys, *_ = OPS.gather_documents(torch.zeros(1, 1, dtype=torch.int64), torch.arange(2), content, None, 1, dtype)
    expected, found = numbers.to(dtype), keys.flatten()
    assert found.isnan().equal(expected.isnan())
    same = ~expected.isnan()
    assert found.view(torch.int16)[same].equal(expected.view(torch.int16)[same])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantizes_as_quantize_keys_does(dtype: torch.dtype) -> None:
    """Bit for bit: the same scale, the same rounding; also of chunks of zeros and of numbers below the normal ones."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(500, 2, 33, generator=generator) * 2.0 ** torch.randint(-9, 9, (500, 2, 33))
    states[3], states[4], states[5] = 0.0, 1e-42, 1e-30
    offsets = torch.arange(501)
    _, numbers, scales = OPS.pool_chunks(states, states, states, offsets, 1, 500, False, dtype)
    expected, factors = quantize_keys(states.flatten(1), dtype)
    assert scales.equal(factors)
    assert numbers.view(torch.int8).equal(expected.view(torch.int8))
