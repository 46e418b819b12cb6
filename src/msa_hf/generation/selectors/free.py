"""Reading what the model names, whatever it names."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from .selector import Asker, Selected, SelectionRound
from .writing import write_ids

if TYPE_CHECKING:
    from torch import Tensor


class Free:
    """The documents that the model names, decoded greedily over the whole vocabulary."""

    model_names_documents: ClassVar[bool] = True
    documents_per_round: ClassVar[int | None] = None

    def __init__(self, asker: Asker) -> None:
        self.asker = asker

    def select(self, round: SelectionRound) -> list[Selected]:
        def likeliest(logits: Tensor, writing: Collection[int]) -> list[int | None]:
            return logits.argmax(-1).tolist()

        return write_ids(self.asker, round, likeliest)
