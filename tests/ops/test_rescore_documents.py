"""`rescore_documents` on every backend: the exact scores of candidates."""

import random
import sys

import pytest
import torch
from battery import FLOATING, NEVER, error_of, offsets_of, places, poisoned_memory, split_up, surrounded
from torch import Tensor

from msa_hf.ops import dispatch, quantize_keys, rescore_documents, route_documents, use_backend

PLACES = places("rescore_documents")
WIDTHS = (8, 24, 64, 128, 136, 1024)


class Case:
    """Queries, exact keys and candidates on the CPU, with the scores that all documents have."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        batch, length, width = pick.choice([1, 3, 16]), pick.choice([1, 7, 33, 130]), pick.choice(WIDTHS)
        chunks = pick.choice([1, 65, 500])
        self.counts = split_up(chunks, pick)
        self.queries = torch.randn(batch, length, width, generator=generator) / width**0.5
        self.mask = torch.rand(batch, length, generator=generator) < 0.5
        self.mask[:, 0] = True
        if batch > 1:
            self.mask[1] = False
        self.queries = self.queries.masked_fill(~self.mask[..., None], float("nan")).to(dtype)
        self.keys = torch.nn.functional.normalize(torch.randn(chunks, width, generator=generator), dim=1).to(dtype)
        self.candidates = torch.full((batch, pick.choice([1, 16, 70])), -1)
        for row in self.candidates:
            some = torch.randperm(len(self.counts), generator=generator)[: pick.randint(0, len(row))]
            row[torch.randperm(len(row), generator=generator)[: len(some)]] = some
        self.k = pick.choice([1, 5, 16, 80])

    def scores(self, dtype: torch.dtype) -> Tensor:
        """[B, N]; -inf for samples that do not route."""
        result = torch.full((len(self.queries), len(self.counts)), NEVER, dtype=dtype)
        for sample, (states, real) in enumerate(zip(self.queries.to(dtype), self.mask, strict=True)):
            if real.any():
                best = (states[real] @ self.keys.to(dtype).T).amax(0)
                result[sample] = torch.stack([part.amax() for part in best.split(self.counts)])
        return result

    def run(self, place: tuple[str, str], keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        backend, device = place
        with poisoned_memory():
            documents, scores = rescore_documents(
                surrounded(self.queries, device),
                surrounded(self.mask, device),
                surrounded(self.keys, device) if keys is None else keys,
                offsets_of(self.counts).to(device),
                surrounded(self.candidates, device),
                self.k,
                backend=backend,
            )
        return documents.cpu(), scores.cpu()

    def check(self, documents: Tensor, scores: Tensor) -> None:
        """The best of the candidates in order, with exact scores; equal ones by index; nothing else."""
        exact, inexact = self.scores(torch.float64), self.scores(torch.float32)
        known = exact > NEVER
        tolerance = 4 * error_of(inexact[known], exact[known]) + 1e-6
        assert documents.shape == scores.shape == (len(self.queries), self.k)
        for row, best, theirs, offered in zip(documents, scores, exact, self.candidates, strict=True):
            offered = offered[offered >= 0] if bool((theirs > NEVER).any()) else offered[:0]
            count = min(self.k, len(offered))
            chosen = row[:count]
            assert row[count:].tolist() == [-1] * (self.k - count)
            assert best[count:].tolist() == [NEVER] * (self.k - count)
            assert set(chosen.tolist()) <= set(offered.tolist()) and len(set(chosen.tolist())) == count
            assert error_of(best[:count], theirs[chosen]) <= tolerance
            pairs = list(zip((-best[:count]).tolist(), chosen.tolist(), strict=True))
            assert pairs == sorted(pairs)
            left = [document for document in offered.tolist() if document not in chosen]
            if left and count:
                assert float(theirs[left].max()) <= float(theirs[chosen].min()) + 2 * tolerance


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_random_candidates(place, dtype, seed) -> None:
    """Any number of candidates in any order, -1 anywhere; what stands beside the tensors is not read."""
    case = Case(seed, dtype)
    case.check(*case.run(place))


@pytest.mark.parametrize("place", places("rescore_documents", "cuda"))
@pytest.mark.parametrize("pinned", [True, False])
def test_keys_in_host_memory(place, pinned) -> None:
    """Only rows of candidates travel; memory that is not pinned is for PyTorch."""
    case = Case(3, torch.bfloat16)
    if not pinned and place[0] != "pytorch":
        with pytest.raises(dispatch.BackendError, match="not pinned"):
            case.run(place, case.keys)
        return
    case.check(*case.run(place, case.keys.pin_memory() if pinned else case.keys))


@pytest.mark.parametrize("place", PLACES)
def test_equal_candidates_come_by_index(place) -> None:
    """Whatever the order of the candidates; a silent sample chooses nothing."""
    backend, device = place
    queries, mask = torch.ones(2, 1, 8, device=device), torch.tensor([[True], [False]], device=device)
    candidates, offsets = torch.tensor([[5, -1, 3, 4]] * 2, device=device), torch.arange(7, device=device)
    documents, scores = rescore_documents(
        queries, mask, torch.ones(6, 8, device=device), offsets, candidates, 3, backend=backend
    )
    assert documents.tolist() == [[3, 4, 5], [-1] * 3]
    assert scores.tolist() == [[8.0] * 3, [NEVER] * 3]


@pytest.mark.parametrize("place", PLACES)
def test_nothing_to_score(place) -> None:
    """No candidates, or only -1: nothing is chosen."""
    backend, device = place
    queries, mask = torch.randn(2, 3, 8, device=device), torch.ones(2, 3, dtype=torch.bool, device=device)
    keys, offsets = torch.randn(4, 8, device=device), offsets_of([1, 3]).to(device)
    for candidates in (torch.full((2, 5), -1, device=device), torch.empty(2, 0, dtype=torch.int64, device=device)):
        documents, scores = rescore_documents(queries, mask, keys, offsets, candidates, 2, backend=backend)
        assert documents.tolist() == [[-1, -1]] * 2 and scores.tolist() == [[NEVER, NEVER]] * 2


@pytest.mark.parametrize("elements", [1, 700, 5000])
def test_tiles_of_any_size_give_the_same(elements, monkeypatch) -> None:
    """The reference bounds its memory."""
    case = Case(8)
    expected = case.run(("pytorch", "cpu"))
    monkeypatch.setattr(sys.modules["msa_hf.ops.rescore_documents.reference"], "TILE_ELEMENTS", elements)
    documents, scores = case.run(("pytorch", "cpu"))
    case.check(documents, scores)
    torch.testing.assert_close(scores, expected[1])


@pytest.mark.parametrize("place", PLACES)
def test_opcheck(place) -> None:
    """Schema, fake and autograd registration are what torch.library asks for."""
    backend, device = place
    case = Case(4)
    arguments = (case.queries.nan_to_num(), case.mask, case.keys, offsets_of(case.counts), case.candidates)
    name = dispatch.BACKENDS[backend].namespace
    torch.library.opcheck(
        dispatch.operator("rescore_documents", name).default, (*(item.to(device) for item in arguments), case.k)
    )


def test_a_backend_without_it_leaves_it_to_the_next() -> None:
    """Routing with exact keys behind quantized ones on a backend asked for, which cannot score candidates again."""
    if dispatch.BACKENDS["cpp"].probe("route_documents") is not None:
        pytest.skip("no extension")
    queries, mask = torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool)
    keys, offsets = torch.randn(30, 16), offsets_of([10, 5, 15])
    numbers, scales = quantize_keys(keys, "int8")
    expected = route_documents(queries, mask, keys, offsets, 3, backend="pytorch")
    with use_backend("cpp"):
        found = route_documents(queries, mask, numbers, offsets, 3, scales=scales, exact_keys=keys)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("place", places("rescore_documents", "cuda"))
def test_in_a_graph(place) -> None:
    """The quantized call with its exact scores, captured once and replayed with other queries: no look at the host."""
    backend, device = place
    if backend == "pytorch":
        return  # the reference waits for the device
    case = Case(2, torch.bfloat16)
    numbers, scales = (item.to(device) for item in quantize_keys(case.keys, "int8"))
    queries, mask = case.queries.nan_to_num().to(device), case.mask.to(device)
    keys, offsets = case.keys.to(device), offsets_of(case.counts).to(device)

    def ask() -> tuple[Tensor, Tensor]:
        return route_documents(
            queries, mask, numbers, offsets, 4, scales=scales, exact_keys=keys, candidates=16, backend=backend
        )

    ask()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ask()
    queries.copy_(queries.roll(1, 2))
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(found, ask(), strict=True):
        assert torch.equal(ours, theirs)
