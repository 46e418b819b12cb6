"""Which documents are read: what routers chose, and what the model makes of it."""

from typing import Any

import pytest
from asking import ONE, QUESTIONS, THREE, TOKENIZER, TWO, asker, each_way, made, script
from scripted import COMPACT, TEXTS, bank_of

from msa_hf.generation import MemoryInterleave


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
def test_the_model_may_end_what_the_router_selects(may_end) -> None:
    """From the second round on, where it would rather say the end marker than name a document; never in the first."""
    interleave = asker(select="router", router_may_end=may_end, documents_per_round=1)
    with script(interleave, {ONE: ["<|answer|>", "[1]", "<|answer|>"], TWO: ["<|answer|>"]}):
        one, two = interleave.ask([ONE, TWO])
    assert [len(item.read) for item in one.trace.rounds] == ([1, 1, 0] if may_end else [1, 1, 1])
    assert one.trace.rounds[-1].ended == ("the model said so" if may_end else "max_rounds=3")
    assert len(two.trace.rounds) == (2 if may_end else 3)
