"""`route_documents` on every backend against its definition in float64.

Scores may differ by a small multiple of PyTorch's own error in the same dtype; choices may differ only between
documents whose exact scores are that close. Where all products are small integers nothing may differ.
"""

import random
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from battery import FLOATING, NEVER, around, error_of, offsets_of, places, poisoned_memory, split_up, surrounded
from torch import Tensor

from msa_hf.model.routing_msa import reduce_queries
from msa_hf.ops import BackendError, dispatch, quantize_keys, route_documents

PLACES = places("route_documents")
QUANTIZED = ("int8", "fp8")
WIDTHS = (8, 16, 24, 40, 64, 96, 128, 136, 256, 264, 512, 1024)
# Multiplications that a case may cost; an interpreter takes its time.
PRODUCTS = 1 << (21 if dispatch.BACKENDS["triton"].also() else 27)


@dataclass
class Case:
    """One call, on the CPU, with the scores that it should have.

    Attributes:
        queries: [B, T, E]; NaN where a token does not route.
        mask: [B, T].
        keys: [C, E].
        scales: [C] or None.
        counts: chunks of each document.
        alive: [N] or None.
        k: how many.
    """

    queries: Tensor
    mask: Tensor
    keys: Tensor
    scales: Tensor | None
    counts: list[int]
    alive: Tensor | None
    k: int
    exact: Tensor = field(init=False)

    def __post_init__(self) -> None:
        keys = self.keys.double() if self.scales is None else self.keys.double() * self.scales.double()[:, None]
        self.exact = self.scores(self.queries.double(), keys)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, N] in the dtype of these; -inf where a document cannot be chosen."""
        result = torch.full((len(queries), len(self.counts)), NEVER, dtype=queries.dtype)
        for sample, (states, real) in enumerate(zip(queries, self.mask, strict=True)):
            if real.any():
                best = (states[real] @ keys.T).amax(0)
                result[sample] = torch.stack([part.amax() for part in best.split(self.counts)])
        if self.alive is not None:
            result[:, ~self.alive] = NEVER
        return result

    def tolerance(self, device: str) -> float:
        """A few times the error of PyTorch's float32 product of the same numbers. On a GPU float32 queries may be
        rounded to the keys' 16 bits, and quantized keys may meet queries quantized alike; tensor cores add the products
        of 16 columns to a float32 sum and cut off what does not fit, one unit in the last place at most each time."""
        keys = self.keys.float() if self.scales is None else self.keys.float() * self.scales[:, None]
        queries = self.queries.float()
        possible = self.exact > NEVER
        errors = [error_of(self.scores(queries, keys)[possible], self.exact[possible])]
        if device == "cuda" and self.scales is not None:
            numbers, scales = quantize_keys(queries.nan_to_num().flatten(0, 1), self.keys.dtype)
            rounded = (numbers.float() * scales[:, None]).view_as(queries)
            errors.append(error_of(self.scores(rounded, keys)[possible], self.exact[possible]))
        elif device == "cuda":
            rounded = queries.to(self.keys.dtype).float()
            errors.append(error_of(self.scores(rounded, keys)[possible], self.exact[possible]))
        largest = float(self.exact[possible].abs().max()) if possible.any() else 0.0
        ulps = 4.0
        if device == "cuda" and keys.dtype != self.keys.dtype:
            ulps += keys.shape[1] / 16
        return 4 * max(errors) + ulps * torch.finfo(torch.float32).eps * largest + 1e-30

    def run(self, place: tuple[str, str], strided: bool = False, **changes: Any) -> tuple[Tensor, Tensor]:
        """The operation's answer, from buffers full of NaN."""
        backend, device = place

        def there(tensor: Tensor | None, apart: bool = False) -> Tensor | None:
            return None if tensor is None else surrounded(tensor, device, strided=apart)

        arguments = {
            "queries": there(self.queries),
            "routing_mask": there(self.mask),
            "keys": there(self.keys, strided),
            "offsets": offsets_of(self.counts).to(device),
            "k": self.k,
            "scales": there(self.scales),
            "alive": there(self.alive),
            **changes,
        }
        with poisoned_memory():
            documents, scores = route_documents(**arguments, backend=backend)
        return documents.cpu(), scores.cpu()

    def check(self, documents: Tensor, scores: Tensor, tolerance: float) -> None:
        """Everything that the answer promises."""
        batch, count = self.exact.shape
        assert documents.shape == scores.shape == (batch, self.k)
        assert documents.dtype == torch.int64 and scores.dtype == torch.float32
        for row, best, exact in zip(documents.tolist(), scores.tolist(), self.exact, strict=True):
            possible = int((exact > NEVER).sum())
            chosen = [document for document in row if document >= 0]
            assert len(chosen) == min(self.k, possible)
            assert row[len(chosen) :] == [-1] * (self.k - len(chosen))
            assert best[len(chosen) :] == [NEVER] * (self.k - len(chosen))
            assert len(set(chosen)) == len(chosen) and all(0 <= document < count for document in chosen)
            if not chosen:
                continue
            theirs = exact[chosen]
            assert error_of(torch.tensor(best[: len(chosen)]), theirs) <= tolerance
            pairs = list(zip([-score for score in best[: len(chosen)]], chosen, strict=True))
            assert pairs == sorted(pairs), "best first, equal scores by index"
            # No document that was left out is better by more than two scores can be wrong.
            others = torch.ones(count, dtype=torch.bool)
            others[chosen] = False
            assert float(exact[others].max() if others.any() else NEVER) <= float(theirs.min()) + 2 * tolerance


def random_case(
    seed: int,
    dtype: torch.dtype = torch.float32,
    quantized: str | None = None,
    integers: bool = False,
    width: int | None = None,
) -> Case:
    """Sizes around edges; samples without a routing token; tombstones; more wanted than there are."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width = pick.choice(WIDTHS) if width is None else width
    batch = pick.choice([1, 1, 2, 3, 16, 17])
    length = around([1, 8, 16, 32, 64, 128, 256, 1024, 1099], pick)
    chunks = around([1, 2, 16, 64, 128, 256, 512, 2048], pick)
    while batch * length * chunks * width > PRODUCTS:
        batch, length, chunks = max(batch // 2, 1), max(length * 3 // 4, 1), max(chunks * 3 // 4, 1)
    counts = split_up(chunks, pick)
    if integers:
        queries = torch.randint(-2, 3, (batch, length, width), generator=generator).float()
        keys = torch.randint(-2, 3, (chunks, width), generator=generator).float()
    else:
        queries = torch.randn(batch, length, width, generator=generator) / width**0.5
        keys = torch.nn.functional.normalize(torch.randn(chunks, width, generator=generator), dim=1)
    scales = None
    keys = keys.to(dtype)
    if quantized is not None:
        keys, scales = quantize_keys(keys, quantized)
    mask = torch.rand(batch, length, generator=generator) < pick.choice([0.05, 0.6, 1.0])
    if batch > 1:
        mask[pick.randrange(batch)] = False
    alive = None
    if pick.random() < 0.5:
        alive = torch.rand(len(counts), generator=generator) < pick.choice([0.0, 0.1, 0.8])
    queries = queries.masked_fill(~mask[..., None], float("nan")).to(dtype)
    k = pick.choice([1, 2, 16, 16, 17, 64, len(counts), len(counts) + 3])
    return Case(queries, mask, keys, scales, counts, alive, min(k, 1024))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("seed", range(16))
def test_random_sizes(place, dtype, seed) -> None:
    """Choices and scores are those of the definition; what stands around tensors or at silent tokens is not read."""
    case = random_case(seed, dtype)
    case.check(*case.run(place), case.tolerance(place[1]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("seed", range(8))
def test_random_sizes_of_quantized_keys(place, quantized, seed) -> None:
    """Scores are those of scale times number."""
    case = random_case(100 + seed, pick_dtype(seed), quantized)
    case.check(*case.run(place), case.tolerance(place[1]))


def pick_dtype(seed: int) -> torch.dtype:
    return (torch.float32, torch.bfloat16)[seed % 2]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_float32_queries_meet_sixteen_bit_keys(place, dtype, seed) -> None:
    """As the model has them: queries reduced in float32, keys stored in 16 bit."""
    case = random_case(200 + seed, dtype)
    exact = random_case(200 + seed)
    case = Case(exact.queries, case.mask, case.keys, None, case.counts, case.alive, case.k)
    case.check(*case.run(place), case.tolerance(place[1]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_ties_go_to_the_lower_index(place, dtype, seed) -> None:
    """Products of small integers are exact in every format, and most scores are shared by many documents."""
    case = random_case(300 + seed, dtype, integers=True)
    documents, scores = case.run(place)
    for row, best, exact in zip(documents.tolist(), scores.tolist(), case.exact.tolist(), strict=True):
        order = sorted((-score, index) for index, score in enumerate(exact) if score > NEVER)[: case.k]
        absent = case.k - len(order)
        assert row == [index for _, index in order] + [-1] * absent
        assert best == [-score for score, _ in order] + [NEVER] * absent


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("width", [1, 3, 6, 9, 12, 20, 31, 33, 100, 1000])
def test_odd_widths_and_rows_apart(place, width, strided) -> None:
    """Any width is right, or refused with the reason; keys may be columns of a larger matrix."""
    case = random_case(400 + width, torch.bfloat16, width=width)
    features = {"queries": case.queries.dtype, "keys": case.keys.dtype, "k": dispatch.size_class(case.k)}
    features |= {"multiple": dispatch.alignment(width), "width": dispatch.size_class(width)}
    reason = dispatch.BACKENDS[place[0]].refuses("route_documents", place[1], features)
    if reason is None:
        case.check(*case.run(place, strided), case.tolerance(place[1]))
    else:
        assert width % 8, "widths of 8 numbers are everybody's"
        with pytest.raises(BackendError, match=r"cannot run on the backend"):
            case.run(place, strided)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("documents", "chunks"), [(1, 1), (1, 700), (700, 700), (3, 700)])
def test_more_wanted_than_there_are(place, documents, chunks) -> None:
    """All documents come, best first, then -1; also where one document holds every chunk, or each holds one."""
    case = random_case(500)
    generator = torch.Generator().manual_seed(documents)
    keys = torch.nn.functional.normalize(torch.randn(chunks, 64, generator=generator), dim=1)
    queries = torch.randn(2, 5, 64, generator=generator)
    counts = [chunks - documents + 1] + [1] * (documents - 1)
    case = Case(queries, torch.ones(2, 5, dtype=torch.bool), keys, None, counts, None, min(documents + 2, 1024))
    case.check(*case.run(place), case.tolerance(place[1]))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_to_choose(place) -> None:
    """No documents, no samples, no tokens, only silent samples, only dead documents: -1 everywhere, no failure."""
    backend, device = place
    keys, queries = torch.randn(4, 8, device=device), torch.randn(2, 3, 8, device=device)
    mask, offsets = torch.ones(2, 3, dtype=torch.bool, device=device), offsets_of([1, 3]).to(device)
    dead = torch.zeros(2, dtype=torch.bool, device=device)
    calls: list[tuple[Any, ...]] = [
        (queries, mask, keys[:0], offsets[:1], None),
        (queries[:, :0], mask[:, :0], keys, offsets, None),
        (queries, ~mask, keys, offsets, None),
        (queries, mask, keys, offsets, dead),
    ]
    for states, real, rows, ends, alive in calls:
        documents, scores = route_documents(states, real, rows, ends, 3, alive=alive, backend=backend)
        assert documents.tolist() == [[-1] * 3] * 2 and scores.tolist() == [[NEVER] * 3] * 2
    documents, scores = route_documents(queries[:0], mask[:0], keys, offsets, 3, backend=backend)
    assert documents.shape == scores.shape == (0, 3)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_keys_of_no_documents(place, kind) -> None:
    """Memory of no bytes may have no address: that the keys have scales is known all the same."""
    backend, device = place
    numbers, scales = quantize_keys(torch.empty(0, 16, device=device), kind)
    queries, mask = torch.randn(2, 3, 16, device=device), torch.ones(2, 3, dtype=torch.bool, device=device)
    offsets, exact = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0, 16, device=device)
    for options in ({}, {"exact_keys": exact}):
        documents, scores = route_documents(
            queries, mask, numbers, offsets, 3, scales=scales, backend=backend, **options
        )
        assert documents.tolist() == [[-1] * 3] * 2 and scores.tolist() == [[NEVER] * 3] * 2


@pytest.mark.parametrize("place", PLACES)
def test_the_same_inputs_give_the_same_bits(place) -> None:
    """Twice the same call; and a sample alone as in its batch, up to rounding."""
    case = random_case(600)
    first, second = case.run(place), case.run(place)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    pick = random.Random(1)
    batch = Case(
        torch.randn(5, 33, 64), torch.rand(5, 33) < 0.5, torch.randn(300, 64), None, split_up(300, pick), None, 8
    )
    documents, scores = batch.run(place)
    for sample in range(5):
        part = slice(sample, sample + 1)
        alone = Case(batch.queries[part], batch.mask[part], batch.keys, None, batch.counts, None, 8)
        theirs = alone.run(place)
        alone.check(*theirs, alone.tolerance(place[1]))
        alone.check(documents[part], scores[part], alone.tolerance(place[1]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_router_queries_with_heads(place, similarity) -> None:
    """[B, T, H, D] queries score as the mean over heads of each head's similarity with its group's key."""
    backend, device = place
    generator = torch.Generator().manual_seed(7)
    heads, groups, dim = 6, 3, 8
    queries = torch.randn(2, 5, heads, dim, generator=generator)
    keys = torch.nn.functional.normalize(torch.randn(40, groups, dim, generator=generator), dim=-1)
    mask = torch.rand(2, 5, generator=generator) < 0.7
    mask[:, 0] = True
    offsets = offsets_of([1, 4, 9, 16, 10])
    documents, scores = route_documents(
        queries.to(device),
        mask.to(device),
        keys.flatten(1).to(device),
        offsets.to(device),
        5,
        similarity=similarity,
        backend=backend,
    )
    unit = queries.double()
    unit = unit / unit.norm(dim=-1, keepdim=True) if similarity == "cosine" else unit * dim**-0.5
    shared = keys.double().repeat_interleave(heads // groups, 1)
    products = torch.einsum("bthd,chd->btch", unit, shared).mean(-1).masked_fill(~mask[..., None], NEVER).amax(1)
    exact = torch.stack([part.amax(1) for part in products.split(offsets.diff().tolist(), 1)], 1)
    order = exact.argsort(dim=1, descending=True)
    assert documents.cpu().tolist() == order.tolist()
    torch.testing.assert_close(scores.cpu().double(), exact.gather(1, order), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("seed", range(4))
def test_exact_scores_after_quantized_candidates(place, kind, seed) -> None:
    """With every document a candidate, quantized keys with exact ones behind them answer as the exact ones alone."""
    exact = random_case(700 + seed, torch.bfloat16)
    numbers, scales = quantize_keys(exact.keys, kind)
    documents, scores = exact.run(
        place,
        keys=numbers.to(place[1]),
        scales=scales.to(place[1]),
        exact_keys=exact.keys,  # stays in host memory
        candidates=max(exact.k, len(exact.counts)),
    )
    exact.check(documents, scores, exact.tolerance(place[1]))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_exact_scores_are_of_queries_that_were_not_rounded(kind, monkeypatch) -> None:
    """Quantized keys meet 16-bit queries on a GPU; exact ones meet the queries as they are."""
    monkeypatch.setattr(sys.modules["msa_hf.ops.route_documents"], "NARROWING", ("cpu",))
    generator = torch.Generator().manual_seed(9)
    queries, keys = torch.randn(2, 5, 4, 16, generator=generator), torch.randn(60, 32, generator=generator)
    mask, offsets = torch.ones(2, 5, dtype=torch.bool), offsets_of([1] * 60)
    numbers, scales = quantize_keys(keys, kind)
    exact = route_documents(queries, mask, keys, offsets, 60)
    found = route_documents(queries, mask, numbers, offsets, 60, scales=scales, exact_keys=keys, candidates=60)
    assert torch.equal(found[0], exact[0])
    torch.testing.assert_close(found[1], exact[1], atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("place", PLACES)
def test_the_scores_of_candidates_are_exact(place) -> None:
    """Four candidates a document by default: the best document is found, with its exact score."""
    case = random_case(800, torch.float32, width=128)
    numbers, scales = quantize_keys(case.keys, "int8")
    device = place[1]
    documents, scores = case.run(
        place, keys=numbers.to(device), scales=scales.to(device), exact_keys=case.keys.to(device)
    )
    for row, best, exact in zip(documents.tolist(), scores.tolist(), case.exact, strict=True):
        for document, score in zip(row, best, strict=True):
            if document >= 0:
                assert abs(float(exact[document]) - score) <= case.tolerance(device)
        assert not (exact > NEVER).any() or row[0] == int(exact.argmax())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("quantized", [None, "int8"])
def test_opcheck(place, quantized) -> None:
    """Schema, fake and autograd registration are what torch.library asks for."""
    case = random_case(900, quantized=quantized, width=32)
    backend, device = place
    name = dispatch.BACKENDS[backend].namespace
    scales = None if case.scales is None else case.scales.to(device)
    arguments = (
        case.queries.nan_to_num().to(device),
        case.mask.to(device),
        case.keys.to(device),
        scales,
        offsets_of(case.counts).to(device),
        None if case.alive is None else case.alive.to(device),
        case.k,
    )
    torch.library.opcheck(dispatch.operator("route_documents", name).default, arguments)


@pytest.mark.parametrize("place", PLACES)
def test_compiled_without_a_break(place) -> None:
    """torch.compile(fullgraph=True), with sizes that change, gives the eager answer."""
    backend, device = place

    def choose(queries: Tensor, mask: Tensor, keys: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        documents, scores = route_documents(queries, mask, keys, offsets, 3, backend=backend)
        return documents + 1, scores * 2

    torch.compiler.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    for seed, batch, length in ((0, 2, 7), (1, 3, 9), (2, 5, 30)):
        generator = torch.Generator().manual_seed(seed)
        queries, keys = torch.randn(batch, length, 4, 8, generator=generator), torch.randn(20 + seed, 16)
        mask = torch.rand(batch, length, generator=generator) < 0.8
        arguments = [queries, mask, keys, offsets_of([5, 10, 5 + seed])]
        arguments = [item.to(device) for item in arguments]
        for ours, theirs in zip(compiled(*arguments), choose(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
def test_it_says_that_it_has_no_derivative(place) -> None:
    """A backward through the scores raises, and says what is the matter."""
    backend, device = place
    queries = torch.randn(1, 2, 8, device=device, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool, device=device)
    _, scores = route_documents(
        queries, mask, torch.randn(3, 8, device=device), offsets_of([1, 2]).to(device), 2, backend=backend
    )
    with pytest.raises(RuntimeError, match=r"route_documents is inference only"):
        scores.sum().backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": torch.zeros(3, 9)}, r"`keys` must be \[C, 8\]"),
        ({"routing_mask": torch.ones(1, 3, dtype=torch.bool)}, r"`routing_mask` must be \[1, 2\] bool"),
        ({"routing_mask": torch.ones(1, 2)}, r"`routing_mask` must be \[1, 2\] bool"),
        ({"keys": torch.zeros(3, 8, dtype=torch.int8)}, "`scales` belong to float8_e4m3fn and int8"),
        ({"scales": torch.ones(3)}, "`scales` belong to float8_e4m3fn and int8"),
        ({"alive": torch.ones(3, dtype=torch.bool)}, r"`alive` must be \[2\] bool"),
        ({"offsets": torch.tensor([0, 1, 3], dtype=torch.int32)}, "`offsets` must be"),
        ({"k": 0}, "`k` must be at least 1"),
        ({"candidates": 4}, "there are none"),
        ({"exact_keys": torch.zeros(4, 8)}, r"`exact_keys` must be \[3, 8\]"),
        ({"exact_keys": torch.zeros(3, 8), "candidates": 1}, "at least k = 2"),
        ({"backend": "fortran"}, "must be one of 'cuda', 'triton', 'cpp', 'pytorch'"),
    ],
    ids=str,
)
def test_contradictions_are_refused(change, said) -> None:
    arguments = {
        "queries": torch.zeros(1, 2, 8),
        "routing_mask": torch.ones(1, 2, dtype=torch.bool),
        "keys": torch.zeros(3, 8),
        "offsets": offsets_of([1, 2]),
        "k": 2,
    }
    with pytest.raises(ValueError, match=said):
        route_documents(**{**arguments, **change})


@pytest.mark.parametrize("place", places("route_documents", "cuda"))
def test_on_a_side_stream(place) -> None:
    """On a stream of its own, behind work that is still running there, the answer is the same."""
    backend, device = place
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 40, 128, generator=generator), torch.randn(5000, 128, generator=generator)
    mask, offsets = torch.ones(2, 40, dtype=torch.bool, device=device), offsets_of([5] * 1000).to(device)
    expected = route_documents(queries.to(device), mask, keys.to(device), offsets, 16, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late_queries, late_keys = torch.zeros_like(queries, device=device), torch.zeros_like(keys, device=device)
        torch.cuda._sleep(20_000_000)  # whoever does not wait for this stream sees zeros
        late_queries.copy_(queries.to(device))
        late_keys.copy_(keys.to(device))
        found = route_documents(late_queries, mask, late_keys, offsets, 16, backend=backend)
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", places("route_documents", "cuda"))
def test_on_a_device_that_is_not_the_current_one(place) -> None:
    """Tensors on the last GPU while the first is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    other = f"cuda:{torch.cuda.device_count() - 1}"
    case = random_case(3, torch.bfloat16)
    documents, scores = case.run((place[0], other))
    case.check(documents, scores, case.tolerance("cuda"))
    assert torch.cuda.current_device() == 0


def test_reduced_queries_are_what_the_operation_takes() -> None:
    """[B, T, H, D] and the same queries reduced by hand give the same answer, to the bit."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(2, 4, 4, 8, generator=generator), torch.randn(9, 16, generator=generator)
    mask, offsets = torch.ones(2, 4, dtype=torch.bool), offsets_of([2, 3, 4])
    reduced = reduce_queries(queries, 2, "cosine").flatten(2)
    for ours, theirs in zip(
        route_documents(queries, mask, keys, offsets, 2), route_documents(reduced, mask, keys, offsets, 2), strict=True
    ):
        assert torch.equal(ours, theirs)
