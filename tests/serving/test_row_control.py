"""Pieces of an answer while it grows: what was handed out is always how the answer begins."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.serving.passages import passage_of
from msa_hf.serving.row_control import RowControl, certain
from msa_hf.serving.waiting import Delta, Options, Question

TEXTS = st.text(st.sampled_from("ab \n€<|end>"), max_size=24)


def question(*stop: str, new_tokens: int = 1000) -> Question:
    async def make() -> Question:
        return Question([{"role": "user", "content": "?"}], Options(new_tokens, stop=stop))

    return asyncio.run(make())


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2))
def test_pieces_are_how_the_answer_begins(text: str, stops: list[str]) -> None:
    """Whatever characters tokens are cut at, here bytes, and whatever ends it."""
    opening, end = "<a", "<|end|>"

    def text_of(tokens: list[int]) -> str:
        found = bytes(tokens).decode("utf-8", "replace").partition(end)[0].strip()
        return found.removeprefix(opening).strip()

    asked = question(*stops)
    control = RowControl([asked], text_of, [255], opening, end)
    tokens = [*text.encode(), 255]
    prompt, sent = [1, 2, 3], []
    for count in range(1, len(tokens) + 1):
        ended = control(torch.tensor([[*prompt, *tokens[:count]]]), None)
        sent.append(asked.sent)
        if bool(ended):
            break
    control.text_of = lambda found: text_of([token for token in found if token != 255])
    final, _ = control.written(0)
    assert all(final.startswith(piece) for piece in sent)
    assert not any(stop in final for stop in stops)


def test_what_may_become_something_else_is_held_back() -> None:
    assert certain("roses <|e", ["<|end|>"]) == "roses"
    assert certain("half \ufffd", []) == "half"
    assert certain("a stop", ["top!", "stopped"]) == "a"
    assert certain("plain", ["xyz", ""]) == "plain"


def test_rows_end_for_themselves() -> None:
    asked = [question("b"), question(), question()]
    control = RowControl(asked, lambda tokens: bytes(tokens).decode(), [0])
    asked[2].cancel()
    first = control(torch.tensor([[1, 97], [1, 97], [1, 97]]), None)
    assert first.tolist() == [False, False, True]
    second = control(torch.tensor([[1, 97, 98], [1, 97, 98], [1, 97, 98]]), None)
    assert second.tolist() == [True, False, True]
    assert control.written(0) == ("a", "stop")
    assert control.tokens == [[97, 98], [97, 98], [97]]
    assert control.written(1)[0] == "ab"


def test_nothing_is_handed_out_twice() -> None:
    async def run() -> list[str]:
        asked = Question([], Options(4))
        for text in ("a", "ab", "ab", "a", "abc"):
            asked.extend(text)
        await asyncio.sleep(0)
        found = []
        while not asked._events.empty():
            event = asked._events.get_nowait()
            assert isinstance(event, Delta)
            found.append(event.text)
        return found

    assert asyncio.run(run()) == ["a", "b", "c"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=900), st.text(max_size=60))
def test_passages_are_pieces_of_the_text(text: str, words: str) -> None:
    parts = passage_of(text, words, longest=80)
    shown = "".join(part["text"] for part in parts)
    inner = shown.removeprefix("…") if not text.startswith("…") else shown
    inner = inner.removesuffix("…") if not text.endswith("…") else inner
    assert inner in text and len(inner) <= 80


@pytest.mark.parametrize("place", [0, 700, 1500])
def test_a_passage_has_the_words_that_were_asked_for(place: int) -> None:
    words = ["filler"] * 300
    words[place // 7] = "The Jethefux Crossing opened in 1889"
    parts = passage_of(" ".join(words), "When did the Jethefux Crossing open? 1889", longest=120)
    assert [part["text"] for part in parts if part["marked"]] == ["Jethefux Crossing", "1889"]
