"""The memory model as a step's writer: it answers a question from the bank, or from the sources that a step got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ...evaluation.prompting import Writer
from ...generation import MemoryInterleave, PromptProtocol
from ...model.memory_msa import MemoryBank, Snapshots
from ...model.modeling_msa import MSAForCausalLM
from ...model.modes_msa import evaluating
from .sources import Source


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer of a memory, and the documents that were read for it, in order."""

    text: str
    sources: tuple[Source, ...]


class MemoryReader(Protocol):
    """A reader that answers questions from a memory.

    Attributes:
        name: for traces.
    """

    name: str

    def read(self, question: str, sources: Sequence[Source] | None, max_new_tokens: int) -> Reading:
        """Answer a question.

        Args:
            question: a text that is not empty.
            sources: documents of the bank to answer from, best first; None: the model finds its own.
            max_new_tokens: of the answer.
        """
        ...


class InterleaveReader:
    """A model with a memory and its bank.

    A question without sources is answered by Memory Interleave. With sources their texts are read as if a round had
    found them, and the memory layers attend to these documents in place of the routed ones. Answers are greedy.

    Args:
        model: `MSAForCausalLM`.
        tokenizer: of the model.
        bank: that is asked, as it is at every question.
        protocol: what the model was trained with.
        name: for traces. Default: the model's.
        interleave: further arguments of `MemoryInterleave`, such as `max_rounds`.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        bank: MemoryBank | Snapshots,
        protocol: PromptProtocol,
        name: str | None = None,
        **interleave: Any,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.protocol = model, tokenizer, bank, protocol
        self.name = name or str(model.config.name_or_path or model.config.model_type)
        self.interleave = interleave

    def _snapshot(self) -> MemoryBank:
        bank = self.bank.snapshot()
        if not isinstance(bank, MemoryBank):
            raise ValueError(f"A reader needs a MemoryBank or a BankStore, got a {type(bank).__name__}.")
        return bank

    def read(self, question: str, sources: Sequence[Source] | None, max_new_tokens: int) -> Reading:
        """See `MemoryReader.read`.

        Raises:
            ValueError: for a source that is not in the bank any more, or whose text was not stored.
        """
        bank = self._snapshot()
        if sources is None:
            options = {**self.interleave, "max_new_tokens": max_new_tokens}
            answer = MemoryInterleave(self.model, self.tokenizer, bank, self.protocol, **options).ask(question)
            found = [
                Source(item.key, text, item.score, item.position, item.id, metadata)
                for item in answer.documents
                for text, metadata in [_stored(bank, item.position)]
            ]
            return Reading(answer.text, tuple(found))
        positions = [_position(bank, source) for source in sources]
        writer = Writer(self.model, self.tokenizer, bank, self.protocol, max_new_tokens)
        prompt, dropped = writer.prompt(question, [positions])
        read = positions[: len(positions) - dropped]
        with evaluating(self.model):
            # Without documents the layers have none to attend to but those they choose themselves.
            (text,) = writer.write([prompt], memory=True, forced=[read] if read else None)
        return Reading(text, tuple(sources[: len(read)]))


def _position(bank: MemoryBank, source: Source) -> int:
    try:
        return bank.documents.position(source.key)
    except KeyError:
        raise ValueError(f"The bank has no document {source.key!r} any more; search it again.") from None


def _stored(bank: MemoryBank, position: int) -> tuple[str | None, dict[str, Any] | None]:
    document = bank.documents[position]
    return document.text, document.metadata
