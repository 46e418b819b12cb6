"""The compiled CPU kernels, at every level of instruction sets that this processor has: one function, the same ties,
and the same bits whatever the batch, the blocks and the threads. Expected values are computed here in float64."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from msa_hf.ops import dispatch, quantize_keys

REASON = dispatch.load_extension()
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

OPS = torch.ops.msa_hf
LEVELS = next(line[5:] for line in OPS.build_info().splitlines() if line.startswith("cpu: ")).split(", ")
FLOATING = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
KINDS = (*FLOATING, "int8", "fp8")

pytestmark = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def keys_of(kind: str, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    return (vectors.to(FLOATING[kind]), None) if kind in FLOATING else quantize_keys(vectors, kind)


def offsets_of(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def best_scores(queries: Tensor, mask: Tensor, keys: Tensor, scales: Tensor | None, offsets: Tensor) -> Tensor:
    """[B, N] float64, from the definition."""
    values = keys.double() if scales is None else keys.double() * scales[:, None].double()
    scores = []
    for query, routes in zip(queries, mask, strict=True):
        products = query[routes].double() @ values.T
        chunks = products.amax(0) if len(products) else products.new_full((len(values),), float("-inf"))
        bounds = offsets.tolist()
        scores.append(torch.stack([chunks[a:b].max() for a, b in itertools.pairwise(bounds)]))
    return torch.stack(scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_scores_of_sizes_around_every_edge(level: str, kind: str, seed: int) -> None:
    """Panels, lone tokens, tiles shared by samples, blocks of keys and their remainders all give float64's scores."""
    draw, generator = random.Random(f"{kind}{seed}"), torch.Generator().manual_seed(seed)
    batch = draw.choice([1, 2, 3, 17])
    tokens = draw.choice([1, 3, 4, 7, 11, 12, 13, 16, 17, 31, 33, 40])
    width = draw.choice([1, 3, 16, 31, 32, 33, 64, 100, 128, 130])
    lengths = torch.randint(1, draw.choice([2, 5, 90]), (draw.choice([1, 2, 15, 16, 17, 33, 300, 1100]),))
    offsets = offsets_of(lengths)
    queries = unit(generator, batch, tokens, width)
    mask = torch.rand(batch, tokens, generator=generator) < draw.choice([0.3, 0.8, 1.0])
    keys, scales = keys_of(kind, unit(generator, int(offsets[-1]), width))
    poisoned = queries.masked_fill(~mask[..., None], float("nan"))
    count = len(lengths)
    documents, scores = OPS._route_documents_at(poisoned, mask, keys, scales, offsets, None, count, level)
    expected = best_scores(queries, mask, keys, scales, offsets)
    for sample in range(batch):
        if not mask[sample].any():
            assert (documents[sample] == -1).all() and (scores[sample] == float("-inf")).all()
            continue
        assert documents[sample].sort().values.equal(torch.arange(count))
        exact = expected[sample][documents[sample]]
        # Unit vectors: float32 rounds every partial sum, of at most 1, to 2^-24 of it.
        torch.testing.assert_close(scores[sample].double(), exact, rtol=0, atol=2e-6)
        assert (scores[sample].diff() <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 12, 20])
def test_equal_keys_have_equal_scores_wherever_they_lie(level: str, kind: str, tokens: int) -> None:
    """One key many times, over several blocks and their remainders: the lower index wins, to the last place."""
    generator = torch.Generator().manual_seed(3)
    count = 1203
    queries, key = unit(generator, 2, tokens, 96), unit(generator, 1, 96)
    keys, scales = keys_of(kind, key.expand(count, 96))
    mask = torch.ones(2, tokens, dtype=torch.bool)
    documents, scores = OPS._route_documents_at(
        queries, mask, keys, scales, torch.arange(count + 1), None, count, level
    )
    assert (scores == scores[:, :1]).all()
    assert documents.equal(torch.arange(count).expand(2, count))


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8"])
def test_a_sample_does_not_depend_on_its_batch(level: str, kind: str) -> None:
    """Bit for bit, with numbers of tokens that share tiles with other samples'."""
    generator = torch.Generator().manual_seed(4)
    counts = [1, 3, 20, 9, 16, 13, 5, 33]
    queries = unit(generator, len(counts), max(counts), 80)
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    keys, scales = keys_of(kind, unit(generator, 700, 80))
    offsets = offsets_of(torch.full((350,), 2))
    together = OPS._route_documents_at(queries, mask, keys, scales, offsets, None, 350, level)
    for sample in range(len(counts)):
        one = slice(sample, sample + 1)
        alone = OPS._route_documents_at(queries[one], mask[one], keys, scales, offsets, None, 350, level)
        assert alone[0].equal(together[0][one]) and alone[1].equal(together[1][one])


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_threads_do_not_change_a_bit(level: str, kind: str, threads: None) -> None:
    """Documents longer than a block are scored by several threads at once."""
    generator = torch.Generator().manual_seed(5)
    queries, mask = unit(generator, 2, 19, 64), torch.ones(2, 19, dtype=torch.bool)
    offsets = offsets_of(torch.tensor([1, 2500, 3, 1, 1700, 40]))
    keys, _ = keys_of(kind, unit(generator, int(offsets[-1]), 64))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(OPS._route_documents_at(queries, mask, keys, None, offsets, None, 6, level))
    for documents, scores in results[1:]:
        assert documents.equal(results[0][0]) and scores.equal(results[0][1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_every_number_of_a_format_is_read_exactly(level: str, dtype: torch.dtype) -> None:
    """Keys of one number, the query 1: the score is the number."""
    bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
    numbers = torch.arange(2 ** (8 * dtype.itemsize)).to(bits).view(dtype)
    numbers = numbers[numbers.float().isfinite()]
    if dtype == torch.bfloat16:  # the matrix unit takes numbers below float32's smallest normal for zero
        numbers = numbers[(numbers == 0) | (numbers.float().abs() >= torch.finfo(torch.float32).tiny)]
    count = len(numbers)
    scales = torch.ones(count) if dtype.itemsize == 1 else None
    query, mask, offsets = torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.arange(count + 1)
    documents, scores = OPS._route_documents_at(query, mask, numbers[:, None], scales, offsets, None, count, level)
    assert scores[0].equal(numbers.float()[documents[0]])
    assert documents[0].sort().values.equal(torch.arange(count))


def test_every_digit_of_a_query_counts(level: str) -> None:
    """float32 queries against the key 1 in bfloat16: 24 bits come through a unit that multiplies numbers of 8."""
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(64, 1, 1, generator=generator) * 2.0 ** torch.randint(-40, 40, (64, 1, 1))
    queries[0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    mask, key = torch.ones(64, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bfloat16)
    _, scores = OPS._route_documents_at(queries, mask, key, None, torch.arange(2), None, 1, level)
    assert scores.equal(queries[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_queries_that_are_no_numbers_choose_nothing(level: str, value: float) -> None:
    generator = torch.Generator().manual_seed(7)
    queries, mask = unit(generator, 2, 5, 40), torch.ones(2, 5, dtype=torch.bool)
    queries[0, 3, 7] = value
    keys = unit(generator, 50, 40).bfloat16()
    documents, scores = OPS._route_documents_at(queries, mask, keys, None, torch.arange(51), None, 4, level)
    assert (documents[0] == -1).all() and (scores[0] == float("-inf")).all()
    assert (documents[1] >= 0).all() and scores[1].isfinite().all()


def test_the_matrix_unit_is_left_as_it_was(level: str) -> None:
    """PyTorch's own products use the same unit, on the same threads: theirs and ours in turn, without a difference."""
    generator = torch.Generator().manual_seed(8)
    queries, mask = unit(generator, 1, 32, 64), torch.ones(1, 32, dtype=torch.bool)
    keys, square = unit(generator, 2000, 64).bfloat16(), torch.randn(256, 256, generator=generator).bfloat16()
    products, results = [], []
    for _ in range(3):
        products.append(square @ square)
        results.append(OPS._route_documents_at(queries, mask, keys, None, torch.arange(2001), None, 8, level))
    assert all(product.equal(products[0]) for product in products)
    assert all(documents.equal(results[0][0]) for documents, _ in results)
