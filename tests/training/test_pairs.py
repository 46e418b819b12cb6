"""Pairs that documents make of themselves: what is taken out, what asks for nothing, and what occurs twice."""

import random

import pytest
from small_corpus import notes, tokenizer_of_notes

from msa_hf.model.tokenizing_msa import tokenize_texts
from msa_hf.training.pairs import KINDS, SHARES, Pair, PairMaker, Passage, cut_passages, first_heading, words

TEXT = """# Office moves
The office moved to Elm Street 12 in May. Deliveries go to the back door now. "Ring twice!" says Mira.

Where to park
There are six places behind the house. Two more are for bicycles.
All rights are reserved."""


def made(passages: list[Passage], place: int, turns: int = 60) -> list[Pair]:
    maker = PairMaker(passages, seed=3)
    return [pair for turn in range(turns) for pair in maker.of(place, turn)]


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    others = [f"Note {n}. It says the thing{n} of person{n * 7}.\nAll rights are reserved." for n in range(30)]
    return [Passage(TEXT, 0, "Office moves"), *(Passage(text, n) for n, text in enumerate(others, 1))]


def test_every_kind_of_question_is_made_and_answers_stay_whole_without_it(passages) -> None:
    pairs = made(passages, 0)
    assert {pair.kind for pair in pairs} == set(KINDS)
    for pair in pairs:
        assert len(words(pair.query)) >= 1 and set(words(pair.query)) <= set(words(TEXT))
        taken = pair.text != TEXT
        if pair.kind in ("sentence", "first", "heading") and taken:
            assert pair.query not in pair.text
        # Nothing but one stretch is gone.
        assert len(words(pair.text)) >= len(words(TEXT)) - 12 and set(words(pair.text)) <= set(words(TEXT))
    for kind in ("sentence", "first", "part"):
        texts = [pair.text for pair in pairs if pair.kind == kind]
        assert TEXT in texts and len(set(texts)) > 1, kind  # some of the time with it
    assert {pair.query for pair in pairs if pair.kind == "heading"} == {"Office moves", "Where to park"}
    rare = [pair.query.split() for pair in pairs if pair.kind == "keywords"]
    assert all(2 <= len(query) <= 5 and len(set(query)) == len(query) for query in rare)
    assert not any("the" in query or "rights" in query for query in rare)


def test_what_many_documents_say_asks_for_none(passages) -> None:
    assert not any(pair.query == "All rights are reserved." for pair in made(passages, 0))


def test_the_same_seed_makes_the_same_pairs_and_turns_differ(passages) -> None:
    first, again = PairMaker(passages, seed=1), PairMaker(list(passages), seed=1)
    assert [first.of(n, 4) for n in range(9)] == [again.of(n, 4) for n in range(9)]
    assert [first.of(n, 4) for n in range(9)] != [first.of(n, 5) for n in range(9)]
    assert first.of(2, 4) != PairMaker(passages, seed=2).of(2, 4)
    for pairs in (first.of(n, turn) for n in range(31) for turn in range(5)):
        queries = [tuple(words(pair.query)) for pair in pairs]
        assert len(set(queries)) == len(queries)


def test_a_passage_asked_once_is_asked_by_its_kinds_in_their_shares(passages) -> None:
    maker = PairMaker(passages, seed=1)
    found = [maker.one(0, turn) for turn in range(400)]
    assert found == [PairMaker(passages, seed=1).one(0, turn) for turn in range(400)]
    kinds = [pair.kind for pair in found if pair is not None]
    assert len(kinds) == 400
    for kind, share in SHARES.items():
        assert abs(kinds.count(kind) / 400 - share) < 0.08, kind


def test_passages_are_cut_to_length_and_taken_once() -> None:
    tokenizer, texts = tokenizer_of_notes(), notes()
    pick = random.Random(0)
    for limit in (5, pick.randint(10, 25), 200):
        found, repeated = cut_passages({**texts, "copy": texts["note3"]}, tokenizer, limit)
        assert max(len(tokenizer(passage.text)["input_ids"]) for passage in found) <= limit
        assert len({passage.text for passage in found}) == len(found)
        assert {found[place].text in texts["note3"] for document, place in repeated if document == len(texts)} == {True}
        together = {n: " ".join(p.text for p in found if p.document == n).split() for n in range(len(texts))}
        if limit == 200:
            assert [" ".join(together[n]) for n in together] == [" ".join(text.split()) for text in texts.values()]
    assert first_heading(texts["note3"]) == found[3].title != ""


def test_very_long_documents_are_cut_without_being_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, texts = tokenizer_of_notes(), {**notes(), "short": "w0x1 ."}
    expected = cut_passages(texts, tokenizer, 9)
    counted: list[str] = []
    monkeypatch.setattr("msa_hf.training.pairs.LONG", 2)
    monkeypatch.setattr(
        "msa_hf.training.pairs.tokenize_texts", lambda of, some: counted.extend(some) or tokenize_texts(of, some)
    )
    assert cut_passages(texts, tokenizer, 9) == expected and counted == ["w0x1 ."]


@pytest.mark.parametrize(
    "text", ["", "word", "a b", "。", "\n\n", "Title\n", "#", "日本語の文。もう一つの文です。", "\x00 \ud800"]
)
def test_short_and_odd_texts_make_few_or_no_pairs(text: str, passages) -> None:
    maker = PairMaker([*passages, Passage(text, 99, text)])
    one = maker.one(len(passages))
    for pair in [*maker.of(len(passages)), *([] if one is None else [one])]:
        assert pair.query.strip() and len(words(pair.text)) >= 4
