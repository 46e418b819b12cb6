"""A bank that changes, read by a model: as one that was encoded at once, whatever was deleted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from setups import Setup, assert_same, batch_of, setup, tokens

from msa_hf import MemoryBank
from msa_hf.bank import BankStore, place_bank
from msa_hf.bank.tiered.hardware import Tiers

LENGTHS = (1, 3, 4, 7, 12, 5, 9)
GONE = (1, 4)


@pytest.fixture(scope="module")
def made() -> Setup:
    return setup(documents=tokens(*LENGTHS))


def changed(made: Setup, directory: Path | None) -> BankStore:
    """The documents of `made`, after others came and went between them."""
    bank = made.model.open_memory(directory)
    strange = tokens(6, 8, seed=5)
    bank.add([{"key": "strange", "input_ids": strange[0]}])
    bank.add([{"key": str(place), "input_ids": ids} for place, ids in enumerate(made.documents)])
    bank.snapshot()
    with bank.batch():
        bank.add([{"key": "stranger", "input_ids": strange[1]}])
        bank.delete("strange")
    for key in ("stranger", *map(str, GONE)):
        bank.delete(key)
    return bank


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("top_k", [2, 50])
def test_it_answers_as_a_bank_of_the_living_documents(
    made: Setup, tmp_path: Path, on_disk: bool, compacted: bool, top_k: int
) -> None:
    """Same documents, scores and logits, also where more are asked for than live."""
    bank = changed(made, tmp_path if on_disk else None)
    if compacted:
        bank.compact()
    alive = [ids for place, ids in enumerate(made.documents) if place not in GONE]
    expected_bank = made.model.encode_documents(alive, show_progress=False)
    batch = batch_of(tokens(5, 9, seed=3))
    config = made.model.config
    banks: list[Any] = [bank, bank.snapshot()]
    if on_disk:
        banks.append(MemoryBank.from_pretrained(tmp_path))
    before, config.top_k = config.top_k, top_k
    try:
        with torch.no_grad():
            for all_scores in (False, True):
                expected = made.model(**batch, memory=expected_bank, output_document_scores=all_scores)
                for memory in banks:
                    found = made.model(**batch, memory=memory, output_document_scores=all_scores)
                    assert_same(found.logits, expected.logits)
                    for layer, routing in expected.routing.items():
                        assert torch.equal(found.routing[layer].documents, routing.documents)
                        torch.testing.assert_close(found.routing[layer].scores, routing.scores)
                        if all_scores:
                            torch.testing.assert_close(found.routing[layer].document_scores, routing.document_scores)
            forced = torch.tensor([[4, -1], [1, 0]])
            expected = made.model(**batch, memory=expected_bank, force_documents=forced)
            for memory in banks:
                found = made.model(**batch, memory=memory, force_documents=forced)
                assert_same(found.logits, expected.logits)
                assert all(torch.equal(routing.documents, forced) for routing in found.routing.values())
            with pytest.raises(ValueError, match="names document 5, but there are 5"):
                made.model(**batch, memory=bank, force_documents=torch.tensor([[5], [0]]))
    finally:
        config.top_k = before
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected_ids = made.model.generate(**batch, memory=expected_bank, **options)
    assert torch.equal(made.model.generate(**batch, memory=bank, **options), expected_ids)


@pytest.mark.parametrize("deleted", [False, True])
def test_an_empty_bank_is_no_memory_but_a_prefix(made: Setup, deleted: bool) -> None:
    """Nothing was ever added, or everything was deleted: no document is chosen, no other either."""
    bank = made.model.open_memory()
    if deleted:
        bank.add([{"key": "only", "input_ids": tokens(7)[0]}])
        bank.delete("only")
    batch = batch_of(tokens(5, 9, seed=3))
    with torch.no_grad():
        found = made.model(**batch, memory=bank)
        nothing = torch.full((2, 1), -1)
        expected = made.model(**batch, memory=made.bank, force_documents=nothing)
    assert all((routing.documents == -1).all() for routing in found.routing.values())
    assert_same(found.logits, expected.logits)


@pytest.mark.parametrize(
    "fields",
    [{}, {"score_bias": True}, {"query_reduction": "mean"}, {"head_reduction": "max"}, {"chunk_reduction": "mean"}],
    ids=lambda fields: "-".join(map(str, *fields.items())) if fields else "default",
)
def test_an_empty_bank_has_no_scores(fields: dict[str, Any]) -> None:
    """Whichever way documents are scored, with and without a gradient, and where the scores of all are asked for."""
    made = setup("qwen3", "sdpa", **fields)
    bank, batch = made.model.open_memory(), batch_of(tokens(5, 9, seed=3))
    tiered = place_bank(bank, tiers=Tiers(*[10**12] * 3))
    expected = made.model(**batch, memory=made.bank, force_documents=torch.full((2, 1), -1)).logits
    for memory in (bank, tiered):
        for all_scores in (False, True):
            found = made.model(**batch, memory=memory, output_document_scores=all_scores)
            assert_same(found.logits, expected)
            for routing in found.routing.values():
                assert (routing.documents == -1).all()
                assert routing.document_scores is None or routing.document_scores.shape == (2, 0)


def test_changed_text_is_what_the_model_reads(made: Setup) -> None:
    """A replaced document counts as it is now, at its old id; a replaced one is gone from what routes."""
    bank = made.model.open_memory()
    old, new, other = tokens(7, 8, 5, seed=8)
    bank.add([{"key": "a", "input_ids": old}, {"key": "b", "input_ids": other}])
    snapshot = bank.snapshot()
    bank.delete("a")
    bank.add([{"key": "a", "input_ids": new}])
    batch = batch_of(tokens(6, seed=2))
    with torch.no_grad():
        for memory, documents in ((snapshot, [old, other]), (bank, [other, new])):
            expected = made.model(**batch, memory=made.model.encode_documents(documents, show_progress=False))
            assert_same(made.model(**batch, memory=memory).logits, expected.logits)
