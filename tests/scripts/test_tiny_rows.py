"""Training rows of msa-hf-tiny: what they say of their corpora is right, and nothing of the tests is in them."""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from msa_hf.synthetic.corpora import UNANSWERABLE
from msa_hf.synthetic.needle_wordings import words_of
from msa_hf.synthetic.needles import TASKS

ROOT = Path(__file__).parents[2]
PROSE = [
    "A reader that waits for its buffer returns nothing, but raises no error. The parser takes whole lines.",
    "Every handler keeps the order of its events. Closed files are opened again, unless the caller forbids that.",
    "Numbers below zero count from the end of a list. Rows that differ in length are padded before they are joined.",
]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield
    for name in ("tiny_rows", "tiny_needles", "tiny_chains"):
        sys.modules.pop(name, None)


def rows_of(kind: Any, corpus: Any, seed: int) -> tuple[Any, Any]:
    """A maker of rows about a corpus whose documents have the ids 1000, 1001, ..., and its tokenizer."""
    import tiny_rows

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model_cards" / "msa-hf-tiny")
    texts = tiny_rows.encode_all(tokenizer, [f" {text}" for text in corpus.texts()])
    ids = list(range(1000, 1000 + len(texts)))
    pieces = tiny_rows.Pieces(texts, ids, tiny_rows.symbols_of(tokenizer))
    return kind(tokenizer, corpus, pieces, random.Random(seed), memory=True), tokenizer


def labeled(row: Any) -> list[int]:
    return [token for token in row.labels if token != -100]


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_study_ask_what_their_texts_answer(seed: int) -> None:
    from tiny_chains import STUDIED, ChainRows, chain_corpus

    corpus = chain_corpus(160, seed, prose=PROSE, prose_share=0.1)
    maker, tokenizer = rows_of(ChainRows, corpus, seed)
    texts, facts = corpus.texts(), corpus.facts()
    asked = {question.text: question for question in corpus.questions}
    kinds, single = set(), 0
    for row in maker.studying(40):
        said = tokenizer.decode(row.ids)
        read, _, questions = said.partition("<|answer|>")
        places = [int(number) - 1000 for number in re.findall(r"(?:^|\n|>)\[(\d+)\] ", read)]
        assert 1 <= len(places) <= STUDIED and len(set(places)) == len(places)
        assert all(f"[{1000 + place}] {texts[place]}" in read for place in places)
        assert set(row.positives) <= set(places) and row.positives and any(row.routes)
        pairs = [item.split("\n") for item in questions.strip().split("<|end|>")[:-1]]
        assert len(pairs) > 1 and pairs[0][0] == read.partition("<|ids|>")[0]
        assert tokenizer.decode(labeled(row)) == "".join(f"{answer}<|end|>" for _, answer in pairs)
        for text, answer in pairs:
            if text in asked:
                question = asked[text]
                assert answer == f" {question.answer}" and set(question.positives) <= set(places)
                kinds.add((question.kind, question.answer == UNANSWERABLE))
            else:
                single += 1
                assert any(
                    text in fact.questions and answer == f" {fact.answer}" for place in places for fact in facts[place]
                )
    assert len(kinds) > 8 and single > 40


@pytest.mark.usefixtures("scripts")
def test_facts_of_chains_stand_in_their_documents_alone() -> None:
    from tiny_chains import chain_corpus

    corpus = chain_corpus(200, 5, prose=PROSE, prose_share=0.1)
    texts, names, facts = corpus.texts(), corpus.names(), corpus.facts()
    assert corpus.facts(20, 90) == facts[20:90]
    answers: dict[str, set[str]] = {}
    for text, name, found in zip(texts, names, facts, strict=True):
        assert name is not None or not found
        for fact in found:
            assert fact.answer in text and all(str(name) in question for question in fact.questions)
            for question in fact.questions:
                answers.setdefault(question, set()).add(fact.answer)
    assert sum(map(bool, facts)) > 100 and {len(found) for found in answers.values()} == {1}
    editions = {place for item in corpus.questions if item.kind == "version" for place in item.positives}
    assert editions and not any(facts[place] for place in editions)


@pytest.mark.usefixtures("scripts")
def test_needles_of_training_have_words_and_wordings_of_their_own() -> None:
    """None of those of the tests; what is asked stands in its documents and nowhere else."""
    from tiny_needles import needle_corpus

    corpora = [needle_corpus(200, seed, PROSE, prose_share=0.2) for seed in range(12)]
    again = needle_corpus(200, 3, PROSE, prose_share=0.2)
    assert again.texts() == corpora[3].texts() and again.questions == corpora[3].questions
    tested = {word for words in words_of("test") for word in words}
    keys = set()
    for corpus in corpora:
        texts = corpus.texts()
        assert {question.kind for question in corpus.questions} >= set(TASKS)
        for question in corpus.questions:
            assert "{" not in question.text
            asked = re.findall(r"[a-z]+-[a-z]+", question.text)
            keys.update(asked)
            assert asked and not tested & {word for key in asked for word in key.split("-")}
            for place, answer in zip(question.positives, question.answers, strict=True):
                assert any(f"{key}" in texts[place] for key in asked) and answer in texts[place]
                assert not any(answer in text for number, text in enumerate(texts) if number != place)
            if not question.positives:
                assert not any(asked[0] in text for text in texts)
    assert len({word for key in keys for word in key.split("-")}) > 150
    assert len({question.text.split()[1] for corpus in corpora for question in corpus.questions}) > 40
