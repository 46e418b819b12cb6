"""What the compiled CPU operations refuse when they are called directly, and how they round."""

import pytest
import torch
from extension import why_not_built
from torch import Tensor

from msa_hf.ops import dispatch, quantize_keys

REASON = why_not_built()
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
        ({"k": 2**31}, "`k` must lie from 0 to"),
        ({"k": 2**63 - 1}, "`k` must lie from 0 to"),
    ],
)
def test_contradictions_of_route_documents(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        route(**changes)


def test_no_document_can_be_asked_for() -> None:
    documents, scores = route(k=0)
    assert documents.shape == scores.shape == (1, 0)


def test_true_is_whatever_is_not_zero() -> None:
    """Memory of another type, seen as bool, may hold any byte."""
    queries, keys = torch.randn(2, 3, 4), torch.randn(6, 4)
    mask, alive = torch.tensor([[7, 0, 255], [0, 128, 0]], dtype=torch.uint8), torch.tensor([2, 0], dtype=torch.uint8)
    found = route(queries=queries, keys=keys, routing_mask=mask.view(torch.bool), alive=alive.view(torch.bool))
    expected = route(queries=queries, keys=keys, routing_mask=mask != 0, alive=alive != 0)
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 6])
def test_numbers_at_any_address(shift: int) -> None:
    def moved(tensor: Tensor) -> Tensor:
        memory = bytearray(shift) + bytearray(tensor.numpy().tobytes())
        return torch.frombuffer(memory, dtype=tensor.dtype, offset=shift).view(tensor.shape)

    queries, keys, offsets = torch.randn(1, 2, 33), torch.randn(6, 33), torch.tensor([0, 2, 6])
    expected = route(queries=queries, keys=keys, offsets=offsets)
    found = route(queries=moved(queries), keys=moved(keys), offsets=moved(offsets))
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])
    states, content = torch.randn(6, 3, 11), torch.randn(6, 2, 3, 11)
    pooled = [OPS.pool_chunks(*3 * [each], offsets, 2, 3, True, None) for each in (states, moved(states))]
    gathered = [
        OPS.gather_documents(torch.tensor([[1]]), offsets, each, None, 4, None) for each in (content, moved(content))
    ]
    for ours, theirs in (pooled, gathered):
        assert all(one.equal(other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [9, 2**31, 2**62, 2**63 - 1])
@pytest.mark.parametrize("namespace", ["msa_hf", "msa_hf_pytorch"])
def test_chunks_larger_than_all_documents(size: int, namespace: str) -> None:
    assert dispatch.BACKENDS["pytorch"].probe("pool_chunks") is None
    assert dispatch.BACKENDS["pytorch"].probe("pool_chunks_backward") is None
    operations = getattr(torch.ops, namespace)
    states, offsets = torch.randn(9, 1, 2), torch.tensor([0, 4, 9])
    content, routing_keys, _ = operations.pool_chunks(states, states, states, offsets, size, 2, False, None)
    expected = torch.stack([states[:4].mean(0), states[4:].mean(0)])
    torch.testing.assert_close(content[:, 0], expected)
    torch.testing.assert_close(routing_keys, expected.flatten(1))
    grads = operations.pool_chunks_backward(content, routing_keys, states, offsets, size, False)
    torch.testing.assert_close(grads[0][:4], (expected[0] / 4).expand(4, 1, 2))


@pytest.mark.parametrize("namespace", ["msa_hf", "msa_hf_pytorch"])
def test_sizes_that_do_not_fit_32_bits(namespace: str) -> None:
    assert dispatch.BACKENDS["pytorch"].probe("gather_documents") is None
    operations, offsets = getattr(torch.ops, namespace), torch.tensor([0])
    with pytest.raises((RuntimeError, ValueError), match="width"):
        operations.gather_documents(torch.zeros(0, 1, dtype=torch.int64), offsets, torch.zeros(0, 2, 1, 1), None, 2**62)
    states = torch.empty(0, 2**40, 2**20)
    with pytest.raises((RuntimeError, ValueError), match=r"G \* D"):
        operations.pool_chunks(states, states, states, offsets, 4, 0, True, None)


def test_sizes_that_take_no_memory_take_no_time() -> None:
    many, none = 2**40, torch.tensor([0])
    gathered = OPS.gather_documents(
        torch.empty(many, 0, dtype=torch.int64), none, torch.zeros(0, 2, 1, 1), None, 0, None
    )
    assert gathered[0].shape == (many, 1, 0, 1)
    states, offsets = torch.empty(many, 0, 3), torch.tensor([0, many])
    content, routing_keys, _ = OPS.pool_chunks(states, states, states, offsets, 1, many, True, None)
    assert content.shape == (many, 2, 0, 3)
    assert OPS.pool_chunks_backward(content, routing_keys, states, offsets, 1, True)[0].shape == states.shape
    with pytest.raises(RuntimeError, match="keys of no numbers"):
        route(queries=torch.empty(1, 2, 0), keys=torch.empty(many, 0), offsets=offsets)


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
