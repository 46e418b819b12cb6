"""Decoding ids so that every one is valid."""

import itertools

import pytest
from asking import (
    TOKENIZER,
)
from scripted import COMPACT

from msa_hf.generation import PromptProtocol
from msa_hf.generation.constrained import IdAutomaton, TokenTexts


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


@pytest.mark.parametrize("may_end", [True, False])
def test_an_automaton_without_the_end(may_end) -> None:
    """The end marker alone may only stand where it may; without candidates there is nothing else to say."""
    protocol, texts = COMPACT, TokenTexts(COMPACT, TOKENIZER)
    end = TOKENIZER.convert_tokens_to_ids("<|answer|>")
    automaton = IdAutomaton(protocol, [3, 31], 2, may_end)
    assert (end in automaton.allowed(automaton.start(), texts)) == may_end
    empty = IdAutomaton(protocol, [], 2, may_end)
    assert end in empty.allowed(empty.start(), texts)
