"""A key format is an entry of one table: an invented one is planned, placed, routed and measured with no other edit."""

from collections.abc import Iterator

import pytest
import torch
from battery import offsets_of
from setups import batch_of, setup, tokens

from msa_hf.bank import place_bank
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.bank.tiered.plan import PlacementOptions, plan_placement
from msa_hf.bank.tiered.shapes import BankShape
from msa_hf.cli import main
from msa_hf.evaluation.quantized import quantized_recall
from msa_hf.ops import quantize_keys, route_documents
from msa_hf.ops.formats import FORMATS, Format, all_formats

AMPLE = Tiers(10**12, 10**12, 10**12)


@pytest.fixture(autouse=True)
def int6(monkeypatch: pytest.MonkeyPatch) -> Iterator[Format]:
    """Six bits in the bytes of int8."""
    format = Format("int6", torch.int8, frozenset({"route_documents"}), largest=31.0, candidates=2)
    monkeypatch.setitem(FORMATS, "int6", format)
    yield format


def test_its_numbers_are_routed_by_the_reference() -> None:
    """At most 31, half a step from the keys, and the scores are theirs."""
    torch.manual_seed(0)
    keys, queries, mask = torch.randn(40, 24), torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)
    numbers, scales = quantize_keys(keys, "int6")
    assert numbers.dtype == torch.int8 and numbers.abs().max() == 31
    kept = numbers.double() * scales.double()[:, None]
    assert ((kept - keys).abs() <= scales[:, None] * 0.5001).all()
    documents, scores = route_documents(
        queries, mask, numbers, offsets_of([4] * 10), 3, scales=scales, backend="pytorch"
    )
    exact = torch.einsum("bte,ce->bct", queries.double(), kept).amax(2).unflatten(1, (10, 4)).amax(2)
    best = exact.topk(3)
    assert torch.equal(documents, best.indices)
    torch.testing.assert_close(scores.double(), best.values, atol=1e-5, rtol=1e-5)


def test_it_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Behind int8, which is as wide; the command knows it too."""
    assert [format.name for format in all_formats()] == ["fp32", "bf16", "fp16", "fp8", "int8", "int6", "int4"]
    shape = BankShape.for_tokens(10**6, [(2, 64)], dtype="bf16")
    plan = plan_placement(shape, AMPLE, placement=PlacementOptions(keys="int6"))
    assert plan.keys == "int6" and plan.shape.key_bytes("int6") == shape.chunks * (2 * 64 + 4)
    sizes = ["--tokens", "1M", "--layers", "1", "--groups", "2", "--head-dim", "64", "--device-memory", "100GB"]
    assert main(["plan", *sizes, "--host-memory", "100GB", "--disk", "100GB", "--keys", "int6@device"]) == 0
    assert "int6" in capsys.readouterr().out


def test_it_is_placed_and_measured(int6: Format) -> None:
    """With as many candidates as it says, exact keys choose what they choose alone; so does a bank of it alone here."""
    made = setup(documents=tokens(*range(1, 15), seed=3), top_k=3, similarity="cosine")
    question = batch_of(tokens(6, 3, 9, seed=5))
    placed = place_bank(made.bank, placement=PlacementOptions(keys="int6"), tiers=AMPLE, model=made.model)
    keys = placed.layers[next(iter(placed.layers))].routing_keys
    assert keys.rows.dtype == torch.int8 and int(keys.rows.whole.abs().max()) == 31 and keys.usual == int6.candidates
    with torch.no_grad():
        expected, found = (made.model(**question, memory=bank).routing for bank in (made.bank, placed))
    for layer, routing in expected.items():
        assert torch.equal(routing.documents, found[layer].documents)
    recall = quantized_recall(made.model, made.bank, question)
    assert list(recall) == ["fp8", "int8", "int6", "int4"] and recall["int6"][6] > 0.9


def test_what_no_operation_scores_is_refused_with_its_remark(int6: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its operation it is planned with a remark where it is asked for, and not placed."""
    monkeypatch.setitem(FORMATS, "int6", Format("int6", torch.int8, frozenset(), largest=31.0, note=" (no kernel yet)"))
    made = setup(documents=tokens(3, 4, seed=3), similarity="cosine")
    with pytest.raises(ValueError, match=r"int6 routing keys \(no kernel yet\); choose fp8 or int8\."):
        place_bank(made.bank, placement=PlacementOptions(keys="int6"), tiers=AMPLE, model=made.model)
    shape = BankShape.for_tokens(10**6, [(2, 64)], dtype="bf16")
    assert "note: int6 routing keys (no kernel yet)" in str(
        plan_placement(shape, AMPLE, placement=PlacementOptions(keys="int6"))
    )
