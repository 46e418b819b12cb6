"""The one writer of a bank's directory: data files that never change, and the manifest that makes them a bank.

The order is that of `docs/bank_format.md`: a data file is written under a temporary name, flushed and renamed; the
directory is flushed before the manifest is renamed to its place, or the file of a commit is linked to its own, which is
the commit; and after it.
"""

import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save, save_file
from torch import Tensor

from .arrow_msa import ArrowTable, numbers_of, write_stream
from .bank_files_msa import checked_file, file_digest
from .bank_format_msa import (
    BACKUP,
    LEFTOVER,
    MANIFEST,
    OWN_FILE,
    BankFormatError,
    CommitOutcomeUnknown,
    DeletionsRecord,
    FileRecord,
    Manifest,
    OriginEntries,
    PrefixRecord,
    SegmentRecord,
    ShardRecord,
    TensorLayout,
    TensorPair,
    chunk_ranges,
    counts_of,
    data_files,
    deletions_payload,
    file_names,
    format_error,
    index_of,
    index_payload,
    manifest_checksum,
    new_manifest,
    parse_size,
)
from .bank_lock_msa import BankNotWritable, WriterLock
from .bank_log_msa import ENTRY_FILE, LogEntry, encode_entry, entry_name
from .bank_manifest_msa import backup_of, manifest_mark, read_checkpoint, read_manifest, referenced_files

logger = logging.getLogger(__name__)
SMALL_TENSORS = 2**20  # bytes; a file of more is written without a copy of it in memory
ChunkSource = Callable[[int, int, int], TensorPair]  # (layer, first, end) -> routing keys and content of these chunks


class BankWriter:
    """The files of one commit to a directory.

    Use it in a `with` block: if that raises, the files that were written in it are removed again, unless the manifest
    names them after all. One writer at a time.

    Args:
        directory: that exists.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._created: list[Path] = []
        self._commits: Callable[[], bool] | None = None  # tells whether the commit that was begun is there

    def __enter__(self) -> "BankWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Whatever goes wrong here is less to the point than the error; leftovers are removed by the next writer.
            with suppress(OSError, BankFormatError):
                # Asked of the directory and not of a flag: an interrupt may arrive after the manifest was replaced.
                kept = referenced_files(self.directory)
                for path in self._created:
                    if path.name not in kept:
                        path.unlink(missing_ok=True)

    # Data files

    def tensors(self, stem: str, tensors: Mapping[str, Tensor]) -> FileRecord:
        """Write tensors by name to a file named after `stem` and its content."""
        # Always a copy: safetensors refuses tensors that share storage, as the halves of one K/V tensor do.
        copies = {name: part.detach().to("cpu", copy=True).contiguous() for name, part in tensors.items()}
        if sum(part.nbytes for part in copies.values()) <= SMALL_TENSORS:
            return self._publish(stem, "safetensors", save(copies))
        # In a folder of its own, because safetensors writes beside the file it was asked for and renames: whatever a
        # kill leaves of that is found under a name of ours.
        folder = self.directory / f".{stem}-{uuid.uuid4().hex}.tmp"
        temporary = folder / "payload"
        try:
            folder.mkdir()
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(copies, temporary)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            return self._place(stem, "safetensors", temporary)
        finally:
            remove_leftover(folder)

    def table(self, stem: str, table: ArrowTable) -> FileRecord:
        """Write a table, likewise."""
        return self._publish(stem, "arrow", lambda path: write_stream(table, path))

    def content(self, stem: str, data: bytes) -> FileRecord:
        """Write bytes, likewise."""
        return self._publish(stem, "bin", data)

    def _publish(self, stem: str, suffix: str, content: bytes | Callable[[Path], object]) -> FileRecord:
        """Write bytes, or what writes to a path, to a file named after `stem` and its content."""
        temporary = self.directory / f".{stem}-{uuid.uuid4().hex}.tmp"
        try:
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                content(temporary)
            return self._place(stem, suffix, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, stem: str, suffix: str, temporary: Path) -> FileRecord:
        """Flush a file and give it its name."""
        sync(temporary)
        digest, size = file_digest(temporary), temporary.stat().st_size
        target = self.directory / f"{stem}-{digest[:16]}.{suffix}"
        if not target.exists():
            self._created.append(target)
        # Also over an equal file: that one may be damaged, and whoever has it mapped keeps it.
        put_in_place(temporary, target)
        return {"file": target.name, "bytes": size, "sha256": digest}

    def prefix(self, prefix: Mapping[int, TensorPair]) -> PrefixRecord | None:
        """Write keys and values of the template prefix; None if there is none."""
        if not prefix:
            return None
        tensors = {}
        for layer, (keys, values) in prefix.items():
            tensors.update({f"layers.{layer}.keys": keys, f"layers.{layer}.values": values})
        return {**self.tensors("prefix", tensors), "layers": list(prefix)}

    def segment(
        self,
        table: ArrowTable,
        first: int,
        tensors: ChunkSource,
        layout: TensorLayout,
        max_bytes: int,
        shard_stem: Callable[[int], str] | None = None,
    ) -> SegmentRecord:
        """Write the files of a segment: tensors, table, and in format version 2 an index.

        Args:
            table: its rows, at least one.
            first: the row of the bank that its first one is, or another number that no other segment has.
            tensors: asked for one shard at a time, with chunks counted within the segment.
            max_bytes: of tensors per file; a document is never split.
            shard_stem: the beginning of a shard's name, from its first chunk. None: every layer gets shards of its own,
                as all of version 1 have.
        """
        offsets = np.concatenate([[0], numbers_of(table, "chunks").cumsum()])
        shards: list[ShardRecord] = []
        for layers in [[layer] for layer in layout.shapes] if shard_stem is None else [list(layout.shapes)]:
            for start, end in chunk_ranges(offsets, max(max_bytes // layout.chunk_bytes(layers), 1)):
                content: dict[str, Tensor] = {}
                for layer in layers:
                    keys, values = tensors(layer, start, end)
                    content.update({f"layers.{layer}.routing_keys": keys, f"layers.{layer}.content": values})
                if shard_stem is None:
                    stem = f"layer-{layers[0]:03d}-{start:010d}"
                    shards.append({**self.tensors(stem, content), "layer": layers[0], "chunks": [start, end]})
                else:
                    shards.append({**self.tensors(shard_stem(start), content), "chunks": [start, end]})
        record: SegmentRecord = {
            "documents": [first, first + len(table)],
            "chunks": int(offsets[-1]),
            "tensors": shards,
            "table": self.table(f"documents-{first:010d}", table),
        }
        if "id" in table.column_names:
            record["index"] = self.index(table, first)
        return record

    def index(self, table: ArrowTable, first: int) -> FileRecord:
        """Write the index of a segment whose first row is `first`."""
        return self.content(f"index-{first:010d}", index_payload(index_of(table["key"].to_pylist())))

    def deletions(self, generation: int, rows: NDArray[np.int64], keys: NDArray[np.uint64]) -> DeletionsRecord:
        """Write rows [n] of deleted documents; and deleted keys [m, 3], halves of a hash and a version."""
        record = self.content(f"deletions-{generation:010d}", deletions_payload(rows, keys))
        return {**record, "rows": len(rows), "keys": len(keys)}

    def adopt(self, path: Path) -> None:
        """Move a data file here that a writer published in another folder of the file system."""
        put_in_place(path, self.directory / path.name)

    # The commit

    def commit(self, manifest: Manifest) -> None:
        """Sign a manifest and put it in the place of the one that lies there; a bank that changes has a copy of it."""
        if "lineage" in manifest:
            manifest["checkpoint"] = manifest["generation"]
        manifest["checksum"] = manifest_checksum(manifest)
        text, path, before = (
            json.dumps(manifest, indent=2) + "\n",
            self.directory / MANIFEST,
            manifest_mark(self.directory),
        )
        self._commits = lambda: manifest_mark(self.directory) != before
        write_text(path, text, "manifest")
        try:
            if "lineage" in manifest or os.path.lexists(self.directory / BACKUP):
                keep_copy(self.directory)
        except OSError as error:  # the commit stands
            logger.warning("%s: no copy of the manifest could be kept (%s).", self.directory, error)

    def append(self, entry: LogEntry) -> None:
        """Add a commit to the log.

        Raises:
            FileExistsError: if another writer has committed this generation.
        """
        path = self.directory / entry_name(entry["generation"])
        temporary = self.directory / f".commit-{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_text(encode_entry(entry), encoding="utf-8")
            sync(temporary)
            sync(self.directory)  # the names of the data files, before anything refers to them
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            self._commits = path.exists
            _link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(self.directory)

    def may_have_committed(self) -> bool:
        """Tell whether readers may see the commit: asked after an error."""
        try:
            return self._commits is not None and self._commits()
        except OSError:
            return True


def _link(temporary: Path, path: Path) -> None:
    """Give a file another name that nothing has."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links. Nothing has the name, of which the caller and its lock have made sure.
        os.rename(temporary, path)


_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


def keep_copy(directory: Path) -> None:
    """Keep a copy of the manifest beside it, of whatever lies there."""
    write_text(directory / BACKUP, (directory / MANIFEST).read_text(encoding="utf-8"), "manifest")


def restore_manifest(directory: Path) -> Manifest:
    """Put the copy of a bank's manifest in the place of one that is missing or damaged; returns it.

    Raises:
        BankFormatError: if there is no intact copy, if a file that it names is missing, or if the manifest is intact.
    """
    try:
        read_checkpoint(directory)
    except BankFormatError:
        pass
    else:
        raise format_error(directory / MANIFEST, "is intact", "Nothing was changed")
    if (manifest := backup_of(directory)) is None:
        raise format_error(directory / BACKUP, "there is no intact copy of the manifest")
    for record in data_files(manifest):
        checked_file(directory, record, verify=False)
    write_text(directory / MANIFEST, (directory / BACKUP).read_text(encoding="utf-8"), "manifest")
    return read_manifest(directory)


def write_text(path: Path, text: str, stem: str) -> None:
    """Put a text that refers to data files in its place, after their names are on the disk; all or nothing."""
    temporary = path.with_name(f".{stem}-{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        sync(path.parent)  # the names of the data files, before anything refers to them
        put_in_place(temporary, path)
    finally:
        with suppress(OSError):  # of the next writer, who removes leftovers
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def put_in_place(file: Path, path: Path) -> None:
    """Rename a file, over another one if there is one.

    Raises:
        BankNotWritable: if a directory has the name.
    """
    try:
        os.replace(file, path)
    except IsADirectoryError as error:
        raise BankNotWritable(f"{path} is a directory, where the bank has a file. Move it away.") from error


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory and needs no flush of one
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftover(path: Path) -> None:
    """Remove a file, or a folder with what it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Remove data files that no manifest names any more, and commits, if they are named as a bank's are."""
    for name in names:
        if OWN_FILE.fullmatch(name) or ENTRY_FILE.fullmatch(
            name
        ):  # a manifest by another hand may name any file of the directory
            with suppress(OSError):  # Windows keeps a mapped file; it does no harm
                (directory / name).unlink(missing_ok=True)


def remove_unnamed(directory: Path, named: set[str]) -> int:
    """Remove data files that are not `named`, and files of writes that did not come to their end; returns how many."""
    left = [
        path
        for path in directory.iterdir()
        if path.name not in named
        and (OWN_FILE.fullmatch(path.name) or ENTRY_FILE.fullmatch(path.name) or LEFTOVER.fullmatch(path.name))
    ]
    for path in left:
        try:
            remove_leftover(path)
        except OSError as error:
            logger.warning("%s: it belongs to nothing, but cannot be removed (%s).", path, error.strerror)
    return sum(not os.path.lexists(path) for path in left)


def write_bank(
    directory: Path,
    origin: OriginEntries,
    layers: Mapping[int, TensorPair],
    prefix: Mapping[int, TensorPair],
    table: ArrowTable,
    max_shard_size: int | str,
    next_id: int = 0,
    sole_writer: bool = False,
) -> None:
    """Write a bank, all or nothing; one that lies in `directory` is replaced at the last step.

    Args:
        directory: made where missing.
        origin: the entries of the manifest that say what the bank was made with.
        layers: per memory layer, routing keys [C, G * D] and content [C, 2, G, D].
        prefix: per layer, keys and values [G, p, D].
        table: N rows; the format's version is that of its columns.
        max_shard_size: bytes of tensors per file, `"4GB"` or a number. A file never splits a document.
        next_id: of a table with ids, the first above all that were ever given.
        sole_writer: ask for no lock, see `WriterLock`.

    Raises:
        BankLocked: where another writer has the directory open.
        BankNotWritable: where the directory cannot be locked, see `WriterLock`.
        ValueError: for a dtype that the format does not have, or an unreadable size.
        BankFormatError: if the directory holds a manifest that cannot be read.
        CommitOutcomeUnknown: for an error of the disk once readers may see the bank.
    """
    limit, layout = parse_size(max_shard_size), TensorLayout.of_tensors(layers)
    directory.mkdir(parents=True, exist_ok=True)
    _replaced_files(directory)  # where it refuses, nothing is made
    manifest = new_manifest(origin, layout, 2 if "id" in table.column_names else 1)

    def chunks(layer: int, first: int, end: int) -> TensorPair:
        keys, content = layers[layer]
        return keys[first:end], content[first:end]

    with WriterLock(directory, sole_writer) as lock:
        old = _replaced_files(directory)
        with BankWriter(directory) as writer:
            manifest["prefix"] = writer.prefix(prefix)
            if len(table):
                manifest["segments"] = [writer.segment(table, 0, chunks, layout, limit)]
                manifest["counts"] = counts_of([table])
            if "next_id" in manifest:
                manifest["next_id"] = next_id
            lock.check()
            try:
                writer.commit(manifest)
            except OSError as error:
                if not writer.may_have_committed():
                    raise
                raise CommitOutcomeUnknown(
                    f"{directory}: the bank was put in its place, but whether the disk has it is not known ({error}). "
                    "Open it: it is this one or the one before, as a whole."
                ) from error
        remove_files(directory, old - file_names(manifest))


def _replaced_files(directory: Path) -> set[str]:
    """The files of the bank that is to be replaced."""
    try:
        return referenced_files(directory)
    except BankFormatError as error:
        raise format_error(
            directory, f"not overwritten, because what lies there cannot be read ({error})", "Save elsewhere"
        ) from error
