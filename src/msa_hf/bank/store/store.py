"""`BankStore`: a bank to which documents are added, in which they are replaced, and from which they are deleted."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from ...model.arrow_msa import table_schema
from ...model.bank_format_msa import (
    MANIFEST,
    BankError,
    BankFormatError,
    Manifest,
    TensorPair,
    commit_id,
    data_files,
    file_names,
    library_version,
    parse_size,
)
from ...model.bank_log_msa import entry_names, manifest_after
from ...model.bank_reader_msa import (
    TRIES,
    BankReader,
    damage_of_file,
    is_bank,
    log_generations,
    manifest_mark,
    mapped_tables,
    read_bank,
    read_checkpoint,
    read_manifest,
)
from ...model.bank_writer_msa import BankWriter, remove_files
from ...model.interface_msa import check_interface
from ...model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable, LayerMemory, MemoryBank
from ...model.open_files_msa import SMALL_FILE
from ...model.routing_msa import RoutingRequest
from ...moved import renamed
from ...retrieval.embedders import Embedder
from ...retrieval.followers import Followers
from ...retrieval.rows import rows_of_state
from .buffers import Buffers
from .changes import Changes, GivenDocument, Known, checked_version, committed, named
from .commit import Commit, commit_of, entry_in_memory, write_commit
from .compact import compacted_in_memory, groups_of, write_compacted
from .deleted_keys import DeletedKeys
from .encoder import DocumentEncoder, EncodingModel
from .erase import erase
from .errors import BankDamaged, BankNotWritable, CommitOutcomeUnknown
from .format_v1 import as_version_3
from .lock import WriterLock
from .merge import LOG_COMMITS, merged_in_memory, segment_bytes, segments_to_merge, write_checkpoint
from .open import new_bank, read_contents, remove_leftovers
from .segments import Damage, Segment, damage_of
from .state import BankStat, State
from .verify import are_intact, find_damage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...generation.protocol import PromptProtocol

logger = logging.getLogger(__name__)


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
        sole_writer: for a file system without locks: you vouch that nothing else writes to the directory, and no lock
            is asked for.
        device: of snapshots. Default: the CPU for a directory, else the model's.
        max_shard_size: most bytes of tensors per file.
        encode_options: further arguments of `model.encode_documents`, such as `batch_tokens`.
        lexical: keep a lexical index for `search` (docs/retrieval.md): True, or the language of its words. None: where
            the bank has one. False: not; what lies there is left behind.
        embedder: keep vectors of this embedding model for `search` as well (docs/retrieval.md). Without it, a bank's
            vectors fall behind, and say so, once texts come that have none.

    Raises:
        BankLocked: where another writer has the directory open, naming it.
        BankNotWritable: where the file system of the directory has no locks, naming it, or `.lock` is no plain file.
        BankFormatError: where the directory holds what is no bank or a damaged one.
        ValueError: where another model made the bank.
    """

    state: State
    origin: BankOrigin
    _prefix: dict[int, TensorPair] | None  # None: damaged, and no model to make it again

    def __init__(
        self,
        model: EncodingModel | None,
        directory: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        protocol: PromptProtocol | None = None,
        *,
        read_only: bool = False,
        sole_writer: bool = False,
        device: torch.device | str | None = None,
        max_shard_size: int | str = "1GB",
        encode_options: Mapping[str, object] | None = None,
        lexical: bool | str | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        if directory is None and read_only:
            raise ValueError("A bank in memory alone cannot be opened with `read_only`.")
        if directory is None:
            if model is None:
                raise ValueError("A bank in memory alone needs a `model`, which encodes its documents.")
            device = model.device if device is None else device
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.directory = None if directory is None else Path(directory)
        self.read_only = read_only
        self._limit = parse_size(max_shard_size)
        self.device = torch.empty(0, device=device or "cpu").device
        self._encoder: DocumentEncoder | None = None
        check_interface(model)
        if model is not None:
            options = {"show_progress": False, **(encode_options or {})}
            self._encoder = DocumentEncoder(model, tokenizer, protocol, self.device, options)
        self._mutex = threading.RLock()
        self._pending: Changes | None = None
        self._buffers: Buffers | None = None
        self._snapshot: MemoryBank | None = None
        self._deleted_keys = DeletedKeys()
        self._verified: set[str] = set()  # tables that were compared with their SHA-256
        self._mark: tuple[int, ...] | None = None  # of the manifest that lies there
        self._opened: tuple[Segment, ...] = ()
        self._damage: dict[str, Damage] = {}
        self._lock: WriterLock | None = None
        self._closed = False
        try:
            if model is None and self.directory is not None:
                read_manifest(self.directory)  # before anything is made there
            if self.directory is not None and not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = WriterLock(self.directory, sole_writer)
                remove_leftovers(self.directory)
            if self.directory is not None and (read_only or is_bank(self.directory)):
                self._load(verify=not read_only)
            else:
                self._create()
            self._followers = Followers(self.directory, read_only, lexical, embedder)
            self._follow()
        except BaseException:
            self.close()
            raise

    # Opening and closing ----------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Begin an empty bank."""
        assert self._encoder is not None
        self.origin = self._encoder.model.memory_origin(self.tokenizer)
        manifest, self._prefix, layers = new_bank(self.directory, self._encoder, self.origin)
        self._buffers = Buffers(layers, 0) if self.directory is None else None
        self._adopt(State.of(manifest, (), np.empty(0, np.int64)))

    def _load(self, verify: bool = False) -> None:
        """Open the bank as it lies in the directory now, keeping what is open already.

        Args:
            verify: compare what decides about keys, versions and ids with its SHA-256.
        """
        assert self.directory is not None
        read_bank(
            self.directory, self.model, self.tokenizer, False, lambda reader: self._read(replace(reader, verify=verify))
        )

    def _read(self, reader: BankReader) -> None:
        contents = read_contents(reader, self._opened, self.device)
        prefix = contents.prefix
        if prefix is None and self._encoder is not None:
            prefix = self._encoder.prefix(reader.layout.dtype)
        self.origin, self._prefix, self._deleted_keys = reader.origin, prefix, contents.keys
        self._adopt(State.of(contents.manifest, contents.segments, contents.deleted))
        self._note(contents.damage)

    def close(self) -> None:
        """Let another writer in, once a commit that another thread is in has come to its end. Snapshots live on.

        Raises:
            RuntimeError: inside a batch of this thread, which goes on.
        """
        if self._lock is not None and not self._lock.held:  # a forked process may have inherited a mutex that is taken
            self._closed = True
            return
        with self._mutex:
            if self._pending is not None:
                raise RuntimeError("close() inside a batch: leave the batch first, which commits it.")
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
        self._opened = state.segments
        self._snapshot = None

    def _note(self, damage: list[Damage]) -> None:
        """Say once what is damaged."""
        for item in damage:
            if item.file not in self._damage:
                self._damage[item.file] = item
                left_out = f"{item.documents} documents are left out" if item.documents else "no document is lost"
                logger.warning("%s: %s; %s.", self.directory, item.cause.rstrip("."), left_out)

    def snapshot(self) -> MemoryBank:
        """The bank as it is now, for good: later commits do not change it. `generate(memory=...)` takes it.

        If it was opened to read and a writer has removed files of the state it was at, it moves on to the last commit.
        """
        with self._mutex:
            for attempt in range(TRIES):
                try:
                    if self._snapshot is None:
                        self._snapshot = self._new_snapshot()
                    return self._snapshot
                except BankFormatError:
                    if attempt + 1 == TRIES or not self.refresh():
                        raise
            raise AssertionError

    def _new_snapshot(self) -> MemoryBank:
        state = self.state
        if self._buffers is None:
            starts = state.offsets[state.starts].tolist()
            segments = dict(zip(starts, state.segments, strict=True))
            self._buffers = Buffers.load(segments, state.layout, state.all_chunks, self.device)
        layers = {layer: DenseLayer(*pair) for layer, pair in self._buffers.view(state.all_chunks).items()}
        documents = DocumentTable(state.table, state.hidden, state.find)
        offsets, counts = torch.from_numpy(state.offsets), (state.chunks, state.tokens)
        next_id = state.manifest["next_id"]
        bank = MemoryBank(layers, offsets, self.whole_prefix(), documents, self.origin, counts, next_id)
        bank.home, bank.indexes = self._followers.home, self._followers.searchers()
        return bank

    @property
    def documents(self) -> DocumentTable:
        """The documents of now; their tensors are not read."""
        return DocumentTable(self.state.table, self.state.hidden, self.state.find)

    @property
    def prefix(self) -> dict[int, TensorPair]:
        """Keys and values of the template prefix; see `MemoryBank`."""
        return self.whole_prefix()

    def session(self, request: RoutingRequest) -> AbstractContextManager[Mapping[int, LayerMemory]]:
        """The layers of the state of now, for one forward; see `Memory`."""
        return self.snapshot().session(request)

    def whole_prefix(self) -> dict[int, TensorPair]:
        """Keys and values of the template prefix, per layer.

        Raises:
            BankDamaged: if its file is damaged and there is no model to make it again.
        """
        if self._prefix is None:
            raise BankDamaged(
                "The file of the template prefix is damaged: open the bank with its model, which makes it."
            )
        return self._prefix

    def search(self, query: str | Sequence[str], k: int = 10, mode: str = "hybrid", **options: Any) -> Any:
        """`MemoryBank.search` in the bank as it is now, with its own model, tokenizer, protocol and embedder."""
        own = {"model": self.model, "tokenizer": self.tokenizer, "protocol": self.protocol}
        return self.snapshot().search(query, k, mode, **{**own, **options})

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
        """Append to the tensors in memory what is new since a state; if rows were moved, they are read again."""
        if self._buffers is not None and not self._buffers.follow(old, self.state):
            self._buffers = None

    def __len__(self) -> int:
        return len(self.state)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def get(self, key: str) -> Document | None:
        """The document named `key` as it was last committed, None if there is none.

        Raises:
            BankDamaged: if a table that may hold the document is damaged.
        """
        row = self._find(key)
        return None if row is None else DocumentTable(self.state.table, find=self.state.find).row(row)

    def _find(self, key: str) -> int | None:
        """The row of a key; that there is none is never said from bytes that were not verified.

        If a writer has removed files of the state of a bank that was opened to read, it moves on to the last commit.
        """
        for attempt in range(TRIES):
            row = self.state.find(key)
            if row is not None or self.directory is None:
                return row
            if self.state.may_have_lost(key):
                raise BankDamaged(f"{key!r} may be the key of a document in damaged files ({self._damaged_files()}).")
            try:
                self._verify_tables()
            except BankDamaged:
                if attempt + 1 == TRIES or not self.refresh():
                    raise
            else:
                return None
        raise AssertionError

    def _damaged_files(self) -> str:
        return ", ".join(sorted(self._damage))

    def _verify_tables(self) -> None:
        """Compare the tables of a bank that was opened to read with their SHA-256, each of them once."""
        assert self.directory is not None
        if not self.read_only:
            return  # it was opened with that
        for segment in self.state.segments:
            record = segment.record["table"]
            if record["file"] not in self._verified and not segment.lost.all():
                if (cause := damage_of_file(self.directory, record)) is not None:
                    raise BankDamaged(f"{cause} Whether the document is there is not known.")
                self._verified.add(record["file"])

    @property
    def generation(self) -> int:
        """Commits that led here."""
        return self.state.manifest["generation"]

    def stat(self) -> BankStat:
        """Numbers about the bank."""
        state = self.state
        files = [] if self.directory is None else data_files(state.manifest)
        return {
            "documents": len(state),
            "deleted": len(state.deleted),
            "damaged": len(state.hidden) - len(state.deleted),
            "chunks": state.chunks,
            "tokens": state.tokens,
            "segments": len(state.segments),
            "generation": self.generation,
            "next_id": state.manifest["next_id"],
            "remembered_deletions": len(self._deleted_keys),
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
            self._pending = Changes(
                self._committed,
                self.state.manifest["next_id"],
                self.protocol,
                self.state.manifest.get("watermark"),
            )
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

    def add(self, documents: Iterable[object]) -> list[int | None]:
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
                given = GivenDocument.of(document)
                key = str(changes.next_id) if given.key is None else named(given.key)
                if changes.known(key)[0].exists:
                    raise ValueError(f"The bank has a document with the key {key!r}; replace it with upsert().")
                added = self._put(changes, key, given.text, given.tokens, given.version, given.metadata)
                ids.append(changes.of_keys[key].known.id if added else None)
        return ids

    def upsert(
        self, key: str, text: str, version: int | None = None, metadata: Mapping[str, object] | None = None
    ) -> bool:
        """Put a document in, or in the place of the one with its key, whose id it keeps.

        Args:
            version: grows with every event about this key. None: always newer, and the key's version stays what it is.

        Returns:
            whether anything changed: not for an event that is known or late, nor for an equal document.
        """
        with self._changing() as changes:
            return self._put(changes, named(key), text, None, version, metadata)

    def delete(self, key: str, version: int | None = None) -> bool:
        """Delete a document; returns whether there was one.

        Its version stays known, so that a late event does not bring it back. `compact()` removes it from the files.
        """
        with self._changing() as changes:
            return changes.delete(named(key), version)

    def _committed(self, key: str) -> tuple[Known, int | None]:
        return committed(self.state, self._deleted_keys, key)

    def _put(
        self,
        changes: Changes,
        key: str,
        text: object,
        tokens: object,
        version: object,
        metadata: Mapping[str, object] | None,
    ) -> bool:
        if self.model is None:
            raise ValueError("This bank was opened without a model, which documents are encoded with.")
        return changes.put(key, text, tokens, version, metadata)

    def _check_writable(self) -> None:
        if self._closed:
            raise BankNotWritable("This bank is closed.")
        if self.read_only:
            raise BankNotWritable("This bank was opened with read_only=True.")
        if self._lock is not None:
            self._lock.check()
        if lost := len(self.state.hidden) - len(self.state.deleted):
            raise BankDamaged(
                f"{lost} documents are in damaged files ({self._damaged_files()}). Restore these from a "
                "copy, or give the documents up with discard_damaged()."
            )

    # Commits ----------------------------------------------------------------------------------------------------------

    def _commit(self, changes: Changes) -> None:
        if changes.of_keys:
            self._apply(commit_of(changes, self.state, self.origin, self._encoder, self._buffers))

    def _apply(self, commit: Commit) -> None:
        """Make what a commit does the bank, on the disk first."""
        if self.directory is None:
            segments = self.state.segments
            segments += (Segment.of_table(commit.table, self.state.rows),) if len(commit.table) else ()
            self._follow_commit(commit, entry_in_memory(self.state, commit), segments)
            if len(self.state.segments) % LOG_COMMITS == 0:
                self._adopt(merged_in_memory(self.state))
            return
        if "lineage" not in self.state.manifest or any(segment.stale for segment in self.state.segments):
            self._checkpoint()  # an earlier format, or an index that was made anew: nothing of it lies there yet
        self._check_is_last()
        with self._committing() as writer:
            entry = write_commit(writer, self.state, commit, self._limit)
            self._check_is_last()  # again: what was written may have taken its time
            try:
                writer.append(entry)
            except FileExistsError:
                raise self._replaced() from None
        with self._after_commit():
            manifest, segments = manifest_after(self.state.manifest, entry), self.state.segments
            if entry["segment"] is not None:
                reader = BankReader(self.directory, manifest, self.origin, verify=False)
                if segment_bytes(entry["segment"]) <= SMALL_FILE:
                    segments += (Segment.of_commit(commit.table, entry["segment"], reader),)
                else:  # from the files, so that the rows do not stay in memory twice
                    segment, losses = Segment.open(reader, entry["segment"])
                    segments += (segment,)
                    deleted = np.union1d(self.state.deleted, commit.gone)
                    self._note([damage_of(segment, loss, deleted) for loss in losses])
            self._follow_commit(commit, manifest, segments)
        if len(entry_names(self.state.manifest)) >= LOG_COMMITS:
            self._maintain()

    def _follow_commit(self, commit: Commit, manifest: Manifest, segments: tuple[Segment, ...]) -> None:
        """Make what was committed the current state."""
        self._deleted_keys.update(commit.versions)
        if commit.memories and self._buffers is not None:
            self._buffers.append(commit.memories)
        self._adopt(self.state.followed_by(manifest, segments, commit.gone))
        self._follow()

    @contextlib.contextmanager
    def _committing(self) -> Iterator[BankWriter]:
        """A writer; if what is done with it fails, all is as before, or this bank must be opened again.

        Raises:
            CommitOutcomeUnknown: if it fails when readers may see the commit.
        """
        assert self.directory is not None
        writer = BankWriter(self.directory)
        try:
            with writer:
                yield writer
        except BaseException as error:
            if writer.may_have_committed():
                self._give_up()
                raise CommitOutcomeUnknown(
                    f"{self.directory}: a commit was begun and its end is not known ({type(error).__name__}: {error}). "
                    "Open the bank again: it has the commit as a whole, or nothing of it."
                ) from error
            raise

    @contextlib.contextmanager
    def _after_commit(self) -> Iterator[None]:
        """A block after a commit that is on the disk; if it fails, this bank must be opened again.

        Raises:
            CommitOutcomeUnknown: for whatever is raised.
        """
        try:
            yield
        except BaseException as error:
            self._give_up()
            raise CommitOutcomeUnknown(
                f"{self.directory}: the commit is on the disk, but this object could not follow it "
                f"({type(error).__name__}: {error}). Open the bank again."
            ) from error

    def _give_up(self) -> None:
        """Let another writer in, and refuse everything from now on."""
        self._closed = True
        if self._lock is not None:
            self._lock.release()

    def _check_is_last(self) -> None:
        """Make sure, directly before a commit, that nobody else has written meanwhile."""
        assert self.directory is not None
        if self._lock is not None:
            self._lock.check()
        manifest = self.state.manifest
        if self._mark is not None and manifest_mark(self.directory) == self._mark:
            return
        now, self._mark = read_checkpoint(self.directory)
        same = "lineage" in manifest and commit_id(now) == f"{manifest['lineage']}-{manifest['checkpoint']}"
        if not same and read_manifest(self.directory)["checksum"] != manifest.get("checksum"):
            self._mark = None
            raise self._replaced()

    def _replaced(self) -> BankNotWritable:
        assert self.directory is not None
        generation = read_manifest(self.directory).get("generation")
        return BankNotWritable(f"{self.directory} was replaced since it was opened (generation {generation}).")

    def _swap(self, manifest: Manifest, write: Callable[[BankWriter], None]) -> None:
        """Run what writes files and fills a manifest, and put that in the place of the one that lies there."""
        assert self.directory is not None
        self._check_is_last()
        with self._committing() as writer:
            write(writer)
            self._check_is_last()
            if log_generations(self.directory) and max(log_generations(self.directory)) > self.generation:
                raise self._replaced()
            writer.commit(manifest)
        self._mark = manifest_mark(self.directory)

    def _checkpoint(self, watermark: int | None = None) -> None:
        """Write a manifest of the state of now, with small segments put together; the log begins anew.

        Args:
            watermark: deletions up to which are forgotten. None: as it is.
        """
        assert self.directory is not None
        state = self.state
        before, _ = read_checkpoint(self.directory)
        numbers = segments_to_merge(state, before, self._limit)
        if not are_intact(self.directory, (state.segments[number] for number in numbers)):
            self.verify()  # finds what else is damaged, and leaves the documents out
            self._check_writable()
        upgraded = state.manifest if "lineage" in state.manifest else as_version_3(state.manifest)
        manifest: Manifest = {**upgraded, "library_version": library_version()}
        if watermark is not None:
            manifest["watermark"] = watermark
        reader = BankReader(self.directory, state.manifest, self.origin, verify=False)
        self._swap(
            manifest, lambda writer: write_checkpoint(writer, manifest, state, reader, before, numbers, self._limit)
        )
        with self._after_commit():
            kept = state.segments[: numbers[0]] if numbers else state.segments
            for segment, record in zip(kept, manifest["segments"], strict=False):
                segment.record, segment.stale = record, False
            segments = kept
            if numbers:
                record = manifest["segments"][-1]
                mapped = record["table"]["file"] in mapped_tables(manifest)
                after = BankReader(self.directory, manifest, self.origin, verify=False)
                segment, losses = Segment.open(after, record, mapped)
                self._note([damage_of(segment, loss, state.deleted) for loss in losses])
                segments += (segment,)
            self._adopt(state.merged(manifest, segments))
            self._follow()
        old = file_names(state.manifest) | entry_names(state.manifest)
        remove_files(self.directory, old - file_names(manifest))

    def _maintain(self) -> None:
        """Put together what the log has; the commits stand, whatever comes of it.

        Raises:
            CommitOutcomeUnknown: if it fails once readers may see it, or is interrupted: nobody may take that for a
                failure of the commit before it.
        """
        try:
            self._checkpoint()
        except CommitOutcomeUnknown:
            raise
        except Exception as error:
            logger.warning(
                "%s: its %d last commits could not be put together (%s); that is tried again at the next commit.",
                self.directory,
                len(entry_names(self.state.manifest)),
                error,
                exc_info=not isinstance(error, OSError | BankError),
            )
        except BaseException:
            with self._after_commit():
                raise

    # Care -------------------------------------------------------------------------------------------------------------

    def compact(self) -> bool:
        """Write the documents anew without the deleted ones, and put small segments together; returns whether it did.

        Afterwards no file holds anything of a deleted document but the hash of its key beside its version. Snapshots
        that were taken before keep what they have in memory until they are let go.

        What an interrupted `msa-hf encode` left in the directory goes as well, and so do indexes that did not follow:
        they are made again of what lives.

        Raises:
            BankDamaged: where a file that would be copied is not what was written; nothing has changed then.
            ErasureIncomplete: naming files that may hold deleted documents and could not be removed. The bank is
                compacted then; once the cause is gone, call this again.
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
                self._erase()
                return False
            copied = (state.segments[number] for keep, numbers in groups if not keep for number in numbers)
            if not are_intact(self.directory, copied):
                self.verify()  # finds what else is damaged, and leaves the documents out
                self._check_writable()
            manifest: Manifest = {
                **as_version_3(state.manifest),
                "lineage": uuid.uuid4().hex,
                "watermark": state.manifest.get("watermark"),
                "generation": self.generation + 1,
                "library_version": library_version(),
                "deletions": [],
            }

            def write(writer: BankWriter) -> None:
                write_compacted(writer, manifest, state, groups, self._limit)
                manifest["prefix"] = writer.prefix(self.whole_prefix())
                if len(keys := self._deleted_keys.array()):
                    entry = writer.deletions(self.generation + 1, np.empty(0, np.int64), keys)
                    manifest["deletions"] = [entry]

            self._swap(manifest, write)
            with self._after_commit():
                self._damage = {}
                self._buffers = None
                self._load()
                self._follow()
            self._erase()
            return True

    def _erase(self) -> None:
        """Remove what may hold deleted documents, and no living one needs."""
        assert self.directory is not None
        erase(self.directory, self._followers.outdated_files())

    def _compact_memory(self) -> bool:
        if not len(self.state.deleted) and len(self.state.segments) < 2:
            return False
        assert self._buffers is not None
        state, self._buffers = compacted_in_memory(self.state, self._buffers, self.device)
        self._adopt(state)
        self._follow()
        return True

    def checkpoint(self) -> bool:
        """Put the commits of the log into the manifest, and small segments together; returns whether there were any.

        That happens by itself every 64 commits. Rows stay as they are: nothing deleted is removed.
        """
        with self._mutex:
            if self._pending is not None:
                raise RuntimeError("checkpoint() inside a batch.")
            self._check_writable()
            if self.directory is None or not entry_names(self.state.manifest):
                return False
            self._checkpoint()
            return True

    def forget_deletions(self, until: int) -> int:
        """Forget deletions whose version is `until` or lower; returns how many.

        A bank remembers the version of every deletion, so that a late event does not bring a document back. Call this
        once no event up to a version will come any more: from then on, events up to it have no effect, whatever key
        they are about.

        Args:
            until: a watermark, from 0 to 2^62; never lower than the one before.
        """
        with self._mutex:
            if self._pending is not None:
                raise RuntimeError("forget_deletions() inside a batch.")
            self._check_writable()
            until = checked_version(until)
            if until < (before := self.state.manifest.get("watermark") or 0):
                raise ValueError(f"The bank has forgotten deletions up to {before} already, which is above {until}.")
            known = len(self._deleted_keys)
            if self.directory is None:
                self._adopt(replace(self.state, manifest={**self.state.manifest, "watermark": until}))
            else:
                self._checkpoint(watermark=until)
            self._deleted_keys.forget(until)
            return known - len(self._deleted_keys)

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
                self._apply(Commit(table_schema(2).empty_table(), {}, lost, {}, state.manifest["next_id"]))
            except BaseException:
                self.state = hidden
                raise
            self._adopt(State.of(self.state.manifest, self.state.segments, self.state.deleted))
            return len(lost)

    def __reduce__(self) -> NoReturn:
        other = "" if self.directory is None else f", or the directory {str(self.directory)!r}, to open it there"
        raise TypeError(
            "A BankStore holds open files and the right to write, and cannot be pickled or copied: pass "
            f"`store.snapshot()`, which can be{other}."
        )

    def __repr__(self) -> str:
        where = "memory" if self.directory is None else repr(str(self.directory))
        return f"BankStore({where}, documents={len(self)}, tokens={self.state.tokens}, generation={self.generation})"


__getattr__ = renamed(__name__, {"OpenBank": "BankStore"})
