"""Pooling tokens into chunks, and finding the chunks of chosen documents."""

import random

import pytest
import torch
from reference import naive_chunks

from msa_hf.model.chunks_msa import chunk_counts, chunk_rows, pool_chunks

SIZES = [1, 2, 3, 4, 64]


def lengths_around(size: int, seed: int) -> list[int]:
    """Document lengths on both sides of multiples of the chunk size, in random order."""
    pick = random.Random(seed)
    edges = [1, 2, size - 1, size, size + 1, 2 * size, 2 * size + 1, 5]
    return [max(pick.choice(edges), 1) for _ in range(pick.choice([1, 2, 6]))]


def test_chunk_counts() -> None:
    """A partial chunk counts."""
    lengths = torch.arange(1, 12)
    for size in SIZES:
        assert chunk_counts(lengths, size).tolist() == [len(range(0, length, size)) for length in range(1, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_pool_chunks(size, shape, dtype) -> None:
    """Means over real tokens only, accumulated in float32 or wider; NaN behind a document's end has no effect."""
    for seed in range(4):
        torch.manual_seed(seed)
        lengths = lengths_around(size, seed)
        states = torch.randn(len(lengths), max(lengths) + seed, *shape).to(dtype)
        expected = [naive_chunks(state[:length].double(), size) for state, length in zip(states, lengths, strict=True)]
        for state, length in zip(states, lengths, strict=True):
            state[length:] = float("nan")
        pooled = pool_chunks(states, torch.tensor(lengths), size)
        assert pooled.dtype == torch.promote_types(dtype, torch.float32)
        close = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(pooled.double(), torch.cat(expected), atol=close, rtol=close)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_pool_chunks(size) -> None:
    """Gradients are those of the naive mean; padding gets zero, not NaN."""
    torch.manual_seed(size)
    lengths = [1, size, size + 1, 2 * size + 1]
    states = torch.randn(len(lengths), max(lengths) + 2, 3)
    for state, length in zip(states, lengths, strict=True):
        state[length:] = float("nan")
    states.requires_grad_()
    pooled = pool_chunks(states, torch.tensor(lengths), size)
    weights = torch.randn_like(pooled)
    (found,) = torch.autograd.grad((pooled * weights).sum(), states)
    naive = torch.cat([naive_chunks(state[:length], size) for state, length in zip(states, lengths, strict=True)])
    (expected,) = torch.autograd.grad((naive * weights).sum(), states)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert all((gradient[length:] == 0).all() for gradient, length in zip(found, lengths, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_chunk_rows(seed) -> None:
    """Rows of each sample: the chunks of its documents in ascending order, with the column each came from."""
    pick = random.Random(seed)
    count = pick.choice([1, 2, 9])
    counts = [pick.choice([1, 1, 2, 5]) for _ in range(count)]
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    columns = pick.choice([1, 2, count, count + 2])
    chosen = []
    for _ in range(pick.choice([1, 2, 4])):
        documents = pick.sample(range(count), pick.randint(0, min(columns, count)))
        documents += [-1] * (columns - len(documents))
        pick.shuffle(documents)
        chosen.append(documents)
    rows, slots, valid = chunk_rows(torch.tensor(chosen), offsets)
    expected = [
        [
            (int(offsets[document]) + chunk, documents.index(document))
            for document in sorted(item for item in documents if item >= 0)
            for chunk in range(counts[document])
        ]
        for documents in chosen
    ]
    assert rows.shape == slots.shape == valid.shape == (len(chosen), max(map(len, expected)))
    assert valid.sum(1).tolist() == [len(sample) for sample in expected]
    for sample, pairs in enumerate(expected):
        assert valid[sample, : len(pairs)].all()
        assert list(zip(rows[sample].tolist(), slots[sample].tolist(), strict=True))[: len(pairs)] == pairs
        assert (rows[sample, len(pairs) :] == 0).all()


def test_no_columns_and_no_documents() -> None:
    """No document chosen by anyone: no rows."""
    offsets = torch.tensor([0, 2, 3])
    for documents in (torch.full((2, 3), -1), torch.empty(2, 0, dtype=torch.int64)):
        rows, slots, valid = chunk_rows(documents, offsets)
        assert rows.shape == slots.shape == valid.shape == (2, 0)
