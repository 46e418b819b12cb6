"""The rounds of Memory Interleave, on models with a real memory that say what a script tells them to."""

import itertools
from typing import Any

import pytest
import torch
from asking import (
    ONE,
    QUESTIONS,
    THREE,
    TOKENIZER,
    TWO,
    asker,
    assert_same_answers,
    each_protocol,
    each_selection,
    each_way,
    end,
    made,
    read,
    script,
)
from plain_tape import recorded, use_tapes
from scripted import COMPACT, PUBLISHED, TEXTS, bank_of
from transformers import CompileConfig

from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.model import options_msa, spare_caches_msa
from msa_hf.model.cache_msa import MSAStaticCache

# What the model writes ------------------------------------------------------------------------------------------------


@each_protocol
@pytest.mark.parametrize(
    "spelling",
    [
        ["[1", "7", "][", "4", "]"],
        ["[", "1", "7", "]", "[", "4", "]"],
        ["[1", "7][", "4", "]"],
    ],
    ids=["canonical", "bytes", "straddling"],
)
def test_ids_across_token_boundaries(name, spelling) -> None:
    """However the ids are cut into tokens, the documents are read, and the transcript goes on in canonical spelling."""
    interleave = asker(name)
    protocol = interleave.protocol
    with script(interleave, {ONE: [[*spelling, end(interleave)], protocol.retrieval_end]}, {ONE: "Yes."}) as said:
        answer = interleave.ask(ONE)
    assert read(answer) == [[17, 4], []] and not answer.trace.rounds[0].dropped
    assert [source.position for source in answer.documents] == [17, 4]
    transcript = protocol.transcript(TOKENIZER, ONE, [[(17, TEXTS[17]), (4, TEXTS[4])]])
    assert said.transcripts[1] == [TOKENIZER.decode(protocol.join(transcript)[0])]


@each_way
def test_duplicate_and_unknown_ids_are_dropped(reuse) -> None:
    """With the reason, within a round and across rounds; a round of nothing else ends retrieval."""
    interleave = asker(reuse_cache=reuse, max_rounds=9)
    with script(interleave, {ONE: ["[3][99][3][18]<|docs|>", "[3][5]<|docs|>", "[5][3]<|docs|>"]}, {ONE: "Yes."}):
        answer = interleave.ask(ONE)
    assert read(answer) == [[3], [5], []]
    dropped = [[(item.id, item.reason) for item in item.dropped] for item in answer.trace.rounds]
    assert dropped == [
        [(99, "unknown"), (3, "duplicate"), (18, "unknown")],
        [(3, "duplicate")],
        [(5, "duplicate"), (3, "duplicate")],
    ]
    assert [item.ended for item in answer.trace.rounds] == ["", "", "no new document"]
    assert answer.trace.rounds[0].text == f"[3] {TEXTS[3]}\n<|ids|>"
    assert answer.text == "Yes."


@pytest.mark.parametrize(
    "said, positions, ended",
    [
        ("<|docs|>", [], "no new document"),
        ("<|answer|>", [], "the model said so"),
        ("I do not know", [], "no new document"),
        (["<eos>"], [], "no new document"),
        (["<eos>", "[", "4", "]"], [], "no new document"),
        (["[", "4", "]", "<eos>", "[", "5", "]"], [4], "max_rounds=1"),
        ("[4]<|answer|>", [4], "the model said so"),
    ],
)
def test_rounds_without_documents(said, positions, ended) -> None:
    """Empty ids, no ids, an end of text, and ids that come with the end of retrieval: one round, then the answer."""
    interleave = asker(max_rounds=1 if ended.startswith("max") else 3)
    with script(interleave, {ONE: [said]}, {ONE: "No idea."}) as played:
        answer = interleave.ask(ONE)
    assert read(answer) == [positions] and answer.trace.rounds[0].ended == ended
    assert answer.text == "No idea."
    closing = "<|answer|>" + ONE + "\n"
    block = f"[4]<|docs|>[4] {TEXTS[4]}\n<|ids|>" if positions else ""
    assert played.transcripts[-1] == [f"{ONE}<|ids|>{block}{closing}"]


@each_way
def test_no_marker_at_all(reuse) -> None:
    """The token limit of a round holds, complete ids before it count, and every later round has its own limit."""
    interleave = asker(max_id_tokens=7, max_rounds=2, reuse_cache=reuse)
    with script(interleave, {ONE: [["[", "5", "]", "[", "6", "]", "[", "7", "]"], ["x"] * 99]}, {ONE: "Yes."}) as said:
        answer = interleave.ask(ONE)
    assert read(answer) == [[5, 6], []]
    assert [item.stages["select"].tokens for item in answer.trace.rounds] == [7, 7]
    # One forward per token but the first, whose logits the prefill gave.
    assert [sum(1 for length in group) for one, group in itertools.groupby(said.fed, lambda n: n == 1) if one][:2] == [
        6,
        6,
    ]


@each_selection
@each_way
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_max_rounds(select, reuse, rounds) -> None:
    """A model that always names another document is stopped, and the answer still comes."""
    interleave = asker(select=select, reuse_cache=reuse, max_rounds=rounds, documents_per_round=1)
    says = [f"[{number}]<|docs|>" for number in (3, 5, 8, 9)]
    with script(interleave, {ONE: says}, {ONE: "Yes."}) as said:
        answer = interleave.ask(ONE)
    assert len(answer.trace.rounds) == rounds and answer.text == "Yes."
    assert [item.ended for item in answer.trace.rounds] == [""] * (rounds - 1) + [f"max_rounds={rounds}"] * (rounds > 0)
    assert len(answer.documents) == len({source.position for source in answer.documents}) == rounds
    assert [source.round for source in answer.documents] == list(range(rounds))
    assert len(said.transcripts) == rounds + 1


@each_selection
def test_documents_per_round(select) -> None:
    """At most so many are read in a round; what the model names beyond is dropped, or cannot be named at all."""
    interleave = asker(select=select, documents_per_round=2, max_rounds=1)
    candidates = [choice.id for choice in interleave.ask(ONE).trace.rounds[0].combined]
    said = "".join(f"[{number}]" for number in candidates[:4]) + "<|docs|>"
    with script(interleave, {ONE: [said]}):
        item = interleave.ask(ONE).trace.rounds[0]
    assert [choice.position for choice in item.read] == candidates[:2]
    reasons = {(drop.id, drop.reason) for drop in item.dropped}
    assert reasons == ({(id, "above documents_per_round") for id in candidates[2:4]} if select == "generate" else set())


def test_tokens_of_the_answer_are_limited() -> None:
    interleave = asker(max_rounds=1)
    with script(interleave, {ONE: ["<|answer|>"]}, {ONE: "word " * 50}):
        assert len(interleave.ask(ONE).token_ids) == 12
        assert len(interleave.ask(ONE, max_new_tokens=5).token_ids) == 5


def test_the_opening_the_markers_and_the_end_are_no_part_of_the_answer() -> None:
    interleave = asker("published", max_new_tokens=99)
    said = "The answer to the question is: here, <|object_ref_end|>[4].<|im_end|>There."
    with script(interleave, {ONE: ["<End-of-Retrieve>"]}, {ONE: said}):
        answer = interleave.ask(ONE)
    assert answer.text == "here, [4]."
    assert TOKENIZER.decode(answer.token_ids) == said.removesuffix("There.")


def test_an_end_that_is_no_token() -> None:
    """The answer ends where its text does, whatever is generated for the rest of the batch."""
    model, bank, _ = made()
    protocol = PromptProtocol(
        **{**COMPACT.to_dict(), "answer_end": " THE END", "special_tokens": COMPACT.special_tokens[:3]}
    )
    interleave = MemoryInterleave(model, TOKENIZER, bank, protocol, select="generate", max_new_tokens=40)
    answers = {ONE: "Yes. THE END. No.", TWO: "Twenty miles or so. THE END"}
    with script(interleave, {question: ["<|answer|>"] for question in answers}, answers):
        assert [answer.text for answer in interleave.ask(list(answers))] == ["Yes.", "Twenty miles or so."]


# A batch --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, reuse, select",
    [
        ("compact", False, "generate"),
        ("compact", False, "router"),
        ("compact", True, "constrained"),
        ("published", True, "generate"),
        ("published", False, "constrained"),
    ],
)
def test_a_batch_equals_each_alone(name, reuse, select) -> None:
    """Samples that end in different rounds, questions and texts of different lengths; answers are the model's own."""
    interleave = asker(name, select=select, reuse_cache=reuse, documents_per_round=2)
    stop = interleave.protocol.retrieval_end
    says: dict[str, Any] = {
        ONE: [f"[3]{end(interleave)}", f"[12][5]{end(interleave)}", stop],
        TWO: [stop],
        THREE: [f"[17][4][9]{end(interleave)}", stop],
        "And then?": [],  # unscripted throughout
    }
    questions = list(says)
    with script(interleave, says):
        together = interleave.ask(questions)
        pairs = interleave.ask(questions, batch_size=2)
        alone = [interleave.ask(question) for question in questions]
    # Scripted logits end retrieval, but where ids are not free the first round always reads.
    assert [len(answer.trace.rounds) for answer in alone][:3] == ([3, 2, 2] if select != "generate" else [3, 1, 2])
    assert len({tuple(answer.token_ids) for answer in alone}) == 4  # or the answers would show nothing
    for batch in (together, pairs):
        for ours, theirs in zip(batch, alone, strict=True):
            assert_same_answers(ours, theirs)


@pytest.mark.parametrize("select", ["generate", "router"])
def test_a_batch_on_a_model_with_windows(select) -> None:
    """Caches that cannot be rolled back: nothing is reused, and a batch still equals each alone."""
    interleave = asker(family="gemma2", select=select, documents_per_round=1)
    says = {
        ONE: ["[3]<|docs|>", "[12][5]<|docs|>", "[8]<|docs|>"],
        TWO: ["<|answer|>"],
        THREE: ["[17]<|docs|>", "<|answer|>"],
    }
    with script(interleave, says):
        together = interleave.ask(QUESTIONS)
        for ours, question in zip(together, QUESTIONS, strict=True):
            assert_same_answers(ours, interleave.ask(question))
    with pytest.raises(ValueError, match="reuse_cache"):
        asker(family="gemma2", reuse_cache=True)


def test_many_questions_come_back_in_order() -> None:
    interleave = asker(select="router", max_rounds=1)
    many = [f"{question} ({number})" for number in range(3) for question in QUESTIONS]
    answers = interleave.ask(many, batch_size=4)
    assert [answer.trace.question for answer in answers] == many
    assert interleave.ask([]) == []


# Limits of the context ------------------------------------------------------------------------------------------------


def test_texts_that_do_not_fit_are_not_read() -> None:
    """The transcript with its answer stays within the limit; smaller documents behind a large one are still read."""
    model, _, protocol = made()
    long = "much " * 40 + "more."
    bank = bank_of(model, TOKENIZER, protocol, [long, "Short.", "Small.", "Tiny."])
    empty = protocol.transcript(TOKENIZER, ONE, closed=True)
    room = len(protocol.join(protocol.transcript(TOKENIZER, ONE, [[(1, "Short."), (2, "Small.")]], closed=True))[0])
    assert room < len(protocol.join(empty)[0]) + len(long)
    for limit, fitting in ((room + 8, [1, 2]), (room + 7, [1, 3]), (room + 400, [0, 1, 2, 3])):
        interleave = MemoryInterleave(
            model, TOKENIZER, bank, protocol, select="generate", max_new_tokens=8, max_context_tokens=limit
        )
        with script(interleave, {ONE: ["[0][1][2][3]<|docs|>"]}) as said:
            answer = interleave.ask(ONE)
        assert read(answer)[0] == fitting
        assert [item.id for item in answer.trace.rounds[0].dropped] == [id for id in range(4) if id not in fitting]
        assert all(item.reason == "no room" for item in answer.trace.rounds[0].dropped)
        assert answer.trace.without_room == [id for id in range(4) if id not in fitting]
        longest = len(TOKENIZER(said.transcripts[-1][0], add_special_tokens=False)["input_ids"])
        assert longest + 8 <= limit


def test_a_question_that_does_not_fit_is_refused() -> None:
    """Before anything is computed, and by its number; the model's positions are a limit too."""
    with pytest.raises(ValueError, match=r"Question 1 is too long.* the 4092 that fit"):
        asker().ask([ONE, "far " * 1100])
    needed = sum(len(segment.input_ids) for segment in COMPACT.transcript(TOKENIZER, ONE, closed=True)) + 12
    with pytest.raises(ValueError, match=rf"Question 0 is too long.* {needed - 40} tokens longer than the 40"):
        asker(max_context_tokens=40).ask(ONE)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"select": "best"}, "`select`"),
        ({"layer_scores": "sum"}, "`layer_scores`"),
        ({"max_rounds": -1}, "`max_rounds`"),
        ({"max_rounds": 2.0}, "`max_rounds`"),
        ({"documents_per_round": 0}, "`documents_per_round`"),
        ({"max_id_tokens": 0}, "`max_id_tokens`"),
        ({"max_new_tokens": True}, "`max_new_tokens`"),
    ],
)
def test_options_out_of_range_are_refused(options, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        asker(**options)


@pytest.mark.parametrize(
    "questions, options, problem",
    [
        ("", {}, "Question 0"),
        ([ONE, "  \n"], {}, "Question 1"),
        ([ONE, None], {}, "Question 1"),
        (ONE, {"num_return_sequences": 2}, "num_return_sequences"),
        (ONE, {"max_length": 9}, "max_new_tokens"),
        (ONE, {"routing_mask": torch.ones(1, 3)}, "routing_mask"),
        (ONE, {"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_asked_is_refused(questions, options, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        asker().ask(questions, **options)


def test_a_model_of_another_protocol_is_noticed() -> None:
    model, bank, _ = made("compact")
    with pytest.warns(UserWarning, match="prefix_token_ids"):
        MemoryInterleave(model, TOKENIZER, bank, PUBLISHED)


# Shapes that stay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["router", "generate"])
def test_with_a_static_cache(select, monkeypatch) -> None:
    """The same answers, documents and scores, in batches and over rounds; ids that were named are forgotten again."""
    options: dict[str, Any] = {"select": select, "max_new_tokens": 6, "documents_per_round": 1}
    expected = asker(**options).ask(QUESTIONS, batch_size=2)
    static = asker(**options, cache_implementation="static").ask(QUESTIONS, batch_size=2)
    for ours, theirs in zip(static, expected, strict=True):
        assert_same_answers(ours, theirs)
    # Asked for in other ways, in one round.
    short, made_of = asker(**options, max_rounds=1), MSAStaticCache.__init__
    expected = short.ask(ONE)
    made: list[bool] = []
    monkeypatch.setattr(MSAStaticCache, "__init__", lambda *args, **kw: made.append(True) or made_of(*args, **kw))
    assert_same_answers(short.ask(ONE), expected)
    assert not made
    short.model.free_spare_caches()  # of the questions before
    assert_same_answers(short.ask(ONE, cache_implementation="static"), expected)
    assert made
    short.model.free_spare_caches()
    made.clear()
    monkeypatch.setattr(short.model.generation_config, "cache_implementation", "static")
    assert_same_answers(short.ask(ONE), expected)
    assert made
    with pytest.raises(ValueError, match="`reuse_cache` lets one cache grow"):
        asker(reuse_cache=True, cache_implementation="static")
    with pytest.raises(ValueError, match="must be 'dynamic' or 'static', got 'paged'"):
        asker(cache_implementation="paged")


@pytest.mark.parametrize("select", ["constrained", "generate"])
def test_a_static_cache_that_is_full_is_left(select, monkeypatch) -> None:
    """Where the answer, longer than ids, has no room behind what the last round fed."""
    monkeypatch.setattr(options_msa, "STATIC_STEP", 1)
    options: dict[str, Any] = {"select": select, "max_id_tokens": 30, "max_new_tokens": 31, "max_rounds": 3}
    expected = asker(**options).ask(QUESTIONS[:2], batch_size=2)
    found = asker(**options, cache_implementation="static").ask(QUESTIONS[:2], batch_size=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_answers(ours, theirs)


@pytest.mark.parametrize("select", ["router", "constrained"])
def test_recorded_rounds(select, monkeypatch) -> None:
    """Questions go on with the caches of those before, so that what was recorded for these is played."""
    tapes = use_tapes(monkeypatch)
    options: dict[str, Any] = {"select": select, "max_new_tokens": 6, "documents_per_round": 1, "max_rounds": 2}
    plain, interleave = asker(**options), asker(**options, **recorded())
    interleave.model.free_spare_caches()
    parts = []
    for question in (*QUESTIONS, *QUESTIONS, ONE):
        assert_same_answers(interleave.ask(question), plain.ask(question))
        parts.append([tape.parts for tape in tapes])
    assert len(tapes) == 2 * len(spare_caches_msa._spare[interleave.model])
    assert parts[-1] == parts[-2] and all(parts[-1])
    assert_same_answers(interleave.ask(TWO, num_beams=2), plain.ask(TWO, num_beams=2))  # its cache holds two samples
    assert_same_answers(interleave.ask(ONE), plain.ask(ONE))
    interleave.model.free_spare_caches()


def test_compiled_rounds() -> None:
    """Prompts and single tokens compiled, in one graph each."""
    torch.compiler.reset()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    options = {"select": "constrained", "max_new_tokens": 4, "documents_per_round": 1, "max_rounds": 2}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = asker(**options, cache_implementation="static", compile_config=config).ask(ONE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= before + 2
    assert_same_answers(found, asker(**options).ask(ONE))
    torch.compiler.reset()
