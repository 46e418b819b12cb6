"""Keys in fewer bits: how far they are from the exact ones, and how many of the right documents they find."""

import random

import pytest
import torch
from battery import NEVER, offsets_of, split_up
from torch import Tensor

from msa_hf.ops import quantize_keys, recall_of_candidates, route_documents
from msa_hf.ops.quantize import pack_int4, unpack_int4

KINDS = ("fp8", "int8", "int4")


def unit_keys(chunks: int, groups: int, dim: int, seed: int) -> Tensor:
    """[C, G * D] float32, every head of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(chunks, groups, dim, generator=generator), dim=-1).flatten(1)


def numbers_of(keys: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Numbers in float64, and scales."""
    numbers, scales = quantize_keys(keys, kind)
    if kind == "int4":
        assert numbers.dtype == torch.uint8 and numbers.shape == (len(keys), -(-keys.shape[1] // 2))
        numbers = unpack_int4(numbers, keys.shape[1])
    return numbers.double(), scales.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_to_the_nearest(kind, dtype) -> None:
    """No number of the format is nearer, and the largest of every chunk uses the whole range."""
    keys = (unit_keys(50, 2, 9, 0) * torch.logspace(-6, 3, 50)[:, None]).to(dtype)
    numbers, scales = numbers_of(keys, kind)
    largest = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[kind]
    assert torch.equal(numbers.abs().amax(1), torch.full((50,), largest).double())
    exact = keys.double()
    if kind == "fp8":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        every = every[every.isfinite()]
    else:
        every = torch.arange(-largest, largest + 1).double()
    nearest = (exact[..., None] - every * scales[:, None, None]).abs().amin(2)
    error = (exact - numbers * scales[:, None]).abs()
    assert (error <= nearest * (1 + 1e-5) + 1e-6 * scales[:, None]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_extremes(kind) -> None:
    """A key of zeros stays one; tiny and huge keys neither vanish nor overflow; no chunks are no chunks, and
    chunks of no numbers are chunks."""
    keys = torch.tensor([[0.0, 0.0, 0.0], [1e-40, -1e-40, 0.0], [1e-30, 1e-31, 0.0], [3e38, -3e38, 1.0]])
    numbers, scales = numbers_of(keys, kind)
    assert numbers.isfinite().all() and scales.isfinite().all() and (scales > 0).all()
    assert not numbers[0].any()
    torch.testing.assert_close((numbers * scales[:, None])[2:, 0], keys.double()[2:, 0], rtol=1e-5, atol=0.0)
    assert quantize_keys(torch.empty(0, 8), kind)[1].shape == (0,)
    assert quantize_keys(torch.empty(3, 0), kind)[1].tolist() == [1.0, 1.0, 1.0]


def test_numbers_of_four_bits_are_packed_in_pairs() -> None:
    """Any number of columns from -8 to 7 comes back."""
    for width in (1, 2, 7, 16):
        numbers = torch.randint(-8, 8, (5, width), dtype=torch.int8)
        packed = pack_int4(numbers)
        assert packed.shape == (5, (width + 1) // 2) and torch.equal(unpack_int4(packed, width), numbers)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="'fp8', 'int8', 'int4'"):
        quantize_keys(torch.zeros(1, 8), "int3")


def question(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [B, T, E], mask, keys and offsets."""
    generator = torch.Generator().manual_seed(seed)
    keys = unit_keys(2000, 2, 32, seed)
    queries = torch.randn(3, 6, 64, generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.7
    mask[:, 0] = True
    return queries, mask, keys, offsets_of(split_up(2000, random.Random(seed + 3)))


def exact_scores(queries: Tensor, mask: Tensor, keys: Tensor, offsets: Tensor) -> Tensor:
    products = (queries.double() @ keys.double().T).masked_fill(~mask[..., None], NEVER).amax(1)
    return torch.stack([part.amax(1) for part in products.split(offsets.diff().tolist(), 1)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_recall_grows_with_the_candidates(kind) -> None:
    """Recall is the share of exact documents among the candidates: it never falls, and ends at 1 with all of them."""
    queries, mask, keys, offsets = question(2)
    count, k = len(offsets) - 1, 16
    asked = [k, 2 * k, 4 * k, count]
    recall = recall_of_candidates(queries, mask, keys, offsets, k, kind, asked)
    values = [recall[number] for number in asked]
    assert values == sorted(values) and values[-1] == 1.0
    numbers, scales = quantize_keys(keys, kind)
    if kind == "int4":
        numbers = unpack_int4(numbers, keys.shape[1])
    exact = exact_scores(queries, mask, keys, offsets)
    rough = exact_scores(queries, mask, numbers.double() * scales.double()[:, None], offsets)
    both = [
        len(set(best.tolist()) & set(found.tolist()))
        for best, found in zip(exact.topk(k).indices, rough.topk(2 * k).indices, strict=True)
    ]
    assert recall[2 * k] == pytest.approx(sum(both) / (3 * k), abs=1.5 / (3 * k))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_recall_on_random_unit_keys(kind) -> None:
    """At the shape of a 4B model (8 heads of 128) four candidates a document hold all of the exact 16 best."""
    keys = unit_keys(20_000, 8, 128, 5)
    queries = unit_keys(4 * 32, 8, 128, 6).view(4, 32, 1024)
    mask, offsets = torch.ones(4, 32, dtype=torch.bool), offsets_of([8] * 2500)
    recall = recall_of_candidates(queries, mask, keys.bfloat16(), offsets, 16, kind, [64])
    assert recall[64] >= 0.999
    numbers, scales = quantize_keys(keys.bfloat16(), kind)
    documents, scores = route_documents(queries, mask, numbers, offsets, 16, scales=scales, exact_keys=keys.bfloat16())
    expected, best = route_documents(queries, mask, keys.bfloat16(), offsets, 16)
    assert torch.equal(documents, expected)
    torch.testing.assert_close(scores, best, atol=1e-6, rtol=1e-5)
