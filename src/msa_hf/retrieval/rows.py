"""The rows of a bank as one commit left them: what indexes that are kept with a bank are made of, and follow."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..json_object import JsonObject
from ..model.bank_format_msa import Manifest, commit_id, lineage_of
from ..model.memory_msa import DocumentTable, MemoryBank

BATCH = 1024  # rows that are decoded at a time


@dataclass(frozen=True)
class CommittedRows:
    """The rows of a bank after a commit.

    Attributes:
        commit: tells this state from every other one of its directory; "" of a bank in memory alone.
        directory: of the bank, None in memory alone.
        lineage: equal ones, in all banks that a directory ever held, begin with equal rows.
        documents: the table, its rows and those without a document.
    """

    commit: str
    directory: Path | None
    lineage: str
    documents: DocumentTable

    @property
    def rows(self) -> int:
        """The number of rows, those without a document too."""
        return self.documents.num_rows

    @property
    def hidden(self) -> np.ndarray:
        """[n] int64, rows without a document, ascending."""
        return self.documents.deleted

    def begins_with(self, lineage: str, rows: int) -> bool:
        """Tell whether the bank begins with the rows of another one."""
        return lineage == self.lineage and rows <= self.rows

    def texts(self, first: int = 0) -> Iterator[tuple[int, str | None]]:
        """Rows from `first` on that have a document, and their texts."""
        return self.documents.texts(first)


class StoreState(Protocol):
    """Everything asked of the state of a `BankStore`."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def segments(self) -> tuple[Any, ...]: ...
    @property
    def table(self) -> Any: ...
    @property
    def hidden(self) -> np.ndarray: ...
    def find(self, key: str) -> int | None: ...


def rows_of_state(state: StoreState, directory: Path | None) -> CommittedRows:
    """The rows of a bank that changes, as its state has them."""
    manifest = state.manifest
    commit = "" if directory is None else commit_id(manifest)
    return CommittedRows(commit, directory, lineage_of(manifest), DocumentTable(state.table, state.hidden, state.find))


def rows_of_bank(bank: MemoryBank) -> CommittedRows:
    """The rows of a bank that does not change."""
    return CommittedRows("", None, uuid.uuid4().hex, bank.documents)


class BankFollower(Protocol):
    """Something that is kept with a bank and made of its documents: a lexical index, vectors.

    A bank that changes calls it after every commit. What it keeps may be behind after a crash, and then says so itself.
    """

    name: str

    def follow(self, rows: CommittedRows) -> None:
        """Bring what is kept to these rows."""

    def searcher(self) -> object | None:
        """What is kept as it is now, for good; None where nothing is."""

    def describe(self) -> JsonObject:
        """JSON values for `stat`."""
