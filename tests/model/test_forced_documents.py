"""Forced documents are scored alone: the same numbers as from scores of all documents, from the keys of those only."""

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from setups import Setup, assert_same, batch_of, setup, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from msa_hf.bank import place_bank, shard_bank
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.bank.tiered.plan import PlacementOptions, Reserves
from msa_hf.bank.tiered.rows import Rows
from msa_hf.model import routing_msa
from msa_hf.model.document_rows_msa import ChunkLayout, DocumentRows, score_chosen, scores_at
from msa_hf.model.routing_msa import NO_SCORE, Scoring, normalize_heads, score_documents

QUESTIONS = tokens(6, 3, 9, seed=5)
REDUCTIONS = list(product(("mean", "max"), ("max", "mean", "last"), ("max", "mean")))
NAMES = ("head_reduction", "query_reduction", "chunk_reduction")


class KeysRead(TorchDispatchMode):
    """Counts the rows that operations read of some tensors [C, E]; views of them read nothing."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.width = tensors[0].shape[1]
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
        self.rows = 0

    def _ours(self, item: Any) -> bool:
        return isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() in self.storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        if not any(map(self._ours, results)):
            for item in filter(self._ours, [*args, *(kwargs or {}).values()]):
                chosen = str(function).startswith(("aten.index_select", "aten.index."))
                self.rows += (results[0] if chosen else item).numel() // self.width
        return result


Place = Callable[[Setup], Any]


def whole(made: Setup) -> Any:
    return made.bank


def of_segments(made: Setup) -> Any:
    """Of several commits, with deleted documents; as many are left."""
    bank = made.model.open_memory()
    for place, document in enumerate([*made.documents, *tokens(5, 4, seed=9)]):
        bank.add([{"key": str(place), "input_ids": document}])
    for key in ("1", "4"):
        bank.delete(key)
    return bank.snapshot()


def placed(keys: str, on: str) -> Place:
    def place(made: Setup) -> Any:
        choice = PlacementOptions(keys=keys, keys_on=on)
        return place_bank(
            made.bank, placement=choice, tiers=Tiers(*[10**12] * 3), reserves=Reserves(0, 0, 0, 0, 0), model=made.model
        )

    return place


def shared(inputs: str) -> Place:
    """By one process, which goes the way of several; test_parallel.py has those."""
    return lambda made: shard_bank(made.bank, inputs=inputs)


PLACES: dict[str, Place] = {
    "whole": whole,
    "segments": of_segments,
    **{f"{keys}-{on}": placed(keys, on) for keys in ("fp32", "fp8", "int8") for on in ("device", "host")},
    **{f"shared-{inputs}": shared(inputs) for inputs in ("same", "different")},
}
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
FIELDS = [{}, *(dict(zip(NAMES, names, strict=True)) for names in REDUCTIONS[1::3]), {"similarity": "dot"}]


def tensors_of(bank: Any) -> list[torch.Tensor]:
    """All routing keys of a bank, wherever they lie."""
    found: list[torch.Tensor] = []
    for memory in bank.layers.values():
        keys = memory.routing_keys
        if isinstance(keys, torch.Tensor):
            found.append(keys)
        else:
            found += [part for rows in (keys.rows, keys.exact) if rows is not None for part in rows.parts]
    return found


@torch.no_grad()
def ask(made: Setup, memory: Any, **arguments: Any) -> Any:
    return made.model(**batch_of(QUESTIONS), memory=memory, **arguments)


def many(seed: int = 2, **fields: Any) -> Setup:
    pick = random.Random(seed)
    return setup(documents=tokens(*(pick.randint(1, 20) for _ in range(40)), seed=seed), top_k=3, **fields)


@each_place
@pytest.mark.parametrize(
    "generates, fields",
    [(False, {}), (True, dict(zip(NAMES, REDUCTIONS[-1], strict=True)))],
    ids=["forward-max", "generate-other"],
)
def test_keys_of_other_documents_are_not_read(
    place: Place, generates: bool, fields: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer reads the exact keys of the forced documents, each once for all samples, and no others."""
    moved: list[int] = []

    def between(rows: Rows, first: int, end: int) -> Any:
        moved.append(end - first)
        return whole_range(rows, first, end)

    whole_range = Rows.between
    monkeypatch.setattr(Rows, "between", between)
    made = many(score_bias=True, **fields)
    bank = place(made)
    forced = torch.tensor([[30, -1, 2], [-1, -1, -1], [2, 7, 39]])
    rows = bank.documents.rows_of(torch.tensor([2, 7, 30, 39]))
    wanted = len(bank.layers) * int(bank.offsets.diff()[rows].sum())
    assert wanted < 0.2 * len(bank.layers) * int(bank.offsets[-1])
    with KeysRead(*tensors_of(bank)) as read:
        if generates:
            made.model.generate(
                **batch_of(QUESTIONS), memory=bank, force_documents=forced, max_new_tokens=3, do_sample=False
            )
        else:
            ask(made, bank, force_documents=forced)
    assert read.rows == wanted
    assert not moved, "to a device, of a bank in tiers"
    with KeysRead(*tensors_of(bank)) as read:  # it counts what is read
        ask(made, bank, force_documents=forced, output_document_scores=True)
    assert read.rows >= len(bank.layers) * int(bank.offsets[-1])


@pytest.mark.parametrize(
    "place, fields",
    [
        pytest.param(place, fields, id=f"{name}-{fields}")
        for number, (name, place) in enumerate(PLACES.items())
        for way, fields in enumerate(FIELDS)
        # Every way to score in one place of each kind, and two of them in the others.
        if name in ("whole", "fp8-host", "shared-different") or way in (0, 1 + number % (len(FIELDS) - 1))
    ],
)
def test_documents_scores_and_logits_are_those_of_full_scoring(place: Place, fields: dict[str, str]) -> None:
    """Random documents for each sample, none and all of them too, attended to with the bias of their scores."""
    made = many(score_bias=True, **fields)
    bank, pick = place(made), random.Random(str(fields))
    for width in (0, 1, 5, len(bank)):
        forced = torch.tensor([pick.sample(range(len(bank)), width) for _ in QUESTIONS], dtype=torch.long)
        forced = forced.masked_fill(torch.rand(forced.shape, generator=torch.Generator().manual_seed(width)) < 0.2, -1)
        ours = ask(made, bank, force_documents=forced)
        theirs = ask(made, bank, force_documents=forced, output_document_scores=True)
        assert_same(ours.logits, theirs.logits)
        for layer, expected in theirs.routing.items():
            found = ours.routing[layer]
            assert torch.equal(found.documents, forced) and torch.equal(expected.documents, forced)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
            assert found.document_scores is None


def test_an_empty_bank() -> None:
    made = setup(score_bias=True)
    bank = made.model.open_memory().snapshot()
    for forced in (torch.full((3, 2), -1), torch.empty(3, 0, dtype=torch.long)):
        output = ask(made, bank, force_documents=forced)
        assert_same(output.logits, ask(made, made.bank, force_documents=forced).logits)
        assert all(bool((found.scores == float("-inf")).all()) for found in output.routing.values())


@pytest.mark.parametrize("names", REDUCTIONS, ids="-".join)
def test_random_sizes(names: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, and gradients of queries and keys, with tiles that end before, at and behind the last chunk."""
    pick = random.Random("-".join(names))
    for case in range(25):
        monkeypatch.setattr(routing_msa, "TILE_CHUNKS", pick.choice([1, 3, 4, 8192]))
        monkeypatch.setattr(routing_msa, "TILE_ELEMENTS", pick.choice([1, 16, 1 << 22]))
        torch.manual_seed(case)
        batch, width, groups, shared_by, dim = (pick.randint(1, 4) for _ in range(5))
        counts = torch.tensor([pick.choice([1, 1, 2, 3, 4, 5, 9]) for _ in range(pick.choice([1, 2, 4, 9]))])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        queries = torch.randn(batch, width, groups * shared_by, dim, requires_grad=True)
        keys = normalize_heads(torch.randn(int(offsets[-1]), groups, dim)).flatten(1).requires_grad_()
        mask = torch.rand(batch, width) < 0.7  # of some samples none
        wide = pick.choice([0, 1, len(counts)])
        forced = torch.tensor([pick.sample(range(len(counts)), wide) for _ in range(batch)], dtype=torch.long)
        forced = forced.masked_fill(torch.rand(forced.shape) < 0.3, -1).view(batch, wide)
        scoring = Scoring(pick.choice(["cosine", "dot"]), *names)

        theirs = scores_at(score_documents(queries, mask, keys, offsets, scoring), forced)
        ours = score_chosen(queries, mask, keys, DocumentRows(forced, offsets), scoring)
        assert ours.shape == (batch, wide)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        known = mask.any(1, keepdim=True) & (forced >= 0)
        assert bool((ours[~known] == NO_SCORE).all()) and bool((ours[known] > NO_SCORE).all())
        if not known.any():
            continue
        weights = torch.randn(ours.shape) * known
        expected = torch.autograd.grad((theirs * weights).sum(), (queries, keys))
        found = torch.autograd.grad((ours * weights).sum(), (queries, keys))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"head_reduction": "max", "chunk_reduction": "mean"}], ids=str)
def test_the_score_bias_learns_from_them(fields: dict[str, str]) -> None:
    """Gradients of the routers and of the bias through the scores of forced documents, as from those of all."""
    made = many(score_bias=True, **fields)
    forced = torch.tensor([[30, -1, 2], [5, 0, 1], [2, 7, 39]])
    gradients = []
    for all_scores in (False, True):
        made.model.zero_grad()
        output = made.model(
            **batch_of(QUESTIONS), memory=made.bank, force_documents=forced, output_document_scores=all_scores
        )
        output.logits.square().mean().backward()
        named = made.model.named_parameters()
        gradients.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and sum("router_q" in name or "score_bias" in name for name in ours) >= 4
    for name, expected in theirs.items():
        assert "router_k" in name or float(expected.abs().max()) > 0.0
        assert_same(ours[name], expected, 1e-4)


@pytest.mark.parametrize("forced", [[[0], [1], [2]], [[-1], [-1], [-1]]], ids=["some", "none"])
def test_scores_that_are_nan_are_refused(forced: list[list[int]]) -> None:
    made = setup()
    with torch.no_grad():
        next(weight for name, weight in made.model.named_parameters() if "router_q" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"router scores of layer .* are NaN"):
        ask(made, made.bank, force_documents=torch.tensor(forced))


@pytest.mark.parametrize("name", ["whole", "int8-device", "shared-same", "shared-different"])
def test_hidden_documents_have_no_score(name: str) -> None:
    """A pass that is told to hide documents: of one that is forced all the same no score is reported."""
    made = setup()
    bank = PLACES[name](made)
    visible = torch.ones(1, len(bank), dtype=torch.bool)
    visible[0, 2] = False
    bank._visible, bank._layout = visible, ChunkLayout(bank.offsets, visible)
    output, full = (
        ask(made, bank, force_documents=torch.tensor([[2, 0], [1, 2], [3, 4]]), output_document_scores=all_scores)
        for all_scores in (False, True)
    )
    for layer, found in output.routing.items():
        assert found.scores.isinf().tolist() == [[True, False], [False, True], [False, False]]
        torch.testing.assert_close(found.scores, full.routing[layer].scores, atol=1e-5, rtol=1e-5)
