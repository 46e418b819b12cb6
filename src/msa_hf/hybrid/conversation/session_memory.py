"""`SessionMemory`: recent turns, pinned texts and state verbatim in the prompt; older turns from a bank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...bank import BankStore
from ...model.memory_msa import MemoryBank
from ...retrieval import Hit, add_lexical_index
from ..chat.chat_model import PromptTooLong
from ..store import MemoryStore
from .context import RememberedTurn, SessionContext, TokenCounter, count_tokens
from .conversation import Conversation, Turn
from .partition import select_partition
from .remembering import PART_TOKENS, remember_turns, remembered_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class SessionMemory:
    """The context that a model is told of a session with a question, within a budget of tokens.

    Pinned texts, state, and the last turns stand in the prompt as they are; no router decides about them. Older turns
    are in a bank, and those that fit the question are added. A session sees its own turns alone.

    Args:
        store: where sessions lie.
        session: name of the session.
        bank: of turns; one bank serves all sessions. Opened to write, it is brought up to date if a question needs it;
            with `read_only`, another process does that by `remember_turns`.
        tokenizer: of the model that is asked, which need not be the one that made the bank.
        budget: most tokens of a prompt; leave room for the answer.
        recent_share: the part of the room for turns, at most, that goes to recent ones if not all fit.
        least_recent: the last turns that must be there.
        k: older turns, or parts of them, to search for.
        mode: of `bank.search`.
        ttl: as of `Conversation`.
        count: counts the tokens of a prompt. Default: `count_tokens(tokenizer)`. For a `ChatModel`:
            `lambda context: chat.count_tokens(context.messages())`.
        part_tokens: as of `remember_turns`.
    """

    def __init__(
        self,
        store: MemoryStore,
        session: str,
        bank: BankStore,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        budget: int = 2048,
        recent_share: float = 0.5,
        least_recent: int = 2,
        k: int = 4,
        mode: str = "router",
        ttl: float | None = None,
        count: TokenCounter | None = None,
        part_tokens: int = PART_TOKENS,
    ) -> None:
        if count is None and tokenizer is None:
            raise ValueError("Name the `tokenizer` of the model that is asked, or `count` its tokens otherwise.")
        if not 0 <= recent_share <= 1:
            raise ValueError(f"`recent_share` must lie between 0 and 1, got {recent_share}.")
        for name, value in (("budget", budget), ("k", k), ("part_tokens", part_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.conversation = Conversation(store, session, ttl=ttl)
        self.bank = bank
        self._count = count_tokens(tokenizer) if count is None and tokenizer is not None else count
        self.budget, self.recent_share, self.least_recent = budget, recent_share, least_recent
        self.k, self.mode, self.part_tokens = k, mode, part_tokens
        self._parts: dict[tuple[int, int], list[str]] = {}  # of turns in the bank, by number and version
        self._partition: tuple[int, list[str], MemoryBank] | None = None

    def context(self, question: str) -> SessionContext:
        """The prompt of a question; neither the question nor an answer becomes a turn by it.

        Raises:
            PromptTooLong: where pinned texts, state, question and the last turns alone exceed the budget.
        """
        context, turns, least, needed = self._least(question)
        recent = self._fitting(context, turns, least, self.budget)
        if recent < len(turns):
            fixed = self._counted(context)
            limit = fixed + int(self.recent_share * (self.budget - fixed))
            recent = self._fitting(context, turns, least, max(limit, needed))
            older = turns[: len(turns) - recent]
            keys, missing = self._keys(older)
            if missing:
                logger.warning(
                    "Session %r: %d older turns are not in the bank yet and stay unseen; remember_turns puts them in.",
                    self.conversation.session,
                    len(missing),
                )
            context = replace(_with_recent(context, turns, recent), missing=tuple(missing))
            context = self._with_remembered(context, self._search(question, keys), older)
        else:
            context = _with_recent(context, turns, recent)
        return replace(context, tokens=self._counted(context))

    def partition(self, context: SessionContext | None = None) -> MemoryBank:
        """A bank of the session's own turns alone: what `generate(memory=...)` or `MemoryInterleave` take.

        Args:
            context: without the turns that are verbatim in it.
        """
        shown = set() if context is None else {turn.number for turn in context.recent}
        turns = [turn for turn in self.conversation.turns() if turn.number not in shown]
        return self._select(self._keys(turns)[0])

    def check_budget(self, question: str) -> None:
        """Make sure that a question fits, which takes no bank: it may be asked before turns are in one.

        Raises:
            PromptTooLong: where `context` would.
        """
        self._least(question)

    # Inside -----------------------------------------------------------------------------------------------------------

    def _least(self, question: str) -> tuple[SessionContext, Sequence[Turn], int, int]:
        """The least that is in every context of a question.

        Returns:
            The context without turns, all turns, how many of the last it has at least, and the tokens of it and these.
        """
        conversation, turns = self.conversation, self.conversation.turns()
        context = SessionContext(question, conversation.pins(), conversation.state(), ())
        least = min(self.least_recent, len(turns))
        needed = self._counted(_with_recent(context, turns, least))
        if needed > self.budget:
            raise PromptTooLong(
                f"Session {conversation.session!r}: pinned texts, state, the question and the last {least} turns have "
                f"{needed} tokens, the budget is {self.budget}. Raise it, or shorten what is pinned."
            )
        return context, turns, least, needed

    def _counted(self, context: SessionContext) -> int:
        assert self._count is not None
        return self._count(context)

    def _fitting(self, context: SessionContext, turns: Sequence[Turn], least: int, limit: int) -> int:
        """The number of the last turns that fit, at least `least`."""

        def fits(recent: int) -> bool:
            return self._counted(_with_recent(context, turns, recent)) <= limit

        return _largest(fits, least, len(turns))

    def _keys(self, turns: Sequence[Turn]) -> tuple[list[str], list[int]]:
        """The documents of turns in the bank, and the numbers of turns that are not there as they are now."""
        session = self.conversation.session
        if not self._know(turns):
            if self.bank.read_only:
                self.bank.refresh()
            else:
                remember_turns(self.conversation.store, self.bank, [session], part_tokens=self.part_tokens)
            self._know(turns)
        keys = [key for turn in turns for key in self._parts.get((turn.number, turn.version), ())]
        return keys, [turn.number for turn in turns if (turn.number, turn.version) not in self._parts]

    def _know(self, turns: Sequence[Turn]) -> bool:
        """Look up turns that were not seen in the bank so far; returns whether all are there."""
        for turn in turns:
            if (turn.number, turn.version) not in self._parts and (
                parts := remembered_parts(self.bank, self.conversation.session, turn)
            ):
                self._parts[turn.number, turn.version] = parts
        return all((turn.number, turn.version) in self._parts for turn in turns)

    def _select(self, keys: list[str]) -> MemoryBank:
        generation = self.bank.generation
        if self._partition is None or self._partition[:2] != (generation, keys):
            self._partition = generation, keys, select_partition(self.bank.snapshot(), keys)
        return self._partition[2]

    def _search(self, question: str, keys: list[str]) -> list[Hit]:
        if not keys:
            return []
        partition, bank = self._select(keys), self.bank
        if self.mode in ("lexical", "hybrid") and "lexical" not in partition.indexes:
            add_lexical_index(partition)
        hits: list[Hit] = partition.search(
            question, self.k, self.mode, model=bank.model, tokenizer=bank.tokenizer, protocol=bank.protocol
        )
        return hits

    def _with_remembered(self, context: SessionContext, hits: Sequence[Hit], older: Sequence[Turn]) -> SessionContext:
        """Add hits, the best first, as long as they fit."""
        roles = {turn.number: turn.role for turn in older}
        for hit in hits:
            number = int(str((hit.metadata or {})["turn"]))
            item = RememberedTurn(number, roles[number], hit.text or "", hit.rank, hit.score)
            remembered = tuple(sorted([*context.remembered, item], key=lambda found: (found.number, found.rank)))
            longer = replace(context, remembered=remembered)
            if self._counted(longer) <= self.budget:
                context = longer
        return context


def _with_recent(context: SessionContext, turns: Sequence[Turn], recent: int) -> SessionContext:
    return replace(context, recent=tuple(turns[len(turns) - recent :]))


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number from `least` to `most` that fits, if all below one that fits do; `least` is not asked."""
    low, step = least, 1
    while low + step <= most and fits(low + step):  # not by halves: counting all of a long session takes long
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)  # does not fit, or is too many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
