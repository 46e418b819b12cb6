"""The interface of a selector, and what it is given in a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ...model.memory_msa import Memory
    from ...model.modeling_msa import MSAForCausalLM
    from ...retrieval import FusionWeights
    from ..document_ids import DocumentIds
    from ..protocol import PromptProtocol
    from ..routed_document import RoutedDocument


class Asker(Protocol):
    """The `MemoryInterleave` that a selector selects for, which describes the arguments, as far as it may be read."""

    model: MSAForCausalLM
    tokenizer: PreTrainedTokenizerBase
    bank: Memory
    ids: DocumentIds
    protocol: PromptProtocol
    documents_per_round: int | None
    max_id_tokens: int
    router_may_end: bool
    fusion: FusionWeights | str | None


@dataclass(frozen=True)
class Asked:
    """One question in one round.

    Attributes:
        question: its text.
        candidates: what the layers chose in this round together, best first; with `exclude_read` without what was read.
        read: positions of the documents that earlier rounds read.
    """

    question: str
    candidates: Sequence[RoutedDocument]
    read: frozenset[int]


@dataclass(frozen=True)
class SelectionRound:
    """One round of a batch of n questions, prefilled and routed.

    Attributes:
        number: of the round, from 0.
        asked: the questions.
        logits: [n, vocabulary] float32, of what would follow each transcript.
        step: feeds one token behind each transcript and returns the next logits, like these.
        rewind: makes the model forget what `step` fed; to be called once behind the last step.
        pad_id: token for questions of the batch that have written all they will.
        stops: tokens that end a text.
    """

    number: int
    asked: Sequence[Asked]
    logits: Tensor
    step: Callable[[list[int]], Tensor]
    rewind: Callable[[], None]
    pad_id: int
    stops: frozenset[int]


@dataclass(frozen=True)
class Selected:
    """The selection for one question.

    Attributes:
        ids: of the documents to read, in order. Those that cannot be read are dropped later, with the reason.
        ended: whether the model said that it has read enough.
        tokens: what the model wrote to name documents; none where it was not asked.
        text: the same as text.
    """

    ids: list[int]
    ended: bool
    tokens: list[int] = field(default_factory=list)
    text: str = ""


class Selector(Protocol):
    """Says which documents a round reads. A new one is a class in a file of its own and a line in `SELECTORS`.

    Attributes:
        model_names_documents: whether the model writes ids (then traces show its words, and `diagnose` can judge them).
        documents_per_round: at most so many where the caller does not say how many; None: as many as are selected.
    """

    model_names_documents: ClassVar[bool]
    documents_per_round: ClassVar[int | None]

    def __init__(self, asker: Asker) -> None: ...

    def select(self, round: SelectionRound) -> list[Selected]:
        """Return what to read for each question of the round, in its order."""
        ...
