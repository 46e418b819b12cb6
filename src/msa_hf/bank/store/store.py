"""`BankStore`: a bank to which documents are added, in which they are replaced, and from which they are deleted."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...model.arrow_msa import table_schema
from ...model.bank_format_msa import BankError, Manifest, file_names, library_version, parse_size
from ...model.bank_log_msa import entry_names, manifest_after
from ...model.bank_manifest_msa import is_bank, read_checkpoint, read_manifest
from ...model.bank_reader_msa import BankReader, mapped_tables
from ...model.bank_writer_msa import BankWriter, remove_files
from ...model.given_documents_msa import are_paths, each_document, key_of, read_paths
from ...model.hub_msa import bank_directory
from ...model.interface_msa import check_interface
from ...model.open_files_msa import SMALL_FILE
from ...moved import renamed
from ...retrieval.embedders import Embedder
from ...retrieval.followers import Followers
from .buffers import Buffers
from .changes import Changes, GivenDocument, Known, checked_version, committed
from .commit import Commit, commit_of, entry_in_memory, write_commit
from .compact import compacted_in_memory, groups_of, write_compacted
from .encoder import DocumentEncoder, EncodingModel
from .erase import erase
from .errors import BankDamaged, BankNotWritable, CommitOutcomeUnknown
from .format_v1 import as_version_3
from .merge import LOG_COMMITS, merged_in_memory, segment_bytes, segments_to_merge, write_checkpoint
from .open import make_directory, new_bank, remove_leftovers
from .reading import CommittedBank
from .segments import Segment, damage_of
from .state import State
from .verify import are_intact
from .write_access import WriteAccess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...generation.protocol import PromptProtocol

logger = logging.getLogger(__name__)


class BankStore(CommittedBank):
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
        directory: made where missing. None: the bank lies in memory alone. With `read_only` also `"user/bank"`, a
            dataset on the Hub.
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
        BankNotWritable: where the file system of the directory has no locks, naming it, `.lock` is no plain file, or
            the directory belongs to the Hub's cache.
        BankFormatError: where the directory holds what is no bank or a damaged one.
        ValueError: where another model made the bank.
    """

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
        check_interface(model)
        place, encoder = torch.empty(0, device=device or "cpu").device, None
        if model is not None:
            options = {"show_progress": False, **(encode_options or {})}
            encoder = DocumentEncoder(model, tokenizer, protocol, place, options)
        if read_only and directory is not None:
            directory = bank_directory(directory, model, tokenizer)
        home = None if directory is None else Path(directory).absolute()  # wherever the process goes
        super().__init__(model, home, tokenizer, protocol, read_only, place, encoder)
        self._limit = parse_size(max_shard_size)
        self._pending: Changes | None = None
        self._access: WriteAccess | None = None
        self._closed = False
        try:
            if model is None and self.directory is not None:
                read_manifest(self.directory)  # before anything is made there
            if self.directory is not None and not read_only:
                make_directory(self.directory)
                self._access = WriteAccess(self.directory, sole_writer)
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

    def close(self) -> None:
        """Let another writer in, once a commit that another thread is in has come to its end. Snapshots live on.

        Raises:
            RuntimeError: inside a batch of this thread, which goes on.
        """
        # A forked process may have inherited a mutex that is taken.
        if self._access is not None and not self._access.held:
            self._closed = True
            return
        with self._mutex:
            if self._pending is not None:
                raise RuntimeError("close() inside a batch: leave the batch first, which commits it.")
            self._closed = True
            if self._access is not None:
                self._access.release()

    def __enter__(self) -> BankStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Changes ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def batch(self) -> Iterator[BankStore]:
        """Everything inside is one commit; where something raises, none of it happens.

        A call inside whose error you catch leaves nothing in the commit either.
        """
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

    def add(self, documents: Iterable[object] | Path) -> list[int | None]:
        """Add documents with new keys; returns their ids, None for one whose `version` is late.

        Args:
            documents: as `model.encode_documents` takes them: texts, token ids, or mappings with `text` or `input_ids`,
                and perhaps `key` (default: the id), `version` and further metadata.

        Raises:
            ValueError: for a key that a document has, or a document that cannot be encoded, naming it.
        """
        given_documents = each_document(read_paths(documents) if are_paths(documents) else documents)
        ids: list[int | None] = []
        with self._changing() as changes, changes.all_or_none():
            for document in given_documents:
                given = GivenDocument.of(document)
                key = str(changes.next_id) if given.key is None else key_of(given.key)
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
            return self._put(changes, key_of(key), text, None, version, metadata)

    def delete(self, key: str, version: int | None = None) -> bool:
        """Delete a document; returns whether there was one.

        Its version stays known, so that a late event does not bring it back. `compact()` removes it from the files.
        """
        with self._changing() as changes:
            return changes.delete(key_of(key), version)

    def known_version(self, key: str) -> int | None:
        """The version up to which events about a key have no effect: that of its document or of its deletion, or a
        watermark above it; None where none is known."""
        key = key_of(key)
        with self._mutex:
            known, _ = self._committed(key) if self._pending is None else self._pending.known(key)
            versions = [item for item in (known.version, self.state.manifest.get("watermark")) if item is not None]
            return max(versions, default=None)

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
        if self._closed or (self._access is not None and self._access.given_up):
            raise BankNotWritable("This bank is closed.")
        if self.read_only:
            raise BankNotWritable("This bank was opened with read_only=True.")
        if self._access is not None:
            self._access.check()
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
        access = self._required_access()
        if "lineage" not in self.state.manifest or any(segment.stale for segment in self.state.segments):
            self._checkpoint()  # an earlier format, or an index that was made anew: nothing of it lies there yet
        access.check_is_last(self.state.manifest)
        with access.committing() as writer:
            entry = write_commit(writer, self.state, commit, self._limit)
            access.check_is_last(self.state.manifest)  # again: what was written may have taken its time
            try:
                writer.append(entry)
            except FileExistsError:
                raise access.replaced() from None
        with access.after_commit():
            manifest, segments = manifest_after(self.state.manifest, entry), self.state.segments
            access.note(manifest)
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

    def _required_access(self) -> WriteAccess:
        """The right to write, of a bank in a directory that was opened with it."""
        assert self._access is not None
        return self._access

    def _follow_commit(self, commit: Commit, manifest: Manifest, segments: tuple[Segment, ...]) -> None:
        """Make what was committed the current state."""
        self._deleted_keys.update(commit.versions)
        if commit.memories and self._buffers is not None:
            self._buffers.append(commit.memories)
        self._adopt(self.state.followed_by(manifest, segments, commit.gone))
        self._follow()

    def _checkpoint(self, watermark: int | None = None) -> None:
        """Write a manifest of the state of now, with small segments put together; the log begins anew.

        Args:
            watermark: deletions up to which are forgotten. None: as it is.
        """
        assert self.directory is not None
        state, access = self.state, self._required_access()
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
        access.swap(
            state.manifest,
            manifest,
            lambda writer: write_checkpoint(writer, manifest, state, reader, before, numbers, self._limit),
        )
        with access.after_commit():
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
            with self._required_access().after_commit():
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

            access = self._required_access()
            access.swap(state.manifest, manifest, write)
            with access.after_commit():
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


__getattr__ = renamed(__name__, {"OpenBank": "BankStore"})
