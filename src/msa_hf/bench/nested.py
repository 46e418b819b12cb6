"""Nested banks: the documents that questions are about, and filler behind them, up to every size that is wanted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..generation import PromptProtocol
from ..model.dense_layer_msa import DenseLayer
from ..model.memory_msa import DocumentTable, MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..synthetic.corpora import Corpus, make_corpus
from ..synthetic.hashing import Permutation, derive_key
from ..synthetic.prose import prose_documents
from .facts import digest_of
from .haystack import HaystackTooSmall

BLOCK = 2048  # texts that a process makes at a time
CORPUS = 1 << 20  # documents of an invented corpus; behind it comes another
TOKENS_OF_ID = 64  # tokens for each number that a document may have; documents are about so long, or longer

Row = dict[str, object]


class Filler(Protocol):
    """Texts by blocks; a process makes any of them without the ones before.

    Attributes:
        digest: a name that tells these texts from others.
    """

    @property
    def digest(self) -> str: ...

    def block(self, number: int) -> list[str]:
        """The texts of a block, at most `BLOCK`; none behind the last."""


class GivenTexts:
    """Texts that lie in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    @property
    def digest(self) -> str:
        """See `Filler`."""
        return digest_of(self._texts)

    def block(self, number: int) -> list[str]:
        """See `Filler`."""
        return list(self._texts[number * BLOCK : (number + 1) * BLOCK])


class InventedTexts:
    """Texts about invented entities without end, a fifth of them real prose.

    Args:
        seed: another seed gives other entities.
        asked: all texts of questions and of what they are about: entities whose names are in them are left out.
    """

    def __init__(self, seed: int, asked: Sequence[str], prose_share: float = 0.2) -> None:
        self._seed, self._asked, self._share = seed, "\n".join(asked), prose_share

    @property
    def digest(self) -> str:
        """See `Filler`."""
        return digest_of(self.block(0))

    def block(self, number: int) -> list[str]:
        """See `Filler`."""
        corpus, start = divmod(number * BLOCK, CORPUS)
        made = _corpus(self._seed * 4099 + corpus + 1, self._share)
        part = start, start + BLOCK
        return [
            text
            for text, name in zip(made.texts(*part), made.names(*part), strict=True)
            if name is None or name not in self._asked
        ]


@lru_cache(maxsize=1)
def _corpus(seed: int, share: float) -> Corpus:
    prose = prose_documents(200, seed=seed, words=55, packages=False) if share else []
    return make_corpus(CORPUS, seed=seed, split="test", prose=prose, prose_share=share)


class NestedDocuments:
    """Rows for encoding: first the documents that questions are about, then filler.

    Numbers of documents, by which a model names them, are drawn from all that a bank of the largest size has, so that
    those asked about do not stand out.

    Args:
        wanted: texts of the documents that questions are about; their positions in every bank are theirs here.
        filler: what stands behind them.
        tokens: of the largest bank.
        seed: of the numbers.
        workers: processes that make texts and tokens; 0: this one does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        wanted: Sequence[str],
        filler: Filler,
        tokens: int,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self._maker = _RowMaker(tokenizer, protocol, filler, len(wanted), tokens, seed)
        self._wanted, self._tokens, self._workers = wanted, tokens, workers

    def fit_into(self, tokens: int) -> bool:
        """Tell whether a bank of so many tokens has all documents that questions are about, the last one if it begins
        there."""
        return sum(self._maker.row(*item)[1] for item in enumerate(self._wanted[:-1])) < tokens

    def rows(self) -> Iterator[Row]:
        """Rows up to the number of tokens.

        Raises:
            HaystackTooSmall: where the filler ends before.
        """
        total = 0
        for number, text in enumerate(self._wanted):
            row, count = self._maker.row(number, text)
            total += count
            yield row
        with self._blocks() as blocks:
            for block in blocks:
                empty = True
                for row, count in block:
                    if total >= self._tokens:
                        return
                    empty, total = False, total + count
                    yield row
                if empty:
                    break
        if total < self._tokens:
            raise HaystackTooSmall(
                f"The texts have {total:,} tokens, but the largest bank is to have {self._tokens:,}. Name more "
                "texts or ask for smaller sizes."
            )

    def _blocks(self) -> AbstractContextManager[Iterable[Iterable[tuple[Row, int]]]]:
        numbers = range(1 << 40)
        if not self._workers:
            return nullcontext(map(self._maker.block, numbers))
        return _PooledBlocks(self._maker, self._workers)


class _RowMaker:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        filler: Filler,
        first: int,
        tokens: int,
        seed: int,
    ) -> None:
        self._tokenizer, self._protocol, self._filler, self._first = tokenizer, protocol, filler, first
        self._order = Permutation(max(tokens // TOKENS_OF_ID, first, 1), derive_key(seed, "numbers"))

    def row(self, number: int, text: str) -> tuple[Row, int]:
        """A document, and its tokens."""
        if self._protocol is None:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"key": str(number), "text": text, "input_ids": ids}, len(ids)
        id = int(self._order.forward(np.array([number]))[0]) if number < self._order.size else number
        row: Row = dict(self._protocol.document_row(id, text, self._tokenizer, str(number)))
        return row, len(row["input_ids"])  # type: ignore[arg-type]

    def block(self, number: int) -> Iterator[tuple[Row, int]]:
        """The documents of a block of the filler."""
        first = self._first + number * BLOCK
        return (self.row(first + place, text) for place, text in enumerate(self._filler.block(number)))


class _PooledBlocks:
    """Blocks that processes make, in order, a few ahead."""

    def __init__(self, maker: _RowMaker, workers: int) -> None:
        self._maker, self._workers = maker, workers

    def __enter__(self) -> Iterator[list[tuple[Row, int]]]:
        # Spawned: a process that has a GPU cannot be forked.
        self._pool = multiprocessing.get_context("spawn").Pool(self._workers, _keep, (self._maker,))
        return self._made()

    def _made(self) -> Iterator[list[tuple[Row, int]]]:
        ahead = [self._pool.apply_async(_kept_block, (number,)) for number in range(2 * self._workers)]
        number = len(ahead)
        while True:
            yield ahead.pop(0).get()
            ahead.append(self._pool.apply_async(_kept_block, (number,)))
            number += 1

    def __exit__(self, *error: object) -> None:
        self._pool.terminate()
        self._pool.join()


_kept: list[_RowMaker] = []  # of a worker process


def _keep(maker: _RowMaker) -> None:
    _kept.append(maker)


def _kept_block(number: int) -> list[tuple[Row, int]]:
    return list(_kept[0].block(number))


def encode_nested(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: NestedDocuments,
    *,
    batch_tokens: int = 16384,
    bank_device: str | None = None,
    show_progress: bool = False,
) -> MemoryBank:
    """The bank of the largest size."""
    options = {"batch_tokens": batch_tokens, "bank_device": bank_device, "show_progress": show_progress}
    return model.encode_documents(documents.rows(), tokenizer, **options)


def documents_of(bank: MemoryBank, tokens: int) -> int:
    """The number of first documents that have so many tokens."""
    ends = np.cumsum(bank.documents.counts("tokens"))
    return min(int(np.searchsorted(ends, tokens)) + 1, len(bank))


def first_documents(bank: MemoryBank, documents: int) -> MemoryBank:
    """The first documents of a bank whose documents were never deleted, as a bank; its tensors are views."""
    if documents == len(bank):
        return bank
    end = int(bank.offsets[documents])
    layers = {
        layer: DenseLayer(memory.routing_keys[:end], memory.pooled_kv[:end]) for layer, memory in bank.layers.items()
    }
    table = DocumentTable(bank.documents[:documents])
    return MemoryBank(layers, bank.offsets[: documents + 1], bank.prefix, table, bank.origin)
