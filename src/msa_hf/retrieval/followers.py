"""What a bank that changes keeps beside its tensors for searching, and tells of every commit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.memory_msa import BankHome, MemoryBank
from .lexical_files import LexicalFollower, open_searcher, read_record
from .rows import BankFollower, CommittedRows

logger = logging.getLogger(__name__)


class Followers:
    """The indexes of one open bank.

    Args:
        directory: of the bank, None in memory alone.
        read_only: nothing is written; what lies there is opened.
        lexical: keep a lexical index: True or its language. None: where the bank has one. False: none, and one that
            lies there is left behind.

    Raises:
        ImportError: where tantivy is missing and an index was asked for.
        ValueError: for another language than that of the index that lies there.
    """

    def __init__(self, directory: Path | None, read_only: bool = False, lexical: bool | str | None = None) -> None:
        self.directory, self.read_only = directory, read_only
        self._followers: list[BankFollower] = []
        self._rows: CommittedRows | None = None
        kept = directory is not None and read_record(directory) is not None
        if read_only or lexical is False or (lexical is None and not kept):
            return
        try:
            self._followers.append(LexicalFollower(directory, lexical if isinstance(lexical, str) else None))
        except ImportError as error:
            if lexical is not None:
                raise
            logger.warning("%s: its lexical index is left behind by what changes now (%s).", directory, error)

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

    def attach(self, bank: MemoryBank) -> None:
        """Give a snapshot of the bank, as it was followed last, what is kept with it."""
        rows = self._rows
        if rows is None:
            return
        if self.directory is not None:
            bank.home = BankHome(self.directory, rows.commit)
            if self.read_only and read_record(self.directory) is not None:
                try:
                    searcher = open_searcher(self.directory, rows, build=False)  # else `search` makes one
                except ImportError:
                    searcher = None  # `search` says so
                if searcher is not None:
                    bank.indexes["lexical"] = searcher
        for item in self._followers:
            item.attach(bank)

    def describe(self) -> dict[str, Any]:
        """What is kept, by name, as JSON values."""
        found = {item.name: item.describe() for item in self._followers}
        if "lexical" not in found and self.directory is not None and (record := read_record(self.directory)):
            current = self._rows is not None and record.get("commit") == self._rows.commit
            found["lexical"] = {"language": record.get("language"), "current": current}
        return found

    @property
    def names(self) -> Sequence[str]:
        """Of what is followed."""
        return [item.name for item in self._followers]
