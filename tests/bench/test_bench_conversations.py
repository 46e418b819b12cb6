"""Long conversations put to the shipped checkpoint, and how answers are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msa_hf.bench import conversations
from msa_hf.bench.conversations import (
    INVENTED,
    MISREAD,
    NOT_FOUND,
    REASONS,
    REFUSALS,
    STALE,
    BankArm,
    ConversationSettings,
    Kept,
    LexicalArm,
    StoreArm,
    in_words,
    judged,
    run_conversations,
)
from msa_hf.bench.report import html_report, text_report
from msa_hf.bench.result import Result, ResultError, Trial
from msa_hf.cli import main
from msa_hf.evaluation.prompting import Writer
from msa_hf.hybrid.chat import PromptTooLong
from msa_hf.retrieval import FusionWeights
from msa_hf.synthetic.conversations import NEVER_SAID, TalkQuestion, make_conversation

TINY = "model_cards/msa-hf-tiny"


@pytest.fixture(scope="module")
def kept(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Kept(*tiny, make_conversation(1, asked=3), tmp_path_factory.mktemp("kept"))
    yield made
    made.close()


def test_a_budget_without_room_is_refused_before_turns_are_encoded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(*given: Any) -> None:
        raise AssertionError("Encoding is begun.")

    monkeypatch.setattr(conversations, "remember_turns", encoded)
    settings = ConversationSettings((1,), asked=1, arms=("gold", "store"), budget=40)
    with pytest.raises(PromptTooLong, match="the budget is 40"):
        run_conversations(settings, *tiny)
    with pytest.raises(AssertionError, match="begun"):  # of other arms it is no limit
        run_conversations(ConversationSettings((1,), asked=1, arms=("gold",), budget=40), *tiny)


def test_all_that_breaks_is_told_in_words() -> None:
    trials = [Trial(broke, "update", {}, "?", ("a",), "b", False, {"broke": broke}) for broke in REASONS]
    result = Result("conversations", {}, {"name": "some"}, trials=trials)
    text, page = text_report(result, reasons=REASONS), html_report(result, reasons=REASONS)
    assert set(REASONS) == {NOT_FOUND, STALE, MISREAD, INVENTED}
    assert all(words in text and words in page for words in REASONS.values())


def asked(answer: str | None, evidence: tuple[int, ...] = (4, 9), stale: tuple[str, ...] = ()) -> TalkQuestion:
    return TalkQuestion("update", "", "What is Ana's locker?", answer, evidence, stale)


@pytest.mark.parametrize(
    ("question", "answer", "read", "wanted"),
    [
        (asked("112"), "It is 112.", [9, 4], (True, "")),
        (asked("112"), "It is 1120.", [9, 4], (False, MISREAD)),
        (asked("112"), "It is 99.", [9], (False, NOT_FOUND)),
        (asked("112"), "", [4, 9], (False, MISREAD)),
        (asked("112", stale=("99",)), "99", [4, 9], (False, STALE)),
        (asked("112", stale=("99",)), "It was 99, it is 112.", [4, 9], (False, STALE)),  # which of them does it mean?
        (asked(None), NEVER_SAID, [], (True, "")),
        (asked(None), f"That is {NEVER_SAID}.", [4], (True, "")),
        (asked(None, stale=("99",)), "99", [4, 9], (False, STALE)),
        (asked(None), "A harp.", [4, 9], (False, INVENTED)),
        (asked(None), "", [4, 9], (False, INVENTED)),
    ],
)
def test_answers_are_judged(question: TalkQuestion, answer: str, read: list[int], wanted: tuple[bool, str]) -> None:
    assert judged(question, answer, read, REFUSALS) == wanted


def test_every_turn_is_in_the_bank_and_in_the_store(kept: Any) -> None:
    turns = list(kept.talk.turns())
    assert list(kept.places) == [turn.number for turn in turns]
    for turn in turns:
        assert "".join(kept.bank.documents[place].text or "" for place in kept.places[turn.number]) == turn.text
    assert [turn.text for turn in StoreArm(kept, ConversationSettings()).memory.conversation.turns()] == [
        turn.text for turn in turns
    ]


def test_what_is_pinned_is_always_read_and_read_first(kept: Any, tiny: Any) -> None:
    writer = Writer(*tiny[:2], kept.bank, tiny[2], 2)
    pinned = [item for item in kept.talk.questions if item.sort == "pinned"]
    arm = StoreArm(kept, ConversationSettings(budget=400, k=1))
    _, read = arm(kept, writer, kept.talk.questions[-1])
    assert set(read[: len(pinned)]) == {number for item in pinned for number in item.evidence} and pinned
    last = list(kept.talk.turns())[-1].number
    assert read[-1] == last  # and the last turn stands next to the question


def test_words_find_what_was_said_once(kept: Any, tiny: Any) -> None:
    writer = Writer(*tiny[:2], kept.bank, tiny[2], 2)
    arm = LexicalArm(kept, ConversationSettings(k=8))
    (said, *_) = [item for item in kept.talk.questions if item.sort == "said once"]
    _, read = arm(kept, writer, said)
    assert set(said.evidence) <= set(read) and read == sorted(read) and len(read) == 8
    # So does the bank alone, where it is told to select by them.
    pytest.importorskip("tantivy")
    rounds = {"select": "hybrid", "max_rounds": 1, "documents_per_round": 8}
    by_words = FusionWeights(("router", "lexical"), "lexical")
    _, read = BankArm(kept, ConversationSettings(rounds=rounds, max_new_tokens=1), by_words)(kept, writer, said)
    assert set(said.evidence) <= set(read)


def test_a_run_goes_on_where_it_ended_and_asks_everything_once(tiny: Any, tmp_path: Path) -> None:
    path, settings = tmp_path / "talk.json", {"sizes": (1,), "asked": 1, "max_new_tokens": 1}
    arms = {"arms": ("none", "bank"), "rounds": {"max_rounds": 1}}
    whole = run_conversations(ConversationSettings(**settings, **arms), *tiny, path=path)  # type: ignore[arg-type]
    assert len(whole.trials) == 10
    record = json.loads(path.read_text())
    record["trials"] = record["trials"][:7]
    path.write_text(json.dumps(record))
    again = run_conversations(ConversationSettings(**settings, **arms), *tiny, path=path)  # type: ignore[arg-type]
    assert again.trials == whole.trials and len(again.runs) == 2
    assert sum(cell.asked for cell in again.cells("arm")) == 10
    *arms_said, longer = in_words(again)  # a conversation is as long as its questions take
    assert len(arms_said) == 2 and longer.startswith("The conversation of 1 tokens has ")
    with pytest.raises(ResultError, match=r"cannot go on with .filler_texts: "):
        run_conversations(ConversationSettings(**settings, **arms), *tiny, ["Other talk."], path)  # type: ignore[arg-type]


def test_the_command_writes_result_and_page_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "talk.json", tmp_path / "talk.html"
    options = [
        "--sizes",
        "1",
        "--asked",
        "1",
        "--arms",
        "none",
        "--max-new-tokens",
        "2",
        "--quiet",
        "--dtype",
        "float32",
    ]
    assert main(["bench", "conversations", TINY, *options, "--out", str(out), "--html", str(page)]) == 0
    assert "the question alone" in capsys.readouterr().out
    assert len(Result.load(out).trials) == 5 and "the question alone" in page.read_text(encoding="utf-8")
    assert main(["bench", "conversations", TINY, *options, "--seed", "1", "--out", str(out)]) == 2
    assert "seed: 0 there, 1 here" in capsys.readouterr().err


def test_an_arm_that_is_none_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="must be among store, bank, lexical, none, gold, got 'crystal'"):
        ConversationSettings(arms=("crystal",))


@pytest.mark.parametrize(
    ("sort", "text", "answer", "stale", "said", "right", "broke"),
    [
        # The question names the later value itself; an answer in a whole sentence repeats it.
        ("before", "What was Ana Roth's course before it was Basque?", "Dutch", "Basque", "Dutch", True, ""),
        (
            "before",
            "What was Ana Roth's course before it was Basque?",
            "Dutch",
            "Basque",
            "Before Basque: Dutch",
            True,
            "",
        ),
        ("before", "What was Ana Roth's course before it was Basque?", "Dutch", "Basque", "Basque.", False, "stale"),
        # Of two that are named, both are no choice; and the other one never held.
        ("which first", "Of whom first, Ana Roth or Eva Holm?", "Ana Roth", "Eva Holm", "Ana Roth", True, ""),
        ("which first", "Of whom first, Ana Roth or Eva Holm?", "Ana Roth", "Eva Holm", "Eva Holm", False, "misread"),
        (
            "which first",
            "Of whom first, Ana Roth or Eva Holm?",
            "Ana Roth",
            "Eva Holm",
            "Ana Roth or Eva Holm",
            False,
            "misread",
        ),
        (
            "updated once",
            "Which language is Ana Roth learning?",
            "Dutch",
            "Basque",
            "Basque, then Dutch",
            False,
            "stale",
        ),
    ],
)
def test_a_value_that_the_question_names_is_no_former_one(
    sort: str, text: str, answer: str, stale: str, said: str, right: bool, broke: str
) -> None:
    question = TalkQuestion("time", sort, text, answer, (3, 5), (stale,))
    assert judged(question, said, [3, 5], ()) == (right, broke)
