"""Sentences that each cite what was shown: on fakes, and on a model whose weights are random."""

import json
import re
from collections.abc import Sequence

import pytest
from fake_chat import FakeChat
from scripted import COMPACT, byte_tokenizer, memory_model

from msa_hf.hybrid.chat import AnswerError, TransformersChat
from msa_hf.hybrid.synthesis import Budget, BudgetError, Finding, Synthesizer

FINDINGS = [
    Finding("When was it built?", "1889", "The tower was built in 1889.", "tower"),
    Finding("Who built it?", "Anna Keller", "Anna Keller built it.", "people"),
    Finding("Who built it?", "her sons", "Her sons built it.", "letters"),
]


def said(*entries: tuple[str, Sequence[str]]) -> str:
    return json.dumps([{"sources": list(sources), "sentence": sentence} for sentence, sources in entries])


def synthesize(*replies: str, findings: Sequence[Finding] = FINDINGS, cut: bool = False, **options: object):
    chat = FakeChat(list(replies), cut=cut)
    made = Synthesizer(chat, Budget(1000, 50), citing="every_sentence", **options).synthesize("Whose?", findings)
    return made, chat


def test_every_sentence_cites_and_what_no_source_backs_is_listed() -> None:
    made, chat = synthesize(
        said(
            # The findings that disagree are shown first: S1 is "people", S2 "letters", S3 "tower".
            ("It was built in 1889. It was  built in [S1] 1889?", ["S3"]),
            ("Her Sons built it.", ["S2", "S2"]),
            ("It was Anna Keller.", ["S3"]),
            ("It is very high.", ["S1"]),
        )
    )
    assert made.answer == (
        "It was built in 1889. [tower] It was built in (S1) 1889? [tower] Her Sons built it. [letters] "
        "It was Anna Keller. [tower][people] It is very high. [people]"
    )
    assert (
        made.unbacked == ("It is very high.",) and made.unknown == () and made.cited == ("tower", "letters", "people")
    )
    assert "In no source in these words:\n- It is very high.\n\nSources disagree:\n- Who built it?" in made.text
    assert made.to_dict()["unbacked"] == ["It is very high."]
    items = chat.schemas[0]["items"]["properties"]
    assert items["sources"]["items"]["enum"] == ["S1", "S2", "S3"] and list(items) == ["sources", "sentence"]


def test_sentences_that_come_again_stand_once() -> None:
    made, _ = synthesize(said(("It is old. It is old.", ["S1"]), ("It is old.", ["S3", "S1"])))
    assert made.answer == "It is old. [people][tower]"


def test_what_was_not_shown_cannot_be_cited() -> None:
    wrong = said(("It was 1889.", ["S9"]))
    made, chat = synthesize(wrong, said(("It was 1889.", ["S3"])))
    assert made.cited == ("tower",) and made.calls == 2
    assert "must be one of" in chat.asked[1][-1].content and chat.asked[1][-2].content == wrong
    for replies in ((wrong, wrong), ("It was built in 1889 [S3].",) * 2, ("[]", "[]"), (said(("x", [])),) * 2):
        with pytest.raises(AnswerError):
            synthesize(*replies)
    with pytest.raises(ValueError, match="wrote nothing"):
        synthesize(said((" \n", ["S1"])))


def test_an_answer_that_was_cut_keeps_its_whole_sentences() -> None:
    whole = said(("It was 1889.", ["S3"]), ("It was Anna Keller.", ["S1"]))
    made, _ = synthesize(whole[:-12], cut=True)
    assert made.answer == "It was 1889. [tower]" and made.truncated == 1
    with pytest.raises(BudgetError, match=r"`answer_tokens=50` has no room for a sentence with its sources; raise it"):
        synthesize(whole[:30], cut=True)


@pytest.mark.parametrize("strategy", ["map_reduce", "refine"])
def test_runs_show_their_own_sources_alone(strategy: str) -> None:
    """A text of some findings can cite these; the last one all that its parts could."""
    findings = [Finding("Which?", f"number {n}", f"It is number {n}, says this note.", f"note {n}") for n in range(8)]

    def reply(prompt: str) -> str:
        shown = dict.fromkeys(re.findall(r"\[(S\d)\]", prompt))
        return said(*((f"It is number {int(label[1]) - 1}.", [label]) for label in shown))

    chat = FakeChat(reply)
    writer = Synthesizer(chat, Budget(150, 20), strategy, conflicts=False, citing="every_sentence")
    made = writer.synthesize("Which?", findings)
    assert made.calls > 1 and made.cited == tuple(f"note {n}" for n in range(8)) and made.unbacked == ()
    for messages, schema in zip(chat.asked, chat.schemas, strict=True):
        labels = schema["items"]["properties"]["sources"]["items"]["enum"]
        assert labels == sorted(set(re.findall(r"\[(S\d)\]", messages[-1].content)))


def test_whatever_the_weights_are_sentences_cite_what_was_shown() -> None:
    pytest.importorskip("llguidance")
    tokenizer = byte_tokenizer()
    chat = TransformersChat(memory_model(tokenizer, COMPACT), tokenizer, "random")
    # A sentence of 240 characters, each of which may take four bytes, a token each: room for one of them.
    made = Synthesizer(chat, Budget(2000, 400), citing="every_sentence").synthesize("Who built it?", FINDINGS)
    assert made.cited and set(made.cited) <= {"tower", "people", "letters"} and made.unknown == () and made.unbacked
    assert "Sources disagree:" in made.text


def test_a_way_of_citing_that_is_none() -> None:
    with pytest.raises(ValueError, match="`citing` must be one of"):
        Synthesizer(FakeChat([]), citing="always")
