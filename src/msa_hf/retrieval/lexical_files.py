"""The lexical index of a bank in its directory: it follows the bank's commits, and is opened by readers.

    lexical.json            which files, of which commit of the bank; written after the index, which is written after
                            the bank's own commit
    lexical-<16 hex>/       tantivy's files

After a crash the index may be behind the bank, never ahead of it unnoticed: `lexical.json` names the commit that it is
of, the rows that it has (`CommittedRows.lineage`), tantivy's own last commit, and its files with their SHA-256: tantivy
compares nothing, and finds something else in damaged ones. If one of them differs, a writer brings the index up to date
when it opens the bank, or makes it anew, and a reader makes one of its own in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path

import numpy as np

from ..json_object import JsonObject
from .lexical import FEW_DOCUMENTS, META, Change, LexicalIndex, LexicalSearcher, stamp_of
from .rows import CommittedRows
from .sidecar import damage_of, digest_of, read_sidecar, write_sidecar

logger = logging.getLogger(__name__)
RECORD = "lexical.json"
KIND = "msa_hf-lexical-index"
VERSION = 2  # of how texts become words; an index of another one is made anew
FOLDER = re.compile(r"lexical-[0-9a-f]{16}")
TRIES = 10  # of a reader whose files a writer removes meanwhile


def read_record(directory: Path) -> JsonObject | None:
    """The record in `lexical.json`, None where the bank has no lexical index."""
    record = read_sidecar(directory / RECORD, KIND)
    if record is None and os.path.lexists(directory / RECORD):
        return {"kind": KIND, "language": "english"}  # damaged: of no commit
    return record


def is_current(record: JsonObject, commit: str) -> bool:
    """Tell whether an index is of this commit of the bank, and of the words of this release."""
    return record.get("version") == VERSION and record.get("commit") == commit


class LexicalFollower:
    """Keeps the lexical index of a bank that changes.

    Args:
        directory: of the bank; None: the index lies in memory.
        language: of a new index. None: that of the index that lies there, else English.

    Raises:
        ImportError: where tantivy is missing.
        ValueError: for a language other than that of the index that lies there.
    """

    name = "lexical"

    def __init__(self, directory: Path | None = None, language: str | None = None) -> None:
        record = None if directory is None else read_record(directory)
        kept = None if record is None else record.get("language")
        if language is not None and kept is not None and kept != language:
            raise ValueError(f"The bank's lexical index is of the language {kept!r}, not {language!r}.")
        self.directory, self.language = directory, language or kept or "english"
        self._lineage, self._rows = "", 0
        self._left_out = 0  # rows that were when the index was recorded
        self._hidden: np.ndarray | None = None  # rows that are known to be left out; None: not known
        self._commit: str | None = None
        self._folder: Path | None = None
        self._index: LexicalIndex | None = None
        LexicalIndex(self.language)  # refuses what cannot be, before anything changes
        if directory is not None and record is not None:
            self._resume(directory, record)

    def _resume(self, directory: Path, record: JsonObject) -> None:
        """Go on with the index that lies there."""
        if record.get("version") != VERSION:
            return
        try:
            folder, stamp = _folder(directory, record), record["stamp"]
            found = stamp_of(folder)
            if found is None or found < stamp:
                raise ValueError("files of it are missing")
            # After a crash tantivy may be ahead, and have put files together.
            _check_files(folder, record, META if found != stamp else None)
            index = LexicalIndex(self.language, folder)
            lineage, known, commit = str(record["lineage"]), int(record["rows"]), record["commit"]
            left_out = int(record["hidden"])
        except (ValueError, OSError, KeyError, TypeError) as error:
            logger.warning("%s: the lexical index cannot be used (%s); it is made anew.", directory, error)
            return
        self._index, self._folder, self._left_out = index, folder, left_out
        self._lineage, self._rows = lineage, known
        self._commit = commit if found == stamp else None

    def follow(self, rows: CommittedRows) -> None:
        """Bring the index to these rows: by what has changed, or anew where rows were moved, as compacting does."""
        restored = len(rows.hidden) < self._left_out  # files that were damaged
        if self._index is not None and self._commit == rows.commit != "" and not restored:
            self._hidden = rows.hidden if self._hidden is None else self._hidden
            self._tidy()
            return
        followed = self._index is not None and not restored and rows.begins_with(self._lineage, self._rows)
        known = self._rows if followed else None
        if known is None:
            self._rebuild(rows)
        else:
            assert self._index is not None
            before = rows.hidden[:0] if self._hidden is None else self._hidden
            gone = np.setdiff1d(rows.hidden, before)
            fresh = range(known, rows.rows)
            # A crash may have left some of the new rows in the index.
            again = fresh if self._hidden is None else ()
            leaving = [*gone[gone < known].tolist(), *again]
            if leaving or len(fresh):
                change = Change(leaving, rows.documents.texts(known), len(fresh) > FEW_DOCUMENTS)
                self._index.apply(change)
        self._lineage, self._rows, self._hidden, self._commit = rows.lineage, rows.rows, rows.hidden, rows.commit
        self._left_out = len(rows.hidden)
        self._record(rows)

    def _rebuild(self, rows: CommittedRows) -> None:
        """Make the index anew, in files of their own."""
        folder = None
        if self.directory is not None:
            folder = self.directory / f"lexical-{uuid.uuid4().hex[:16]}"
            folder.mkdir()
        index = LexicalIndex(self.language, folder)
        index.apply(Change((), rows.documents.texts(), rows.rows > FEW_DOCUMENTS))
        self._index, self._folder = index, folder

    def _record(self, rows: CommittedRows) -> None:
        if self.directory is None or self._folder is None:
            return
        record = {
            "kind": KIND,
            "version": VERSION,
            "language": self.language,
            "index": self._folder.name,
            "stamp": stamp_of(self._folder),
            "files": {path.name: digest_of(path) for path in _files(self._folder)},
            "commit": rows.commit,
            "lineage": rows.lineage,
            "rows": rows.rows,
            "hidden": len(rows.hidden),
        }
        write_sidecar(self.directory / RECORD, record)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what is left of an index before, or of one that did not come to its end."""
        assert self.directory is not None
        for path in self.directory.iterdir():
            if FOLDER.fullmatch(path.name) and path != self._folder:
                shutil.rmtree(path, ignore_errors=True)

    def searcher(self) -> LexicalSearcher | None:
        """The index as it is now."""
        return None if self._index is None else self._index.searcher()

    def describe(self) -> JsonObject:
        """Language, documents and bytes of the index."""
        size = 0
        if self._folder is not None:
            size = sum(path.stat().st_size for path in self._folder.iterdir())
        documents = 0 if self._index is None else len(self._index.searcher())
        return {"language": self.language, "documents": documents, "bytes": size}


def outdated_folders(directory: Path, commit: str) -> list[Path]:
    """Indexes in a directory that are not of this commit of the bank: they may hold what was deleted."""
    record = read_record(directory) or {}
    current = record.get("index") if is_current(record, commit) else None
    return [path for path in directory.iterdir() if FOLDER.fullmatch(path.name) and path.name != current]


def open_searcher(directory: Path, rows: CommittedRows, build: bool = True) -> LexicalSearcher | None:
    """The lexical index of a bank for reading; nothing is written in its directory. None where the bank has none.

    Args:
        build: where the index is not of these rows' commit, make one of their texts, in memory; else None then too.
    """
    cause = ""
    for _ in range(TRIES):
        record = read_record(directory)
        if record is None:
            return None
        if record.get("commit") != rows.commit:
            cause = "it is not of the commit that was opened"
            break
        if record.get("version") != VERSION:
            cause = "another release made it, by other rules of what is a word"
            break
        try:
            if len(rows.hidden) < record["hidden"]:
                cause = "it lacks documents of files that were damaged"
                break
            return _opened(_folder(directory, record), record)
        except (ValueError, OSError, KeyError, TypeError) as error:
            cause = str(error)
    if not build:
        return None
    logger.warning(
        "%s: its lexical index cannot be used (%s); one is made in memory. `msa-hf bank index` brings it up to date.",
        directory,
        cause,
    )
    return search_in_memory(rows, str((record or {}).get("language", "english")))


def search_in_memory(rows: CommittedRows, language: str = "english") -> LexicalSearcher:
    """A lexical index of rows, in memory alone."""
    index = LexicalIndex(language)
    index.apply(Change((), rows.documents.texts(), rows.rows > FEW_DOCUMENTS))
    return index.searcher()


def _folder(directory: Path, record: JsonObject) -> Path:
    """The folder that a record names: one of ours, beside it."""
    if not FOLDER.fullmatch(record["index"]):
        raise ValueError(f"{record['index']!r:.80} is no name of an index")
    return directory / str(record["index"])


def damaged_files(directory: Path, commit: str) -> dict[str, str]:
    """The faults of files of the index of this commit, by their paths in the directory."""
    for _ in range(TRIES):
        record = read_record(directory) or {}
        if not is_current(record, commit):
            return {}
        try:
            folder, files = _folder(directory, record), _digests(record)
        except (ValueError, KeyError, TypeError) as error:
            return {RECORD: f"{directory / RECORD}: {error}"}
        found = {f"{folder.name}/{name}": damage_of(folder / name, digest) for name, digest in files.items()}
        damaged = {name: cause for name, cause in found.items() if cause is not None}
        if not damaged or read_record(directory) == record:  # else a writer has put files together
            return damaged
    return {}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _digests(record: JsonObject) -> dict[str, object]:
    """SHA-256 of the files of an index, by name; earlier releases put none down."""
    found = dict(record.get("files", {}))
    if any(os.path.basename(name) != name or name in ("", ".", "..") for name in found):
        raise ValueError("`files` has what is no name of a file in a folder")
    return found


def _check_files(folder: Path, record: JsonObject, changed: str | None = None) -> None:
    """Compare the files of an index with its record.

    Args:
        changed: a file that is another one by now; others may then be gone as well.

    Raises:
        ValueError: naming the one that differs.
        OSError: for one that cannot be read.
    """
    for name, digest in _digests(record).items():
        if name != changed and not (changed and not (folder / name).exists()) and digest_of(folder / name) != digest:
            raise ValueError(f"{name} is corrupted")


def _opened(folder: Path, record: JsonObject) -> LexicalSearcher:
    """tantivy's files as they are, by links in a folder of our own: it would make a lock beside them."""
    with tempfile.TemporaryDirectory(prefix="msa-hf-lexical-") as links:
        for path in _files(folder):
            target = Path(links) / path.name
            if path.name == META:
                shutil.copyfile(path, target)
            else:
                with contextlib.suppress(FileNotFoundError):
                    _link(path, target)
        if stamp_of(Path(links)) != record["stamp"]:
            raise ValueError("its files are of another commit")
        _check_files(folder, record)
        return LexicalIndex(record["language"], Path(links)).searcher()  # it has all of them open now


def _link(path: Path, target: Path) -> None:
    try:
        target.symlink_to(path.resolve())
    except (OSError, NotImplementedError):  # a system without links, or that does not let us make them
        shutil.copyfile(path, target)
