"""The things that a bank that changes keeps beside its tensors for searching, and tells of every commit."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from ..json_object import JsonObject
from ..model.bank_format_msa import BankFormatError
from ..model.memory_msa import BankHome
from .dense_files import KIND as VECTORS_KIND
from .dense_files import RECORD as VECTORS
from .dense_files import DenseFollower, VectorsBehind, VectorsLost, has_vectors, open_vectors, outdated_files
from .dense_files import damaged_files as damaged_vectors
from .embedders import Embedder
from .lexical_files import LexicalFollower, is_current, open_searcher, outdated_folders, read_record
from .lexical_files import damaged_files as damaged_index
from .rows import BankFollower, CommittedRows
from .sidecar import read_sidecar

logger = logging.getLogger(__name__)


class Followers:
    """The indexes of one open bank.

    Args:
        directory: of the bank, None in memory alone.
        read_only: nothing is written; what lies there is opened.
        lexical: keep a lexical index: True or its language. None: where the bank has one. False: none, and one that
            lies there is left behind.
        embedder: keep vectors, made by this model, or embed queries with it. None: where the bank has vectors, they
            follow what needs no new ones.

    Raises:
        ImportError: where tantivy is missing and an index was asked for.
        ValueError: for another language than that of the index that lies there, or another embedding model.
    """

    def __init__(
        self,
        directory: Path | None,
        read_only: bool = False,
        lexical: bool | str | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.directory, self.read_only, self.embedder = directory, read_only, embedder
        self._followers: list[BankFollower] = []
        self._rows: CommittedRows | None = None
        if read_only:
            return
        kept = directory is not None and read_record(directory) is not None
        if lexical or (lexical is None and kept):
            try:
                self._followers.append(LexicalFollower(directory, lexical if isinstance(lexical, str) else None))
            except ImportError as error:
                if lexical is not None:
                    raise
                logger.warning("%s: its lexical index is left behind by what changes now (%s).", directory, error)
        if embedder is not None or (directory is not None and has_vectors(directory)):
            try:
                self._followers.append(DenseFollower(directory, embedder))
            except VectorsLost as error:  # the bank can be written to without them
                logger.warning("%s: its vectors are left behind by what changes now (%s)", directory, error)

    def follow(self, rows: CommittedRows) -> None:
        """Bring all to these rows. What fails is left behind with a warning: the bank's commit stands."""
        self._rows = rows
        if self.read_only:
            return
        for item in list(self._followers):
            try:
                item.follow(rows)
            except Exception:
                self._followers.remove(item)
                logger.warning(
                    "%s: the %s index could not follow a commit; opening the bank again brings it up to date.",
                    self.directory or "bank in memory",
                    item.name,
                    exc_info=True,
                )

    def outdated_files(self) -> list[Path]:
        """Files and folders of indexes that are not of the commit that was followed last: no search uses them, and they
        may hold documents that were deleted since."""
        if self.directory is None or self._rows is None:
            return []
        return [
            *outdated_folders(self.directory, self._rows.commit),
            *outdated_files(self.directory, self._rows),
        ]

    def damaged_files(self) -> dict[str, str]:
        """The faults of files of the indexes of the commit that was followed last, by their paths."""
        if self.directory is None or self._rows is None:
            return {}
        commit = self._rows.commit
        return {**damaged_index(self.directory, commit), **damaged_vectors(self.directory, commit)}

    @property
    def home(self) -> BankHome | None:
        """The place of the bank, and the commit that was followed last."""
        if self.directory is None or self._rows is None:
            return None
        return BankHome(self.directory, self._rows.commit)

    def searchers(self) -> JsonObject:
        """Everything kept of the commit that was followed last, by name, for good."""
        rows, found = self._rows, {item.name: item.searcher() for item in self._followers}
        if self.directory is not None and rows is not None and self.read_only:
            # What cannot be opened now, a search makes, or says why not.
            with contextlib.suppress(ImportError):
                found["lexical"] = open_searcher(self.directory, rows, build=False)
            with contextlib.suppress(VectorsBehind, BankFormatError):
                found["dense"] = open_vectors(self.directory, rows, self.embedder)
        return {name: searcher for name, searcher in found.items() if searcher is not None}

    def describe(self) -> JsonObject:
        """Everything kept, by name, as JSON values."""
        found = {item.name: item.describe() for item in self._followers}
        if "lexical" not in found and self.directory is not None and (record := read_record(self.directory)):
            current = self._rows is not None and is_current(record, self._rows.commit)
            found["lexical"] = {"language": record.get("language"), "current": current}
        if "dense" not in found and self.directory is not None and has_vectors(self.directory):
            record = read_sidecar(self.directory / VECTORS, VECTORS_KIND) or {}
            current = self._rows is not None and record.get("commit") == self._rows.commit
            found["dense"] = {"model": record.get("model"), "current": current}
        return found
