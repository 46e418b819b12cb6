"""The vectors of a bank in its directory: they follow the bank's commits, and are opened by readers.

vectors.json                          which files, of which commit of the bank, and the model that made them;
                                      written after the bank's own commit
vectors-<first row>-<16 hex>.safetensors   `keys` [C, D], `counts` [R], `digests` [R, 16] of a run of rows
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..json_object import JsonObject
from ..model.bank_files_msa import checked_file
from ..model.bank_format_msa import BankFormatError, FileRecord
from ..model.bank_writer_msa import BankWriter
from ..model.bounds_msa import check_header
from ..model.open_files_msa import SMALL_FILE
from .dense import (
    DIGEST_BYTES,
    DTYPE,
    PASSAGE_CHARACTERS,
    DenseSearcher,
    VectorMaker,
    Vectors,
    check_probe,
    joined,
    probe,
    text_digest,
)
from .embedders import Embedder
from .rows import CommittedRows
from .sidecar import damage_of, digest_of, read_sidecar, write_sidecar

logger = logging.getLogger(__name__)
RECORD = "vectors.json"
KIND = "msa_hf-vectors"
VERSION = 1
FIELDS = {"model", "dimension", "characters", "probe", "commit", "hidden", "files"}
FILE = re.compile(r"vectors-\d+-[0-9a-f]{16}\.safetensors")
MOST_FILES = 32  # then they are written as one
MOST_MAPPED = 12  # files that are larger than `SMALL_FILE`; then they are written as one


class VectorsLost(ValueError):
    """A bank has no vectors that can be read, and there is no model to make them."""


class VectorsBehind(ValueError):
    """A bank's vectors are not of the commit that was opened."""


@dataclass(frozen=True)
class _Part:
    """A run of rows in a file, or in memory."""

    vectors: Vectors
    entry: JsonObject | None


def has_vectors(directory: Path) -> bool:
    """Tell whether a bank was made with vectors."""
    return os.path.lexists(directory / RECORD)


def _published(directory: Path | None, vectors: Vectors, first: int, dimension: int) -> _Part:
    """Write vectors of rows from `first` on to a file of a directory; None: they stay in memory."""
    if directory is None or not len(vectors):
        return _Part(vectors, None)
    tensors = {
        "keys": vectors.keys,
        "counts": torch.from_numpy(vectors.counts),
        "digests": torch.from_numpy(vectors.digests),
    }
    record = BankWriter(directory).tensors(f"vectors-{first:010d}", tensors)
    entry = {**record, "rows": len(vectors), "vectors": len(vectors.keys)}
    return _Part(read_vectors(directory, entry, dimension), entry)  # mapped if it is large: not twice in memory


class DenseFollower:
    """Keeps the vectors of a bank that changes.

    Args:
        directory: of the bank; None: in memory.
        embedder: makes the vectors. None: for a bank that has some, to which no new text can be added.
        characters: of a passage; default: as the vectors that lie there were made, else 1000.

    Raises:
        ValueError: for another model than the one that made the vectors that lie there; or where there are none and no
            model.
    """

    name = "dense"

    def __init__(
        self, directory: Path | None = None, embedder: Embedder | None = None, characters: int | None = None
    ) -> None:
        self.directory, self.embedder = directory, embedder
        self._parts: list[_Part] = []
        self._lineage, self._rows = "", 0
        self._commit: str | None = None
        self._left_out = 0  # rows that were when the vectors were recorded
        record = None if directory is None else read_sidecar(directory / RECORD, KIND)
        if record is not None and (record.get("version") != VERSION or not record.keys() >= FIELDS):
            record = None
        if record is None and embedder is None:
            raise VectorsLost("There are no vectors that can be read, and no `embedder` that makes them.")
        if record is None:
            assert embedder is not None
            self.characters: int | None = characters or PASSAGE_CHARACTERS
            self.fingerprint, self.model = probe(embedder), embedder.name
            self.dimension = len(self.fingerprint[0])
            return
        self.characters, self.fingerprint, self.model = record["characters"], record["probe"], record["model"]
        self.dimension = record["dimension"]
        if embedder is not None:
            check_probe(embedder, self.fingerprint, self.model)
        if characters not in (None, self.characters):
            raise ValueError(f"The bank's vectors are of passages of {self.characters} characters, not {characters}.")
        assert directory is not None
        try:
            read = _read_all(directory, record["files"], self.dimension)
            parts = [_Part(vectors, entry) for vectors, entry in zip(read, record["files"], strict=True)]
            # Earlier releases say it in another way: vectors are then taken over by their texts.
            self._lineage, self._rows = str(record.get("lineage", "")), int(record.get("rows", 0))
            self._commit = record["commit"]
            self._parts, self._left_out = parts, record["hidden"]
        except (BankFormatError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s: its vectors cannot be read (%s); they are made anew.", directory, error)
            self._parts = []

    def follow(self, rows: CommittedRows) -> None:
        """Bring the vectors to these rows: those of new texts are made, those of equal texts taken over."""
        restored = len(rows.hidden) < self._left_out  # files that were damaged
        if self._commit == rows.commit != "" and not restored:
            self._tidy()
            return
        known = self._rows if not restored and rows.begins_with(self._lineage, self._rows) else None
        if known is not None and known != sum(len(part.vectors) for part in self._parts):
            known = None
        old = [part.vectors for part in self._parts]
        maker = VectorMaker(self.embedder, self.characters, self.dimension)
        if known is None:
            fresh = maker.make(rows.rows, rows.documents.texts(), old)
            parts = [self._published(fresh, 0)]
        else:
            parts = list(self._parts)
            if known < rows.rows:
                texts = ((row - known, text) for row, text in rows.documents.texts(known))
                # To look for equal texts in all others takes longer than to embed a few.
                fresh = maker.make(rows.rows - known, texts, old if self.embedder is None else ())
                parts.append(self._published(fresh, known))
            if len(parts) > MOST_FILES or len(_large_files(part.entry for part in parts)) > MOST_MAPPED:
                parts = [self._published(joined([part.vectors for part in parts], self.dimension), 0)]
        self._parts, self._lineage, self._rows, self._commit = parts, rows.lineage, rows.rows, rows.commit
        self._left_out = len(rows.hidden)
        self._record(rows)

    def _published(self, vectors: Vectors, first: int) -> _Part:
        return _published(self.directory, vectors, first, self.dimension)

    def _record(self, rows: CommittedRows) -> None:
        if self.directory is None:
            return
        files = [part.entry for part in self._parts if part.entry is not None]
        record = {
            "kind": KIND,
            "version": VERSION,
            "model": self.model,
            "dimension": self.dimension,
            "characters": self.characters,
            "probe": self.fingerprint,
            "commit": rows.commit,
            "lineage": rows.lineage,
            "rows": rows.rows,
            "hidden": len(rows.hidden),
            "files": files,
        }
        write_sidecar(self.directory / RECORD, record)
        self._tidy()

    def _tidy(self) -> None:
        """Remove files of vectors before, or of a write that did not come to its end."""
        assert self.directory is not None
        named = {part.entry["file"] for part in self._parts if part.entry is not None}
        for path in self.directory.iterdir():
            if FILE.fullmatch(path.name) and path.name not in named:
                with contextlib.suppress(OSError):  # one that a reader has mapped, on Windows
                    path.unlink(missing_ok=True)

    def searcher(self) -> DenseSearcher:
        """The vectors as they are now."""
        vectors = [part.vectors for part in self._parts]
        return DenseSearcher(vectors, self.dimension, self.model, self.embedder, self.fingerprint)

    def describe(self) -> JsonObject:
        """Model, dimension, documents and bytes of the vectors."""
        parts = [part.vectors for part in self._parts]
        return {
            "model": self.model,
            "dimension": self.dimension,
            "vectors": sum(len(part.keys) for part in parts),
            "bytes": sum(part.keys.nbytes for part in parts),
        }


def outdated_files(directory: Path, rows: CommittedRows) -> list[Path]:
    """Files of vectors that are not of these rows' commit: they may hold what was deleted.

    Where the bank's vectors are behind, those of texts that are there still are written anew, as vectors of no commit:
    they are taken over once an embedder is there to make the rest.
    """
    record = read_sidecar(directory / RECORD, KIND)
    if record is None or record.get("version") != VERSION or not record.keys() >= FIELDS:
        record = {}
    try:
        named = {str(entry["file"]) for entry in record.get("files", ())}
        if named and record.get("commit") != rows.commit:
            named = _keep_living(directory, record, rows)
    except (BankFormatError, KeyError, TypeError) as error:
        logger.warning("%s: its vectors cannot be read (%s); they are removed.", directory, error)
        named = set()
    return [path for path in directory.iterdir() if FILE.fullmatch(path.name) and path.name not in named]


def _keep_living(directory: Path, record: JsonObject, rows: CommittedRows) -> set[str]:
    """Write the vectors of texts that are there still, and a record of them; returns the names of their files."""
    living = {text_digest(text) for _, text in rows.documents.texts() if text is not None}
    kept: list[Vectors] = []
    for entry in record["files"]:
        vectors = read_vectors(directory, entry, record["dimension"])
        stays = np.array([digest.tobytes() in living for digest in vectors.digests], bool)
        keys = vectors.keys[torch.from_numpy(np.repeat(stays, vectors.counts))]
        kept.append(Vectors(keys, vectors.counts[stays], vectors.digests[stays]))
    part = _published(directory, joined(kept, record["dimension"]), 0, record["dimension"])
    files = [] if part.entry is None else [part.entry]
    write_sidecar(directory / RECORD, {**record, "commit": "", "lineage": "", "rows": 0, "hidden": 0, "files": files})
    return {str(entry["file"]) for entry in files}


def _large_files(entries: Iterable[JsonObject | None]) -> list[str]:
    """Names of the files that are worth a mapping, the largest ones first."""
    sizes = {str(entry["file"]): entry["bytes"] for entry in entries if entry is not None}
    large = {name: size for name, size in sizes.items() if type(size) is int and size > SMALL_FILE}
    return sorted(large, key=lambda name: -large[name])


def _read_all(directory: Path, entries: Sequence[JsonObject], dimension: int) -> list[Vectors]:
    """Vectors of files, of which the largest are memory mapped: mappings stay few."""
    mapped = _large_files(entries)[:MOST_MAPPED]
    return [read_vectors(directory, entry, dimension, entry["file"] in mapped) for entry in entries]


def read_vectors(directory: Path, entry: JsonObject, dimension: int, mapped: bool | None = None) -> Vectors:
    """Vectors of a file.

    Args:
        mapped: memory mapped, else read. None: if the file is larger than `SMALL_FILE`.

    Raises:
        BankFormatError: for a file that is not what its entry says.
    """
    if not FILE.fullmatch(entry["file"]):
        raise BankFormatError(f"{entry['file']!r:.80} is no name of a file of vectors.")
    record: FileRecord = {"file": entry["file"], "bytes": entry["bytes"], "sha256": entry["sha256"]}
    path = checked_file(directory, record, verify=False)
    try:
        digest = digest_of(path)
    except (OSError, ValueError) as error:
        raise BankFormatError(f"{path}: cannot be read ({error}).") from error
    if digest != record["sha256"]:
        raise BankFormatError(f"{path}: is corrupted: its SHA-256 is {digest}, the record says {record['sha256']}.")
    rows, count = entry["rows"], entry["vectors"]
    wanted = {
        "keys": ((count, dimension), DTYPE),
        "counts": ((rows,), torch.int64),
        "digests": ((rows, DIGEST_BYTES), torch.uint8),
    }
    try:
        check_header(path, len(wanted))
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in wanted}
        if not (record["bytes"] > SMALL_FILE if mapped is None else mapped):
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise BankFormatError(f"{path}: not a file of vectors ({error}).") from error
    for name, (shape, kind) in wanted.items():
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != kind:
            raise BankFormatError(f"{path}: `{name}` is {list(tensors[name].shape)} {tensors[name].dtype}.")
    counts = tensors["counts"].numpy()
    if len(counts) and (counts.min() < 1 or int(counts.sum()) != count):
        raise BankFormatError(f"{path}: its rows do not have {count} vectors.")
    return Vectors(tensors["keys"], counts, tensors["digests"].numpy())


def damaged_files(directory: Path, commit: str) -> dict[str, str]:
    """The faults of files of the vectors of this commit, by name."""
    record = read_sidecar(directory / RECORD, KIND) or {}
    try:
        if record.get("commit") != commit or record.get("version") != VERSION:
            return {}
        named = {str(entry["file"]): entry["sha256"] for entry in record["files"]}
    except (KeyError, TypeError) as error:
        return {RECORD: f"{directory / RECORD}: {error!r} is missing or no value of its kind"}
    found = {name: damage_of(directory / name, digest) for name, digest in named.items() if FILE.fullmatch(name)}
    return {name: cause for name, cause in found.items() if cause is not None}


def open_vectors(directory: Path, rows: CommittedRows, embedder: Embedder | None = None) -> DenseSearcher | None:
    """The vectors of a bank for reading; None where it has none.

    Raises:
        VectorsBehind: where they are not of these rows' commit.
        BankFormatError: where they cannot be read.
    """
    if not has_vectors(directory):
        return None
    record = read_sidecar(directory / RECORD, KIND)
    current = record is not None and record.get("version") == VERSION and record.get("commit") == rows.commit
    if record is None or not current or len(rows.hidden) < record.get("hidden", 0):
        raise VectorsBehind(
            f"{directory}: its vectors are not of the commit that was opened. Opening the bank to write, with the "
            "`embedder` that made them, or `msa-hf bank index BANK --embedder MODEL` brings them up to date."
        )
    try:
        try:
            parts = _read_all(directory, record["files"], record["dimension"])
        except BankFormatError as error:
            raise BankFormatError(
                f"{error} Opening the bank to write, with the `embedder`, makes them anew."
            ) from error
        found = DenseSearcher(parts, record["dimension"], record["model"], None, record["probe"])
    except (KeyError, TypeError) as error:
        raise BankFormatError(f"{directory / RECORD}: {error!r} is missing or no value of its kind.") from error
    if found.rows != rows.rows:
        raise BankFormatError(f"{directory / RECORD}: its files have {found.rows} rows, the bank {rows.rows}.")
    if embedder is not None:
        found.check_embedder(embedder)
    return found
