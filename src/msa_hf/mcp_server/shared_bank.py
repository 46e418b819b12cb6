"""A bank that several processes read and change: each sees the last commit, and holds the lock for its own alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import StoppingCriteria

from ..bank import BankStore
from ..generation import Answer
from ..generation.asking import Asker, asker_of
from ..hybrid.streams import open_when_free
from ..model.bank_format_msa import MANIFEST
from ..model.checkpoint_msa import UNTRAINED
from ..model.document_table_msa import Document, DocumentTable
from ..model.memory_msa import MemoryBank
from ..retrieval import Hit, Searcher
from ..retrieval.where import Where
from ..user_errors import UserError
from .stopping import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..bank.store.state import BankStat
    from ..generation import PromptProtocol
    from ..model.modeling_msa import MSAForCausalLM
    from ..retrieval import Embedder

TOO_LONG = "Pass too_long="  # how the remedy of encoding a text that is too long begins


@dataclass(frozen=True)
class Options:
    """The way a bank is opened, and asked.

    Attributes:
        read_only: nothing is written, and no lock is asked for.
        create: make an empty bank where there is none.
        patience: seconds to wait for another writer.
        sole_writer: see `BankStore`.
        lexical: keep a lexical index; see `BankStore`.
        embedder: keep vectors of this model, and embed queries with it.
        max_new_tokens: of an answer.
        max_rounds: of retrieval for an answer.
    """

    read_only: bool = False
    create: bool = False
    patience: float = 5.0
    sole_writer: bool = False
    lexical: bool | str | None = None
    embedder: Embedder | None = None
    max_new_tokens: int = 128
    max_rounds: int = 3


@dataclass(frozen=True)
class Reader:
    """A model with what it reads by."""

    model: MSAForCausalLM
    tokenizer: PreTrainedTokenizerBase
    protocol: PromptProtocol | None


@dataclass(frozen=True)
class Page:
    """Documents in the order of the bank, and where the next page begins: None behind the last."""

    documents: list[Document]
    cursor: str | None


class StopGenerating(StoppingCriteria):
    """Ends all texts once there is nothing left to wait for."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """[B] bool, whether each text ends here."""
        return torch.full((len(input_ids),), not self._stop.left, dtype=torch.bool, device=input_ids.device)


@dataclass
class _Current:
    """The things made for one snapshot."""

    bank: MemoryBank
    searcher: Searcher
    modes: list[str] | None = None
    asker: Asker | None = None


class SharedBank:
    """A bank that is read as it was last committed, by whatever process, and changed one commit at a time.

    The lock is held for the length of a commit, so that several servers, each started by its own client, work on one
    bank. Threads may share it; those that need the model wait for their turn.

    Args:
        directory: of the bank.
        reader: encodes, routes and answers. None: what needs no model works.
        options: how it is opened.

    Raises:
        UserError: where there is no bank and none is to be made.
        BankError, ValueError: as `BankStore`.
    """

    def __init__(self, directory: Path, reader: Reader | None = None, options: Options | None = None) -> None:
        self.directory, self.reader = directory, reader
        self.options = Options() if options is None else options
        self._model_turn = threading.Lock()
        self._writer_turn = threading.Lock()  # of this process' threads, also where the file system has no locks
        self._mutex = threading.Lock()  # of what belongs to the snapshot of now
        self._current: _Current | None = None
        if not (directory / MANIFEST).exists():
            if not self.options.create:
                raise UserError(f"{directory}: there is no bank; --create makes an empty one")
            with self._open_to_write():
                pass
        self._store = self._open(read_only=True)

    def _open(self, read_only: bool) -> BankStore:
        options, reader = self.options, self.reader
        return BankStore(
            None if reader is None else reader.model,
            self.directory,
            None if reader is None else reader.tokenizer,
            None if reader is None else reader.protocol,
            read_only=read_only,
            sole_writer=options.sole_writer,
            device=None if reader is None else reader.model.device,
            lexical=options.lexical,
            embedder=options.embedder,
        )

    @contextlib.contextmanager
    def _open_to_write(self) -> Iterator[BankStore]:
        with self._writer_turn:
            opened = open_when_free(lambda: self._open(read_only=False), patience=self.options.patience, poll=0.05)
            with opened as bank:
                yield bank

    @contextlib.contextmanager
    def _with_model(self, stop: Stop) -> Iterator[Reader]:
        if self.reader is None:
            raise UserError("this needs a model, and the server was started without one (--model)")
        if not self._model_turn.acquire(timeout=stop.left):
            raise TimeoutError("the model was busy for longer than a call may take (--timeout)")
        try:
            stop.check()
            yield self.reader
        finally:
            self._model_turn.release()

    # Reading ----------------------------------------------------------------------------------------------------------

    def stat(self) -> BankStat:
        """Numbers about the bank."""
        self._store.refresh()
        return self._store.stat()

    def get(self, key: str) -> Document | None:
        """The document of a key, None if there is none."""
        self._store.refresh()
        return self._store.get(key)

    def page(self, size: int, cursor: str | None = None) -> Page:
        """Some documents, in the order of the bank.

        A document that is replaced meanwhile comes to stand at the end; none that stays is left out.

        Args:
            size: documents at most.
            cursor: of the page before; None: the first.

        Raises:
            ValueError: for a cursor of another bank, or of this one before it was compacted.
        """
        self._store.refresh()
        state = self._store.state  # once: another call may move on to a later commit
        documents = DocumentTable(state.table, state.hidden, state.find)
        lineage, first = str(state.manifest.get("lineage", "")), 0
        if cursor is not None:
            origin, _, row = cursor.partition(":")
            if origin != lineage or not row.isdecimal() or len(row) > 18:
                raise ValueError("This cursor is not of the bank as it is now; list from the beginning.")
            first = int(row)
        rows = (first + np.flatnonzero(documents.visible_rows()[first:])).tolist()
        found = [documents.row(row) for row in rows[:size]]
        return Page(found, f"{lineage}:{rows[size]}" if len(rows) > size else None)

    def _now(self) -> _Current:
        self._store.refresh()
        bank = self._store.snapshot()
        with self._mutex:
            if self._current is None or self._current.bank is not bank:
                reader = self.reader
                made_with = {} if reader is None else vars(reader)
                self._current = _Current(bank, Searcher(bank, embedder=self.options.embedder, **made_with))
            return self._current

    def search(
        self, query: str, k: int, mode: str | None, stop: Stop, where: Where | None = None
    ) -> tuple[str, list[Hit]]:
        """The k best documents for a query, and the mode in which they were found.

        Args:
            mode: see `Searcher.search`. None: hybrid, or the only way that there is.
            where: values of metadata that documents have.

        Raises:
            ValueError: where nothing is there to search by, with the remedy.
        """
        now = self._now()
        if mode is None:
            with self._mutex:
                if now.modes is None:
                    now.modes = _modes(now.searcher)
            mode = now.modes[0]
        if self.reader is None or mode in ("lexical", "dense"):
            return mode, now.searcher.search([query], k, mode, where=where)[0]
        with self._with_model(stop):
            return mode, now.searcher.search([query], k, mode, where=where)[0]

    @property
    def note(self) -> str | None:
        """A warning about what the model says, None where there is nothing."""
        untrained = self.reader is not None and self.reader.model.config.routers_trained is False
        return f"The routers of this model are untrained: {UNTRAINED}." if untrained else None

    def ask(self, question: str, stop: Stop) -> tuple[Answer, list[Document]]:
        """An answer, and the documents that were read for it as they were then.

        Raises:
            TimeoutError: where it takes too long.
        """
        with self._with_model(stop) as reader:
            now = self._now()
            if now.asker is None:
                rounds = {} if reader.protocol is None else {"max_rounds": self.options.max_rounds}
                now.asker = asker_of(
                    reader.model,
                    reader.tokenizer,
                    now.bank,
                    reader.protocol,
                    max_new_tokens=self.options.max_new_tokens,
                    **rounds,
                )
            answer: Answer = now.asker.ask(question, stopping_criteria=[StopGenerating(stop)])
            stop.check()
            return answer, [now.bank.documents[source.position] for source in answer.documents]

    # Changing ---------------------------------------------------------------------------------------------------------

    def upsert(
        self, key: str, text: str, version: int | None, metadata: Mapping[str, object] | None, stop: Stop
    ) -> str:
        """Put a document in, or in the place of the one with its key; it is on the disk when this returns.

        Returns:
            `"added"`, `"replaced"` or `"unchanged"`.

        Raises:
            UserError: for a text of more tokens than a document may have.
        """
        with self._with_model(stop), self._open_to_write() as bank:
            known = key in bank
            try:
                changed = bank.upsert(key, text, version, metadata)
            except ValueError as error:
                cause, found, _ = str(error).partition(TOO_LONG)
                if not found:
                    raise
                raise UserError(f"{cause}Remember it in parts, each under a key of its own.") from error
            return "unchanged" if not changed else "replaced" if known else "added"

    def delete(self, key: str) -> bool:
        """Delete a document, on the disk too when this returns; returns whether there was one."""
        with self._open_to_write() as bank:
            return bank.delete(key)


def _modes(searcher: Searcher) -> list[str]:
    """The modes that a bank can be searched in, the best first.

    Raises:
        ValueError: where there is none, naming what is missing.
    """
    try:
        return ["hybrid", *searcher.ways()]
    except ValueError as error:
        lacking = error
    found = []
    if searcher.model is not None and searcher.model.config.routers_trained is not False:
        found.append("router")
    for name, opened in (("lexical", searcher.lexical), ("dense", searcher.dense)):
        with contextlib.suppress(ValueError, ImportError):
            opened()
            found.append(name)
    if not found:
        raise lacking
    return found
