"""`OpenBank`: a bank to which documents are added, in which they are replaced, and from which they are deleted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generation.protocol import DocumentIds
from ..memory_msa import BankOrigin, Document, DocumentTable, LayerMemory, MemoryBank, _check_origin
from ..storage_msa import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    LEFTOVER,
    MANIFEST,
    OWN_FILE,
    BankFormatError,
    checked_file,
    chunk_ranges,
    commit_manifest,
    data_files,
    deletions_payload,
    format_error,
    index_payload,
    key_hash,
    library_version,
    parse_size,
    publish_file,
    publish_prefix,
    pyarrow,
    read_deletions,
    read_manifest,
    read_prefix,
    remove_created,
    remove_files,
    remove_leftover,
    table_schema,
)
from .lock import WriterLock
from .segments import Buffers, Damage, Growing, Loss, Segment, State, with_ids

logger = logging.getLogger(__name__)
MAX_VERSION = 2**62
MERGE_DELETIONS = 32  # files of deletions that are put into one at the next deletion
TRIES = 10  # of a reader whose files a writer removes while they are opened

Memories = dict[int, LayerMemory]


class BankDamaged(RuntimeError):
    """A bank with damaged files cannot be written to before it is decided what becomes of their documents."""


@dataclass(frozen=True)
class _Known:
    """What is known of a key: its version, and the document where there is one."""

    version: int | None = None
    id: int | None = None
    digest: bytes | None = None
    metadata: str | None = None
    exists: bool = False


@dataclass(frozen=True)
class _Change:
    """What a commit does to a key.

    Attributes:
        known: the key after it.
        row: the row that goes, None where there was none.
        text, input_ids: what is encoded; `copy` instead: the row's tensors are taken over.
    """

    known: _Known
    row: int | None
    text: str | None = None
    input_ids: Any = None
    copy: bool = False


class OpenBank:
    """A bank that changes by commits, in a directory or in memory alone.

    Every method that changes something is one commit: when it returns, the change is on the disk as a whole; when it
    raises, nothing has changed. `batch()` puts many changes into one commit. Events may come from a stream that repeats
    or reorders them: with a `version`, what is as old as what is known of its key, or older, has no effect.

    A document keeps its id as long as it lives, also when its text changes or the bank is compacted. An id is never
    given again.

    Threads may share an open bank; processes may not, but may open the same directory to read.

    Args:
        model: encodes the documents; the bank must be of its making. None: for a bank that is there, to which nothing
            can be added; deleting, compacting, verifying and reading need no model.
        directory: made where missing. None: the bank lies in memory alone.
        tokenizer: of the texts.
        protocol: how documents are wrapped with their ids; None: texts are encoded as they are.
        read_only: open without the right to write, beside a writer.
        device: of snapshots. Default: the CPU for a directory, else the model's.
        max_shard_size: most bytes of tensors per file.
        encode_options: further arguments of `model.encode_documents`, such as `batch_tokens`.

    Raises:
        BankLocked: where another writer has the directory open, naming it.
        BankFormatError: where the directory holds what is no bank or a damaged one.
        ValueError: where another model made the bank.
    """

    state: State
    origin: BankOrigin
    _prefix: dict[int, tuple[Tensor, Tensor]] | None  # None: damaged, and no model to make it again

    def __init__(
        self,
        model: Any,
        directory: str | Path | None = None,
        tokenizer: Any = None,
        protocol: Any = None,
        *,
        read_only: bool = False,
        device: torch.device | str | None = None,
        max_shard_size: int | str = "1GB",
        encode_options: Mapping[str, Any] | None = None,
    ) -> None:
        if directory is None and read_only:
            raise ValueError("A bank in memory alone cannot be opened with `read_only`.")
        if directory is None and model is None:
            raise ValueError("A bank in memory alone needs a `model`, which encodes its documents.")
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.directory = None if directory is None else Path(directory)
        self.read_only = read_only
        self._limit = parse_size(max_shard_size)
        self._encode_options = {"show_progress": False, **(encode_options or {})}
        default = getattr(model, "device", "cpu") if directory is None else "cpu"
        self.device = torch.empty(0, device=default if device is None else device).device
        self._mutex = threading.RLock()
        self._pending: dict[str, _Change] | None = None
        self._next_id = 0
        self._buffers: Buffers | None = None
        self._snapshot: MemoryBank | None = None
        self._versions: dict[tuple[int, int], int] = {}
        self._damage: dict[str, Damage] = {}
        self._lock: WriterLock | None = None
        self._closed = False
        try:
            if model is None and self.directory is not None:
                read_manifest(self.directory)  # before anything is made there
            if self.directory is not None and not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = WriterLock(self.directory)
                self._remove_leftovers()
            if self.directory is not None and (read_only or (self.directory / MANIFEST).exists()):
                self._load()
            else:
                self._create()
        except BaseException:
            self.close()
            raise

    # Opening and closing ----------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Begin an empty bank; what its tensors look like is learnt by encoding one token."""
        self.origin = self.model.memory_origin(self.tokenizer)
        like = self.model.encode_documents([[0]], self.tokenizer, bank_device=self.device, **self._encode_options)
        dtype = next(name for name, (kind, _) in DTYPES.items() if kind is like.dtype)
        self._prefix = like.prefix
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "reader_features": [],
            "writer_features": [],
            "library_version": library_version(),
            "generation": 0,
            "next_id": 0,
            "origin": self.origin.to_dict(),
            "dtype": dtype,
            "layers": [
                {"layer": layer, "groups": memory.content.shape[2], "head_dim": memory.content.shape[3]}
                for layer, memory in like.layers.items()
            ],
            "counts": {"documents": 0, "chunks": 0, "tokens": 0},
            "prefix": None,
            "segments": [],
            "deletions": [],
        }
        if self.directory is not None:
            created: list[Path] = []
            try:
                manifest["prefix"] = publish_prefix(self.directory, like.prefix, created)
                commit_manifest(self.directory, manifest)
            except BaseException:
                remove_created(self.directory, created)
                raise
        else:
            empty = {layer: (memory.routing_keys[:0], memory.content[:0]) for layer, memory in like.layers.items()}
            self._buffers = Buffers({layer: LayerMemory(*pair) for layer, pair in empty.items()}, 0)
        self._adopt(manifest, (), np.empty(0, np.int64))

    def _load(self) -> None:
        """Open the bank as it lies in the directory now, keeping what is open already."""
        assert self.directory is not None
        for attempt in range(TRIES):
            manifest = read_manifest(self.directory)
            try:
                return self._read(manifest)
            except BankFormatError:
                if attempt + 1 == TRIES or read_manifest(self.directory)["checksum"] == manifest["checksum"]:
                    raise  # else a writer has removed what this manifest names: its next one is there

    def _read(self, manifest: dict[str, Any]) -> None:
        assert self.directory is not None
        try:
            origin = BankOrigin.from_dict(manifest["origin"])
        except ValueError as error:
            raise format_error(self.directory / MANIFEST, str(error)) from error
        if self.model is not None:
            _check_origin(origin, self.model.memory_origin(self.tokenizer))
        self.origin = origin
        state = getattr(self, "state", None)
        old = {} if state is None else {item.record["table"]["file"]: item for item in state.segments}
        segments: list[Segment] = []
        losses: list[tuple[Segment, Loss]] = []
        for record in manifest["segments"]:
            known = old.get(record["table"]["file"])
            if known is not None and known.record == record:
                segments.append(known)
            else:
                segment, found = Segment.open(self.directory, record, manifest)
                segments.append(segment)
                losses += [(segment, loss) for loss in found]
        if losses and read_manifest(self.directory)["checksum"] != manifest["checksum"]:
            raise BankFormatError("The bank was changed while it was opened.")
        deleted, keys = read_deletions(self.directory, manifest)
        damage = [_damage(segment, loss, deleted) for segment, loss in losses]
        versions: dict[tuple[int, int], int] = {}
        for first, second, version in keys.tolist():
            versions[first, second] = max(version, versions.get((first, second), -1))
        try:
            self._prefix = read_prefix(self.directory, manifest, self.device, verify=True)
        except BankFormatError as error:
            entry = manifest["prefix"]["file"]
            damage.append(Damage(entry, str(error)))
            dtype = DTYPES[manifest["dtype"]][0]
            encoded = None if self.model is None else self.model.encode_prefix()
            self._prefix = encoded and {
                layer: (keys.to(self.device, dtype), values.to(self.device, dtype))
                for layer, (keys, values) in encoded.items()
            }
        if manifest["format_version"] == 1:
            manifest = self._as_version_2(manifest, segments)
        self._versions = versions
        self._adopt(manifest, tuple(segments), deleted)
        self._note(damage)

    def _as_version_2(self, manifest: dict[str, Any], segments: list[Segment]) -> dict[str, Any]:
        """A manifest of format version 1 as the first commit will write it, its documents with the ids they have."""
        first = 0
        given: list[int | None] = []
        for segment in segments:
            documents = DocumentTable(segment.table.drop_columns(["id", "version", "digest"]))
            numbers = [DocumentIds.of(first + row, document) for row, document in enumerate(documents)]
            own = [
                first + row == number and (document.metadata or {}).get("id") != number
                for row, (number, document) in enumerate(zip(numbers, documents, strict=True))
            ]
            given += [None if mine else number for mine, number in zip(own, numbers, strict=True)]
            first += len(segment)
        stored = [number for number in given if number is not None]
        if len(set(stored)) < len(stored):
            raise BankFormatError("Two documents have the same id in their metadata: encode them again.")
        taken, next_id = set(stored), max([first - 1, *stored]) + 1
        ids = np.empty(first, np.int64)
        for position, number in enumerate(given):
            if number is None and position in taken:  # a stored id has the right of way
                number, next_id = next_id, next_id + 1
            ids[position] = position if number is None else number
        first = 0
        for segment in segments:
            plain = segment.table.drop_columns(["id", "version", "digest"])
            segment.table = with_ids(plain, ids[first : first + len(segment)])
            first += len(segment)
        return {**manifest, "format_version": FORMAT_VERSION, "generation": 0, "next_id": next_id, "deletions": []}

    def _remove_leftovers(self) -> None:
        """Remove what a writer left that died before its commit, or after it and before it had tidied up."""
        assert self.directory is not None
        manifest = self.directory / MANIFEST
        kept = {entry["file"] for entry in data_files(read_manifest(self.directory))} if manifest.exists() else set()
        left = [
            path
            for path in self.directory.iterdir()
            if path.name not in kept and (OWN_FILE.fullmatch(path.name) or LEFTOVER.fullmatch(path.name))
        ]
        for path in left:
            remove_leftover(path)
        if left:
            logger.warning(
                "%s: removed %d files of an interrupted write; the last commit is intact.", self.directory, len(left)
            )

    def close(self) -> None:
        """Let another writer in. Snapshots live on."""
        self._closed = True
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> OpenBank:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # State ------------------------------------------------------------------------------------------------------------

    def _adopt(
        self, manifest: dict[str, Any], segments: tuple[Segment, ...], deleted: np.ndarray, appended: bool = False
    ) -> None:
        """Make this the current state; `appended`: the old one and a further segment."""
        starts = np.array([item.record["documents"][0] for item in segments], np.int64)
        if appended and len(segments) == len(self.state.segments):
            table, fresh = self.state.table, segments[:0]
        elif appended:
            table, fresh = pyarrow().concat_tables([self.state.table, segments[-1].table]), segments[-1:]
        else:
            table = pyarrow().concat_tables([table_schema(2).empty_table(), *(item.table for item in segments)])
            self._offsets, fresh = Growing(np.zeros(1, np.int64)), segments
        for item in fresh:
            self._offsets.append(item.offsets[1:] + self._offsets.view(self._offsets.length)[-1])
        offsets = self._offsets.view(self._offsets.length)
        lost = [
            np.flatnonzero(item.lost) + start for item, start in zip(segments, starts, strict=True) if item.lost.any()
        ]
        hidden = np.union1d(deleted, np.concatenate(lost)) if lost else deleted
        if appended:
            gone = np.setdiff1d(hidden, self.state.hidden, assume_unique=True)
            chunks, tokens = self.state.chunks, self.state.tokens
            for item in fresh:
                chunks += int(item.offsets[-1])
                tokens += int(item.table["tokens"].to_numpy().sum(dtype=np.int64))
            chunks -= int((offsets[gone + 1] - offsets[gone]).sum())
            tokens -= (
                int(table["tokens"].take(pyarrow().array(gone)).to_numpy().sum(dtype=np.int64)) if len(gone) else 0
            )
        else:
            visible = np.ones(len(offsets) - 1, bool)
            visible[hidden] = False
            chunks = int(np.diff(offsets)[visible].sum())
            tokens = int(table["tokens"].to_numpy()[visible].sum(dtype=np.int64))
        self.state = State(manifest, segments, table, offsets, deleted, hidden, chunks, tokens, starts)
        self._next_id = manifest["next_id"]
        self._snapshot = None

    def _note(self, damage: list[Damage]) -> None:
        """Say once what is damaged."""
        for item in damage:
            if item.file not in self._damage:
                self._damage[item.file] = item
                left_out = f"{item.documents} documents are left out" if item.documents else "no document is lost"
                logger.warning("%s: %s; %s.", self.directory, item.cause.rstrip("."), left_out)

    def snapshot(self) -> MemoryBank:
        """The bank as it is now, for good: later commits do not change it. `generate(memory=...)` takes it."""
        with self._mutex:
            if self._snapshot is None:
                state = self.state
                if self._buffers is None:
                    self._buffers = Buffers.load(state, self.device, DTYPES[state.manifest["dtype"]][0])
                layers = self._buffers.view(int(state.offsets[-1]))
                documents = DocumentTable(state.table, state.hidden, state.find)
                offsets, counts = torch.from_numpy(state.offsets), (state.chunks, state.tokens)
                next_id = state.manifest["next_id"]
                bank = MemoryBank(layers, offsets, self._whole_prefix(), documents, self.origin, counts, next_id)
                if hasattr(self.model, "accept_bank"):
                    self.model.accept_bank(bank)
                self._snapshot = bank
            return self._snapshot

    def _whole_prefix(self) -> dict[int, tuple[Tensor, Tensor]]:
        if self._prefix is None:
            raise BankDamaged(
                "The file of the template prefix is damaged: open the bank with its model, which makes it."
            )
        return self._prefix

    def refresh(self) -> bool:
        """Move on to the last commit of another process; returns whether there was one."""
        with self._mutex:
            if self.directory is None or self._lock is not None:
                return False
            if read_manifest(self.directory)["checksum"] == self.state.manifest.get("checksum"):
                return False
            old = self.state
            self._load()
            self._keep_buffers(old)
            return True

    def _keep_buffers(self, old: State) -> None:
        """Append to the tensors in memory what is new; where rows were moved, they are read again."""
        if self._buffers is None:
            return
        segments = self.state.segments
        if segments[: len(old.segments)] != old.segments:
            self._buffers = None
            return
        for segment in segments[len(old.segments) :]:
            if segment.lost.any():
                self._buffers = None
                return
            for shard in segment.shards:
                self._buffers.append(
                    {
                        layer: LayerMemory(*(part.to(self.device) for part in segment.tensors(shard, layer)))
                        for layer in shard.layers
                    }
                )

    def __len__(self) -> int:
        return len(self.state)

    def __contains__(self, key: str) -> bool:
        return self.state.find(key) is not None

    def get(self, key: str) -> Document | None:
        """The document named `key` as it was last committed, None where there is none."""
        row = self.state.find(key)
        return None if row is None else DocumentTable(self.state.table, find=self.state.find).row(row)

    @property
    def generation(self) -> int:
        """Commits that led here."""
        return self.state.manifest["generation"]

    def stat(self) -> dict[str, Any]:
        """Numbers about the bank, as JSON values."""
        state, directory = self.state, self.directory
        files = [] if directory is None else [*data_files(state.manifest)]
        return {
            "documents": len(state),
            "deleted": len(state.deleted),
            "damaged": len(state.hidden) - len(state.deleted),
            "chunks": state.chunks,
            "tokens": state.tokens,
            "segments": len(state.segments),
            "generation": self.generation,
            "next_id": state.manifest["next_id"],
            "remembered_deletions": len(self._versions),
            "bytes": sum(entry["bytes"] for entry in files),
        }

    # Changes ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def batch(self) -> Iterator[OpenBank]:
        """Everything inside is one commit; where something raises, none of it happens."""
        with self._mutex:
            if self._pending is not None:
                raise RuntimeError("A batch of this bank is open already.")
            self._check_writable()
            self._pending = {}
            try:
                yield self
                self._commit(self._pending)
            finally:
                self._pending, self._next_id = None, self.state.manifest["next_id"]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, _Change]]:
        with self._mutex:
            if self._pending is not None:
                yield self._pending
            else:
                with self.batch():
                    assert self._pending is not None
                    yield self._pending

    def add(self, documents: Iterable[Any]) -> list[int | None]:
        """Add documents with new keys; returns their ids, None for one whose `version` is late.

        Args:
            documents: texts, token ids, or mappings with `text` or `input_ids`, and perhaps `key` (default: the id),
                `version` and further metadata.

        Raises:
            ValueError: for a key that a document has, or a document that cannot be encoded, naming it.
        """
        if isinstance(documents, str | bytes | Mapping):
            raise TypeError(f"`documents` must be an iterable of documents, got one {type(documents).__name__}.")
        ids: list[int | None] = []
        with self._changing() as pending:
            for document in documents:
                fields = dict(document) if isinstance(document, Mapping) else None
                if fields is None:
                    fields = {"text" if isinstance(document, str) else "input_ids": document}
                key, version = fields.pop("key", None), fields.pop("version", None)
                text, tokens = fields.pop("text", None), fields.pop("input_ids", None)
                if set(fields) == {"metadata"}:
                    fields = fields["metadata"] or {}
                key = str(self._next_id if key is None else key)
                if self._known(key, pending)[0].exists:
                    raise ValueError(f"The bank has a document with the key {key!r}; replace it with upsert().")
                added = self._put(pending, key, text, tokens, version, fields)
                ids.append(pending[key].known.id if added else None)
        return ids

    def upsert(
        self, key: str, text: str, version: int | None = None, metadata: Mapping[str, Any] | None = None
    ) -> bool:
        """Put a document in, or in the place of the one with its key, whose id it keeps.

        Args:
            version: grows with every event about this key. None: always newer, and the key's version stays what it is.

        Returns:
            whether anything changed: not for an event that is known or late, nor for an equal document.
        """
        with self._changing() as pending:
            return self._put(pending, str(key), text, None, version, metadata)

    def delete(self, key: str, version: int | None = None) -> bool:
        """Delete a document; returns whether there was one.

        Its version stays known, so that a late event does not bring it back. `compact()` removes it from the files.
        """
        key = str(key)
        with self._changing() as pending:
            known, row = self._known(key, pending)
            if self._is_late(known, version) or (not known.exists and version is None):
                return False
            version = known.version if version is None else version
            pending[key] = _Change(_Known(version), row)
            return known.exists

    def _known(self, key: str, pending: Mapping[str, _Change]) -> tuple[_Known, int | None]:
        """What is known of a key, in the changes or else in the state; and its row in the state."""
        if key in pending:
            return pending[key].known, pending[key].row
        row = self.state.find(key)
        if row is None:
            return _Known(self._versions.get(key_hash(key))), None
        segment, place = self.state.place(row)
        try:
            found = segment.fields(place, ["version", "id", "digest", "metadata"])
        except ValueError as error:
            raise BankFormatError(f"{segment.record['table']['file']}: row {place}: {error}.") from error
        return _Known(**found, exists=True), row

    @staticmethod
    def _is_late(known: _Known, version: int | None) -> bool:
        if version is None:
            return False
        if type(version) is not int or not 0 <= version <= MAX_VERSION:
            raise ValueError(f"`version` must be an integer from 0 to 2^62, got {version!r:.80}.")
        return known.version is not None and version <= known.version

    def _put(
        self,
        pending: dict[str, _Change],
        key: str,
        text: str | None,
        tokens: Any,
        version: int | None,
        metadata: Mapping[str, Any] | None,
    ) -> bool:
        if self.model is None:
            raise ValueError("This bank was opened without a model, which documents are encoded with.")
        known, row = self._known(key, pending)
        if self._is_late(known, version):
            return False
        if not isinstance(text, str | None):
            raise TypeError(f"Document {key!r}: its text is a {type(text).__name__}.")
        if self.protocol is not None and tokens is not None:
            raise ValueError(f"Document {key!r} has `input_ids`, but it is this bank's protocol that wraps the texts.")
        if (text is None and tokens is None) or (self.protocol is not None and not text):
            raise ValueError(f"Document {key!r} has no text; leave it out.")
        try:
            encoded = json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False) if metadata else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"Document {key!r}: its metadata cannot be written as JSON: {error}.") from error
        digest = text_digest("" if self.protocol is None else self.protocol.document, key, text, tokens)
        same = known.exists and known.digest == digest
        version = known.version if version is None else version
        if same and encoded == known.metadata and version == known.version:
            return False
        id = known.id if known.exists else self._next_id
        assert id is not None
        if not known.exists:
            self._next_id += 1
        # An unchanged text whose row is in the state keeps its tensors; else what is pending is encoded once anyway.
        copied = same and (key not in pending or pending[key].copy)
        pending[key] = _Change(_Known(version, id, digest, encoded, True), row, text, tokens, copied)
        return True

    def _check_writable(self) -> None:
        if self._closed:
            raise RuntimeError("This bank is closed.")
        if self.read_only:
            raise RuntimeError("This bank was opened with read_only=True.")
        if self._lock is not None and not self._lock.held:
            raise RuntimeError("This process was forked from the one that has the bank open; only that one may write.")
        if lost := len(self.state.hidden) - len(self.state.deleted):
            raise BankDamaged(
                f"{lost} documents are in damaged files ({', '.join(sorted(self._damage))}). Restore these from a "
                "copy, or give the documents up with discard_damaged()."
            )

    # Commits ----------------------------------------------------------------------------------------------------------

    def _commit(self, changes: Mapping[str, _Change]) -> None:
        if not changes:
            return
        written = {key: change for key, change in changes.items() if change.known.exists}
        memories, table = self._rows(written)
        gone = np.array(sorted(change.row for change in changes.values() if change.row is not None), np.int64)
        versions = {
            key_hash(key): change.known.version
            for key, change in changes.items()
            if not change.known.exists and change.known.version is not None
        }
        self._publish(memories, table, gone, versions)

    def _rows(self, changes: Mapping[str, _Change]) -> tuple[Memories, Any]:
        """Tensors and table of the documents that a commit writes, encoded ones first."""
        state = self.state
        encoded = {key: change for key, change in changes.items() if not change.copy}
        copied = {key: change for key, change in changes.items() if change.copy}
        parts: list[Memories] = []
        tokens: list[int] = []
        if encoded:
            rows = (self._to_encode(key, change) for key, change in encoded.items())
            bank = self.model.encode_documents(rows, self.tokenizer, bank_device=self.device, **self._encode_options)
            if len(bank) != len(encoded):
                raise ValueError("A document was split while it was encoded; an open bank takes whole ones only.")
            kind = DTYPES[state.manifest["dtype"]][0]
            parts.append({layer: memory.to(dtype=kind) for layer, memory in bank.layers.items()})
            tokens += bank.documents.counts("tokens").tolist()
        for change in copied.values():
            assert change.row is not None
            parts.append(self._copy(change.row))
            segment, place = state.place(change.row)
            tokens.append(segment.fields(place, ["tokens"])["tokens"])
        memories = {
            layer: LayerMemory(
                *(
                    torch.cat(column)
                    for column in zip(*((part[layer].routing_keys, part[layer].content) for part in parts), strict=True)
                )
            )
            for layer in (parts[0] if parts else {})
        }
        size = self.origin.chunk_size
        columns: dict[str, list[Any]] = {field.name: [] for field in table_schema(2)}
        for (key, change), count in zip([*encoded.items(), *copied.items()], tokens, strict=True):
            known = change.known
            row = (key, change.text, known.metadata, count, -(-count // size), known.id, known.version, known.digest)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        return memories, pyarrow().table(columns, schema=table_schema(2))

    def _to_encode(self, key: str, change: _Change) -> dict[str, Any]:
        if self.protocol is not None:
            return self.protocol.document_row(change.known.id, change.text, self.tokenizer, key)
        row = {"key": key, "text": change.text, "input_ids": change.input_ids}
        return {name: value for name, value in row.items() if value is not None}

    def _copy(self, row: int) -> Memories:
        """The tensors of a row."""
        state = self.state
        if self._buffers is not None:
            chunks = slice(*state.offsets[row : row + 2].tolist())
            return {
                layer: LayerMemory(memory.routing_keys[chunks], memory.content[chunks])
                for layer, memory in self._buffers.view(int(state.offsets[-1])).items()
            }
        segment, place = state.place(row)
        chunks_of_row = np.arange(*segment.offsets[place : place + 2].tolist())
        layers = [layer["layer"] for layer in state.manifest["layers"]]
        return {layer: segment.gather(layer, chunks_of_row).to(self.device) for layer in layers}

    def _publish(
        self, memories: Memories, table: Any, gone: np.ndarray, versions: Mapping[tuple[int, int], int | None]
    ) -> None:
        """Write a further segment and deletions, and make them the bank."""
        state = self.state
        deleted = np.union1d(state.deleted, gone)
        manifest = {**state.manifest, "format_version": FORMAT_VERSION, "library_version": library_version()}
        manifest.update(generation=state.manifest["generation"] + 1, next_id=self._next_id)
        segments = list(state.segments)
        segment, base = None, int(state.offsets[-1])
        if len(table):
            first = state.rows
            record: dict[str, Any] = {"documents": [first, first + len(table)], "chunks": 0, "tensors": [], "table": {}}
            payload = index_payload(table["key"].to_pylist())
            segment = Segment(record, table, np.frombuffer(payload, "<u8").reshape(3, -1))
            record["chunks"] = int(segment.offsets[-1])
            segments.append(segment)
            counts = manifest["counts"]
            tokens = int(table["tokens"].to_numpy().sum(dtype=np.int64))
            manifest["counts"] = {
                "documents": counts["documents"] + len(table),
                "chunks": base + record["chunks"],
                "tokens": counts["tokens"] + tokens,
            }
        if self.directory is not None:
            merged = {**self._versions, **versions}

            def write(directory: Path, created: list[Path]) -> None:
                manifest["segments"] = self._upgraded(directory, created)
                if segment is not None:
                    self._write_segment(directory, segment, base, partial(_part, memories), created)
                    manifest["segments"].append(segment.record)
                if len(gone) or versions:
                    every = len(manifest["deletions"]) >= MERGE_DELETIONS
                    entry = self._write_deletions(
                        directory, manifest, deleted if every else gone, merged if every else versions, created
                    )
                    manifest["deletions"] = [entry] if every else [*manifest["deletions"], entry]

            self._write(write, manifest)
            if segment is not None:
                # From the files, so that the rows do not stay in memory twice.
                segments[-1], losses = Segment.open(self.directory, segment.record, manifest)
                self._note([_damage(segments[-1], loss, deleted) for loss in losses])
        for number, version in versions.items():
            assert version is not None
            self._versions[number] = version
        if memories and self._buffers is not None:
            self._buffers.append(memories)
        self._adopt(manifest, tuple(segments), deleted, appended=True)

    def _write(self, write: Any, manifest: dict[str, Any]) -> None:
        """Run what writes files and fills the manifest, and commit; where that fails, all is as before."""
        assert self.directory is not None
        if (now := read_manifest(self.directory))["checksum"] != self.state.manifest["checksum"]:
            raise RuntimeError(
                f"{self.directory} was replaced since it was opened (generation {now.get('generation')})."
            )
        created: list[Path] = []
        try:
            write(self.directory, created)
            commit_manifest(self.directory, manifest)
        except BaseException:
            self._recover(created)
            raise
        for segment, record in zip(self.state.segments, manifest["segments"], strict=False):
            # Only after the commit: a part that was made anew lies in the directory now.
            if segment.stale and record["documents"] == segment.record["documents"]:
                segment.record, segment.stale = record, False
        remove_files(self.directory, _names(self.state.manifest) - _names(manifest))

    def _recover(self, created: list[Path]) -> None:
        """After a failed commit: remove its files, and read again where the directory has the new state after all."""
        assert self.directory is not None
        try:
            with contextlib.suppress(OSError):
                remove_created(self.directory, created)
            if read_manifest(self.directory)["checksum"] != self.state.manifest["checksum"]:
                old = self.state
                self._load()
                self._keep_buffers(old)
                remove_files(self.directory, _names(old.manifest) - _names(self.state.manifest))
        except BaseException:
            self._closed = True  # what lies there is not known: it must be opened again
            logger.exception("%s: cannot be read after a failed commit; open it again.", self.directory)

    def _upgraded(self, directory: Path, created: list[Path]) -> list[dict[str, Any]]:
        """The records of the segments; parts that are not in the directory yet are written."""
        records = []
        for segment in self.state.segments:
            if segment.stale:
                start = segment.record["documents"][0]
                index = index_payload(segment.whole_table()["key"].to_pylist())
                table = publish_file(directory, f"documents-{start:010d}", segment.table, created)
                entry = publish_file(directory, f"index-{start:010d}", index, created)
                records.append({**segment.record, "table": table, "index": entry})
            else:
                records.append(segment.record)
        return records

    def _write_segment(
        self,
        directory: Path,
        segment: Segment,
        base: int,
        part: Callable[[int, int, int], LayerMemory],
        created: list[Path],
    ) -> None:
        """Write the files of a segment from chunk `base`; `part(layer, first, end)` gives the tensors of its chunks."""
        record, manifest = segment.record, self.state.manifest
        first = record["documents"][0]
        shapes = [(item["layer"], item["groups"] * item["head_dim"]) for item in manifest["layers"]]
        row_bytes = sum(3 * width for _, width in shapes) * DTYPES[manifest["dtype"]][0].itemsize
        for start, end in chunk_ranges(segment.offsets, max(self._limit // row_bytes, 1)):
            tensors: dict[str, Tensor] = {}
            for layer, _ in shapes:
                memory = part(layer, start, end)
                tensors[f"layers.{layer}.routing_keys"] = memory.routing_keys
                tensors[f"layers.{layer}.content"] = memory.content
            entry = publish_file(directory, f"chunks-{base + start:010d}", tensors, created)
            record["tensors"].append({**entry, "chunks": [start, end]})
        record["table"] = publish_file(directory, f"documents-{first:010d}", segment.table, created)
        index = np.ascontiguousarray(segment.index).astype("<u8").tobytes()
        record["index"] = publish_file(directory, f"index-{first:010d}", index, created)

    @staticmethod
    def _write_deletions(
        directory: Path,
        manifest: Mapping[str, Any],
        rows: np.ndarray,
        versions: Mapping[tuple[int, int], int | None],
        created: list[Path],
    ) -> dict[str, Any]:
        keys = np.array([(*key, version) for key, version in versions.items()], np.uint64).reshape(-1, 3)
        stem = f"deletions-{manifest['generation']:010d}"
        entry = publish_file(directory, stem, deletions_payload(rows, keys), created)
        return {**entry, "rows": len(rows), "keys": len(keys)}

    # Care -------------------------------------------------------------------------------------------------------------

    def compact(self) -> bool:
        """Write the documents anew without the deleted ones, and put small segments together; returns whether it did.

        Afterwards no file holds anything of a deleted document but the hash of its key beside its version. Snapshots
        that were taken before keep what they have in memory until they are let go.

        Raises:
            BankDamaged: where a file that would be copied is not what was written; nothing has changed then.
        """
        with self._mutex:
            if self._pending is not None:
                raise RuntimeError("compact() inside a batch.")
            self._check_writable()
            state = self.state
            if self.directory is None:
                return self._compact_memory()
            groups = self._groups()
            clean = all(keep for keep, _ in groups) and not len(state.deleted) and not self._damage
            if clean and len(state.manifest["deletions"]) < 2:
                return False
            self._check_files([state.segments[number] for keep, numbers in groups if not keep for number in numbers])
            manifest = {**state.manifest, "generation": state.manifest["generation"] + 1}
            manifest["library_version"] = library_version()

            def write(directory: Path, created: list[Path]) -> None:
                manifest["segments"], rows, chunks, tokens = [], 0, 0, 0
                for keep, numbers in groups:
                    record, count = self._compacted(keep, numbers, rows, chunks, directory, created)
                    if record is None:
                        continue
                    manifest["segments"].append(record)
                    rows, chunks, tokens = record["documents"][1], chunks + record["chunks"], tokens + count
                manifest["counts"] = {"documents": rows, "chunks": chunks, "tokens": tokens}
                manifest["deletions"] = []
                manifest["prefix"] = publish_prefix(directory, self._whole_prefix(), created)
                if self._versions:
                    none = np.empty(0, np.int64)
                    entry = self._write_deletions(directory, manifest, none, self._versions, created)
                    manifest["deletions"] = [entry]

            self._write(write, manifest)
            self._damage = {}
            self._buffers = None
            self._load()
            return True

    def _check_files(self, segments: Sequence[Segment]) -> None:
        """Refuse to copy damage, which would give it a checksum of its own."""
        assert self.directory is not None
        for segment in segments:
            for entry in (*segment.record["tensors"], segment.record["table"]):
                try:
                    checked_file(self.directory, entry, verify=True)
                except BankFormatError:
                    self.verify()  # finds the others too, and leaves their documents out
                    return self._check_writable()

    def _groups(self) -> list[tuple[bool, list[int]]]:
        """Segments to keep, and runs of segments to write anew as one: those with deleted rows, and small ones."""
        state = self.state
        groups: list[tuple[bool, list[int]]] = []
        for number, segment in enumerate(state.segments):
            start = int(state.starts[number])
            first, end = np.searchsorted(state.deleted, [start, start + len(segment)])
            large = sum(shard["bytes"] for shard in segment.record["tensors"]) >= self._limit
            keep = bool(first == end and large and not segment.stale)
            if groups and not keep and not groups[-1][0]:
                groups[-1][1].append(number)
            else:
                groups.append((keep, [number]))
        if len(state.segments) == 1 and not len(state.deleted) and not state.segments[0].stale:
            return [(True, [0])]
        return groups

    def _compacted(
        self, keep: bool, numbers: list[int], row: int, base: int, directory: Path, created: list[Path]
    ) -> tuple[dict[str, Any] | None, int]:
        """The record of a run of segments, from row `row` and chunk `base`, and its tokens."""
        state = self.state
        parts = [state.segments[number] for number in numbers]
        if keep:
            record = {**parts[0].record, "documents": [row, row + len(parts[0])]}
            return record, int(parts[0].table["tokens"].to_numpy().sum(dtype=np.int64))
        tables, chunks = [], []
        for number, segment in zip(numbers, parts, strict=True):
            visible = np.ones(len(segment), bool)
            start = int(state.starts[number])
            first, end = np.searchsorted(state.deleted, [start, start + len(segment)])
            visible[state.deleted[first:end] - start] = False
            tables.append(segment.whole_table().filter(pyarrow().array(visible)))
            chunks.append(np.flatnonzero(np.repeat(visible, np.diff(segment.offsets))))
        table = pyarrow().concat_tables(tables)
        if not len(table):
            return None, 0
        record = {"documents": [row, row + len(table)], "chunks": 0, "tensors": [], "table": {}}
        index = np.frombuffer(index_payload(table["key"].to_pylist()), "<u8").reshape(3, -1)
        merged = Segment(record, table, index)
        record["chunks"] = int(merged.offsets[-1])
        edges = np.concatenate([[0], np.cumsum([len(item) for item in chunks])])

        def part(layer: int, first: int, end: int) -> LayerMemory:
            found = []
            for segment, mine, edge in zip(parts, chunks, edges, strict=False):
                inside = mine[max(first - edge, 0) : max(end - edge, 0)]
                if len(inside):
                    found.append(segment.gather(layer, inside))
            return LayerMemory(
                torch.cat([memory.routing_keys for memory in found]), torch.cat([memory.content for memory in found])
            )

        self._write_segment(directory, merged, base, part, created)
        return record, int(table["tokens"].to_numpy().sum(dtype=np.int64))

    def _compact_memory(self) -> bool:
        state = self.state
        if not len(state.deleted) and len(state.segments) < 2:
            return False
        assert self._buffers is not None
        visible = np.ones(state.rows, bool)
        visible[state.deleted] = False
        chunks = torch.from_numpy(np.flatnonzero(np.repeat(visible, np.diff(state.offsets)))).to(self.device)
        layers = {
            layer: LayerMemory(memory.routing_keys[chunks], memory.content[chunks])
            for layer, memory in self._buffers.view(int(state.offsets[-1])).items()
        }
        table = state.table.filter(pyarrow().array(visible)).combine_chunks()
        index = np.frombuffer(index_payload(table["key"].to_pylist()), "<u8").reshape(3, -1)
        record = {"documents": [0, len(table)], "chunks": len(chunks), "tensors": [], "table": {"file": "memory"}}
        segments = (Segment(record, table, index),) if len(table) else ()
        tokens = int(table["tokens"].to_numpy().sum(dtype=np.int64))
        counts = {"documents": len(table), "chunks": len(chunks), "tokens": tokens}
        manifest = {**state.manifest, "counts": counts, "generation": state.manifest["generation"] + 1}
        self._buffers = Buffers(layers, len(chunks))
        self._adopt(manifest, segments, np.empty(0, np.int64))
        return True

    def verify(self) -> list[Damage]:
        """Read every file and compare it with its SHA-256; returns what is damaged, an empty list where nothing is.

        Documents of damaged files are left out from now on; the others stay usable. Before the bank can be written to
        again, the files must be restored, or the documents given up with `discard_damaged()`.
        """
        with self._mutex:
            if self.directory is None:
                return []
            found: list[Damage] = []
            try:
                read_manifest(self.directory)
            except BankFormatError as error:
                found.append(Damage(MANIFEST, str(error), tuple(self.state.table["key"].to_pylist())))
            else:
                self.refresh()
            state = self.state

            def check(entry: Mapping[str, Any]) -> str | None:
                try:
                    checked_file(self.directory, entry, verify=True)  # type: ignore[arg-type]
                except BankFormatError as error:
                    return str(error)
                return None

            def note(segment: Segment, file: str, rows: list[int]) -> None:
                cause = causes.pop(file)
                found.append(self._damage.get(file) or _damage(segment, (file, cause, rows), state.deleted))

            on_disk = data_files(state.manifest)
            causes = {entry["file"]: cause for entry in on_disk if (cause := check(entry)) is not None}
            for segment in state.segments:
                record = segment.record
                if (file := record["table"]["file"]) in causes:
                    note(segment, file, segment.lose_rows(0, len(segment)))
                for shard, entry in zip(segment.shards, record["tensors"], strict=True):
                    if (file := entry["file"]) in causes:
                        shard.file = None
                        note(segment, file, segment.lose_chunks(*entry["chunks"]))
                if "index" in record and (file := record["index"]["file"]) in causes:
                    if not segment.lost.all():
                        segment.rebuild_index()
                    note(segment, file, [])
            found += [Damage(file, cause) for file, cause in causes.items()]  # prefix and deletions can be done without
            if found:
                self._note(found)
                self._buffers = None
                self._adopt(state.manifest, state.segments, state.deleted)
            return found

    def discard_damaged(self) -> int:
        """Give up the documents in damaged files, as if they were deleted; returns how many. Ids stay taken."""
        with self._mutex:
            state = self.state
            lost = np.setdiff1d(state.hidden, state.deleted)
            if not len(lost):
                return 0
            hidden, self.state = state, replace(state, hidden=state.deleted)
            try:
                self._check_writable()
                self._next_id = state.manifest["next_id"]
                self._publish({}, table_schema(2).empty_table(), lost, {})
            except BaseException:
                self.state = hidden
                raise
            self._adopt(self.state.manifest, self.state.segments, self.state.deleted)
            return len(lost)

    def __repr__(self) -> str:
        where = "memory" if self.directory is None else repr(str(self.directory))
        return f"OpenBank({where}, documents={len(self)}, tokens={self.state.tokens}, generation={self.generation})"


def text_digest(wrapping: str, key: str, text: str | None, tokens: Any) -> bytes:
    """Of what is encoded: the text with what wraps it (`Protocol.document`, or nothing), or token ids.

    Raises:
        ValueError: for a text that is not Unicode, naming the document.
    """
    digest = hashlib.sha256(json.dumps([wrapping, text is None, tokens is None]).encode())
    try:
        digest.update((text or "").encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"Document {key!r}: its text is not Unicode ({error.reason}).") from error
    if tokens is not None:
        digest.update(np.asarray(tokens, np.int64).tobytes())
    return digest.digest()


def _names(manifest: Mapping[str, Any]) -> set[str]:
    return {entry["file"] for entry in data_files(manifest)}


def _damage(segment: Segment, loss: Loss, deleted: np.ndarray) -> Damage:
    """A loss in terms of documents: of what was deleted nothing is lost."""
    file, cause, rows = loss
    gone = set(deleted.tolist())
    start = segment.record["documents"][0]
    return Damage(file, cause, tuple(segment.key(row) for row in rows if start + row not in gone))


def _part(memories: Memories, layer: int, first: int, end: int) -> LayerMemory:
    return LayerMemory(memories[layer].routing_keys[first:end], memories[layer].content[first:end])
