"""The pipeline asks as `MemoryInterleave` does."""

from typing import Any

import pytest
from scripted import COMPACT, bank_of, byte_tokenizer, memory_model
from transformers import pipeline

from msa_hf.generation import MemoryInterleave, asker_of
from msa_hf.pipeline import TASK

TOKENIZER = byte_tokenizer()
MODEL = memory_model(TOKENIZER, COMPACT)
BANK = bank_of(MODEL, TOKENIZER, COMPACT)
OPTIONS = {"max_rounds": 1, "documents_per_round": 2}
QUESTIONS = ["Where is the amber?", "How far off is the reef, in miles?", "Which one is it?"]


def answerer(**kwargs: Any) -> Any:
    options = {"memory": BANK, "protocol": COMPACT, "interleave": OPTIONS, "device": "cpu", **kwargs}
    return pipeline(TASK, model=MODEL, tokenizer=TOKENIZER, **options)


@pytest.mark.parametrize("kwargs", [{}, {"batch_size": 2}])
def test_answers_are_those_of_the_rounds(kwargs) -> None:
    """With their sources; one for a text, a list for several, and options of generate reach the answer."""
    ask = MemoryInterleave(MODEL, TOKENIZER, BANK, COMPACT, **OPTIONS)
    expected = ask.ask(QUESTIONS, max_new_tokens=5)
    found = answerer()(question=QUESTIONS, max_new_tokens=5, **kwargs)
    assert [item["answer"] for item in found] == [item.text for item in expected]
    for item, other in zip(found, expected, strict=True):
        assert [source["key"] for source in item["sources"]] == [source.key for source in other.documents]
        assert [source["score"] for source in item["sources"]] == pytest.approx([s.score for s in other.documents])
        assert len(item["sources"]) == 2
    single = answerer()(question=QUESTIONS[0], max_new_tokens=5)
    assert single["answer"] == found[0]["answer"] and single["trace"].rounds


def test_what_is_missing_or_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="needs `memory`"):
        answerer(memory=None)
    with pytest.raises(TypeError, match=r"unexpected arguments \['max_round'\]"):
        answerer(max_round=3)


def test_a_checkpoint_is_loaded_by_its_path(tmp_path) -> None:
    """Model and tokenizer come from the directory, and the bank of the model that was saved there is accepted."""
    MODEL.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=str(tmp_path), memory=BANK, protocol=COMPACT, interleave=OPTIONS, device="cpu")
    found = loaded(question=QUESTIONS, max_new_tokens=5)
    expected = answerer()(question=QUESTIONS, max_new_tokens=5)
    assert loaded.model is not MODEL
    for item, other in zip(found, expected, strict=True):
        assert item["answer"] == other["answer"]
        assert [source["key"] for source in item["sources"]] == [source["key"] for source in other["sources"]]


@pytest.mark.parametrize("protocol", [COMPACT, None])
def test_the_checkpoints_protocol_is_read_and_messages_are_taken(tmp_path, protocol) -> None:
    """One conversation, a batch of them, and texts, as `asker_of` answers them; sources come with their texts."""
    for part in (MODEL, TOKENIZER, *([protocol] if protocol else [])):
        part.save_pretrained(tmp_path)
    options = OPTIONS if protocol else {}
    found = pipeline(TASK, model=str(tmp_path), memory=BANK, interleave=options, device="cpu")
    asker = asker_of(MODEL, TOKENIZER, BANK, protocol, **options)
    assert found.asker.protocol == protocol
    said = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Here."}]
    said.append({"role": "user", "content": "and how far is it?"})
    batch = [said, said[:1], QUESTIONS[1]]
    expected = asker.ask(batch, max_new_tokens=5)
    for item, other in zip(found(batch, max_new_tokens=5), expected, strict=True):
        assert item["answer"] == other.text
        texts = {document.key: document.text for document in BANK.documents}
        assert [(source["key"], source["text"]) for source in item["sources"]] == [
            (source.key, texts[source.key]) for source in other.documents
        ]
    assert found(said, max_new_tokens=5)["answer"] == expected[0].text
    with pytest.raises(ValueError, match="must be the user's question"):
        found(said[:2])
