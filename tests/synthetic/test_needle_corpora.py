"""Corpora with needles: what is asked stands in the documents that are named, and training rows say what they read."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from msa_hf.synthetic.corpora import UNANSWERABLE, make_corpus
from msa_hf.synthetic.needle_corpora import PLANTED, NeedleCorpus
from msa_hf.synthetic.needles import TASKS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_stand_in_their_documents_and_nowhere_else(split: Any) -> None:
    corpus = NeedleCorpus(300, seed=3, split=split)
    texts, plain = corpus.texts(), make_corpus(300, seed=3, split=split).texts()
    changed = [place for place in range(300) if texts[place] != plain[place]]
    assert 0.9 * PLANTED * 300 <= len(changed) <= PLANTED * 300
    assert {question.kind for question in corpus.questions} == {*TASKS, "unanswerable"}
    for question in corpus.questions:
        for place, answer in zip(question.positives, question.answers, strict=True):
            assert [number for number in range(300) if answer in texts[number]] == [place]
        if not question.positives:
            key = next(word.strip("?,.") for word in question.text.split() if "-" in word)
            assert question.answer == UNANSWERABLE and question.near and not any(key in text for text in texts)
    assert NeedleCorpus(300, seed=3, split=split).questions == corpus.questions != NeedleCorpus(300, seed=4).questions


@pytest.mark.parametrize("words", [(["a"], ["b", "c"]), (["a", "b"], ["b", "c"]), (["a", "b-c"], ["d", "e"])])
def test_words_that_no_keys_are_made_of_are_refused(words: Any) -> None:
    with pytest.raises(ValueError, match="of letters alone, each of them once"):
        NeedleCorpus(30, words=words)


def test_rows_read_the_documents_and_say_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tiny_rows
    from tiny_needles import NeedleRows

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model_cards" / "msa-hf-tiny")
    corpus, draw = NeedleCorpus(120, seed=1), random.Random(0)
    texts = tiny_rows.encode_all(tokenizer, [f" {text}" for text in corpus.texts()])
    pieces = tiny_rows.Pieces(texts, list(range(1000, 1120)), tiny_rows.symbols_of(tokenizer))
    maker = NeedleRows(tokenizer, corpus, pieces, draw, memory=True)
    by_text = {question.text: question for question in corpus.questions}
    several = 0
    for row in maker.needles(40):
        said = tokenizer.decode(row.ids)
        question = by_text[said.partition("<|ids|>")[0].strip()]
        labeled = tokenizer.decode([token for token in row.labels if token != tiny_rows.UNLABELLED])
        answer = labeled.replace("<|answer|>", "").replace("<|end|>", "").strip()
        assert len(row.ids) == len(row.labels) == len(row.routes)
        # The values come in the order in which their documents were read, which positives have.
        values = dict(zip(question.positives, question.answers, strict=True))
        assert answer == (", ".join(values[place] for place in row.positives) or UNANSWERABLE)
        read = [
            said.find(f"[{1000 + place}]<|docs|>")
            if f"[{1000 + place}]<|docs|>" in said
            else said.find(f"[{1000 + place}]")
            for place in row.positives
        ]
        assert -1 not in read and read == sorted(read)
        assert any(row.routes) and (bool(row.positives) or question.kind == "unanswerable")
        several += len(row.positives) > 1
    assert several
    said_so_far = set()
    for row in maker.needle_rounds(40):
        labeled = tokenizer.decode([token for token in row.labels if token != tiny_rows.UNLABELLED])
        one = f"[{1000 + row.positives[0]}]<|docs|>"
        assert row.positives and labeled in (("[",) if len(row.positives) > 1 else ("<|answer|>", one))
        said_so_far.add(labeled[:1])
    assert said_so_far == {"[", "<"}
    for name in ("tiny_rows", "tiny_needles", "tiny_chains"):
        sys.modules.pop(name, None)
