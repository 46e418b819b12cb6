"""Documents by their ids, which outlive positions."""

import itertools
from typing import Any

import pytest
import torch
from asking import (
    ONE,
    TOKENIZER,
    asker,
    each_selection,
    made,
    script,
)
from scripted import TEXTS

from msa_hf import Document
from msa_hf.generation import DocumentIds, MemoryInterleave
from msa_hf.model.memory_msa import DocumentTable, MemoryBank


def rearranged(bank: MemoryBank, order: list[int], texts: bool = True) -> MemoryBank:
    """Some documents of a bank, in another order, with or without their texts."""
    rows = torch.cat([torch.arange(int(bank.offsets[i]), int(bank.offsets[i + 1])) for i in order])
    documents = [bank.documents[i] for i in order]
    if not texts:
        documents = [Document(item.key, None, item.metadata, item.tokens, item.chunks) for item in documents]
    layers = {
        layer: type(memory)(memory.routing_keys[rows], memory.pooled_kv[rows]) for layer, memory in bank.layers.items()
    }
    offsets = torch.tensor([0, *itertools.accumulate(item.chunks for item in documents)])
    return MemoryBank(layers, offsets, bank.prefix, DocumentTable(documents), bank.origin)


@each_selection
def test_no_round_looks_at_all_documents(select, monkeypatch) -> None:
    """Where ids are stored as `encode_corpus` stores them, the work of a round does not grow with the bank."""

    def refuse(table: DocumentTable) -> Any:
        raise AssertionError("the whole table was read")

    interleave = asker(select=select)
    with script(interleave, {ONE: ["[4][17]<|docs|>", "<|answer|>"]}), monkeypatch.context() as patch:
        patch.setattr(DocumentTable, "__iter__", refuse)
        assert interleave.ask(ONE).documents


def test_ids_outlive_positions() -> None:
    """After documents were deleted and moved, the model's ids still mean the documents that they were given to."""
    model, bank, protocol = made()
    moved = rearranged(bank, [17, 3, 8, 0])
    interleave = MemoryInterleave(model, TOKENIZER, moved, protocol, select="generate", max_rounds=1)
    with script(interleave, {ONE: ["[8][17][1][0]<|docs|>"]}, {ONE: "Yes."}):
        answer = interleave.ask(ONE)
    assert [(source.id, source.position, source.key) for source in answer.documents] == [
        (8, 2, "8"),
        (17, 0, "17"),
        (0, 3, "0"),
    ]
    assert [(item.id, item.reason) for item in answer.trace.rounds[0].dropped] == [(1, "unknown")]
    item = answer.trace.rounds[0]
    scores = {choice.id: choice.score for choice in item.combined}
    assert [source.score for source in answer.documents] == [scores[8], scores[17], scores[0]]
    assert item.text == "".join(f"[{id}] {TEXTS[id]}\n" for id in (8, 17, 0)) + "<|ids|>"
    for choices in item.chosen.values():
        assert all(choice.id == [17, 3, 8, 0][choice.position] for choice in choices)


def test_sources_carry_the_routers_scores() -> None:
    """The combined score where a layer had chosen the document, None where the model named another."""
    interleave = asker(max_rounds=1)
    item = interleave.ask(ONE).trace.rounds[0]
    chosen, other = item.combined[1], next(id for id in range(18) if id not in {c.id for c in item.combined})
    with script(interleave, {ONE: [f"[{chosen.id}][{other}]<|docs|>"]}):
        answer = interleave.ask(ONE)
    assert [source.score for source in answer.documents] == [chosen.score, None]


@each_selection
def test_documents_without_text_cannot_be_read(select) -> None:
    model, bank, protocol = made()
    bare = rearranged(bank, [0, 1, 2], texts=False)
    interleave = MemoryInterleave(model, TOKENIZER, bare, protocol, select=select, max_new_tokens=4)
    with script(interleave, {ONE: ["[1]<|docs|>"]}, {ONE: "No."}):
        answer = interleave.ask(ONE)
    assert {item.reason for item in answer.trace.rounds[0].dropped} == {"without text"}
    assert answer.documents == [] and answer.text == "No." and len(answer.trace.rounds) == 1


def bank_with(ids: list[int | None]) -> Any:
    """The documents of a bank, as far as ids go."""
    metadata = [None if id is None else {"id": id} for id in ids]
    return type("Bank", (), {"documents": [Document(f"k{i}", "x", item, 1, 1) for i, item in enumerate(metadata)]})


@pytest.mark.parametrize(
    "ids, positions, unknown, following",
    [
        ([0, 1, 2], {0: 0, 1: 1, 2: 2}, [3, -1, 10**17], 3),
        ([7, 3, 0], {7: 0, 3: 1, 0: 2}, [1, 2, -3], 8),
        ([None, None], {0: 0, 1: 1}, [2, -1, -2], 2),
        ([None, 5, None], {0: 0, 5: 1, 2: 2}, [1], 6),
        ([2, None, None], {2: 0, 1: 1}, [0], 3),
        ([True, "x", -4], {0: 0, 1: 1, 2: 2}, [-4], 3),
    ],
)
def test_ids_and_positions(ids, positions, unknown, following) -> None:
    """Stored ids count, wherever the document stands now; without one the position does, unless the id is taken."""
    found = DocumentIds(bank_with(ids))
    assert {id: found.position_of(id) for id in positions} == positions
    assert [found.position_of(id) for id in unknown] == [None] * len(unknown)
    assert found.next_id() == following
    stored = [position if type(id) is not int or id < 0 else id for position, id in enumerate(ids)]
    assert [found.id_of(position) for position in range(len(ids))] == stored


def test_an_id_that_two_documents_have() -> None:
    with pytest.raises(ValueError, match="'k0' and 'k2' have the same id 4"):
        DocumentIds(bank_with([4, 1, 4])).position_of(4)
