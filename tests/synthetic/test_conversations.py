"""Long conversations: what their questions ask is decided by what was said, in the order in which it was said."""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime
from functools import cache

import pytest

from msa_hf.synthetic.conversations import KINDS, LongConversation, TalkQuestion, make_conversation
from msa_hf.synthetic.conversations.statements import pin_of

SIZES = (2_000, 60_000, 400_000)
CASES = [(size, seed) for size in SIZES for seed in (0, 1, 7)]


@cache
def made(size: int, seed: int) -> LongConversation:
    return make_conversation(size, seed=seed, asked=8)


class Listener:
    """Somebody who hears all turns in order and answers from what holds at the end, or held on a day."""

    def __init__(self, talk: LongConversation) -> None:
        self.values: dict[tuple[str, str], list[tuple[object, int, str | None]]] = {}  # [(day, turn, value)]
        roles: dict[str, str] = {}
        for session in talk.sessions:
            for turn in session.turns:
                if (said := turn.statement) is None:
                    continue
                if said.act == "name":
                    assert said.role not in roles
                    roles[said.role] = said.person
                    continue
                assert said.attribute is not None
                person = roles[said.role] if said.role else said.person  # a name must have been given before
                known = self.values.setdefault((person, said.attribute.name), [])
                if said.act in ("state", "update"):
                    assert bool(known) == (said.act == "update")  # nothing is updated before it is said
                    known.append((session.day, turn.number, said.value))
                elif said.act == "withdraw":
                    assert known
                    known.append((session.day, turn.number, None))
                elif said.act == "same":
                    assert known  # what it refers to was said before
                    self.values[said.other, said.attribute.name] = [(session.day, turn.number, known[-1][2])]
                else:
                    assert said.act == "mention" and known

    def answer(self, question: TalkQuestion) -> str | None:
        found = [self.values.get(pair, []) for pair in question.seen]
        if question.sort == "comparison":
            numbers = {
                pair[0]: int(str(item[-1][2]).split()[0]) for pair, item in zip(question.seen, found, strict=True)
            }
            return max(numbers, key=lambda name: numbers[name])
        if question.sort == "which first":
            return min(zip(question.seen, found, strict=True), key=lambda item: item[1][0][1])[0][0]
        if question.sort == "before":
            return found[0][-2][2]
        if question.sort == "as of a day":
            day = datetime.strptime(question.text.partition(" on ")[2], "%d %B %Y?").date()
            return [value for since, _, value in found[0] if since <= day][-1]
        return found[0][-1][2] if found[0] else None


@pytest.mark.parametrize(("size", "seed"), CASES)
def test_who_listens_to_the_end_knows_every_answer(size: int, seed: int) -> None:
    talk = made(size, seed)
    heard = Listener(talk)
    assert [heard.answer(item) for item in talk.questions] == [item.answer for item in talk.questions]
    assert {(item.kind, item.sort) for item in talk.questions} == {
        (kind, s) for kind, all_ in KINDS.items() for s in all_
    }
    assert all((item.answer is None) == (item.kind == "unanswerable") for item in talk.questions)


@pytest.mark.parametrize(("size", "seed"), CASES)
def test_the_words_say_what_the_statements_say(size: int, seed: int) -> None:
    talk = made(size, seed)
    turns = {turn.number: turn for turn in talk.turns()}
    assert list(turns) == list(range(1, len(turns) + 1))
    for turn in turns.values():
        said = turn.statement
        if said is not None:
            named = f"my {said.role}" if said.role and said.act != "name" else said.person
            wanted = [
                said.value,
                said.role,
                said.other,
                named,
                "" if said.value else getattr(said.attribute, "name", ""),
            ]
            assert [word for word in wanted if word.lower() not in turn.text.lower()] == []
            assert (pin_of(turn.text) is not None) == said.pinned
    for item in talk.questions:
        evidence = " ".join(turns[number].text for number in item.evidence)
        if item.answer is not None:
            assert item.answer in evidence
        # An answer of a former time is nowhere in what is to be read for the latest one.
        if item.kind == "update":
            assert not any(re.search(rf"\b{re.escape(value)}\b", evidence) for value in item.stale)
        if item.sort == "withdrawn":
            last = max(turn.number for turn in turns.values() if about(turn.statement) == item.seen[0])
            assert item.evidence == (last,)


def about(statement: object) -> tuple[str, str] | None:
    attribute = getattr(statement, "attribute", None)
    return None if attribute is None else (statement.person, attribute.name)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("size", "seed"), CASES)
def test_evidence_across_sessions_is_in_several_sessions(size: int, seed: int) -> None:
    talk = made(size, seed)
    session_of = {turn.number: turn.session for turn in talk.turns()}
    for item in talk.questions:
        sessions = {session_of[number] for number in item.evidence}
        assert len(sessions) == len(item.evidence)  # every statement of a thread has a day of its own
        if item.kind == "across sessions":
            assert len(sessions) == 2


def test_what_was_never_said_is_in_no_turn() -> None:
    talk = made(60_000, 0)
    for item in talk.questions:
        if item.sort == "never said":
            (pair,) = item.seen
            said = [turn.statement for turn in talk.turns() if turn.statement is not None]
            assert pair[0] in {one.person for one in said}  # somebody known
            assert pair not in {about(one) for one in said}
            assert pair not in {(one.other, one.attribute.name) for one in said if one.act == "same" and one.attribute}


def test_the_same_seed_gives_the_same_conversation_and_another_one_others() -> None:
    assert make_conversation(20_000, seed=3) == make_conversation(20_000, seed=3)
    texts = [{turn.text for turn in make_conversation(20_000, seed=seed).turns() if turn.statement} for seed in (3, 4)]
    assert len(texts[0] & texts[1]) < 0.1 * len(texts[0])


def test_questions_do_not_depend_on_the_size_and_the_size_is_kept() -> None:
    for size in SIZES[1:]:
        talk = made(size, 0)
        assert sum(len(turn.text) for turn in talk.turns()) / 4.4 == pytest.approx(size, rel=0.05)
        assert len(talk.sessions) == size // 3000
        without_days = [(item.answer, re.sub(r" on \d.*", "", item.text)) for item in talk.questions]
        assert without_days == [(item.answer, re.sub(r" on \d.*", "", item.text)) for item in made(2_000, 0).questions]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_longer_conversation_says_the_same_of_the_same_people_at_the_same_places(seed: int) -> None:
    small, large = (made(size, seed) for size in SIZES[1:])
    asked = {person for item in small.questions for person, _ in item.seen}
    said = [
        Counter(turn.statement for turn in talk.turns() if turn.statement and turn.statement.person in asked)
        for talk in (small, large)
    ]
    assert said[0] == said[1]
    places = [{turn.number: turn.session / len(talk.sessions) for turn in talk.turns()} for talk in (small, large)]
    for one, other in zip(small.questions, large.questions, strict=True):
        for number, same in zip(one.evidence, other.evidence, strict=True):
            assert places[0][number] == pytest.approx(places[1][same], abs=0.2)


def test_given_texts_are_the_filler() -> None:
    talk = make_conversation(30_000, filler=["The river rises in the hills.", "Slate was cut here."])
    said = {turn.text for turn in talk.turns() if turn.role == "assistant"}
    assert {"The river rises in the hills.", "Slate was cut here."} < said and len(said) < 10


@pytest.mark.parametrize(("options", "named"), [({"tokens": 0}, "tokens"), ({"asked": 0}, "asked")])
def test_numbers_that_make_no_conversation_are_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_conversation(**options)


def test_more_questions_than_there_are_people_for_are_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer questions"):
        make_conversation(1000, asked=3000)
