"""The right to write to a bank's directory, and what becomes of it when a commit fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ...model.bank_format_msa import Manifest, commit_id
from ...model.bank_manifest_msa import log_generations, manifest_mark, read_checkpoint, read_manifest
from ...model.bank_writer_msa import BankWriter
from .errors import BankNotWritable, CommitOutcomeUnknown
from .lock import WriterLock


class WriteAccess:
    """The right to write to a directory, until it is released or it is not known what became of a commit.

    Args:
        sole_writer: as of `BankStore`.

    Raises:
        BankLocked: where another writer has the directory open, naming it.
        BankNotWritable: where the file system has no locks, naming it, or `.lock` is no plain file.
    """

    def __init__(self, directory: Path, sole_writer: bool) -> None:
        self.directory = directory
        self.given_up = False
        self._lock = WriterLock(directory, sole_writer)
        self._mark: tuple[int, ...] | None = None  # of the manifest that lies there

    @property
    def held(self) -> bool:
        """Tell whether it is this process that holds the lock: a forked one only seems to."""
        return self._lock.held

    def check(self) -> None:
        """Make sure that this still is the writer.

        Raises:
            BankNotWritable: if it is not, saying why.
        """
        self._lock.check()

    def release(self) -> None:
        """Let another writer in."""
        self._lock.release()

    @contextlib.contextmanager
    def committing(self) -> Iterator[BankWriter]:
        """A writer; if what is done with it fails, all is as before, or the bank must be opened again.

        Raises:
            CommitOutcomeUnknown: if it fails when readers may see the commit.
        """
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

    def note(self, manifest: Manifest) -> None:
        """Note that the bank is at this manifest, so that a commit whose file is removed later is told."""
        if "lineage" in manifest:
            self._lock.note_commit(manifest["lineage"], manifest["generation"])

    @contextlib.contextmanager
    def after_commit(self) -> Iterator[None]:
        """A block after a commit that is on the disk; if it fails, the bank must be opened again.

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
        self.given_up = True
        self._lock.release()

    def check_is_last(self, manifest: Manifest) -> None:
        """Make sure, directly before a commit, that nobody else has written since the bank was at this manifest."""
        self._lock.check()
        if self._mark is not None and manifest_mark(self.directory) == self._mark:
            return
        now, self._mark = read_checkpoint(self.directory)
        same = "lineage" in manifest and commit_id(now) == f"{manifest['lineage']}-{manifest['checkpoint']}"
        if not same and read_manifest(self.directory)["checksum"] != manifest.get("checksum"):
            self._mark = None
            raise self.replaced()

    def replaced(self) -> BankNotWritable:
        """The error of a bank to which somebody else has written."""
        generation = read_manifest(self.directory).get("generation")
        return BankNotWritable(f"{self.directory} was replaced since it was opened (generation {generation}).")

    def swap(self, old: Manifest, new: Manifest, write: Callable[[BankWriter], None]) -> None:
        """Put a manifest in the place of the one that lies there.

        Args:
            old: of the bank as it is open.
            new: is committed.
            write: writes files and fills `new`.
        """
        self.check_is_last(old)
        with self.committing() as writer:
            write(writer)
            self.check_is_last(old)
            if (logged := log_generations(self.directory)) and max(logged) > old["generation"]:
                raise self.replaced()
            writer.commit(new)
        self._mark = manifest_mark(self.directory)
        self.note(new)
