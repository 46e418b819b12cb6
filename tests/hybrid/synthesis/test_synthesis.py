"""Synthesis on fakes: budgets that are never exceeded, citations, contradictions side by side, summaries."""

import json
import re

import pytest
from fake_chat import FakeChat, FakeMemory
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from msa_hf.hybrid.chat import AnswerError
from msa_hf.hybrid.synthesis import (
    Budget,
    BudgetError,
    ChatExtractor,
    CitationError,
    Finding,
    MemoryExtractor,
    Synthesizer,
    cited_labels,
    extract_findings,
    find_conflicts,
    group_documents,
    summarize,
)
from msa_hf.hybrid.synthesis.budget import Spending, pack, shorten
from msa_hf.hybrid.synthesis.citations import label_keys, resolve
from msa_hf.hybrid.synthesis.extracting import evidence_of, sentences_of

FINDINGS = [
    Finding("Where is it?", "Harrow Bay", f"It is in Harrow Bay, says note {n}.", f"note {n}") for n in range(9)
]


def cite_all(prompt: str) -> str:
    """Cites every label that the prompt shows, but for its instructions."""
    shown = prompt.partition("Write the ")[0]
    return "It is there " + "".join(f"[{label}]" for label in dict.fromkeys(re.findall(r"\[(S\d+)\]", shown)))


class Budgeted(FakeChat):
    """Fails if it is asked for more than a budget; its answers may be longer than they should."""

    def __init__(self, reply, budget: Budget, **options) -> None:
        super().__init__(reply, **options)
        self.budget, self.spent = budget, 0

    def complete(self, messages, max_new_tokens, **options):
        tokens = self.count_tokens(messages)
        assert tokens <= self.budget.prompt_tokens and max_new_tokens <= self.budget.answer_tokens
        self.spent += tokens + max_new_tokens
        assert self.budget.total_tokens is None or self.spent <= self.budget.total_tokens
        assert len(self.asked) < self.budget.calls
        return super().complete(messages, max_new_tokens, **options)


@pytest.mark.parametrize("strategy", ["map_reduce", "refine"])
@pytest.mark.parametrize("room", [130, 150, 1000])
def test_all_findings_arrive_by_either_strategy(strategy: str, room: int) -> None:
    budget = Budget(room, 20)
    chat = Budgeted(cite_all, budget)
    made = Synthesizer(chat, budget, strategy).synthesize("Where?", FINDINGS)
    assert made.cited == tuple(finding.key for finding in FINDINGS) and made.unknown == () == made.conflicts
    assert made.answer == "It is there " + "".join(f"[note {n}]" for n in range(9)) == made.text
    assert made.calls == len(chat.asked) and made.tokens == chat.spent
    assert (room == 1000) == (made.calls == 1)
    for finding in FINDINGS:
        assert any(finding.evidence in messages[-1].content for messages in chat.asked)


words = st.lists(st.sampled_from(["a", "bb", "ccc", "[S1]", "[S99]", "{x}", "{items}", "d\ne"]), max_size=60).map(
    " ".join
)
findings = st.lists(
    st.builds(
        Finding,
        st.sampled_from(["q one", "q two"]),
        st.sampled_from(["yes", "no", "Yes.", "a very long answer " * 12]),
        words,
        st.sampled_from([f"k{n}" for n in range(30)] + ["odd key", "[k]", "S1"]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    findings,
    st.sampled_from(["map_reduce", "refine"]),
    st.integers(60, 400),
    st.integers(1, 80),
    st.none() | st.integers(50, 3000),
    st.integers(1, 12),
    st.integers(0, 150),
)
@example([Finding("q", "a", "b " * 500, "k")], "refine", 150, 30, None, 9, 100)
def test_no_budget_is_ever_exceeded(
    found: list[Finding], strategy: str, prompt: int, answer: int, total: int | None, calls: int, length: int
) -> None:
    """Whatever the findings are and however long the answers: either a text within the budget, or an error."""
    budget = Budget(prompt, answer, total, calls)
    chat = Budgeted(lambda shown: f"{cite_all(shown)} [S77] [what] " + "word " * length, budget)
    try:
        made = Synthesizer(chat, budget, strategy).synthesize("What {now}?", found)
    except BudgetError as error:
        assert re.search(r"prompt_tokens|total_tokens|calls", str(error))
        return
    keys = {finding.key for finding in found}
    assert set(made.cited) <= keys and (not found or set(made.unknown) == {"S77", "what"})
    conflicting = {finding.answer.strip(".").lower() for finding in found if finding.question == "q one"}
    assert any(item.question == "q one" for item in made.conflicts) == (len(conflicting) > 1)


def test_a_budget_that_the_model_does_not_hold_or_that_is_none() -> None:
    with pytest.raises(BudgetError, match="more than the 100 that fake holds"):
        Synthesizer(FakeChat(cite_all, context_tokens=100), Budget(90, 20)).synthesize("Where?", FINDINGS)
    for wrong in ({"prompt_tokens": 0}, {"answer_tokens": True}, {"calls": None}, {"total_tokens": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Budget(**wrong)
    for wrong in ({"strategy": "vote"}, {"on_unknown": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Synthesizer(FakeChat(cite_all), **wrong)
    with pytest.raises(ValueError, match="question"):
        Synthesizer(FakeChat(cite_all)).synthesize(" ", FINDINGS)
    with pytest.raises(ValueError, match="wrote nothing"):
        Synthesizer(FakeChat([" "])).synthesize("Where?", FINDINGS)
    none = Synthesizer(FakeChat([])).synthesize("Where?", [])
    assert none.answer == "No document answers this." and none.calls == 0


def test_citations_of_something_else_are_marked_or_refused() -> None:
    said = "It is there [S1, S2; S40][note 1] and [note 77], not [here] or [in the bay]."
    made = Synthesizer(FakeChat([said])).synthesize("Where?", FINDINGS[:2])
    assert made.cited == ("note 0", "note 1") and made.unknown == ("S40", "here")
    assert made.answer == (
        "It is there [note 0][note 1][unknown source: S40][note 1] and [note 77], not [unknown source: here] or "
        "[in the bay]."
    )
    with pytest.raises(CitationError, match=r"fake cites S40, here, which is not among .*\(S1, S2\)"):
        Synthesizer(FakeChat([said]), on_unknown="refuse").synthesize("Where?", FINDINGS[:2])
    keyed = [Finding("q", "a", "", "mh-1"), Finding("q", "a", "", "S1")]
    made = Synthesizer(FakeChat(["x [mh-1] [S2] [mh-2]"])).synthesize("Where?", keyed)
    assert made.cited == ("mh-1", "S1") and made.unknown == ("mh-2",)


def test_a_source_that_another_prompt_showed_is_unknown_here() -> None:
    """A text of the first findings cannot cite one of the last."""
    chat = FakeChat(lambda prompt: "All say so [S9] [S1]" if "says note 0" in prompt else cite_all(prompt))
    made = Synthesizer(chat, Budget(150, 20)).synthesize("Where?", FINDINGS)
    assert made.unknown == ("S9",)
    assert [messages for messages in chat.asked if "[unknown source: S9] [S1]" in messages[-1].content]


def test_labels() -> None:
    assert cited_labels("[a][b, c;d] [e f] [] [a] x[1] [[g]]") == ["a", "b", "c", "d", "1", "g"]
    assert label_keys(["x", "y", "x"]) == {"S1": "x", "S2": "y"}
    once = resolve("[S1] [S3]", {"S1": "x y"})
    assert once == ("[x y] [unknown source: S3]", ["x y"], ["S3"]) and resolve(once[0], {})[2] == []


def test_contradictions_are_shown_side_by_side() -> None:
    found = [
        Finding("How many?", "40", "It has 40 houses.", "a"),
        Finding("Where?", "In the bay", "", "a"),
        Finding("how  many?", "The 40.", "There are 40.", "b"),
        Finding("How many?", "41", "Count: 41.", "c"),
        Finding("Where?", "the bay", "", "c"),
        Finding("Where?", "In  the Bay!", "", "d"),
        Finding("Which?", "", "", "a"),
        Finding("Which?", "this", "", "b"),
    ]
    conflicts = find_conflicts(found)
    assert [[[item.key for item in side] for side in conflict.sides] for conflict in conflicts] == [
        [["a", "b"], ["c"]], [["a", "d"], ["c"]]
    ]  # fmt: skip
    chat = FakeChat(["It has 40 houses [S1]."])
    made = Synthesizer(chat).synthesize("How many houses?", found)
    assert made.text == (
        "It has 40 houses [a].\n\nSources disagree:\n- How many?: '40' [a][b]; '41' [c]\n"
        "- Where?: 'In the bay' [a][d]; 'the bay' [c]"
    )
    shown = chat.asked[0][-1].content
    places = [shown.index(text) for text in ("It has 40", "There are 40", "Count: 41", "-> In the bay")]
    assert places == sorted(places)
    record = json.loads(json.dumps(made.to_dict()))
    assert record["conflicts"][0]["sides"][1][0]["key"] == "c" and record["text"] == made.text
    assert Synthesizer(FakeChat(["x"]), conflicts=False).synthesize("How many?", found).conflicts == ()


def test_what_the_documents_say_is_never_read_as_a_template() -> None:
    odd = [Finding("{items} {before}", "{task}", "{question} {{x}} {", "k{0}")]
    chat = FakeChat(["x [S1]"])
    assert Synthesizer(chat).synthesize("{items}?", odd).cited == ("k{0}",)
    assert 'Question: {items}?\n\n[S1] {items} {before} -> {task} ("{question} {{x}} {")' in chat.asked[0][-1].content


def test_packing_and_shortening() -> None:
    assert pack([3, 3, 1, 5, 2], lambda run: sum(run) <= 5) == [[3], [3, 1], [5], [2]]
    assert pack([], lambda run: False) == []
    with pytest.raises(BudgetError, match="by itself"):
        pack([6], lambda run: sum(run) <= 5)
    for size in range(12):
        short = shorten("a b c d e", lambda text: len(text) <= size)  # noqa: B023
        best = [text for n in range(5) if len(text := ("a b c d e"[: max(2 * n - 1, 0)] + " [...]")) <= size]
        assert short == ("a b c d e" if size >= 9 else best[-1].strip() if best else None), size
    spending = Spending(FakeChat(["a"]), Budget(5, 2, total_tokens=8, calls=9))
    from msa_hf.hybrid.chat import Message

    spending.complete([Message("user", "a b c")])
    with pytest.raises(BudgetError, match="12 tokens in all"):
        spending.complete([Message("user", "a b c")])
    with pytest.raises(BudgetError, match="has 6 tokens"):
        spending.complete([Message("user", "a b c d e")])


# Extraction -----------------------------------------------------------------------------------------------------------

DOCUMENTS = [
    {"key": "a", "text": "The lamp was made in 1950. It is kept at Harrow Bay."},
    {"key": "b", "text": "Harrow Bay has 40 houses. The lamp was made in 1951!"},
    {"key": "c", "text": "Nothing of note."},
]


def test_groups() -> None:
    groups = group_documents(DOCUMENTS, 2)
    assert [[item.key for item in group.documents] for group in groups] == [["a", "b"], ["c"]]
    assert groups[0].keys() == {"a", "b"} and group_documents([], 3) == []
    for wrong in ([{"key": "a"}], [{"text": "x"}], [*DOCUMENTS, DOCUMENTS[0]], [{"key": "a", "text": " "}]):
        with pytest.raises(ValueError, match=r"Document|documents"):
            group_documents(wrong, 2)
    with pytest.raises(ValueError, match="size"):
        group_documents(DOCUMENTS, 0)


def test_a_memory_extracts_with_the_sentence_that_says_so() -> None:
    answers = {"When was the lamp made?": "1951", "Who made it?": "The memory does not hold the answer."}

    class Reader(FakeMemory):
        def __init__(self, group) -> None:
            super().__init__(answers if group.name == "group 1" else {"When was the lamp made?": "in old times"})
            self.group = group

        def read(self, question, sources, max_new_tokens):
            return super().read(question, self.group.documents, max_new_tokens)

    extractor = MemoryExtractor(Reader)
    found = extract_findings(extractor, list(answers), group_documents(DOCUMENTS, 2))
    assert found == [
        Finding("When was the lamp made?", "1951", "The lamp was made in 1951!", "b", "group 1"),
        Finding("When was the lamp made?", "in old times", "", "c", "group 2", quoted=False),
        Finding("Who made it?", "unknown", "", "c", "group 2", quoted=False),
    ]
    for wrong in ([], [" "]):
        with pytest.raises(ValueError, match="questions"):
            extract_findings(extractor, wrong, [])


def test_evidence() -> None:
    from msa_hf.hybrid.chains import Source

    sources = [
        Source("x", "It rained. Ada wrote 4.2 notes, e.g.this one. Ada slept."),
        Source("y", "Ada wrote. Bob: 4."),
    ]
    assert evidence_of("What did Ada write?", "4.2", sources) == (sources[0], "Ada wrote 4.2 notes, e.g.this one.")
    assert evidence_of("What did Ada do?", "she wrote", sources) == (sources[1], "Ada wrote.")
    assert evidence_of("Why?", "because", sources) == (sources[1], "")
    assert sentences_of('One. "Two!" Three?\nfour\n\n五。六') == ["One.", '"Two!"', "Three?", "four", "五。", "六"]
    assert sentences_of("") == [] and sentences_of("...") == ["..."]


def test_a_chat_model_extracts_from_as_many_prompts_as_it_takes() -> None:
    def reply(prompt: str) -> str:
        rows = []
        for label, text in re.findall(r"\[(S\d+)\] ([^\n]*)", prompt):
            if year := re.search(r"[^.]*(19\d\d)", text):
                rows.append({"answer": year[1], "evidence": f"{year[0].strip()}", "source": label})
        return json.dumps(rows)

    groups = group_documents(DOCUMENTS, 3)
    whole = FakeChat(reply)
    found = ChatExtractor(whole).extract(["When?"], groups[0])
    assert [(item.answer, item.key, item.quoted) for item in found] == [("1950", "a", True), ("1951", "b", True)]
    budget = Budget(150, 40)
    narrow = Budgeted(reply, budget)
    assert ChatExtractor(narrow, budget).extract(["When?"], groups[0]) == found
    assert len(narrow.asked) > len(whole.asked) == 1
    invented = json.dumps([{"answer": "1", "evidence": "it says so", "source": "S1"}])
    (item,) = ChatExtractor(FakeChat(["oops", invented])).extract(["When?"], groups[0])
    assert not item.quoted and item.key == "a"
    wrong = json.dumps([{"answer": "1", "evidence": "x", "source": "S9"}])
    with pytest.raises(AnswerError, match="must be one of"):
        ChatExtractor(FakeChat([wrong, wrong])).extract(["When?"], groups[0])
    with pytest.raises(BudgetError, match="prompt_tokens"):
        ChatExtractor(FakeChat(reply), Budget(20, 5)).extract(["When?"], groups[0])


# Summaries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["map_reduce", "refine"])
def test_a_summary_of_a_long_text(strategy: str) -> None:
    text = " ".join(f"Sentence {n} tells of day {n}." for n in range(60))
    budget = Budget(130, 20)

    def reply(prompt: str) -> str:
        if prompt.startswith("Sum up this part"):
            assert "above all of the days" in prompt
            days = re.findall(r"day (\d+)", prompt)
            return f"Days {days[0]} to {days[-1]}."
        return cite_all(prompt)

    chat = Budgeted(reply, budget)
    made = summarize(text, chat, budget, focus="the days", strategy=strategy)
    assert made.cited == tuple(f"part-{n + 1}" for n in range(len(made.findings))) and len(made.findings) > 2
    spans = [re.findall(r"\d+", finding.answer) for finding in made.findings]
    assert [int(span[0]) for span in spans] == [0, *(int(span[1]) + 1 for span in spans[:-1])] and spans[-1][1] == "59"
    assert made.calls == len(chat.asked) and made.tokens == chat.spent and made.conflicts == ()
    rows = [{"key": "guide#0", "text": "Day 1 was wet. day 1"}, {"key": "guide#1", "text": "It ended. day 2"}]
    assert summarize(rows, FakeChat(reply), focus="the days").cited == ("guide#0", "guide#1")


def test_a_sentence_without_end_is_halved_and_nothing_is_no_document() -> None:
    seen: list[str] = []

    def reply(prompt: str) -> str:
        if prompt.startswith("Sum up this part"):
            seen.append(prompt.partition("\n\n")[2])
            return "x"
        return cite_all(prompt)

    text = " ".join(map(str, range(200)))
    budget = Budget(100, 10, calls=200)
    summarize(text, Budgeted(reply, budget), budget)
    assert " ".join(seen) == text and len(seen) > 3
    for empty in ("", " \n", []):
        with pytest.raises(ValueError, match="no text"):
            summarize(empty, FakeChat(reply))
    with pytest.raises(ValueError, match="Part 0 needs"):
        summarize([{"key": "a"}], FakeChat(reply))
    with pytest.raises(BudgetError, match="prompt_tokens"):
        summarize("word", FakeChat(reply), Budget(5, 5))
