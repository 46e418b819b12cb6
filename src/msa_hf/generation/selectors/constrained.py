"""Reading what the model names among the documents that were routed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from ..constrained import IdAutomaton, TokenTexts
from .selector import Asker, Selected, SelectionRound
from .writing import write_ids

if TYPE_CHECKING:
    from torch import Tensor


class Constrained:
    """The documents that the model names where it can only spell ids that some layer chose in this round.

    In the first round it names one at least: how alike documents are grows with the bank, so that none fits is to be
    said of texts that were read.
    """

    model_names_documents: ClassVar[bool] = True
    documents_per_round: ClassVar[int | None] = None

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self._texts: TokenTexts | None = None

    def select(self, round: SelectionRound) -> list[Selected]:
        asker = self.asker
        texts = self._texts = self._texts or TokenTexts(asker.protocol, asker.tokenizer)
        automata: list[IdAutomaton] = []
        for asked in round.asked:
            ids = [choice.id for choice in asked.candidates]
            limit = asker.documents_per_round or len(ids)
            automata.append(IdAutomaton(asker.protocol, ids, limit, may_end=round.number > 0))
        states = [automaton.start() for automaton in automata]

        def likeliest_allowed(logits: Tensor, writing: Collection[int]) -> list[int | None]:
            tokens: list[int | None] = [None] * len(automata)
            for row in writing:
                # Empty where the vocabulary cannot spell any candidate.
                if following := automata[row].allowed(states[row], texts):
                    numbers = list(following)
                    token = tokens[row] = numbers[int(logits[row, numbers].argmax())]
                    states[row] = following[token]
            return tokens

        return write_ids(asker, round, likeliest_allowed)
