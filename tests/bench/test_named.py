"""Texts around what is asked about: those that name it are left out, as they may be documents of an earlier run."""

import re
from pathlib import Path
from typing import Any

import pytest

from msa_hf.bench.chains import ChainSettings, run_chains
from msa_hf.bench.conversations import ConversationSettings, run_conversations
from msa_hf.bench.facts import digest_of
from msa_hf.bench.named import ENTITY, without_names
from msa_hf.bench.scaling import invented_questions
from msa_hf.synthetic.conversations import make_conversation

PROSE = ["A text about nobody at all, of several words.", "Another one, about the weather and what it does."]


def test_texts_that_name_somebody_are_left_out() -> None:
    names = {"Oskel Lantern", "Ana Brandt", "Fort Nid"}
    texts = ["the Oskel Lantern, lit.", "Oskel lantern", "Ana Brandts", "Ana. Brandt", "(Ana Brandt)", "Fort Nid"]
    assert without_names(texts, names) == ["Oskel lantern", "Ana. Brandt"]
    assert without_names([], names) == [] and without_names(texts, ()) == texts
    with pytest.raises(ValueError, match=r"All 1 texts name .* such as 'Fort Nid'.* another seed"):
        without_names(texts[-1:], names)
    assert ENTITY.findall("Of The Oskel Lantern or Ana Brandt?")[-2:] == ["Oskel Lantern", "Ana Brandt"]


def test_prose_of_chains_says_nothing_of_what_is_asked(tiny: Any, tmp_path: Path) -> None:
    settings = ChainSettings((2500,), ("one_hop",), questions=1, max_new_tokens=1, rounds={"max_rounds": 1})
    plain = run_chains(settings, *tiny, PROSE, show_progress=False)
    facts = [f"{ENTITY.findall(trial.question)[-1]} was founded in 1903, others say." for trial in plain.trials]
    assert len(set(facts)) == 2 and "prose left out" not in plain.notes
    mixed = run_chains(settings, *tiny, [facts[0], *PROSE, facts[1]], tmp_path / "r.json", show_progress=False)
    assert mixed.notes["prose left out"] == 2 and mixed.settings["prose"] == digest_of(PROSE)
    assert [trial.question for trial in mixed.trials] == [trial.question for trial in plain.trials]
    with pytest.raises(ValueError, match="All 2 texts name"):
        run_chains(settings, *tiny, facts, show_progress=False)


def test_talk_says_nothing_of_those_who_are_asked_about(tiny: Any) -> None:
    settings = ConversationSettings((1,), asked=1, arms=("none",), max_new_tokens=1)
    people = [person for item in make_conversation(1, asked=1).questions for person, _ in item.seen]
    result = run_conversations(settings, *tiny, [f"{people[-1]} lives in Graz.", *PROSE], show_progress=False)
    assert result.notes["texts left out"] == 1 and result.settings["filler_texts"] == digest_of(PROSE)


def test_invented_questions_name_all_that_filler_must_not() -> None:
    asked = invented_questions(3000, 2)
    for text in (*asked.texts, *(item.text for item in asked.questions)):
        assert any(name in text for name in asked.names), text
    assert without_names([*asked.texts, *PROSE], asked.names) == PROSE
    assert all(re.fullmatch(r"\w+ \w+", name) for name in asked.names)
