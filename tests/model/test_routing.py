"""Routing against its definition, computed naively in float64."""

import itertools
import random
from typing import Any

import pytest
import torch
from reference import NEVER, naive_choice, naive_scores
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msa_hf.model import routing_msa
from msa_hf.model.routing_msa import (
    NO_SCORE,
    SCORINGS,
    Scoring,
    normalize_heads,
    reduce_chunks,
    scale_heads,
    score_documents,
    select_documents,
)

FORMS = list(itertools.product(("cosine", "dot"), ("mean", "max"), ("max", "mean", "last"), ("max", "mean")))
TILES = {"one tile": (1 << 22, 8192), "one number at a time": (1, 1), "odd tiles": (17, 3), "many chunks": (5, 100)}


def case(seed: int) -> dict[str, Tensor]:
    """Random router queries, masks, keys and documents, with sizes around edges; one sample does not route."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    groups, share = pick.choice([1, 2, 3]), pick.choice([1, 2, 4])
    batch, length, dim = [1, 3, 5][seed % 3], [7, 2, 1][seed // 2 % 3], [4, 8, 1, 6][seed % 4]
    chunks = torch.tensor([pick.choice([1, 1, 2, 5]) for _ in range([9, 7, 2, 1][seed % 4])])
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[0, pick.randrange(length)] = True
    if batch > 1:
        mask[1] = False
    return {
        "queries": torch.randn(batch, length, groups * share, dim, generator=generator),
        "routing_mask": mask,
        "keys": torch.randn(int(chunks.sum()), groups, dim, generator=generator),
        "offsets": torch.nn.functional.pad(chunks.cumsum(0), (1, 0)),
    }


def naive(case: dict[str, Tensor], *form: str) -> Tensor:
    """[B, N] float64."""
    documents = case["keys"].tensor_split(case["offsets"][1:-1])
    samples = zip(case["queries"], case["routing_mask"], strict=True)
    scores = [naive_scores(queries[mask], documents, *form) for queries, mask in samples]
    return torch.tensor(scores, dtype=torch.float64)


def ours(case: dict[str, Tensor], similarity: str, head: str, query: str, chunk: str, **changes: Tensor) -> Tensor:
    case = {**case, **changes}
    keys = normalize_heads(case["keys"]) if similarity == "cosine" else case["keys"]
    return score_documents(
        case["queries"],
        case["routing_mask"],
        keys.flatten(1),
        case["offsets"],
        Scoring(similarity, head, query, chunk),
    )


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_scores_of_every_form_in_tiles_of_any_size(form, tiles, monkeypatch) -> None:
    """All similarities and reductions, in tiles of any size, equal the definition; who does not route has no score."""
    monkeypatch.setattr(routing_msa, "TILE_ELEMENTS", tiles[0])
    monkeypatch.setattr(routing_msa, "TILE_CHUNKS", tiles[1])
    for seed in range(6):
        inputs = case(seed)
        expected = naive(inputs, *form)
        found = ours(inputs, *form)
        assert found.dtype == torch.float32
        silent = expected == NEVER
        assert torch.equal(found <= NO_SCORE, silent)
        torch.testing.assert_close(found[~silent].double(), expected[~silent], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_tokens_that_do_not_route_have_no_effect(form) -> None:
    """Whatever stands at the other tokens, NaN too, leaves the scores as they are, to the bit."""
    inputs = case(4)
    junk = inputs["queries"].masked_fill(~inputs["routing_mask"][..., None, None], float("nan"))
    assert torch.equal(ours(inputs, *form), ours(inputs, *form, queries=junk))


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_negative_scores_beside_longer_questions(form) -> None:
    """Where every score is negative, the tokens that a shorter question lacks do not raise it to zero."""
    inputs = case(1)
    inputs["queries"] = inputs["queries"].abs()
    inputs["keys"] = -inputs["keys"].abs()
    inputs["routing_mask"] = torch.ones(inputs["routing_mask"].shape, dtype=torch.bool).tril()
    expected = naive(inputs, *form)
    assert inputs["routing_mask"].sum(1).unique().numel() > 1 and (expected < 0).all()
    torch.testing.assert_close(ours(inputs, *form).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_states_are_scored_in_float32(dtype) -> None:
    """Scores of 16-bit queries and keys equal those of the same numbers in float64: nothing is rounded on the way."""
    for seed, similarity in itertools.product(range(4), ("cosine", "dot")):
        inputs = case(seed)
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        keys = (normalize_heads(inputs["keys"]) if similarity == "cosine" else inputs["keys"]).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = score_documents(
                inputs["queries"], inputs["routing_mask"], keys.flatten(1), inputs["offsets"], Scoring(similarity)
            )
        assert found.dtype == torch.float32
        query = inputs["queries"].double()
        if similarity == "cosine":
            query = query / query.norm(dim=-1, keepdim=True)
        scale = 1.0 if similarity == "cosine" else query.shape[-1] ** -0.5
        share = query.shape[2] // keys.shape[1]
        products = torch.einsum("bthd,chd->btch", query, keys.double().repeat_interleave(share, 1)).mean(-1) * scale
        best = products.masked_fill(~inputs["routing_mask"][..., None], NEVER).amax(1)
        expected = torch.stack([part.amax(1) for part in best.tensor_split(inputs["offsets"][1:-1], 1)], 1)
        routes = inputs["routing_mask"].any(1)
        torch.testing.assert_close(found[routes].double(), expected[routes], atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for item in output if isinstance(output, tuple | list) else [output]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return output


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_memory_is_bounded_by_the_tile(form, monkeypatch) -> None:
    """A long prompt over many chunks: no tensor is larger than a tile, or than the inputs and the chunks' scores."""
    monkeypatch.setattr(routing_msa, "TILE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(routing_msa, "TILE_CHUNKS", 64)
    batch, length, chunks = 2, 300, 600
    queries, keys = torch.randn(batch, length, 2, 2), normalize_heads(torch.randn(chunks, 1, 2)).flatten(1)
    offsets = torch.arange(0, chunks + 1, 3)
    mask = torch.ones(batch, length, dtype=torch.bool)
    with LargestTensor() as largest:
        score_documents(queries, mask, keys, offsets, Scoring(*form))
    assert largest.elements <= max(1 << 12, queries.numel(), batch * chunks)


def test_gradients_of_scores() -> None:
    """The gradients of scores are those of the definition written with autograd."""
    inputs = case(2)
    inputs = {**inputs, "routing_mask": torch.ones_like(inputs["routing_mask"])}
    queries = inputs["queries"].requires_grad_()
    keys = inputs["keys"].requires_grad_()
    weights = torch.randn(len(queries), len(inputs["offsets"]) - 1)
    (ours(inputs, "cosine", "mean", "max", "max") * weights).sum().backward()
    found = [queries.grad, keys.grad]
    queries.grad = keys.grad = None
    unit_queries, unit_keys = (item / item.norm(dim=-1, keepdim=True) for item in (queries, keys))
    share = queries.shape[2] // keys.shape[1]
    products = torch.einsum("bthd,chd->btch", unit_queries, unit_keys.repeat_interleave(share, 1)).mean(-1).amax(1)
    scores = torch.stack([part.amax(1) for part in products.tensor_split(inputs["offsets"][1:-1], 1)], 1)
    (scores * weights).sum().backward()
    for ours_, theirs in zip(found, [queries.grad, keys.grad], strict=True):
        torch.testing.assert_close(ours_, theirs, atol=1e-5, rtol=1e-5)


def test_zero_vectors_have_the_score_zero_and_finite_gradients() -> None:
    """Cosine of a zero query or key is 0 with a finite gradient, not NaN."""
    queries = torch.zeros(1, 2, 2, 4, requires_grad=True)
    keys = torch.zeros(3, 2, 4, requires_grad=True)
    scores = score_documents(
        queries, torch.ones(1, 2, dtype=torch.bool), normalize_heads(keys).flatten(1), torch.tensor([0, 1, 3])
    )
    scores.sum().backward()
    assert scores.tolist() == [[0.0, 0.0]]
    assert queries.grad is not None and keys.grad is not None
    assert queries.grad.isfinite().all() and keys.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_reduce_chunks(reduction) -> None:
    """Documents of one or many chunks, alone or together, are reduced to their maximum or mean."""
    for counts in ([1], [5], [1, 1, 1], [1, 4, 1], [2, 2], [7, 1, 3]):
        scores = torch.randn(3, sum(counts))
        parts = scores.double().split(counts, 1)
        expected = torch.stack([part.mean(1) if reduction == "mean" else part.amax(1) for part in parts], 1)
        offsets = torch.tensor([0, *itertools.accumulate(counts)])
        torch.testing.assert_close(reduce_chunks(scores, offsets, reduction).double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_selection_is_a_stable_sort(seed) -> None:
    """Documents come best first; equal scores by index; negative, zero and tiny scores order as numbers do."""
    pick = random.Random(seed)
    values = [0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38, 1e-45, -1e-45, 3e38, -3e29, 0.5, 0.5000001, -0.5, -0.5000001]
    count = pick.choice([1, 2, 5, 40])
    scores = [[pick.choice([*values, NO_SCORE, NO_SCORE]) for _ in range(count)] for _ in range(4)]
    for k in (1, 2, 16, count, count + 3):
        documents, chosen = select_documents(torch.tensor(scores), k)
        assert documents.shape == chosen.shape == (4, k) and documents.dtype == torch.int64
        for row, found, best in zip(torch.tensor(scores).tolist(), documents.tolist(), chosen.tolist(), strict=True):
            known = [NEVER if score <= torch.tensor(NO_SCORE).item() else score for score in row]
            assert found == naive_choice(known, k)
            assert best == [NEVER if document < 0 else row[document] for document in found]


def test_ties_go_to_the_lower_index_at_any_size() -> None:
    """A thousand equal scores: the first ones are chosen, in order; -0.0 equals 0.0."""
    scores = torch.zeros(2, 1000)
    scores[0, ::2] = -0.0
    scores[1, 500:] = 1.0
    documents, _ = select_documents(scores, 16)
    assert documents.tolist() == [list(range(16)), list(range(500, 516))]


def test_no_score_is_never_chosen() -> None:
    """-1 and -inf stand where documents have no score, also where all have none."""
    scores = torch.tensor([[NO_SCORE, -2.0, NO_SCORE], [NO_SCORE] * 3, [NEVER, NO_SCORE, -1e29]])
    documents, chosen = select_documents(scores, 2)
    assert documents.tolist() == [[1, -1], [-1, -1], [2, -1]]
    assert chosen.tolist() == [[-2.0, NEVER], [NEVER, NEVER], [scores[2, 2].item(), NEVER]]


def test_selection_leaves_the_graph_alone() -> None:
    """Selection is hard: it gives no gradient."""
    documents, chosen = select_documents(torch.randn(2, 5, requires_grad=True), 3)
    assert not chosen.requires_grad


@pytest.mark.parametrize("field", SCORINGS)
def test_a_misspelt_name_is_refused_with_those_that_there_are(field: str) -> None:
    """Nothing falls back to another similarity or reduction."""
    for name in SCORINGS[field]:
        assert getattr(Scoring(**{field: name}), field) == name
    with pytest.raises(ValueError, match=f"`{field}` must be one of .*{next(iter(SCORINGS[field]))}.*got 'cosin'"):
        Scoring(**{field: "cosin"})
    with pytest.raises(ValueError, match="`similarity` must be one of"):
        scale_heads(torch.ones(1, 2), "cosin")
