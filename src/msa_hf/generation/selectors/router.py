"""Reading what the router chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .selector import Asked, Asker, Selected, SelectionRound

if TYPE_CHECKING:
    from torch import Tensor


class Router:
    """The best documents by router score, without generating.

    From the second round on it is the model that may end retrieval (`router_may_end`): where it would rather begin the
    end marker than the id of any document to be read.
    """

    model_names_documents: ClassVar[bool] = False
    documents_per_round: ClassVar[int | None] = 1  # what measured best (docs/experiments.md)

    def __init__(self, asker: Asker) -> None:
        self.asker = asker

    def select(self, round: SelectionRound) -> list[Selected]:
        return [
            self._selected(asked, logits, round.number) for asked, logits in zip(round.asked, round.logits, strict=True)
        ]

    def _selected(self, asked: Asked, logits: Tensor, number: int) -> Selected:
        count = self.asker.documents_per_round or self.documents_per_round
        ids = [choice.id for choice in asked.candidates[:count]]
        if number and ids and self.asker.router_may_end:
            protocol, tokenizer = self.asker.protocol, self.asker.tokenizer
            end = protocol.end_segment(tokenizer).input_ids[0]
            begins = {protocol.ids_segment(tokenizer, [id]).input_ids[0] for id in ids}
            if end not in begins and bool(logits[end] > logits[list(begins)].max()):
                return Selected([], ended=True)
        return Selected(ids, ended=False)
