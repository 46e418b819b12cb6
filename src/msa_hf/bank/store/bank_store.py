"""`BankStore`: a bank to which documents are added, in which they are replaced, and from which they are deleted."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.memory_msa import BankOrigin, Document, DocumentTable, LayerMemory, MemoryBank
from ...model.origin_msa import check_origin
from ...model.storage_msa import (
    DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    BankFormatError,
    commit_manifest,
    data_files,
    library_version,
    parse_size,
    publish_prefix,
    read_manifest,
    remove_created,
    remove_files,
    table_schema,
)
from ...moved import renamed
from ...retrieval.followers import Followers
from ...retrieval.rows import rows_of_state
from .buffers import Buffers
from .changes import Change, Changes, Known, committed, table_of
from .compaction import compacted_in_memory, groups_of, write_compacted
from .lock import WriterLock
from .opening import empty_manifest, origin_of, read_contents, remove_leftovers
from .segments import Damage, Segment, damage_of
from .state import State
from .verification import are_intact, find_damage
from .writing import renewed_records, write_deletions, write_segment

logger = logging.getLogger(__name__)
MERGE_DELETIONS = 32  # files of deletions that are put into one at the next deletion
TRIES = 10  # of a reader whose files a writer removes while they are opened

Memories = dict[int, LayerMemory]


class BankDamaged(RuntimeError):
    """A bank with damaged files cannot be written to before it is decided what becomes of their documents."""


class BankStore:
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
        lexical: keep a lexical index for `search` (docs/retrieval.md): True, or the language of its words. None: where
            the bank has one. False: not; what lies there is left behind.

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
        lexical: bool | str | None = None,
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
        self._pending: Changes | None = None
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
                remove_leftovers(self.directory)
            if self.directory is not None and (read_only or (self.directory / MANIFEST).exists()):
                self._load()
            else:
                self._create()
            self._followers = Followers(self.directory, read_only, lexical)
            self._follow()
        except BaseException:
            self.close()
            raise

    # Opening and closing ----------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Begin an empty bank; what its tensors look like is learnt by encoding one token."""
        self.origin = self.model.memory_origin(self.tokenizer)
        like = self.model.encode_documents([[0]], self.tokenizer, bank_device=self.device, **self._encode_options)
        self._prefix = like.prefix
        manifest = empty_manifest(like, self.origin)
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
        self._adopt(State.of(manifest, (), np.empty(0, np.int64)))

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
        origin = origin_of(self.directory, manifest)
        if self.model is not None:
            check_origin(origin, self.model.memory_origin(self.tokenizer))
        opened = () if getattr(self, "state", None) is None else self.state.segments
        contents = read_contents(self.directory, manifest, opened, self.device)
        prefix = contents.prefix
        if prefix is None and self.model is not None:
            kind = DTYPES[manifest["dtype"]][0]
            prefix = {
                layer: (keys.to(self.device, kind), values.to(self.device, kind))
                for layer, (keys, values) in self.model.encode_prefix().items()
            }
        self.origin, self._prefix, self._versions = origin, prefix, contents.versions
        self._adopt(State.of(contents.manifest, contents.segments, contents.deleted))
        self._note(contents.damage)

    def close(self) -> None:
        """Let another writer in. Snapshots live on."""
        self._closed = True
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> BankStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _follow(self) -> None:
        """Tell what is kept beside the bank of the commit that the bank is at now."""
        self._followers.follow(rows_of_state(self.state, self.directory))

    # State ------------------------------------------------------------------------------------------------------------

    def _adopt(self, state: State) -> None:
        """Make this the current state."""
        self.state = state
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
                self._followers.attach(bank)
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
            self._follow()
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
            "indexes": self._followers.describe(),
        }

    # Changes ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def batch(self) -> Iterator[BankStore]:
        """Everything inside is one commit; where something raises, none of it happens."""
        with self._mutex:
            if self._pending is not None:
                raise RuntimeError("A batch of this bank is open already.")
            self._check_writable()
            self._pending = Changes(self._committed, self.state.manifest["next_id"], self.protocol)
            try:
                yield self
                self._commit(self._pending)
            finally:
                self._pending = None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Changes]:
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
        with self._changing() as changes:
            for document in documents:
                fields = dict(document) if isinstance(document, Mapping) else None
                if fields is None:
                    fields = {"text" if isinstance(document, str) else "input_ids": document}
                key, version = fields.pop("key", None), fields.pop("version", None)
                text, tokens = fields.pop("text", None), fields.pop("input_ids", None)
                if set(fields) == {"metadata"}:
                    fields = fields["metadata"] or {}
                key = str(changes.next_id if key is None else key)
                if changes.known(key)[0].exists:
                    raise ValueError(f"The bank has a document with the key {key!r}; replace it with upsert().")
                added = self._put(changes, key, text, tokens, version, fields)
                ids.append(changes.of_keys[key].known.id if added else None)
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
        with self._changing() as changes:
            return self._put(changes, str(key), text, None, version, metadata)

    def delete(self, key: str, version: int | None = None) -> bool:
        """Delete a document; returns whether there was one.

        Its version stays known, so that a late event does not bring it back. `compact()` removes it from the files.
        """
        with self._changing() as changes:
            return changes.delete(str(key), version)

    def _committed(self, key: str) -> tuple[Known, int | None]:
        return committed(self.state, self._versions, key)

    def _put(self, changes: Changes, *document: Any) -> bool:
        if self.model is None:
            raise ValueError("This bank was opened without a model, which documents are encoded with.")
        return changes.put(*document)

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

    def _commit(self, changes: Changes) -> None:
        if changes.of_keys:
            memories, table = self._rows(changes.written())
            self._publish(memories, table, changes.gone(), changes.deleted_versions(), changes.next_id)

    def _rows(self, changes: Mapping[str, Change]) -> tuple[Memories, Any]:
        """Tensors and table of the documents that a commit writes, in their order: encoded ones first."""
        state = self.state
        encoded = {key: change for key, change in changes.items() if not change.copy}
        parts: list[Memories] = []
        tokens: list[int] = []
        if encoded:
            rows = (self._to_encode(key, change) for key, change in encoded.items())
            bank = self.model.encode_documents(rows, self.tokenizer, bank_device=self.device, **self._encode_options)
            check_origin(self.origin, bank.origin)  # an adapter may have been switched, or weights changed, since
            if len(bank) != len(encoded):
                raise ValueError("A document was split while it was encoded; an open bank takes whole ones only.")
            kind = DTYPES[state.manifest["dtype"]][0]
            parts.append({layer: memory.to(dtype=kind) for layer, memory in bank.layers.items()})
            tokens += bank.documents.counts("tokens").tolist()
        for change in changes.values():
            if not change.copy:
                continue
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
        return memories, table_of(changes, tokens, self.origin.chunk_size)

    def _to_encode(self, key: str, change: Change) -> dict[str, Any]:
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
        self,
        memories: Memories,
        table: Any,
        gone: np.ndarray,
        versions: Mapping[tuple[int, int], int],
        next_id: int,
    ) -> None:
        """Write a further segment and deletions, and make them the bank."""
        state = self.state
        deleted = np.union1d(state.deleted, gone)
        manifest = {**state.manifest, "format_version": FORMAT_VERSION, "library_version": library_version()}
        manifest.update(generation=state.manifest["generation"] + 1, next_id=next_id)
        segments = list(state.segments)
        segment, base = None, int(state.offsets[-1])
        if len(table):
            segment = Segment.of_table(table, state.rows)
            segments.append(segment)
            counts = manifest["counts"]
            tokens = int(table["tokens"].to_numpy().sum(dtype=np.int64))
            manifest["counts"] = {
                "documents": counts["documents"] + len(table),
                "chunks": base + segment.record["chunks"],
                "tokens": counts["tokens"] + tokens,
            }
        if self.directory is not None:
            merged = {**self._versions, **versions}

            def part(layer: int, first: int, end: int) -> LayerMemory:
                return LayerMemory(memories[layer].routing_keys[first:end], memories[layer].content[first:end])

            def write(directory: Path, created: list[Path]) -> None:
                manifest["segments"] = renewed_records(directory, state.segments, created)
                if segment is not None:
                    write_segment(directory, manifest, segment, base, part, self._limit, created)
                    manifest["segments"].append(segment.record)
                if len(gone) or versions:
                    every = len(manifest["deletions"]) >= MERGE_DELETIONS
                    entry = write_deletions(
                        directory, manifest, deleted if every else gone, merged if every else versions, created
                    )
                    manifest["deletions"] = [entry] if every else [*manifest["deletions"], entry]

            self._write(write, manifest)
            if segment is not None:
                # From the files, so that the rows do not stay in memory twice.
                segments[-1], losses = Segment.open(self.directory, segment.record, manifest)
                self._note([damage_of(segments[-1], loss, deleted) for loss in losses])
        self._versions.update(versions)
        if memories and self._buffers is not None:
            self._buffers.append(memories)
        self._adopt(state.followed_by(manifest, tuple(segments), deleted))
        self._follow()

    def _write(self, write: Callable[[Path, list[Path]], None], manifest: dict[str, Any]) -> None:
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
                self._follow()
                remove_files(self.directory, _names(old.manifest) - _names(self.state.manifest))
        except BaseException:
            self._closed = True  # what lies there is not known: it must be opened again
            logger.exception("%s: cannot be read after a failed commit; open it again.", self.directory)

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
            groups = groups_of(state, self._limit)
            clean = all(keep for keep, _ in groups) and not len(state.deleted) and not self._damage
            if clean and len(state.manifest["deletions"]) < 2:
                return False
            copied = (state.segments[number] for keep, numbers in groups if not keep for number in numbers)
            if not are_intact(self.directory, copied):
                self.verify()  # finds what else is damaged, and leaves the documents out
                self._check_writable()
            manifest = {**state.manifest, "generation": state.manifest["generation"] + 1}
            manifest["library_version"] = library_version()

            def write(directory: Path, created: list[Path]) -> None:
                write_compacted(directory, manifest, state, groups, self._limit, created)
                manifest["deletions"] = []
                manifest["prefix"] = publish_prefix(directory, self._whole_prefix(), created)
                if self._versions:
                    none = np.empty(0, np.int64)
                    entry = write_deletions(directory, manifest, none, self._versions, created)
                    manifest["deletions"] = [entry]

            self._write(write, manifest)
            self._damage = {}
            self._buffers = None
            self._load()
            self._follow()
            return True

    def _compact_memory(self) -> bool:
        if not len(self.state.deleted) and len(self.state.segments) < 2:
            return False
        assert self._buffers is not None
        state, self._buffers = compacted_in_memory(self.state, self._buffers, self.device)
        self._adopt(state)
        self._follow()
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
            found += find_damage(self.directory, state, self._damage)
            if found:
                self._note(found)
                self._buffers = None
                self._adopt(State.of(state.manifest, state.segments, state.deleted))
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
                self._publish({}, table_schema(2).empty_table(), lost, {}, state.manifest["next_id"])
            except BaseException:
                self.state = hidden
                raise
            self._adopt(State.of(self.state.manifest, self.state.segments, self.state.deleted))
            return len(lost)

    def __repr__(self) -> str:
        where = "memory" if self.directory is None else repr(str(self.directory))
        return f"BankStore({where}, documents={len(self)}, tokens={self.state.tokens}, generation={self.generation})"


def _names(manifest: Mapping[str, Any]) -> set[str]:
    return {entry["file"] for entry in data_files(manifest)}


__getattr__ = renamed(__name__, {"OpenBank": "BankStore"})
