"""Texts that a question needs and routing cannot find: passages of long ones, look-alikes, those encoded in part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blind_spots import COPIES, plant
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.evaluation import UNANSWERABLE, make_corpus
from msa_hf.generation import PromptProtocol
from msa_hf.hybrid.monitoring import Monitor
from msa_hf.hybrid.monitoring.coverage import left_out
from msa_hf.hybrid.monitoring.look_alikes import look_alikes, words_of
from msa_hf.hybrid.monitoring.passages import passage_of
from msa_hf.retrieval import add_lexical_index

CHECKPOINT = Path(__file__).parents[3] / "model_cards" / "msa-hf-tiny"
FACTS = "Ada Quorn keeps bees. They fly in May. The honey of Quorn is dark."
FILLER = "It rains on the hill, and the grass grows all the year. " * 4


def test_short_texts_are_read_whole() -> None:
    assert passage_of(FACTS, "What does Ada Quorn keep?") == FACTS
    assert passage_of("", "Who?") == ""


@pytest.mark.parametrize("text", [FILLER + FACTS, FACTS + " " + FILLER, FILLER + FACTS + " " + FILLER])
def test_of_long_texts_the_sentences_about_the_question_are_read(text: str) -> None:
    passage = passage_of(text, "What does Ada Quorn keep?", words=20)
    assert passage.startswith("Ada Quorn keeps bees. They fly in May.") and len(passage.split()) <= 20
    assert "The honey of Quorn" in passage
    assert passage_of(text, "what colour is the honey?", words=8) == "The honey of Quorn is dark."


def test_a_passage_is_never_empty_and_a_long_sentence_is_one() -> None:
    long = "word " * 60 + "about Quorn."
    assert passage_of(long, "Who is Quorn?", words=20) == long
    assert passage_of(FILLER, "Who is Quorn?", words=20) == "It rains on the hill, and the grass grows all the year."


def test_look_alikes_differ_in_a_few_words() -> None:
    read = "The key of the shed hangs on the hook behind the door of the house."
    assert look_alikes([read], [read.replace("hook", "nail"), read.replace("shed", "barn")]) == 2
    assert look_alikes([read], [read, read.upper(), read + "!"]) == 0, "the same words say nothing else"
    assert look_alikes([read], ["The roses are cut in March.", ""]) == 0
    assert look_alikes([], [read]) == look_alikes([""], [""]) == 0
    assert words_of("Bees, bees!") == {"bees"}


@pytest.mark.parametrize(
    ("encoded", "needed", "share"), [(50, 100, 0.5), (95, 100, 0.0), (120, 100, 0.0), (1, 0, 0.0), (1, 1000, 0.999)]
)
def test_what_was_left_out_is_a_share_of_the_text(encoded: int, needed: int, share: float) -> None:
    assert left_out(encoded, needed) == pytest.approx(share)


def test_faults_of_texts_are_signals_of_the_questions_about_them() -> None:
    """And of no other; a document that only repeats what was read is not read once more."""
    model = MSAForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer, protocol = AutoTokenizer.from_pretrained(CHECKPOINT), PromptProtocol.from_pretrained(CHECKPOINT)
    prose = ["Tools are kept in the shed behind the house. Paint is kept there too, on the upper shelf by the door."]
    planted = plant(model, tokenizer, protocol, make_corpus(24, 1, "test"), 1, 1, prose, ("crowded", "truncated"), 1)
    add_lexical_index(planted.bank)
    monitor = Monitor(model, tokenizer, planted.bank, protocol, refusal=UNANSWERABLE, max_new_tokens=6, checks=())
    (crowded,), (truncated,) = planted.questions["crowded"], planted.questions["truncated"]
    asked = [crowded, truncated, *planted.healthy]
    alike, partly, *healthy = monitor.check([question.text for question in asked])
    assert alike.signals["look_alikes"] > COPIES / 2 and alike.signals["partly_encoded"] == 0.0
    assert partly.signals["look_alikes"] == 0.0 and 0.2 < partly.signals["partly_encoded"] < 0.8
    for finding in healthy:
        assert finding.signals["look_alikes"] == finding.signals["partly_encoded"] == 0.0
    documents = planted.bank.documents
    kept = list(monitor._distinct(range(len(documents)), [len(documents) - 1]))
    texts = [words_of(document.text or "") for document in documents]
    assert len(kept) == len(set(texts)) - 1 and {texts[position] for position in kept} == set(texts[:-1]) - {texts[-1]}
