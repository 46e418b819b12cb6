"""Reading what the router, the bank's lexical index and its vectors find together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .router import Router
from .selector import Asked, Asker, Selected, SelectionRound

if TYPE_CHECKING:
    from ...retrieval import Searcher

DEPTH = 100  # documents of the lexical index, and of the vectors, that are fused with those that the router chose


class Hybrid(Router):
    """The best documents by a fusion of rankings (docs/retrieval.md): what the layers chose in this round, and what the
    lexical index and the vectors of the bank have for the question, where there are any.

    The router looks at the question and at what was read last, so its ranking changes from round to round; the others
    look at the question alone, which finds more of the documents that several steps need than adding what was read
    (docs/experiments.md). Documents that were read are left out.

    Raises:
        ValueError: if the bank has neither a lexical index nor vectors, or vectors without the model that made them.
    """

    def __init__(self, asker: Asker) -> None:
        super().__init__(asker)
        from ...retrieval import Searcher  # here, because the command line lists selectors without loading torch

        self.searcher: Searcher = Searcher(asker.bank, model=asker.model, fusion=asker.fusion)
        self.ways = self.searcher.kept()

    def select(self, round: SelectionRound) -> list[Selected]:
        questions = [asked.question for asked in round.asked]
        depth = DEPTH + max(len(asked.read) for asked in round.asked)
        found = {way: self.searcher.rankings(way, questions, depth) for way in self.ways}
        chosen = []
        for number, (asked, logits) in enumerate(zip(round.asked, round.logits, strict=True)):
            fused = self._fused(asked, {way: lists[number] for way, lists in found.items()})
            chosen.append(self._selected(fused, logits, round.number))
        return chosen

    def _fused(self, asked: Asked, found: dict[str, list[tuple[int, float]]]) -> Asked:
        """The question with the documents of all rankings together as its candidates."""

        def unread(ranking: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
            return [(position, score) for position, score in ranking if position not in asked.read]

        router = [(choice.position, choice.score or 0.0) for choice in asked.candidates]
        lists = {"router": unread(router), **{way: unread(ranking) for way, ranking in found.items()}}
        count = self.asker.documents_per_round or self.documents_per_round
        ranked = self.searcher.fused(lists, asked.question)[:count]
        return replace(asked, candidates=self.searcher.routed(ranked))
