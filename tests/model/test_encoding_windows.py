"""Documents are read and tokenized a window ahead of the model; the model gets its first batch after a small one."""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from test_encoding import assert_same_bank, byte_tokenizer, encode, model_of, random_documents

from msa_hf.model import encoding_msa
from msa_hf.model.encoding_msa import _Item, _windows
from msa_hf.model.memory_msa import DenseLayer

LENGTH, BATCH, TOTAL = 10, 20, 100
WINDOW = 16 * BATCH // LENGTH


def found_before(monkeypatch: pytest.MonkeyPatch, encode_all: Callable[[Callable[[int], None]], Any]) -> list[int]:
    """How many documents of `LENGTH` tokens were there at every batch, besides those in earlier batches.

    Args:
        encode_all: encodes; given a function that is to be told how many documents have got their token ids.
    """
    model, there = model_of(), 0
    found, like = [], model.encode_batch(torch.tensor([[5]]), torch.tensor([1]))

    def encode_batch(ids: torch.Tensor, lengths: torch.Tensor) -> dict[int, DenseLayer]:
        nonlocal there
        found.append(there)
        there -= len(lengths)
        chunks = int((-(-lengths // model.config.chunk_size)).sum())
        rows = torch.zeros(chunks, dtype=torch.int64)
        return {layer: DenseLayer(one.routing_keys[rows], one.pooled_kv[rows]) for layer, one in like.items()}

    def come(count: int) -> None:
        nonlocal there
        there += count

    monkeypatch.setattr(model, "encode_batch", encode_batch)
    bank = encode_all(come)
    assert len(bank) == TOTAL and there == 0
    return found


def test_a_model_is_not_kept_waiting_for_a_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for token ids that are made on the way; windows grow, up to 16 batches, and no more is read ahead."""

    def encode_all(come: Callable[[int], None]) -> Any:
        def documents() -> Iterator[list[int]]:
            for ids in random_documents([LENGTH] * TOTAL):
                come(1)
                yield ids

        return encode(documents(), batch_tokens=BATCH)

    found = found_before(monkeypatch, encode_all)
    assert [found[place] for place in (0, 1, 3, 7, 14, 28)] == [2, 4, 7, 14, 28, WINDOW] and max(found) == WINDOW


@pytest.mark.parametrize("counted", [True, False], ids=["a list", "an iterator"])
def test_nor_for_its_texts_to_be_tokenized(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, tokenizer = [f"{number:010}" for number in range(TOTAL)], byte_tokenizer()
    whole = encoding_msa.tokenize_texts
    monkeypatch.setattr(encoding_msa, "BLOCK", 2)  # texts that are tokenized together

    def encode_all(come: Callable[[int], None]) -> Any:
        def tokenize_texts(tokenizer: Any, texts: Any, *options: Any) -> Any:
            come(len(texts))
            return whole(tokenizer, texts, *options)

        monkeypatch.setattr(encoding_msa, "tokenize_texts", tokenize_texts)
        return encode(texts if counted else iter(texts), tokenizer, batch_tokens=BATCH)

    found = found_before(monkeypatch, encode_all)
    assert found[0] == 2 and WINDOW <= max(found) < WINDOW + 2


def test_what_is_there_comes_in_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is sorted by length as far as can be."""

    class Documents:
        def __init__(self, come: Callable[[int], None]) -> None:
            self.come, self.looks = come, 0

        def __len__(self) -> int:
            return TOTAL

        def __iter__(self) -> Iterator[list[int]]:
            self.looks += 1
            for ids in random_documents([LENGTH] * TOTAL):
                self.come(self.looks > 1)  # looked through before anything is encoded
                yield ids

    assert found_before(monkeypatch, lambda come: encode(Documents(come), batch_tokens=BATCH))[0] == WINDOW


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_windows_at_the_edges(batch: int) -> None:
    """Documents in order, none lost, in windows of as many as are asked for and no more, whatever their lengths."""
    pick = random.Random(batch)
    lengths = [pick.choice([1, batch - 1 or 1, batch, batch + 1, 16 * batch, 40 * batch]) for _ in range(60)]
    for part in (lengths, lengths[:1], [], [16 * batch], [batch] * 16, [1] * 20 * batch):
        for chance in (0, 0.1, 1):  # of one that has to be waited for
            items = [
                _Item(str(number), None, None, torch.zeros(length).long(), is_there=pick.random() >= chance)
                for number, length in enumerate(part)
            ]
            windows = list(_windows(iter(items), batch))
            assert [item.key for window in windows for item in window] == [item.key for item in items]
            for number, window in enumerate(windows):
                held, least = 0, min(16, 7 / 8 * 2**number) * batch
                for place, item in enumerate(window, start=1):
                    held += len(item.ids)
                    enough = held >= (16 * batch if all(item.is_there for item in window[:place]) else least)
                    assert enough == (place == len(window)) or (number + 1 == len(windows) and not enough)


def test_the_bank_does_not_depend_on_windows() -> None:
    """One that begins small holds what one of whole windows does: fewer tokens than a batch, a window, long ones."""
    pick = random.Random(0)
    for lengths in ([3], [BATCH], [16 * BATCH // 2] * 2, [200, 1, 1, 200], [pick.randint(1, 30) for _ in range(40)]):
        rows = [{"key": f"d{number}", "input_ids": ids} for number, ids in enumerate(random_documents(lengths))]
        found, expected = encode(iter(rows), batch_tokens=BATCH), encode(rows, batch_tokens=BATCH)
        assert [item.key for item in found.documents] == [row["key"] for row in rows]
        assert_same_bank(found, expected)


def test_an_endless_input_is_not_read_to_its_end() -> None:
    """An error in the first windows stops the reading."""
    read = 0

    def documents() -> Iterable[list[int]]:
        nonlocal read
        while True:
            read += 1
            yield [5] * 10 if read < 100 else []

    with pytest.raises(ValueError, match="Document 99"):
        encode(documents(), batch_tokens=10)
    assert read == 100
