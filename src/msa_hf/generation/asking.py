"""Asking a memory in the way that its checkpoint was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..model.memory_msa import Memory, Snapshots
from ..model.modeling_msa import MSAForCausalLM
from .answering import Answering
from .direct import DirectAsker
from .interleave import MemoryInterleave
from .prompting import Prompting, Said
from .protocol import PromptProtocol

DIRECT_OPTIONS = ("max_new_tokens", "layer_scores")


class Asker(Protocol):
    """An object that answers questions of a bank: `MemoryInterleave` and `DirectAsker`."""

    tokenizer: PreTrainedTokenizerBase
    bank: Memory
    answering: Answering
    max_new_tokens: int

    @property
    def prompting(self) -> Prompting: ...

    @property
    def protocol(self) -> PromptProtocol | None: ...

    def ask(
        self,
        questions: Said | Sequence[Said],
        streamer: BaseStreamer | None = None,
        generation_config: GenerationConfig | None = None,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Any:
        """Answer a question, or many: `Answer`, or a list of them."""

    def room(self, said: Said, max_new_tokens: int | None = None) -> int:
        """Tokens that the model's positions leave beside a question and its answer; below 0: it cannot be asked."""


def asker_of(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    bank: Memory | Snapshots,
    protocol: PromptProtocol | None = None,
    **options: Any,
) -> Asker:
    """Memory Interleave by the checkpoint's protocol; without one what the model writes with the memory attached.

    Args:
        protocol: of `protocol_beside`.
        options: of `MemoryInterleave`; without a protocol there are `max_new_tokens` and `layer_scores` alone.

    Raises:
        ValueError: for an option that needs a protocol, and one out of range.
    """
    if protocol is not None:
        return MemoryInterleave(model, tokenizer, bank, protocol, **options)
    if others := sorted(options.keys() - set(DIRECT_OPTIONS)):
        raise ValueError(
            f"`{others[0]}` is about rounds of reading, which need a protocol: the checkpoint has no "
            "memory_protocol.json, so that the model answers from the memory in one run."
        )
    return DirectAsker(model, tokenizer, bank, **options)


def protocol_beside(name_or_path: str, **hub: Any) -> PromptProtocol | None:
    """The protocol that lies beside a checkpoint; None where it is known to have none.

    Args:
        hub: of a checkpoint on the Hub: `revision`, `token` and others, as of `PromptProtocol.from_pretrained`.

    Raises:
        BankUnavailable: where the Hub refuses or cannot be reached and its cache does not know either, with the remedy:
            without its protocol a checkpoint would be asked in another way than it was trained for.
        ValueError: for one that is damaged.
    """
    try:
        return PromptProtocol.from_pretrained(name_or_path, **hub)
    except FileNotFoundError:
        return None
