"""Encoding a corpus into a bank on disk, part by part, in any number of processes, and going on after an interruption.

The corpus is cut into parts of about as much text each, but for smaller ones at the beginning and the end; that depends
on the corpus alone. A part is encoded by itself: its files and a record, named after everything that they depend on,
are put into a folder of the bank's directory and stay there. Whoever finds the record of a part does not encode it,
whichever process of whichever run did. Once all parts are there, one process moves their files beside the manifest and
writes that one. Until then a bank that lies in the directory stays as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from ..data.documents import Corpus
from ..generation.document_ids import ID_FIELD
from ..model.bank_format_msa import TensorLayout, new_manifest
from ..model.encoded_batches_msa import EncodedWindow, EncodingLayers
from ..model.memory_msa import MemoryBank
from ..model.origin_msa import BankOrigin
from ..model.positions_msa import position_limit
from .corpus_lengths import check_lengths
from .corpus_parts import FOLDER, Part, Record, check_place, commit_parts, find_parts, remove_unfinished, write_part
from .corpus_rows import PartRows, RowReader
from .part_pipeline import BEHIND, WritingBehind, default_workers, reading_ahead
from .sharded.collectives import Collectives, agreed, connect_within
from .store.encoder import EncodingModel
from .store.lock import WriterLock

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ..generation.protocol import PromptProtocol

logger = logging.getLogger(__name__)
PART_SIZE = 10**6  # bytes of text: about 250,000 tokens of English
# Shares of a part: how far behind the beginning, and before the end, the corpus is cut as well. So its first rows are
# there soon, and little is left to be written when the last ones are encoded: writing takes up to half the time of
# encoding, so that each of the last parts is written while the next one, of a third, is encoded.
FIRST_CUTS = 1 / 16, 1 / 4
LAST_CUTS = 1 / 16, 1 / 4, 3 / 4
TIMEOUT = timedelta(hours=1)
SHOWN_EVERY = 1.0  # seconds between two looks at what the other processes have encoded
VERSION = 1  # of what a part is made of; grows when this file makes something else of the same documents


class CorpusModel(EncodingModel, Protocol):
    """The model that encodes a corpus."""

    config: PreTrainedConfig
    dtype: torch.dtype

    def encoding_layers(self, compile_layers: bool = False, fp8_projections: bool = False) -> EncodingLayers: ...
    def encode_rows(self, keys: Sequence[str], ids: Sequence[torch.Tensor], **options: object) -> EncodedWindow: ...


@dataclass(frozen=True)
class Encoded:
    """A report of what `encode_bank` did.

    Attributes:
        documents, tokens, chunks: of the bank.
        parts: how many there are, and `found` of them had been encoded before.
        own: documents of the corpus that this process encoded.
    """

    documents: int
    tokens: int
    chunks: int
    parts: int
    found: int
    own: int


# Processes ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(timeout: timedelta = TIMEOUT) -> Iterator[Collectives]:
    """The processes that a launcher started, connected over gloo; one where none did.

    Args:
        timeout: of every wait for another process; must exceed the time that a part takes.

    Raises:
        RankFailed: where the processes cannot be connected in time.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if launched:
        connect_within(timeout, lambda: dist.init_process_group("gloo", timeout=timeout))
    try:
        ranks = Collectives(None, timeout)
        try:
            yield ranks
            ranks.part()
        except BaseException as error:
            ranks.fail(error)  # what the others have not been told
            raise
        finally:
            ranks.close()
    finally:
        if launched:
            dist.destroy_process_group()


# Encoding -------------------------------------------------------------------------------------------------------------


def encode_bank(
    corpus: Corpus,
    model: CorpusModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    protocol: PromptProtocol | None = None,
    *,
    ranks: Collectives,
    too_long: str = "error",
    max_length: int | None = None,
    part_size: int = PART_SIZE,
    batch_tokens: int = 16384,
    show_progress: bool = True,
    sole_writer: bool = False,
    workers: int | None = None,
    compile_layers: bool = False,
    fp8_projections: bool = False,
) -> Encoded:
    """Encode a corpus into a bank of format version 2, together with the other processes, which all call this.

    Parts that an interrupted run encoded from the same documents, with the same model and settings, are taken over; so
    are those of the bank in `directory`, if this made it. Other parts in the folder are left alone until the bank is
    complete, and removed then. Ids are the documents' numbers in the corpus. With `too_long="split"`, the pieces of
    document i of N have the ids i, i + N, i + 2 N, ..., so that none depends on how others were cut.

    The bank does not depend on the number of processes or on interruptions. It depends on `part_size` in the order of
    a last digit, as on `batch_tokens`: both decide which documents are encoded in one batch.

    Args:
        directory: made where missing; of a file system that all processes share. A bank there is replaced in the end.
        protocol: how documents are wrapped with their ids; None: texts are encoded as they are.
        ranks: of `connected()`.
        too_long: `"error"`, or `"split"` to store documents above the limit in parts `key#0`, `key#1`, ...
        max_length: the limit, in tokens of a document as it is encoded. Default: the model's positions; half of them
            where documents are split and a protocol has them read, since a part of all positions leaves no room for
            the question.
        part_size: bytes of text that are kept at a time, by whole documents; less at the beginning and the end.
        batch_tokens: tokens per batch, padding included.
        sole_writer: for a file system without locks: you vouch that nothing else writes to the directory.
        workers: processes that read and tokenize ahead of this one's model; with any, parts are also written while
            the next ones are encoded. None: three beside an accelerator, if there are cores for them; beside a model on
            the CPU 0, which does one after the other.
        compile_layers: see `model.encode_documents`; parts that are there were encoded either way.
        fp8_projections: see `model.encode_documents`; parts that were encoded otherwise are not taken over.

    Raises:
        BankLocked: where another writer has the directory open.
        BankNotWritable: where the file system of the directory has no locks, naming it.
        BankFormatError: where the directory holds a manifest that cannot be read.
        ValueError: for a document that cannot be encoded, naming it, and where the processes have other documents,
            models, settings or directories.
        RankFailed: where another process failed. What was encoded stays, as after any error.
    """
    folder = directory / FOLDER
    lock: WriterLock | None = None
    try:
        with agreed(ranks):
            encoder = _Encoder(
                corpus, model, tokenizer, protocol, too_long, max_length, batch_tokens, compile_layers, fp8_projections
            )
            parts = encoder.parts(part_size)
            if too_long == "error":
                own_numbers = (
                    number for part in parts[ranks.rank :: ranks.size] for number in range(part.first, part.end)
                )
                check_lengths(corpus, own_numbers, encoder.reader.limit, tokenizer, protocol)
        names = ranks.everyone(_digest([part.name for part in parts]))
        with agreed(ranks):
            if len(set(names)) > 1:
                raise ValueError(
                    "The processes do not have the same documents, model and settings: give all of them the same "
                    "command, and all machines the same files."
                )
        mark = f".run-{uuid.uuid4().hex}.tmp"
        with agreed(ranks):
            if ranks.rank == 0:
                directory.mkdir(parents=True, exist_ok=True)
                lock = WriterLock(directory, sole_writer)
                check_place(directory)  # else the end would refuse, after all the work
                folder.mkdir(exist_ok=True)
                remove_unfinished(folder)
                (folder / mark).touch()
        mark = ranks.everyone(mark)[0]
        with agreed(ranks):
            if not (folder / mark).exists():
                raise ValueError(
                    f"{directory.absolute()} is not the directory that process 0 has: it must lie on a file system "
                    "that all machines share."
                )
            found = find_parts(directory, parts[ranks.rank :: ranks.size])
        records = {name: record for mine in ranks.everyone(found) for name, record in mine.items()}
        found_parts = len(records)
        if workers is None:
            workers = default_workers(model.device)
        own = _encode_parts(encoder, folder, parts, records, ranks, workers, show_progress)
        with agreed(ranks):
            if lock is not None:
                like = encoder.like()
                layers = {layer: (memory.routing_keys, memory.pooled_kv) for layer, memory in like.layers.items()}
                manifest = new_manifest(encoder.origin.to_manifest(), TensorLayout.of_tensors(layers), version=2)
                commit_parts(directory, manifest, like.prefix, [records[part.name] for part in parts], lock)
        documents, tokens, chunks = (
            sum(record[name] for record in records.values()) for name in ("documents", "tokens", "chunks")
        )
        return Encoded(documents, tokens, chunks, len(parts), found_parts, own)
    finally:
        if lock is not None:
            (folder / mark).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing was encoded
            lock.release()


def _encode_parts(
    encoder: _Encoder,
    folder: Path,
    parts: list[Part],
    records: dict[str, Record],
    ranks: Collectives,
    workers: int,
    show_progress: bool,
) -> int:
    """Encode what has no record, a part in every process at a time; adds the records.

    Returns:
        documents of the corpus that this process encoded.
    """
    left = [part for part in parts if part.name not in records]
    there = len(encoder.corpus) - sum(part.end - part.first for part in left)
    others = {path.stem for path in folder.glob("*.json")} - {part.name for part in parts}
    if others and ranks.rank == 0:
        logger.warning(
            "%s: %d parts of an interrupted run are of other documents, another model or other settings; they are "
            "removed when this run is complete.",
            folder,
            len(others),
        )
    own = left[ranks.rank :: ranks.size]
    turns = range(0, len(left), ranks.size)
    shown = tqdm(
        total=len(encoder.corpus),
        initial=there,
        desc="Encoding documents" + (f" ({there} were there)" if there else ""),
        unit="doc",
        disable=not show_progress or ranks.rank > 0,
    )
    with (
        shown,
        reading_ahead(encoder.reader, own, workers) as rows_of_parts,
        WritingBehind(partial(encoder.write, folder), BEHIND if workers else 0) as writing,
    ):
        progress = _Progress(shown, there, ranks.size)
        for turn in turns:
            written: list[Record] = []
            with agreed(ranks):
                for part in left[turn + ranks.rank : turn + ranks.size][:1]:
                    rows = next(rows_of_parts)
                    writing.put(part, rows, encoder.encode(rows, progress))
                if turn == turns[-1] and ranks.rank == 0:
                    encoder.like()  # for the manifest, while parts are on their way to the disk
                written = writing.written(all=turn == turns[-1])
            said = ranks.everyone((written, progress.own))
            records.update({record["part"]: record for theirs, _ in said for record in theirs})
            progress.hear(counts for _, counts in said)
    return sum(part.end - part.first for part in own)


class _Progress:
    """Documents and tokens that all processes have encoded: of this one at any time, of others as of the last turn."""

    def __init__(self, shown: tqdm[object], there: int, processes: int) -> None:
        self._shown, self._there, self._processes = shown, there, processes
        self._started, self._looked = time.perf_counter(), 0.0
        self.own = self._others = (0, 0)  # documents and tokens

    def add(self, documents: int, tokens: int) -> None:
        """Count what this process has encoded."""
        self.own = self.own[0] + documents, self.own[1] + tokens
        if time.perf_counter() - self._looked > SHOWN_EVERY:
            self._show()

    def hear(self, all: Iterable[tuple[int, int]]) -> None:
        """Take note of what every process, this one too, has encoded by now."""
        documents, tokens = (sum(numbers) for numbers in zip(*all, strict=True))
        self._others = documents - self.own[0], tokens - self.own[1]
        self._show()

    def _show(self) -> None:
        self._looked = time.perf_counter()
        documents, tokens = (own + others for own, others in zip(self.own, self._others, strict=True))
        processes = f", {self._processes} processes" if self._processes > 1 else ""
        rate = tokens / (self._looked - self._started)
        self._shown.set_postfix_str(f"{tokens:,} tokens, {rate:,.0f}/s{processes}", refresh=False)
        self._shown.update(self._there + documents - self._shown.n)


class _Encoder:
    """Makes parts of a corpus, and of the rows of a part a bank."""

    def __init__(
        self,
        corpus: Corpus,
        model: CorpusModel,
        tokenizer: PreTrainedTokenizerBase | None,
        protocol: PromptProtocol | None,
        too_long: str,
        max_length: int | None,
        batch_tokens: int,
        compile_layers: bool,
        fp8_projections: bool,
    ) -> None:
        if too_long not in ("error", "split"):
            raise ValueError(f"`too_long` must be 'error' or 'split', got {too_long!r}.")
        self.corpus, self.model, self.batch_tokens = corpus, model, batch_tokens
        self._layers = partial(model.encoding_layers, compile_layers, fp8_projections)
        self._made_layers: EncodingLayers | None = None
        self._like: MemoryBank | None = None
        self.origin: BankOrigin = model.memory_origin(tokenizer)
        if protocol is not None and ID_FIELD in corpus.fields:  # before anything is written
            for number, document in enumerate(corpus):
                if document["metadata"].get(ID_FIELD, number) != number:
                    raise ValueError(
                        f"{corpus.place(number)}: the field {ID_FIELD!r} has the name that the memory needs for its "
                        "own numbers; rename it, or make it the document's key."
                    )
        split = too_long == "split"
        limit = _limit(position_limit(model.config), max_length, halved=split and protocol is not None)
        self.reader = RowReader(
            corpus, tokenizer, protocol, limit, split, model.config.chunk_size, model.config.vocab_size
        )
        self.settings = {
            "version": VERSION,
            "origin": self.origin.to_dict(),
            "dtype": str(model.dtype),
            "protocol": None if protocol is None else protocol.to_dict(),
            "limit": limit,
            "documents": len(corpus) if split else None,  # of which the ids of pieces depend
        }
        if fp8_projections:  # parts from before there was a choice are of the model's own dtype
            self.settings["projections"] = "fp8"

    def parts(self, size: int) -> list[Part]:
        """Cut the corpus into parts of at least `size` bytes of text, those at the beginning and the end aside."""
        parts, first, held, own, left = [], 0, 0, 0, sum(self.corpus.sizes)
        cuts = [*(share * size for share in FIRST_CUTS), size]
        for number, length in enumerate(self.corpus.sizes):
            held, own, before, left = held + length, own + length, left, left - length
            near_end = own >= min(LAST_CUTS) * size and any(left <= share * size < before for share in LAST_CUTS)
            if held >= cuts[0] or near_end or number + 1 == len(self.corpus):
                content = self.corpus.digest(first, number + 1).hex()
                parts.append(Part(first, number + 1, _digest([self.settings, first, content])))
                first, own = number + 1, 0
                cuts = [] if near_end else [cut for cut in cuts if cut > held]
                if not cuts:
                    cuts, held = [size], 0
        return parts

    def like(self) -> MemoryBank:
        """A bank of one token, encoded once: it has the prefix of all, and tells what tensors look like."""
        if self._like is None:
            self._like = self.model.encode_documents([[0]], None, bank_device="cpu", show_progress=False)
        return self._like

    def layers(self) -> EncodingLayers:
        """The model's layers for all parts, made with the first of them."""
        if self._made_layers is None:
            self._made_layers = self._layers()
        return self._made_layers

    def encode(self, rows: PartRows, progress: _Progress) -> EncodedWindow:
        """The memory of a part, perhaps on its way."""

        def count(places: list[int]) -> None:
            progress.add(sum(rows.documents[place] for place in places), sum(rows.lengths[place] for place in places))

        return self.model.encode_rows(
            rows.keys,
            rows.token_ids(),
            batch_tokens=self.batch_tokens,
            layers=self.layers(),
            bank_device="cpu",
            counted=count,
        )

    def write(self, folder: Path, part: Part, rows: PartRows, window: EncodedWindow) -> Record:
        """Put the files of a part and its record into `folder`, once its memory is there."""
        layers = {layer: (memory.routing_keys, memory.pooled_kv) for layer, memory in window.layers().items()}
        return write_part(folder, part, rows.table(self.origin.chunk_size), layers)


def _limit(positions: int | None, asked: int | None, halved: bool) -> int:
    """The most tokens of a document.

    Args:
        positions: of the model; None: any number.
        asked: for by the user.
        halved: the model's positions have to hold a question and its answer besides.

    Raises:
        ValueError: for more than the model has positions for.
    """
    if asked is None:
        return np.iinfo(np.int64).max if positions is None else positions // 2 if halved else positions
    if asked < 1 or (positions is not None and asked > positions):
        most = "" if positions is None else f" to {positions}, the model's positions"
        raise ValueError(f"`max_length` (--max-length) must be from 1{most}, got {asked!r:.80}.")
    return asked


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
