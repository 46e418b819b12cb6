"""Decoding document ids so that every one is valid: an automaton over characters, walked by tokens.

Tokens need not end where ids do ("][", "[1"), so the automaton reads the characters of a token, across the ends of ids.
Its size depends on the candidates of the round, never on the bank.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .protocol import PromptProtocol

# How vocabularies spell a space or a line break.
STAND_INS = {"Ġ", "Ċ", "▁", "#"}


class TokenTexts:
    """The texts of those tokens that ids and markers can be spelt with, by first character.

    Args:
        protocol: of the ids and markers.
        tokenizer: of the model.
    """

    def __init__(self, protocol: PromptProtocol, tokenizer: PreTrainedTokenizerBase) -> None:
        from ..model.tokenizing_msa import tokenize  # transformers: the selectors' names are known without it

        words = protocol.id_format.format(id=0) + protocol.ids_end + protocol.retrieval_end
        alphabet = {*words, *string.digits, *STAND_INS}
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        # Behind another token, because some decoders treat the first of a text in their own way.
        anchor = tokenize(tokenizer, protocol.id_format.format(id=0))[:1]

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        before = decode(anchor)
        self.by_first: dict[str, list[tuple[int, str]]] = {}
        for number, name in enumerate(names):
            if name and set(name) <= alphabet:
                text = decode([*anchor, number])
                if text.startswith(before) and len(text) > len(before):
                    text = text[len(before) :]
                    self.by_first.setdefault(text[0], []).append((number, text))


@dataclass
class Node:
    """A node of a trie over characters.

    Attributes:
        following: character -> the node behind it.
        ends: whether a word ends here.
        id: that this word names; None for a marker.
    """

    following: dict[str, Node] = field(default_factory=dict)
    ends: bool = False
    id: int | None = None


@dataclass
class IdAutomaton:
    """The texts a model may write in a round: distinct candidates and then `ids_end`, or `retrieval_end` alone where it
    may end.

    Args:
        protocol: of the ids and markers.
        candidates: ids that may be named.
        limit: at most so many of them.
        may_end: whether it may name none; without candidates it may in any case.
    """

    protocol: PromptProtocol
    candidates: Sequence[int]
    limit: int
    may_end: bool = True
    _tries: dict[frozenset[int], Node] = field(default_factory=dict)

    def start(self) -> State:
        """The state before anything was written."""
        return State(self._trie(frozenset()), frozenset())

    def _trie(self, named: frozenset[int]) -> Node:
        """The trie of what may follow once these were named."""
        if named not in self._tries:
            root = Node()
            words: list[tuple[str, int | None]] = []
            if len(named) < self.limit:
                words = [(self.protocol.id_format.format(id=id), id) for id in self.candidates if id not in named]
            if named or self.may_end or not words:
                words.append((self.protocol.ids_end if named else self.protocol.retrieval_end, None))
            for word, leaf in words:
                node = root
                for character in word:
                    node = node.following.setdefault(character, Node())
                node.ends, node.id = True, leaf
            self._tries[named] = root
        return self._tries[named]

    def advance(self, state: State, text: str) -> State | None:
        """The state after `text`, or None where it may not follow."""
        for character in text:
            node = None if state.finished else state.node.following.get(character)
            if node is None:
                return None
            if not node.ends:
                state = State(node, state.named)
            elif node.id is None:
                state = State(Node(), state.named, finished=True)
            else:
                named = state.named | {node.id}
                state = State(self._trie(named), named)
        return state

    def allowed(self, state: State, texts: TokenTexts) -> dict[int, State]:
        """Tokens that may follow, each with the state after it."""
        following: dict[int, State] = {}
        for first in state.node.following:
            for number, text in texts.by_first.get(first, ()):
                if (after := self.advance(state, text)) is not None:
                    following[number] = after
        return following


@dataclass(frozen=True)
class State:
    """The place in the automaton that a text has led to.

    Attributes:
        node: of the trie of what may follow.
        named: ids completed.
        finished: a marker was completed; nothing may follow.
    """

    node: Node
    named: frozenset[int]
    finished: bool = False
