"""Batches that are launched ahead of being looked at, and banks that are handed out before they are there, hold what
others do. Every test runs with as many batches ahead as beside a GPU, too."""

import threading
from typing import Any

import pytest
import torch
from test_encoding import assert_same_bank, encode, model_of, random_documents

from msa_hf.model import encoded_batches_msa
from msa_hf.model.memory_msa import MemoryBank


@pytest.fixture(params=[0, 3], ids=["at once", "three ahead"], autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(encoded_batches_msa, "batches_ahead", lambda device: request.param)
    return request.param


def rejecting(model: Any, token: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Let documents that hold a token have a number that is none; returns the batches as they come."""
    seen: list[torch.Tensor] = []
    whole = model.encode_batch

    def encode_batch(ids: torch.Tensor, lengths: torch.Tensor) -> Any:
        seen.append(ids)
        layers = whole(ids, lengths)
        rows = (-(-lengths // model.config.chunk_size)).cumsum(0) - 1
        for place in (ids == token).any(1).nonzero().flatten().tolist():
            next(iter(layers.values())).pooled_kv[rows[place]] = torch.nan
        return layers

    monkeypatch.setattr(model, "encode_batch", encode_batch)
    return seen


def test_the_bank_does_not_depend_on_what_is_ahead() -> None:
    """Over several windows, whose order differs from that of lengths."""
    documents = random_documents([9, 1, 30, 4, 4, 17, 2, 8] * 3, seed=3)
    whole = encode(documents)
    for batch_tokens in (2, 30):
        for options in ({}, {"non_blocking": True}):
            found = encode(documents, batch_tokens=batch_tokens, **options)
            assert_same_bank(found, whole)
            assert found.num_tokens == whole.num_tokens and found.num_chunks == whole.num_chunks


def test_numbers_that_are_none_are_refused_by_name(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon: no more batches are launched than may be ahead."""
    model = model_of()
    seen = rejecting(model, 499, monkeypatch)
    rows = [{"key": f"d{number}", "input_ids": [7] * (20 - number)} for number in range(16)]
    rows[12]["input_ids"] = [7, 7, 7, 499]  # the shortest, hence in the first batch
    with pytest.raises(ValueError, match="Document 'd12' has NaN or infinite states in layer"):
        encode(rows, model=model, batch_tokens=20)
    assert len(seen) == 1 + ahead


def test_a_bank_that_is_not_there_yet_is_waited_for_where_it_is_asked(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any thread; also for what it cannot hold."""
    model = model_of()
    documents = random_documents([5, 9, 13], seed=5)
    bank = encode(documents, non_blocking=True)
    got: list[MemoryBank] = []
    thread = threading.Thread(target=lambda: got.append(bank.layers[model.config.memory_layers[0]].pooled_kv))
    thread.start()
    thread.join()
    assert torch.equal(got[0], encode(documents).layers[model.config.memory_layers[0]].pooled_kv)
    assert bank.layers is bank.layers and bank.device.type == "cpu"
    model(torch.tensor([[5, 6]]), memory=bank)
    rejecting(model, 499, monkeypatch)
    if ahead:
        late = encode([[499]], non_blocking=True)
        with pytest.raises(ValueError, match="Document '0' has NaN"):
            _ = late.layers
    with pytest.raises(ValueError, match="Document '0' has NaN"):
        encode([[499]])


def test_what_is_given_to_the_model_is_counted() -> None:
    """Documents once, however many parts they have, and tokens."""
    told: list[tuple[int, int]] = []
    documents = random_documents([300, 5, 5, 700, 1], seed=6)
    bank = encode(documents, too_long="split", batch_tokens=256, counted=lambda *numbers: told.append(numbers))
    assert tuple(map(sum, zip(*told, strict=True))) == (5, 1011) and len(told) > 3 and len(bank) == 8
