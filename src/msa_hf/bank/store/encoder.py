"""The encoder of the documents of a bank that changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ...model.bank_format_msa import TensorPair
from ...model.bank_reader_msa import KnowsOrigin
from ...model.memory_msa import MemoryBank
from ...model.origin_msa import BankOrigin, check_origin
from .changes import Change

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...generation.protocol import PromptProtocol


class EncodingModel(KnowsOrigin, Protocol):
    """The model of a bank that changes."""

    device: torch.device

    def encode_documents(
        self, documents: Iterable[object], tokenizer: object = None, **options: object
    ) -> MemoryBank: ...
    def encode_prefix(self) -> dict[int, TensorPair]: ...


@dataclass(frozen=True)
class DocumentEncoder:
    """A model, and how it encodes documents.

    Attributes:
        device: where their tensors go.
        options: further arguments of `encode_documents`.
    """

    model: EncodingModel
    tokenizer: PreTrainedTokenizerBase | None
    protocol: PromptProtocol | None
    device: torch.device
    options: Mapping[str, object]

    def encode(self, documents: Iterable[object]) -> MemoryBank:
        return self.model.encode_documents(documents, self.tokenizer, bank_device=self.device, **self.options)

    def prefix(self, dtype: torch.dtype) -> dict[int, TensorPair]:
        """Keys and values [G, p, D] of the template prefix, per layer."""
        found = self.model.encode_prefix().items()
        return {layer: (keys.to(self.device, dtype), values.to(self.device, dtype)) for layer, (keys, values) in found}

    def encode_changes(self, changes: Mapping[str, Change], origin: BankOrigin) -> MemoryBank:
        """Encode the documents of some changes, by key.

        Raises:
            ValueError: if the model is no longer the one that made the bank, or a document was split.
        """
        bank = self.encode(self._document(key, change) for key, change in changes.items())
        check_origin(origin, bank.origin)  # an adapter may have been switched, or weights changed, since
        if len(bank) != len(changes):
            raise ValueError("A document was split while it was encoded; an open bank takes whole ones only.")
        return bank

    def _document(self, key: str, change: Change) -> Mapping[str, object]:
        if self.protocol is not None:
            assert change.known.id is not None and change.text is not None
            return self.protocol.document_row(change.known.id, change.text, self.tokenizer, key)
        row = {"key": key, "text": change.text, "input_ids": change.input_ids}
        return {name: value for name, value in row.items() if value is not None}
