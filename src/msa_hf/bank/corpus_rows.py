"""The documents of a part of a corpus as rows of a bank: read, tokenized, cut where they are too long, and digested.

What comes out is numbers and text, without a tensor, so that other processes can make it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.documents import Corpus, DocumentRow
from ..generation.document_ids import ID_FIELD
from ..model.arrow_msa import ArrowTable, table_of
from ..model.encoding_msa import _Fields, _Item, _Reader
from ..model.splitting_msa import LimitTooSmall, split_text
from .corpus_parts import Part
from .store.changes import text_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..generation.protocol import PromptProtocol

BLOCK = 64  # documents that are tokenized together


@dataclass
class PartRows:
    """The rows of a part: documents and pieces of documents.

    Attributes:
        keys, texts, ids, digests: of each row.
        metadata: likewise, as JSON; None where there is none.
        tokens: [T] int32, those of all rows.
        lengths: of the rows, in tokens.
        documents: how many documents of the corpus end with a row, 0 or 1.
    """

    keys: list[str] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    metadata: list[str | None] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    lengths: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    def token_ids(self) -> tuple[torch.Tensor, ...]:
        """The token ids of each row, [tokens] int64."""
        return torch.from_numpy(self.tokens.astype(np.int64)).split(self.lengths)

    def table(self, chunk_size: int) -> ArrowTable:
        """The rows as a table of format version 2."""
        return table_of(
            {
                "key": [*self.keys],
                "text": [*self.texts],
                "metadata": [*self.metadata],
                "tokens": [*self.lengths],
                "chunks": [-(-length // chunk_size) for length in self.lengths],
                "id": [*self.ids],
                "version": [None] * len(self.keys),
                "digest": [*self.digests],
            }
        )


@dataclass(frozen=True)
class RowReader:
    """Makes the rows of parts of a corpus.

    Attributes:
        limit: of tokens of a document.
        split: cut what is longer into pieces; else it is refused.
        chunk_size, vocabulary: of the model.
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase | None
    protocol: PromptProtocol | None
    limit: int
    split: bool
    chunk_size: int
    vocabulary: int

    def rows(self, part: Part) -> PartRows:
        """The rows of a part.

        Raises:
            ValueError: for a document that cannot be encoded, naming it.
            DataError: where the corpus is not what it was when it was looked at.
        """
        made, tokens = PartRows(), []
        documents = self.corpus.read(part.first, part.end)
        pieces = self._plain(part.first, documents) if self.protocol is None else self._wrapped(part.first, documents)
        wrapping = "" if self.protocol is None else self.protocol.document
        for number, document, items in pieces:
            given = None if self.protocol is not None else document.get("input_ids")
            for piece, item in enumerate(items):
                self._check_key(number, document["key"], item.key)
                metadata = dict(item.metadata or {})
                if self.protocol is not None:
                    del metadata[ID_FIELD]  # the table has a column for it
                made.keys.append(item.key)
                made.texts.append(item.text)
                made.metadata.append(json.dumps(metadata, ensure_ascii=False, allow_nan=False) if metadata else None)
                made.ids.append(number + piece * len(self.corpus))
                made.digests.append(text_digest(wrapping, item.text, given))
                made.lengths.append(len(item.ids))
                made.documents.append(0)
                tokens.append(item.ids.numpy())
            made.documents[-1] = 1
        made.tokens = np.concatenate(tokens).astype(np.int32)
        return made

    def _check_key(self, number: int, key: str, own: str) -> None:
        if own != key and own in self.corpus.keys:
            raise ValueError(
                f"Document {number} (key {key!r}) is stored in parts, of which one gets the key {own!r}, "
                f"which is that of {self.corpus.place(self.corpus.keys[own])}; rename one of them."
            )

    def _reader(self, too_long: str) -> _Reader:
        return _Reader(
            tokenizer=self.tokenizer,
            limit=self.limit,
            too_long=too_long,
            chunk_size=self.chunk_size,
            add_special_tokens=False,
            text_column="text",
            key_column="key",
            vocabulary=self.vocabulary,
        )

    def _plain(
        self, first: int, documents: Iterable[DocumentRow]
    ) -> Iterator[tuple[int, DocumentRow, Iterator[_Item]]]:
        """Documents with the items that each becomes, the texts as they are."""
        waiting: list[DocumentRow] = []

        def noted() -> Iterator[Mapping[str, object]]:
            for document in documents:
                waiting.append(document)
                yield dict(document)

        for number, items in self._reader("split" if self.split else "error").items(noted(), first):
            yield number, waiting.pop(0), items

    def _wrapped(
        self, first: int, documents: Iterator[DocumentRow]
    ) -> Iterator[tuple[int, DocumentRow, Iterator[_Item]]]:
        """Documents with the items that each becomes, wrapped with their ids."""
        assert self.protocol is not None and self.tokenizer is not None
        reader, number = self._reader("error"), first
        while block := list(islice(documents, BLOCK)):
            values = [{"id": id, "text": document["text"]} for id, document in enumerate(block, start=number)]
            for document, ids in zip(
                block, self.protocol.encode_each(self.tokenizer, self.protocol.document, values), strict=True
            ):
                if self.split and len(ids) > self.limit:
                    yield number, document, self._pieces(reader, number, document)
                else:
                    key, metadata = document["key"], {**document["metadata"], ID_FIELD: number}
                    taken = _Fields(number, key, document["text"], metadata, _tensor_of(ids))
                    yield number, document, reader.taken(taken)
                number += 1

    def _pieces(self, reader: _Reader, number: int, document: DocumentRow) -> Iterator[_Item]:
        """A document that is too long, in pieces that each have an id."""
        protocol, tokenizer, key, text = self.protocol, self.tokenizer, document["key"], document["text"]
        assert protocol is not None and tokenizer is not None
        largest = number + len(text) * len(self.corpus)
        empty = protocol.encode(tokenizer, protocol.document, id=10 ** len(str(largest)), text="")
        try:
            for piece, (words, _) in enumerate(split_text(tokenizer, text, self.limit - len(empty))):
                id, metadata = number + piece * len(self.corpus), {**document["metadata"], "part": piece}
                row = protocol.document_row(id, words, tokenizer, f"{key}#{piece}", metadata)
                yield from reader.taken(
                    _Fields(number, row["key"], words, row["metadata"], _tensor_of(row["input_ids"]))
                )
        except LimitTooSmall as error:
            raise ValueError(f"Document {number} (key {key!r}) cannot be split: {error}.") from None


def _tensor_of(ids: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(ids, np.int64))
