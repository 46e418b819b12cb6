"""The rounds of Memory Interleave, on models with a real memory that say what a script tells them to."""

import itertools
import json
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from scripted import COMPACT, PUBLISHED, TEXTS, Script, bank_of, byte_tokenizer, memory_model
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, TextStreamer
from transformers.generation import BaseStreamer

from msa_hf import Document, MSACache
from msa_hf.generation import Answer, MemoryInterleave, PromptProtocol, memory_interleave
from msa_hf.generation.constrained import IdAutomaton, TokenTexts
from msa_hf.model.memory_msa import DocumentTable, MemoryBank

TOKENIZER = byte_tokenizer()
QUESTIONS = ["Where is the amber?", "How far off is the reef, in miles?", "Which one is it?"]
ONE, TWO, THREE = QUESTIONS
PROTOCOLS = {"published": PUBLISHED, "compact": COMPACT}

each_protocol = pytest.mark.parametrize("name", PROTOCOLS)
each_selection = pytest.mark.parametrize("select", ["generate", "constrained", "router"])
each_way = pytest.mark.parametrize("reuse", [False, True], ids=["again", "reuse"])


def made(name: str = "compact", family: str = "qwen3") -> tuple[Any, Any, PromptProtocol]:
    """A model, a bank of 18 documents, and their protocol; the same ones every time."""
    return _made(name, family)


@cache
def _made(name: str, family: str) -> tuple[Any, Any, PromptProtocol]:
    protocol = PROTOCOLS[name]
    model = memory_model(TOKENIZER, protocol, family)
    return model, bank_of(model, TOKENIZER, protocol), protocol


def asker(name: str = "compact", family: str = "qwen3", **options: Any) -> MemoryInterleave:
    model, bank, protocol = made(name, family)
    return MemoryInterleave(model, TOKENIZER, bank, protocol, **{"max_new_tokens": 12, "select": "generate", **options})


def script(asker: MemoryInterleave, says: dict[str, Any], answers: dict[str, Any] | None = None) -> Script:
    return Script(asker.model, TOKENIZER, asker.protocol, says, answers)


def end(asker: MemoryInterleave) -> str:
    return asker.protocol.ids_end


def read(answer: Answer) -> list[list[int]]:
    """Positions read, per round."""
    return [[choice.position for choice in item.read] for item in answer.trace.rounds]


def assert_same_answers(ours: Answer, theirs: Answer) -> None:
    """Text, tokens, documents and all that the trace says; scores up to float32's error."""
    assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
    assert len(ours.trace.rounds) == len(theirs.trace.rounds)
    for one, other in zip(ours.trace.rounds, theirs.trace.rounds, strict=True):
        assert (one.named, one.dropped, one.text, one.ended) == (other.named, other.dropped, other.text, other.ended)
        assert one.generated == other.generated
        for mine, yours in [
            (one.read, other.read),
            *((one.chosen[layer], other.chosen[layer]) for layer in one.chosen),
        ]:
            assert [choice.position for choice in mine] == [choice.position for choice in yours]
            scores = [[choice.score or 0.0 for choice in choices] for choices in (mine, yours)]
            torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), atol=1e-5, rtol=1e-5)


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


def test_the_opening_and_the_end_are_no_part_of_the_answer() -> None:
    interleave = asker("published", max_new_tokens=99)
    said = "The answer to the question is: here, [4].<|im_end|>There."
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


@each_protocol
@each_way
@each_selection
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


# Against a computation from scratch -----------------------------------------------------------------------------------


def published_transcript(rounds: list[list[int]], closed: bool) -> tuple[list[int], list[bool]]:
    """The published transcript of question ONE, put together by hand, and which of its tokens route."""
    pieces = [
        (
            "\nPlease answer the question based on the above historical document information\n\n" + ONE + "\n"
            "Please return all documents related to the question\n",
            True,
        ),
        ("<|im_end|>\n<|im_start|>", False),
    ]
    for number, documents in enumerate(rounds):
        pieces.append(("".join(f"[{id}]" for id in documents) + "<|object_ref_end|>", False))
        block = "".join(f"[{id}]. {TEXTS[id]}\n" for id in documents) + "<|object_ref_end|>"
        pieces.append((block, number == len(rounds) - 1))
    if closed:
        text = f"<End-of-Retrieve><|im_start|>The user's question is: {ONE}\n<|object_ref_end|>"
        pieces.append((text, False))
    ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    routes = [[route] * len(piece) for piece, (_, route) in zip(ids, pieces, strict=True)]
    return list(itertools.chain(*ids)), list(itertools.chain(*routes))


@torch.no_grad()
@pytest.mark.parametrize("rounds", [[[17, 4], [12]], [[5]], []], ids=["two", "one", "none"])
@pytest.mark.parametrize("ends", ["said", "limit"])
def test_every_round_equals_a_computation_from_scratch(rounds, ends) -> None:
    """Routing of every round to the bit, and the answer's tokens: plain calls of the model on the whole transcript.

    The question and the last block route, in the published words. Where the model ends retrieval itself, the answer
    comes from the cache of that round; else everything was prefilled again.
    """
    said = ends == "said"
    interleave = asker("published", max_rounds=len(rounds) + said, documents_per_round=2)
    model, bank, _ = made("published")
    says = ["".join(f"[{id}]" for id in documents) + "<|object_ref_end|>" for documents in rounds]
    with script(interleave, {ONE: [*says, "<End-of-Retrieve>"]}) as script_of:
        answer = interleave.ask(ONE)
    assert read(answer) == [*rounds, *([[]] if said else [])]

    for number, item in enumerate(answer.trace.rounds):
        ids, routes = published_transcript(rounds[:number], closed=False)
        output = model(torch.tensor([ids]), memory=bank, routing_mask=torch.tensor([routes]), use_cache=False)
        assert item.stages["prefill"].tokens == len(ids)
        for layer, found in output.routing.items():
            assert [choice.position for choice in item.chosen[layer]] == found.documents[0].tolist()
            assert [choice.score for choice in item.chosen[layer]] == found.scores[0].tolist()
    ids, routes = published_transcript(rounds, closed=True)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": sorted(interleave.answering.stop_ids())}
    whole = model.generate(torch.tensor([ids]), memory=bank, routing_mask=torch.tensor([routes]), **options)
    assert answer.token_ids == whole[0, len(ids) :].tolist()
    prefilled = [length for length in script_of.fed if length > 1][-1]
    closing = len(ids) - len(published_transcript(rounds, closed=False)[0])
    assert prefilled == (closing if said else len(ids))


@torch.no_grad()
def test_a_reused_cache_equals_turns_of_a_conversation() -> None:
    """`reuse_cache`: each block is a further turn on one cache, where only the block routes; and that is another thing
    than a transcript prefilled again, from the second round on."""
    interleave = asker("published", max_rounds=2, documents_per_round=2, reuse_cache=True)
    model, bank, _ = made("published")
    rounds = [[17, 4], [12]]
    says = {ONE: ["[17][4]<|object_ref_end|>", "[12]<|object_ref_end|>"]}
    with script(interleave, says):
        reused = interleave.ask(ONE)
        again = asker("published", max_rounds=2, documents_per_round=2).ask(ONE)
    kept, fed = MSACache(config=model.config), 0
    for number, item in enumerate(reused.trace.rounds):
        ids, routes = published_transcript(rounds[:number], closed=False)
        new = {"input_ids": torch.tensor([ids[fed:]]), "routing_mask": torch.tensor([routes[fed:]])}
        output = model(**new, memory=bank, past_key_values=kept)
        assert item.stages["prefill"].tokens == len(ids) - fed
        fed = len(ids)
        for layer, found in output.routing.items():
            assert [choice.position for choice in item.chosen[layer]] == found.documents[0].tolist()
            scores = torch.tensor([choice.score for choice in item.chosen[layer]])
            torch.testing.assert_close(scores, found.scores[0], atol=1e-6, rtol=1e-5)
    ids, routes = published_transcript(rounds, closed=True)
    history = {"input_ids": torch.tensor([ids]), "routing_mask": torch.tensor([[False] * fed + routes[fed:]])}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": sorted(interleave.answering.stop_ids())}
    whole = model.generate(**history, memory=bank, past_key_values=kept, **options)
    assert reused.token_ids == whole[0, len(ids) :].tolist()
    assert reused.trace.rounds[0].chosen == again.trace.rounds[0].chosen
    assert reused.trace.rounds[1].chosen != again.trace.rounds[1].chosen


# Selection ------------------------------------------------------------------------------------------------------------


@each_way
def test_constrained_names_only_what_the_routers_chose(reuse) -> None:
    """A model that wants an id that was not chosen, or that does not exist, names one that was; a random one too."""
    interleave = asker(select="constrained", reuse_cache=reuse)
    wanted = {ONE: ["[99][0][00]<|docs|>"], TWO: ["x[1]] <|docs|>"], THREE: []}
    with script(interleave, wanted):
        answers = interleave.ask(QUESTIONS)
    for answer in answers:
        for number, item in enumerate(answer.trace.rounds):
            earlier = {source.position for source in answer.documents if source.round < number}
            assert set(item.named) <= {choice.id for choice in item.combined if choice.position not in earlier}
            assert not item.dropped and len(item.named) == len(item.read)
            assert COMPACT.named_ids(item.generated)[1] is not None  # it came to its end, without a limit
    assert any(answer.documents for answer in answers)


def test_constrained_lets_the_model_choose() -> None:
    """Among the candidates it is the model that says which, how many, and in which order."""
    interleave = asker(select="constrained", max_rounds=2)
    candidates = [choice.id for choice in interleave.ask(ONE).trace.rounds[0].combined]
    picked = [candidates[2], candidates[0]]
    said = "".join(f"[{id}]" for id in picked) + "<|docs|>"
    with script(interleave, {ONE: [said, "<|answer|>"]}):
        answer = interleave.ask(ONE)
    assert answer.trace.rounds[0].named == picked and answer.trace.rounds[1].ended == "the model said so"


@pytest.mark.parametrize(
    "candidates, limit, id_format",
    [([1, 17, 12], 3, "[{id}]"), ([7], 1, "[{id}]"), ([1, 2, 11], 2, "<{id:03d}>"), ([], 0, "[{id}]")],
)
def test_the_automaton_allows_what_can_still_become_valid(candidates, limit, id_format) -> None:
    """Along every path that its tokens can take: exactly the tokens of the vocabulary that continue a valid text."""
    protocol = PromptProtocol(**{**COMPACT.to_dict(), "id_format": id_format, "retrieval_end": "<End>"})
    texts = TokenTexts(protocol, TOKENIZER)
    vocabulary = {number: TOKENIZER.decode([number]) for number in range(len(TOKENIZER))}
    names = {id: id_format.format(id=id) for id in candidates}
    valid = {"<End>"}
    for count in range(1, limit + 1):
        valid |= {"".join(names[id] for id in some) + "<|docs|>" for some in itertools.permutations(candidates, count)}
    automaton, seen = IdAutomaton(protocol, candidates, limit), set()
    open_states = [("", automaton.start())]
    while open_states:
        written, state = open_states.pop()
        following = automaton.allowed(state, texts)
        expected = {
            number for number, text in vocabulary.items() if text and any(v.startswith(written + text) for v in valid)
        }
        assert set(following) == expected
        for number, after in following.items():
            text = written + vocabulary[number]
            assert after.finished == (text in valid)
            if text not in seen:
                seen.add(text)
                open_states.append((text, after))
    assert valid <= seen


def naive_combination(chosen: dict[int, list[Any]], how: str) -> list[tuple[int, float]]:
    scores = [{choice.position: choice.score for choice in choices} for choices in chosen.values()]
    combined = {}
    for position in {position for layer in scores for position in layer}:
        if how == "max":
            combined[position] = max(layer.get(position, -1e9) for layer in scores)
        else:
            combined[position] = sum(layer.get(position, min(layer.values())) for layer in scores) / len(scores)
    return sorted(combined.items(), key=lambda item: (-item[1], item[0]))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_the_router_takes_the_best_over_layers(how) -> None:
    """The union of what the layers chose, by mean or maximum of their scores; nothing is generated."""
    interleave = asker(select="router", layer_scores=how, max_rounds=1, documents_per_round=4)
    for question in QUESTIONS:
        item = interleave.ask(question).trace.rounds[0]
        expected = naive_combination(item.chosen, how)
        assert [choice.position for choice in item.combined] == [position for position, _ in expected]
        assert [choice.score for choice in item.combined] == pytest.approx([score for _, score in expected], abs=1e-6)
        assert len(expected) > 4  # the layers differ, or the union would show nothing
        assert [choice.position for choice in item.read] == [position for position, _ in expected][:4]
        assert not item.generated and item.stages["select"].tokens == 0


def test_exclude_read() -> None:
    """Documents that were read give way to others; without that they are named again, and the round ends retrieval."""
    model, bank, protocol = made()
    every = len(bank)
    small = bank_of(model, TOKENIZER, protocol, TEXTS[:4])  # all of them are chosen in every round
    for exclude, named, dropped in ((True, 0, 0), (False, 4, 4)):
        options: dict[str, Any] = {"documents_per_round": 4, "router_may_end": False, "max_new_tokens": 4}
        interleave = MemoryInterleave(model, TOKENIZER, small, protocol, exclude_read=exclude, **options)
        first, second = interleave.ask(ONE).trace.rounds
        assert len(first.read) == 4 and second.ended == "no new document"
        assert (len(second.named), len(second.dropped)) == (named, dropped)
    constrained = MemoryInterleave(model, TOKENIZER, small, protocol, select="constrained", max_rounds=2)
    with script(constrained, {ONE: ["[2]<|docs|>", "[2]<|docs|>"]}):
        assert 2 not in constrained.ask(ONE).trace.rounds[1].named
        constrained.exclude_read = False
        assert constrained.ask(ONE).trace.rounds[1].dropped[0].reason == "duplicate"
    assert every > 4


def test_the_router_reads_one_document_a_round() -> None:
    """Where the caller does not say how many."""
    interleave = asker(select="router", max_rounds=2, router_may_end=False)
    assert [len(item.read) for item in interleave.ask(ONE).trace.rounds] == [1, 1]


def test_a_constrained_first_round_names_a_document() -> None:
    """Whatever the model would rather say; from the second round on it may name none."""
    interleave = asker(select="constrained", max_rounds=2)
    with script(interleave, {ONE: ["<|answer|>", "<|answer|>"]}):
        first, second = interleave.ask(ONE).trace.rounds
    assert len(first.read) >= 1 and not first.ended
    assert not second.named and second.ended == "the model said so"


@pytest.mark.parametrize("may_end", [True, False])
def test_an_automaton_without_the_end(may_end) -> None:
    """The end marker alone may only stand where it may; without candidates there is nothing else to say."""
    protocol, texts = COMPACT, TokenTexts(COMPACT, TOKENIZER)
    end = TOKENIZER.convert_tokens_to_ids("<|answer|>")
    automaton = IdAutomaton(protocol, [3, 31], 2, may_end)
    assert (end in automaton.allowed(automaton.start(), texts)) == may_end
    empty = IdAutomaton(protocol, [], 2, may_end)
    assert end in empty.allowed(empty.start(), texts)


@pytest.mark.parametrize("may_end", [True, False])
def test_the_model_may_end_what_the_router_selects(may_end) -> None:
    """From the second round on, where it would rather say the end marker than name a document; never in the first."""
    interleave = asker(select="router", router_may_end=may_end, documents_per_round=1)
    with script(interleave, {ONE: ["<|answer|>", "[1]", "<|answer|>"], TWO: ["<|answer|>"]}):
        one, two = interleave.ask([ONE, TWO])
    assert [len(item.read) for item in one.trace.rounds] == ([1, 1, 0] if may_end else [1, 1, 1])
    assert one.trace.rounds[-1].ended == ("the model said so" if may_end else "max_rounds=3")
    assert len(two.trace.rounds) == (2 if may_end else 3)


# Documents ------------------------------------------------------------------------------------------------------------


def rearranged(bank: MemoryBank, order: list[int], texts: bool = True) -> MemoryBank:
    """Some documents of a bank, in another order, with or without their texts."""
    rows = torch.cat([torch.arange(int(bank.offsets[i]), int(bank.offsets[i + 1])) for i in order])
    documents = [bank.documents[i] for i in order]
    if not texts:
        documents = [Document(item.key, None, item.metadata, item.tokens, item.chunks) for item in documents]
    layers = {
        layer: type(memory)(memory.routing_keys[rows], memory.pooled_kv[rows]) for layer, memory in bank.layers.items()
    }
    offsets = torch.tensor([0, *itertools.accumulate(item.chunks for item in documents)])
    return MemoryBank(layers, offsets, bank.prefix, DocumentTable(documents), bank.origin)


@each_selection
def test_no_round_looks_at_all_documents(select, monkeypatch) -> None:
    """Where ids are stored as `encode_corpus` stores them, the work of a round does not grow with the bank."""

    def refuse(table: DocumentTable) -> Any:
        raise AssertionError("the whole table was read")

    interleave = asker(select=select)
    with script(interleave, {ONE: ["[4][17]<|docs|>", "<|answer|>"]}), monkeypatch.context() as patch:
        patch.setattr(DocumentTable, "__iter__", refuse)
        assert interleave.ask(ONE).documents


def test_ids_outlive_positions() -> None:
    """After documents were deleted and moved, the model's ids still mean the documents that they were given to."""
    model, bank, protocol = made()
    moved = rearranged(bank, [17, 3, 8, 0])
    interleave = MemoryInterleave(model, TOKENIZER, moved, protocol, select="generate", max_rounds=1)
    with script(interleave, {ONE: ["[8][17][1][0]<|docs|>"]}, {ONE: "Yes."}):
        answer = interleave.ask(ONE)
    assert [(source.id, source.position, source.key) for source in answer.documents] == [
        (8, 2, "8"),
        (17, 0, "17"),
        (0, 3, "0"),
    ]
    assert [(item.id, item.reason) for item in answer.trace.rounds[0].dropped] == [(1, "unknown")]
    item = answer.trace.rounds[0]
    scores = {choice.id: choice.score for choice in item.combined}
    assert [source.score for source in answer.documents] == [scores[8], scores[17], scores[0]]
    assert item.text == "".join(f"[{id}] {TEXTS[id]}\n" for id in (8, 17, 0)) + "<|ids|>"
    for choices in item.chosen.values():
        assert all(choice.id == [17, 3, 8, 0][choice.position] for choice in choices)


def test_sources_carry_the_routers_scores() -> None:
    """The combined score where a layer had chosen the document, None where the model named another."""
    interleave = asker(max_rounds=1)
    item = interleave.ask(ONE).trace.rounds[0]
    chosen, other = item.combined[1], next(id for id in range(18) if id not in {c.id for c in item.combined})
    with script(interleave, {ONE: [f"[{chosen.id}][{other}]<|docs|>"]}):
        answer = interleave.ask(ONE)
    assert [source.score for source in answer.documents] == [chosen.score, None]


@each_selection
def test_documents_without_text_cannot_be_read(select) -> None:
    model, bank, protocol = made()
    bare = rearranged(bank, [0, 1, 2], texts=False)
    interleave = MemoryInterleave(model, TOKENIZER, bare, protocol, select=select, max_new_tokens=4)
    with script(interleave, {ONE: ["[1]<|docs|>"]}, {ONE: "No."}):
        answer = interleave.ask(ONE)
    assert {item.reason for item in answer.trace.rounds[0].dropped} == {"without text"}
    assert answer.documents == [] and answer.text == "No." and len(answer.trace.rounds) == 1


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
        longest = len(TOKENIZER(said.transcripts[-1][0], add_special_tokens=False)["input_ids"])
        assert longest + 8 <= limit


def test_a_question_that_does_not_fit_is_refused() -> None:
    """Before anything is computed, and by its number; the model's positions are a limit too."""
    with pytest.raises(ValueError, match=r"Question 1 is too long.* the 4092 that fit"):
        asker().ask([ONE, "far " * 1100])
    needed = sum(len(segment.input_ids) for segment in COMPACT.transcript(TOKENIZER, ONE, closed=True)) + 12
    with pytest.raises(ValueError, match=rf"Question 0 is too long.* {needed - 40} tokens longer than the 40"):
        asker(max_context_tokens=40).ask(ONE)


# The answer stage -----------------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended += 1


STREAMED = {
    "The answer to the question is: in a grove.<|im_end|>": " in a grove.",
    "The answer to the questions is no.<|im_end|>": "The answer to the questions is no.",
    "The answer<|im_end|>": "The answer",
    "Here.": "Here.",
}


@pytest.mark.parametrize("said", STREAMED)
def test_a_streamer_gets_the_answer_and_nothing_else(said) -> None:
    """No prompt, ids, texts, opening or end marker, with or without `skip_prompt`; in pieces as they come."""
    interleave = asker("published", max_new_tokens=80)
    with script(interleave, {ONE: ["[4]<|object_ref_end|>", "<End-of-Retrieve>"]}, {ONE: said}):
        recorder = Recorder()
        answer = interleave.ask(ONE, streamer=recorder)
        assert TOKENIZER.decode(recorder.tokens) == STREAMED[said] and recorder.ended == 1
        assert answer.text == STREAMED[said].strip()
        for skip_prompt in (False, True):
            stream = TextIteratorStreamer(TOKENIZER, skip_prompt=skip_prompt, timeout=30)
            thread = threading.Thread(target=interleave.ask, args=(ONE,), kwargs={"streamer": stream})
            thread.start()
            assert "".join(stream) == STREAMED[said]
            thread.join()


def test_streaming_does_not_wait_for_the_end(capsys) -> None:
    """Tokens reach the streamer before generation is over."""
    interleave = asker(max_new_tokens=40)
    seen: list[int] = []

    class Watching(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            seen.append(len(said.fed))

    with script(interleave, {ONE: ["<|answer|>"]}, {ONE: "one two three"}) as said:
        interleave.ask(ONE, streamer=Watching())
        assert len(set(seen)) == len(seen) > 5
        interleave.ask(ONE, streamer=TextStreamer(TOKENIZER))
    assert capsys.readouterr().out == "one two three\n"


@pytest.mark.parametrize("questions", [[ONE, TWO], "", ["x " * 9000]])
def test_a_stream_ends_where_asking_fails(questions) -> None:
    """Whoever reads it must not wait for ever; and a stream holds one answer."""
    recorder = Recorder()
    with pytest.raises(ValueError):
        asker().ask(questions, streamer=recorder)
    assert recorder.ended == 1


class Force(LogitsProcessor):
    """Makes a token certain, and counts."""

    def __init__(self, token: int) -> None:
        self.token, self.calls = token, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        forced = torch.full_like(scores, -1e9)
        forced[:, self.token] = 0.0
        return forced


def test_options_of_generate_reach_the_answer_alone() -> None:
    """A processor sees the answer's steps and no others; sampling changes the answer, not the retrieval."""
    interleave = asker(max_rounds=2)
    force = Force(TOKENIZER.convert_tokens_to_ids("z"))
    plain = interleave.ask(ONE)
    forced = interleave.ask(ONE, logits_processor=LogitsProcessorList([force]))
    assert forced.text == "z" * 12 and force.calls == 12
    sampled = []
    for seed in range(3):
        torch.manual_seed(seed)
        sampled.append(interleave.ask(ONE, do_sample=True, temperature=5.0, top_k=0))
    assert len({tuple(answer.token_ids) for answer in (plain, *sampled)}) == 4
    for answer in (forced, *sampled):
        for mine, yours in zip(answer.trace.rounds, plain.trace.rounds, strict=True):
            assert (mine.generated, mine.chosen, mine.read) == (yours.generated, yours.chosen, yours.read)


@each_way
def test_beams(reuse) -> None:
    """Beams over a cache of earlier rounds and over a fresh one find what they find on the whole transcript."""
    interleave = asker(reuse_cache=reuse, max_rounds=1)
    model, bank, protocol = made()
    with script(interleave, {ONE: ["<|answer|>"], TWO: ["<|answer|>"]}):
        answers = interleave.ask([ONE, TWO], num_beams=3)
    for question, answer in zip((ONE, TWO), answers, strict=True):
        ids, routes = protocol.join(protocol.transcript(TOKENIZER, question, closed=True))
        inputs = {"input_ids": torch.tensor([ids]), "routing_mask": torch.tensor([routes])}
        stops = sorted(interleave.answering.stop_ids())
        options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": stops}
        whole = model.generate(**inputs, memory=bank, **options)[0, len(ids) :].tolist()
        assert answer.token_ids == whole


def test_answers_are_greedy_unless_asked_otherwise() -> None:
    """Also where the model's own options sample, or limit the length."""
    interleave = asker(max_rounds=1)
    config = interleave.model.generation_config
    plain = interleave.ask(ONE)
    before = config.to_dict()
    try:
        config.update(do_sample=True, temperature=9.0, top_p=0.9, max_new_tokens=3)
        assert interleave.ask(ONE).token_ids == plain.token_ids
        torch.manual_seed(0)
        assert interleave.ask(ONE, do_sample=True).token_ids != plain.token_ids
    finally:
        config.update(**before)


@each_selection
@each_way
def test_a_model_that_was_saved_without_a_cache_answers_all_the_same(reuse, select) -> None:
    """As Trainer saves them: the rounds keep a cache whatever the configuration says."""
    interleave = asker(reuse_cache=reuse, select=select, max_rounds=3)
    says = {ONE: ["[3]<|docs|>", "<|answer|>"]}
    with script(interleave, says):
        expected = interleave.ask(ONE)
        configs = interleave.model.config, interleave.model.generation_config
        before = [config.use_cache for config in configs]
        try:
            for config in configs:
                config.use_cache = False
            assert_same_answers(interleave.ask(ONE), expected)
        finally:
            for config, value in zip(configs, before, strict=True):
                config.use_cache = value


def test_a_generation_config_applies_and_stays_as_it_was() -> None:
    interleave = asker(max_rounds=1)
    config = interleave.model.generation_config
    given = type(config)(max_new_tokens=3, do_sample=False, eos_token_id=TOKENIZER.eos_token_id)
    before = given.to_dict()
    assert len(interleave.ask(ONE, generation_config=given).token_ids) == 3
    assert given.to_dict() == before and interleave.model.generation_config is config


def test_the_model_is_left_as_it_was() -> None:
    """Asking in the middle of training neither drops out nor leaves the model in another mode."""
    interleave = asker(max_rounds=1)
    modes = []
    hook = interleave.model.register_forward_hook(lambda model, args, output: modes.append(model.training))
    interleave.model.train()
    try:
        interleave.ask(ONE)
        assert interleave.model.training and modes and not any(modes)
        with pytest.raises(ValueError):
            interleave.ask(ONE, num_return_sequences=2, do_sample=True)
        assert interleave.model.training
    finally:
        hook.remove()
        interleave.model.eval()


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


# The trace ------------------------------------------------------------------------------------------------------------


def test_the_trace(capsys) -> None:
    """Per round: choices of every layer, ids, what was dropped and why, texts, tokens and times; also as JSON."""
    interleave = asker(documents_per_round=1)
    with script(interleave, {ONE: ["[4][99][5]<|docs|>", "<|answer|>"]}, {ONE: "In a grove."}):
        answer = interleave.ask(ONE)
    trace = answer.trace
    assert trace.question == ONE and trace.answer == answer.text == "In a grove."
    first, second = trace.rounds
    assert set(first.chosen) == {1, 3} and all(len(choices) == 4 for choices in first.chosen.values())
    for choices in first.chosen.values():
        scores = [choice.score for choice in choices]
        assert scores == sorted(scores, reverse=True)
        assert [choice.key for choice in choices] == [str(choice.position) for choice in choices]
    assert (first.generated, first.named) == ("[4][99][5]<|docs|>", [4, 99, 5])
    assert first.text == f"[4] {TEXTS[4]}\n<|ids|>"
    said = len(TOKENIZER("[4][99][5]<|docs|>", add_special_tokens=False)["input_ids"])
    assert first.stages["select"].tokens == said and second.stages["select"].tokens == 1
    stages = [*first.stages.values(), *second.stages.values(), *trace.stages.values()]
    assert all(stage.seconds > 0 and stage.tokens > 0 for stage in stages)
    closing = len(TOKENIZER("<|answer|>" + ONE + "\n", add_special_tokens=False)["input_ids"])
    assert trace.stages["answer"].tokens == closing + len(answer.token_ids)

    record = json.loads(trace.to_json())
    assert record["rounds"][0]["chosen"]["1"][0]["position"] == first.chosen[1][0].position
    assert record["rounds"][0]["dropped"] == [
        {"id": 99, "reason": "unknown"},
        {"id": 5, "reason": "above documents_per_round"},
    ]
    assert record["rounds"][1]["ended"] == "the model said so"
    text = trace.explain()
    assert capsys.readouterr().out == text + "\n"
    parts = (ONE, "layer 3 chose", "[4][99][5]", "dropped 99: unknown", TEXTS[4], "the model said so", "In a grove.")
    assert all(part in text for part in parts)
    assert trace.explain(show=False) == text and capsys.readouterr().out == ""


# As a decoding method of generate() -----------------------------------------------------------------------------------


def inputs_of(questions: list[str]) -> Any:
    return TOKENIZER(questions, return_tensors="pt", padding=True, add_special_tokens=False)


@each_selection
def test_custom_generate(select) -> None:
    """`generate(custom_generate=memory_interleave)` returns the prompt and what `ask` answers."""
    interleave = asker(select=select, documents_per_round=2, max_rounds=2)
    model, bank, protocol = made()
    says = {ONE: ["[3][5]<|docs|>", "[8]<|docs|>"], TWO: ["<|answer|>"], THREE: ["[17]<|docs|>", "<|answer|>"]}
    inputs = inputs_of(QUESTIONS)
    with script(interleave, says, {TWO: "Short."}):
        answers = interleave.ask(QUESTIONS)
        output = model.generate(
            **inputs,
            custom_generate=memory_interleave,
            tokenizer=TOKENIZER,
            memory=bank,
            protocol=protocol,
            select=select,
            documents_per_round=2,
            max_rounds=2,
            max_new_tokens=12,
            do_sample=False,
        )
    width = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :width], inputs["input_ids"])
    longest = max(len(answer.token_ids) for answer in answers)
    expected = [answer.token_ids + [0] * (longest - len(answer.token_ids)) for answer in answers]
    assert output[:, width:].tolist() == expected and len({len(answer.token_ids) for answer in answers}) > 1


def test_custom_generate_streams_and_processes() -> None:
    """The streamer gets the prompt from generate(), then the answer; the caller's processors and constraints work."""
    model, bank, protocol = made()
    common: dict[str, Any] = {"custom_generate": memory_interleave, "tokenizer": TOKENIZER, "memory": bank}
    common |= {"protocol": protocol, "max_new_tokens": 5, "max_rounds": 1, "do_sample": False}
    inputs = inputs_of([ONE])
    z, y = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "zy")
    recorder = Recorder()
    output = model.generate(**inputs, **common, streamer=recorder, logits_processor=LogitsProcessorList([Force(z)]))
    assert output[0].tolist() == recorder.tokens == [*inputs["input_ids"][0].tolist(), *[z] * 5]
    stream = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=30)
    only_y: Callable[..., list[int]] = lambda sample, ids: [y]  # noqa: E731
    model.generate(**inputs, **common, streamer=stream, prefix_allowed_tokens_fn=only_y)
    assert "".join(stream) == "yyyyy"


def test_custom_generate_with_samples_and_beams() -> None:
    """Several samples of a question, several beams; both at once is refused."""
    model, bank, protocol = made()
    common: dict[str, Any] = {"custom_generate": memory_interleave, "tokenizer": TOKENIZER, "memory": bank}
    common |= {"protocol": protocol, "max_new_tokens": 6, "max_rounds": 1}
    inputs = inputs_of([ONE, TWO])
    torch.manual_seed(0)
    sampled = model.generate(**inputs, **common, do_sample=True, temperature=9.0, top_k=0, num_return_sequences=3)
    assert sampled.shape[0] == 6 and len({tuple(row) for row in sampled.tolist()}) == 6
    assert torch.equal(sampled[::3, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    found = model.generate(**inputs, **common, do_sample=False, num_beams=2)
    expected = asker(select="router", max_rounds=1).ask([ONE, TWO], num_beams=2, max_new_tokens=6)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == [answer.token_ids for answer in expected]
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(**inputs, **common, do_sample=False, num_beams=2, num_return_sequences=2)


def test_custom_generate_says_what_is_missing() -> None:
    model, bank, _ = made()
    inputs = inputs_of([ONE])
    with pytest.raises(ValueError, match="`tokenizer`"):
        model.generate(**inputs, custom_generate=memory_interleave, memory=bank, max_new_tokens=2)
    with pytest.raises(ValueError, match="`memory`"):
        memory_interleave(model, inputs["input_ids"], tokenizer=TOKENIZER)
    common: dict[str, Any] = {"custom_generate": memory_interleave, "tokenizer": TOKENIZER, "memory": bank}
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(**inputs, **common, return_dict_in_generate=True, max_new_tokens=2)
