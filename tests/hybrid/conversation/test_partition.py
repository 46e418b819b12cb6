"""A part of a bank is what a bank of these documents alone would be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from fake_model import FakeModel, contents
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model

from msa_hf.bank import BankStore, place_bank
from msa_hf.hybrid.conversation import select_partition


@pytest.mark.parametrize("seed", range(3))
def test_documents_keep_all_that_belongs_to_them_and_others_are_not_there(tmp_path: Path, seed: int) -> None:
    pick = random.Random(seed)
    with BankStore(FakeModel(), tmp_path / "bank") as bank:
        for step in range(40):
            key = f"key {pick.randrange(15)}"
            if pick.random() < 0.25:
                bank.delete(key)
            else:
                bank.upsert(key, f"text {step} " + "x" * pick.randrange(12), step, {"step": step})
        whole = bank.snapshot()
        for size in (0, 1, 5, len(whole)):
            keys = pick.sample([document.key for document in whole.documents], size)
            part = select_partition(whole, [*keys, "nobody's", *keys])
            expected = {key: value for key, value in contents(whole).items() if key in keys}
            assert contents(part) == expected and list(contents(part)) == list(expected)
            ids = {document.key: document.id for document in whole.documents}
            assert all(document.id == ids[document.key] for document in part.documents)
            part.save_pretrained(tmp_path / f"part-{size}")


def test_a_model_sees_no_difference_to_a_bank_of_these_documents_alone() -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    chosen = [1, 4, 9, 12, 13, 17]

    def logits(memory: object) -> torch.Tensor:
        inputs = tokenizer("How far is the heath?", return_tensors="pt")
        with torch.no_grad():
            return model(input_ids=inputs["input_ids"], memory=memory).logits

    with BankStore(model, None, tokenizer) as bank, BankStore(model, None, tokenizer) as alone:
        bank.add({"key": str(number), "text": text} for number, text in enumerate(TEXTS))
        alone.add({"key": str(number), "text": TEXTS[number]} for number in chosen)
        part = select_partition(bank.snapshot(), map(str, chosen))
        torch.testing.assert_close(logits(part), logits(alone.snapshot()), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(part), logits(bank.snapshot()), rtol=1e-3, atol=1e-3)
        queries = ["Where is the pine?", "amber"]
        options = {"mode": "router", "model": model, "tokenizer": tokenizer}
        found, expected = part.search(queries, 4, **options), alone.snapshot().search(queries, 4, **options)
        assert [[hit.key for hit in hits] for hits in found] == [[hit.key for hit in hits] for hits in expected]


def test_a_bank_in_tiers_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    with BankStore(model, tmp_path / "bank", tokenizer) as bank:
        bank.add([{"key": "a", "text": TEXTS[0]}])
    with pytest.raises(ValueError, match="not of one in tiers"):
        select_partition(place_bank(tmp_path / "bank", model=model, tokenizer=tokenizer), ["a"])  # type: ignore[arg-type]
