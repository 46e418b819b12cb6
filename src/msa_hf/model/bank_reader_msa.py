"""The door of a bank's directory: whatever reads a bank opens it with `open_bank`.

It knows a manifest, tensors and a table of documents; what they mean is the business of `memory_msa.py` and of
`msa_hf.bank`. Nothing here trusts the directory: before memory is allocated for what a file holds, its place, size,
header and shape are checked, and its SHA-256 if that is asked for.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from .arrow_msa import ArrowTable, concat_tables, numbers_of, pyarrow, read_stream, table_schema
from .bank_format_msa import (
    BACKUP,
    CHOOSE,
    DTYPES,
    INDEX_ENTRY,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MEMORY_PER_FILE,
    OWN_FILE,
    RESTORE,
    BankError,
    BankFormatError,
    BankUnreadable,
    DeletionsRecord,
    FileRecord,
    Manifest,
    SegmentRecord,
    ShardRecord,
    TensorLayout,
    TensorPair,
    brief,
    check_unique,
    data_files,
    decode_deletions,
    decode_manifest,
    deletions_of,
    file_names,
    format_error,
)
from .bank_log_msa import ENTRY_FILE, MAX_ENTRY_BYTES, decode_entry, entry_name, entry_names, manifest_after
from .bounds_msa import MEMORY, bytes_there, check_header, check_json, json_memory
from .interface_msa import check_interface
from .open_files_msa import SMALL_FILE, TensorFile
from .origin_msa import BankOrigin, check_origin

# What a manifest may count beside lost files: rows, which take memory; and bytes of tensors, whose places take none.
FEW_ROWS, ROW_BYTES = 2**18, 128  # without more; one more for so many bytes that are there
FEW_TENSORS, LOST_TIMES = 2**30, 1024  # bytes without more; so many for each byte that is there
MOST_MAPPED = 16  # tables
TRIES = 10  # of a reader whose files a writer removes meanwhile


Read = TypeVar("Read")


class KnowsOrigin(Protocol):
    """A model, as far as a bank asks whether it is the one that made it."""

    def memory_origin(self, tokenizer: object = None) -> BankOrigin: ...


# --- files ------------------------------------------------------------------------------------------------------------


def is_bank(directory: Path) -> bool:
    """Tell whether a bank, or what claims to be one, lies in a directory."""
    path = directory / MANIFEST
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from error
    return True


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a bank, and the commits since it was written.

    Returns:
        the manifest of the last commit, as decoded.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    for attempt in range(TRIES):
        manifest, mark = read_checkpoint(directory)
        if "lineage" not in manifest:
            return manifest
        try:
            return _with_log(directory, manifest)
        except BankFormatError:
            # A writer removes the commits that its next manifest has: then that one is there.
            if attempt + 1 == TRIES or manifest_mark(directory) == mark:
                raise
    raise AssertionError


def read_checkpoint(directory: Path) -> tuple[Manifest, tuple[int, ...]]:
    """Read and check `manifest.json` alone, without the commits since; returns it and its `manifest_mark`.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    path = directory / MANIFEST
    if not is_bank(directory):
        raise missing_manifest(directory)
    data, mark = _manifest_bytes(directory, MANIFEST)
    try:
        return decode_manifest(data, path), mark
    except BankFormatError as error:
        if backup_of(directory) is None or ("checksum" not in str(error) and "JSON" not in str(error)):
            raise
        raise BankFormatError(f"{str(error).removesuffix('.')}; {_RESTORE_BACKUP.format(directory)}.") from error


def _manifest_bytes(directory: Path, name: str) -> tuple[bytes, tuple[int, ...]]:
    """The content of a manifest or its copy, which takes no more memory than one of these files does; and its mark."""
    path = directory / name
    if (size := _regular_file(directory, name).st_size) > MAX_MANIFEST_BYTES:
        raise format_error(path, f"larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")
    try:
        _check_memory(path, size)
        with open(path, "rb") as file:
            data, mark = file.read(size), _mark(os.fstat(file.fileno()))
        _check_memory(path, json_memory(data))
    except OSError as error:
        raise _unreadable(path, error) from error
    return data, mark


def manifest_mark(directory: Path) -> tuple[int, ...] | None:
    """A mark of the file `manifest.json` that is another one once it was replaced; None where there is none."""
    try:
        return _mark(os.stat(directory / MANIFEST))
    except OSError:
        return None


def _mark(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _with_log(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest after the commits that lie beside it."""
    later = sorted(number for number in log_generations(directory) if number > manifest["generation"])
    for number in later:
        path = directory / entry_name(number)
        if number != manifest["generation"] + 1:
            missing = directory / entry_name(manifest["generation"] + 1)
            raise format_error(missing, f"is missing, and with it the commits after it, up to {path.name}")
        try:
            if _regular_file(directory, path.name).st_size > MAX_ENTRY_BYTES:
                raise format_error(path, f"larger than the {MAX_ENTRY_BYTES} bytes that a commit may have")
            data = path.read_bytes()
            check_json(data)
        except OSError as error:
            raise _unreadable(path, error) from error
        except ValueError as error:
            raise format_error(path, str(error)) from error
        manifest = manifest_after(manifest, decode_entry(data, path, manifest))
    check_unique(manifest, directory / MANIFEST)
    return manifest


def log_generations(directory: Path) -> list[int]:
    """Generations of the commits whose files lie in a directory, in any order."""
    found = (ENTRY_FILE.fullmatch(name) for name in os.listdir(directory))
    return [int(match[1]) for match in found if match is not None]


def missing_manifest(directory: Path) -> BankFormatError:
    """The error about a directory without a manifest, by what else lies there."""
    path = directory / MANIFEST
    if left := data_left(directory):
        cause = f"is missing, but {len(left)} data files of a bank are there ({left[0]}, ...)"
        remedy = f"{RESTORE}; if `msa-hf encode` was interrupted, run it again"
        if backup_of(directory) is not None:
            remedy = _RESTORE_BACKUP.format(directory)
        return format_error(path, cause, f"Nothing was removed. {remedy}")
    return format_error(path, "there is no such file, so this is not a bank", CHOOSE)


_RESTORE_BACKUP = f"`msa-hf bank restore {{}}` puts the copy in its place that is kept in {BACKUP}"


def data_left(directory: Path) -> list[str]:
    """Names of files of a bank in a directory, but for a prefix, which a bank that was never begun may leave."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    return [
        name
        for name in names
        if name == BACKUP or ENTRY_FILE.fullmatch(name) or (OWN_FILE.fullmatch(name) and not name.startswith("prefix-"))
    ]


def backup_of(directory: Path) -> Manifest | None:
    """The copy of the manifest that is kept beside it, None where there is none that is intact."""
    try:
        return decode_manifest(_manifest_bytes(directory, BACKUP)[0], directory / BACKUP)
    except (OSError, BankFormatError):
        return None


def _check_memory(path: Path, needed: int) -> None:
    """Compare what a manifest takes in memory with the files that lie beside it: it names no others."""
    if needed > MEMORY and needed > (most := MEMORY + MEMORY_PER_FILE * len(os.listdir(path.parent))):
        cause = f"so large, or of so many values, that it may take {needed} bytes of memory; beside so few files a"
        raise format_error(path, f"{cause} manifest has at most {most}")


def referenced_files(directory: Path) -> set[str]:
    """Names of the data files of the bank that lies in `directory`, and of its log; empty if none does.

    Raises:
        BankFormatError: for a manifest that cannot be read, or that is missing while data files are there.
    """
    if not is_bank(directory) and not data_left(directory):
        return set()
    manifest = read_manifest(directory)
    return file_names(manifest) | entry_names(manifest)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_file(directory: Path, record: FileRecord, verify: bool) -> Path:
    """Check place, size and, with `verify`, SHA-256 of a data file; returns its path.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    path = directory / record["file"]
    size = _regular_file(directory, record["file"]).st_size
    if size != record["bytes"]:
        raise format_error(path, f"has {size} bytes, the manifest says {record['bytes']}: truncated or overwritten")
    try:
        digest = file_digest(path) if verify else record["sha256"]
    except OSError as error:
        raise _unreadable(path, error) from error
    if digest != record["sha256"]:
        raise _corrupted(path, digest, record)
    return path


def _corrupted(path: Path, digest: str, record: FileRecord) -> BankFormatError:
    return format_error(path, f"is corrupted: its SHA-256 is {digest}, the manifest says {record['sha256']}")


def check_claims(directory: Path, manifest: Manifest) -> None:
    """Compare rows and tensors that a manifest counts with what lies in the directory, of which some may be lost.

    Rows of lost tables and tensors of lost shards keep their places.

    Raises:
        BankFormatError: where these would be more than what is there lets expect.
    """
    counts, layout = manifest["counts"], TensorLayout.of_manifest(manifest)
    tensors = counts["chunks"] * layout.chunk_bytes(list(layout.shapes))
    try:
        there = bytes_there(directory)
    except OSError as error:
        raise _unreadable(directory, error) from error
    if counts["documents"] > FEW_ROWS + there // ROW_BYTES or tensors > FEW_TENSORS + LOST_TIMES * there:
        stated = f"{counts['documents']} documents with {tensors} bytes of tensors"
        raise format_error(directory / MANIFEST, f"counts {stated}, but the directory has {there} bytes")


def damage_of_file(directory: Path, record: FileRecord) -> str | None:
    """The message about a file that is not what was written, None if it is."""
    try:
        checked_file(directory, record, verify=True)
    except BankFormatError as error:
        return str(error)
    return None


def _regular_file(directory: Path, name: str) -> os.stat_result:
    path = directory / name
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    if resolved.parent != directory.resolve():
        remedy = "Copy the bank with its files, not links to them (`snapshot_download(..., local_dir=...)`)"
        raise format_error(path, "a link that leaves the directory of the bank", remedy)
    if not stat.S_ISREG(status.st_mode):
        raise format_error(path, "not a regular file")
    return status


def _unreadable(path: Path, error: Exception) -> BankError:
    """The error about a file that cannot be read: it is missing, or nothing is known about it."""
    if isinstance(error, OSError) and error.errno is None:  # pyarrow's, about what the file holds
        return format_error(path, f"cannot be read ({error})")
    if isinstance(error, OSError) and error.errno not in _MISSING:
        return BankUnreadable(error.errno or errno.EIO, _UNREADABLE.format(path, error.strerror or error))
    try:
        there = path.name in os.listdir(path.parent)
    except OSError as listing:
        return BankUnreadable(listing.errno or errno.EIO, _UNREADABLE.format(path, listing.strerror))
    if there and isinstance(error, FileNotFoundError) and not path.is_symlink():
        return BankUnreadable(errno.ENOENT, _UNREADABLE.format(path, error.strerror))
    remedy = f"{RESTORE}; where another process saved the bank meanwhile, load it again"
    return format_error(path, f"cannot be read ({error})", remedy)


_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_UNREADABLE = "{}: cannot be read now ({}). That is no damage: try again, or see what the system lacks"


def _tensor_shapes(file: TensorFile, names: set[str], dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Shapes in the header of a safetensors file that must hold exactly `names`, all of `dtype`; it stays open."""
    path = file.path
    try:
        check_header(path, len(names))
        opened = file.open()
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, ValueError) as error:
        raise format_error(path, f"not a valid safetensors file ({error})") from error
    if found.keys() != names:
        raise format_error(path, f"holds the tensors {brief(sorted(found))} instead of {brief(sorted(names))}")
    wanted = str(dtype).removeprefix("torch.")
    for name, (_, kind) in found.items():
        if kind != DTYPES[wanted][1]:
            raise format_error(path, f"`{name}` has dtype {kind}, the manifest says {wanted}")
    return {name: shape for name, (shape, _) in found.items()}


@dataclass
class Shard:
    """Tensors of a run of chunks, in one file whose header was checked.

    Attributes:
        first, end: the chunks; of the segment or of the bank, as whoever opened it counts.
        layers: that it holds.
        file: None if it is damaged.
    """

    first: int
    end: int
    layers: list[int]
    file: TensorFile | None

    def tensors(self, layer: int, first: int | None = None, end: int | None = None) -> TensorPair:
        """Routing keys and content of a layer, memory mapped on the CPU; or a copy of chunks [first, end) of them.

        Raises:
            BankFormatError: if a writer has removed the file meanwhile.
        """
        if self.file is None:
            raise ValueError("A damaged shard has no tensors.")
        names = f"layers.{layer}.routing_keys", f"layers.{layer}.content"
        low, high = self.first if first is None else first, self.end if end is None else end
        try:
            file = self.file.open()
            if (low, high) == (self.first, self.end):
                return file.get_tensor(names[0]), file.get_tensor(names[1])
            keys, content = (file.get_slice(name)[low - self.first : high - self.first] for name in names)
            return keys, content
        except OSError as error:
            raise _unreadable(self.file.path, error) from error


# --- a bank -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deletions:
    """The deletions of a bank.

    Attributes:
        rows: [n] int64, of deleted documents, ascending.
        keys: [m, 3] uint64: halves of the hash of a deleted key, and the version of its deletion.
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]


@dataclass(frozen=True)
class Rows:
    """The documents of a bank, and the rows of deleted ones.

    Attributes:
        table: R rows.
        deleted: [n] int64 rows, ascending.
        offsets: [R + 1] int64 on the CPU, chunks of the rows.
        next_id: the first id above all that were ever given, None in format version 1.
    """

    table: ArrowTable
    deleted: NDArray[np.int64]
    offsets: Tensor
    next_id: int | None


@dataclass(frozen=True)
class BankReader:
    """A bank's directory, open; `open_bank` makes one. Files are looked at when they are asked for.

    Every method raises `BankFormatError`, which names the file, the cause and the remedy, for what is not as the
    manifest says; those that read the table raise `ImportError` if pyarrow is missing.

    Attributes:
        manifest: checked.
        origin: what the bank was made with.
        verify: compare the SHA-256 of files.
    """

    directory: Path
    manifest: Manifest
    origin: BankOrigin
    verify: bool = True

    @property
    def layout(self) -> TensorLayout:
        return TensorLayout.of_manifest(self.manifest)

    @property
    def bytes(self) -> int:
        """Bytes of all data files."""
        return sum(record["bytes"] for record in data_files(self.manifest))

    def file(self, record: FileRecord) -> Path:
        """The path of a data file, which was checked."""
        return checked_file(self.directory, record, self.verify)

    def check_side_files(self) -> None:
        """Check deletions and indices, which only a writer needs."""
        if self.manifest["format_version"] > 1:
            for record in (*(item["index"] for item in self.manifest["segments"]), *self.manifest["deletions"]):
                self.file(record)

    # Documents

    def rows(self) -> Rows:
        """All rows of the bank."""
        manifest = self.manifest
        tables = [table_schema(manifest["format_version"]).empty_table()]
        mapped = mapped_tables(manifest)
        table = concat_tables(
            tables + [self.segment_table(item, item["table"]["file"] in mapped) for item in manifest["segments"]]
        )
        tokens = int(table["tokens"].to_numpy().sum(dtype=np.int64))
        if tokens != (stated := manifest["counts"]["tokens"]):
            raise format_error(self.directory / MANIFEST, f"counts.`tokens` is {stated}, the documents have {tokens}")
        deleted = self.deletions().rows
        if "id" in table.column_names:
            ids = np.delete(numbers_of(table, "id"), deleted)
            if len(np.unique(ids[(ids >= 0) & (ids < manifest["next_id"])])) < len(ids):
                with self.contradictions():
                    raise ValueError("ids of documents are not distinct numbers below `next_id`.")
        offsets = torch.from_numpy(np.concatenate([[0], numbers_of(table, "chunks").cumsum()]))
        return Rows(table, deleted, offsets, manifest.get("next_id"))

    def segment_table(self, segment: SegmentRecord, mapped: bool = True) -> ArrowTable:
        """The table of a segment, with the columns of the format's version; memory mapped, or read."""
        schema = table_schema(self.manifest["format_version"])
        path = self.file(segment["table"])
        try:
            table = read_stream(path, schema, mapped)
            # Only a full check makes offsets and UTF-8 safe to follow; it reads everything, as `verify` does anyway.
            table.validate(full=self.verify)
            if nulls := [field.name for field in schema if not field.nullable and table[field.name].null_count]:
                raise ValueError(f"{', '.join(nulls)} are null somewhere")
            if table.nbytes > segment["table"]["bytes"]:
                raise ValueError("its columns lie in the same bytes")
            if len(table) and numbers_of(table, "chunks").min() < 1:
                raise ValueError("it has a document without chunks, but chunks ascend by 1 or more")
        except OSError as error:
            raise _unreadable(path, error) from error
        except (pyarrow().ArrowException, ValueError, MemoryError) as error:
            raise format_error(path, f"not the table of a bank ({error})") from error
        first, end = segment["documents"]
        chunks = int(table["chunks"].to_numpy().sum(dtype=np.int64))
        if (len(table), chunks) != (end - first, segment["chunks"]):
            stated = f"{end - first} documents with {segment['chunks']} chunks"
            raise format_error(path, f"holds {len(table)} documents with {chunks} chunks, the manifest says {stated}")
        return table.replace_schema_metadata(None).cast(schema)

    def segment_index(self, segment: SegmentRecord) -> NDArray[np.uint64]:
        """Read the index of a segment, [3, rows]; see `index_of`. It is always verified: it says what is not there."""
        path = checked_file(self.directory, segment["index"], verify=False)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        if (digest := hashlib.sha256(data).hexdigest()) != segment["index"]["sha256"]:
            raise _corrupted(path, digest, segment["index"])
        return np.frombuffer(data, "<u8").astype(np.uint64, copy=False).reshape(INDEX_ENTRY // 8, -1)

    def deletions(self) -> Deletions:
        """What was deleted; each file says it twice, so that one damaged place brings no document back."""
        rows, keys = [np.empty(0, np.int64)], [np.empty((0, 3), np.uint64)]
        for record in deletions_of(self.manifest):
            found = self.deletions_file(record)
            rows.append(found[0])
            keys.append(found[1])
        dead, documents = np.sort(np.concatenate(rows)), self.manifest["counts"]["documents"]
        if len(dead) and (dead[0] < 0 or dead[-1] >= documents or (np.diff(dead) == 0).any()):
            cause = f"`deletions` name documents twice, or none of these {documents}"
            raise format_error(self.directory / MANIFEST, cause)
        return Deletions(dead, np.concatenate(keys))

    def deletions_file(self, record: DeletionsRecord) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Rows [n] and keys [m, 3] of one file of deletions, from whichever of its copies is intact."""
        path = checked_file(self.directory, record, verify=False)
        try:
            found = decode_deletions(path.read_bytes(), record["rows"])
        except OSError as error:
            raise _unreadable(path, error) from error
        if found is None:
            raise format_error(path, "is damaged in both of its copies, so that deleted documents are not known")
        return found

    @contextmanager
    def contradictions(self) -> Iterator[None]:
        """A block whose `ValueError`s say that what was read does not fit together."""
        try:
            yield
        except BankFormatError:
            raise
        except ValueError as error:
            cause = f"the bank contradicts itself: {str(error).removesuffix('.')}"
            raise format_error(self.directory / MANIFEST, cause) from error

    # Tensors

    def prefix(self, device: torch.device) -> dict[int, TensorPair]:
        """Keys and values [G, p, D] of the template prefix, per layer; empty if there is none."""
        if (record := self.manifest["prefix"]) is None:
            return {}
        path = self.file(record)
        names = {layer: (f"layers.{layer}.keys", f"layers.{layer}.values") for layer in record["layers"]}
        file = TensorFile(path, str(device))
        _tensor_shapes(file, {name for pair in names.values() for name in pair}, self.layout.dtype)
        opened = file.open()
        return {layer: (opened.get_tensor(keys), opened.get_tensor(values)) for layer, (keys, values) in names.items()}

    def shard(self, record: ShardRecord, device: torch.device | str = "cpu") -> Shard:
        """Open a shard whose header was checked; its chunks are counted as the record does."""
        path, layout = self.file(record), self.layout
        first, end = record["chunks"]
        layers = shard_layers(record, layout)
        wanted: dict[str, tuple[int, ...]] = {}
        for layer in layers:
            groups, dim = layout.shapes[layer]
            wanted[f"layers.{layer}.routing_keys"] = (end - first, groups * dim)
            wanted[f"layers.{layer}.content"] = (end - first, 2, groups, dim)
        file = TensorFile(path, str(device))
        if (found := _tensor_shapes(file, set(wanted), layout.dtype)) != wanted:
            raise format_error(path, f"tensors have the shapes {found} instead of {wanted}")
        return Shard(first, end, layers, file)

    def shards(self, device: torch.device | str = "cpu", first: int = 0, end: int | None = None) -> list[Shard]:
        """Open the shards that have chunks in [first, end) of the bank, in whose chunks they count."""
        end = self.manifest["counts"]["chunks"] if end is None else end
        opened, base = [], 0
        for segment in self.manifest["segments"]:
            for record in segment["tensors"]:
                start, stop = (base + edge for edge in record["chunks"])
                if max(start, first) < min(stop, end):
                    opened.append(replace(self.shard(record, device), first=start, end=stop))
            base += segment["chunks"]
        return opened

    def tensors(self, device: torch.device, first: int = 0, end: int | None = None) -> dict[int, TensorPair]:
        """Load routing keys [C, G * D] and content [C, 2, G, D] of chunks [first, end), per memory layer.

        On the CPU a layer that lies in one shard stays memory mapped; else shards are read straight to `device`.
        """
        end, layout = self.manifest["counts"]["chunks"] if end is None else end, self.layout
        shards = self.shards(device, first, end)  # all headers first: what is allocated is then known to lie on disk
        layers: dict[int, TensorPair] = {}
        for layer in layout.shapes:
            mine = [shard for shard in shards if layer in shard.layers]
            if len(mine) == 1 and (mine[0].first, mine[0].end) == (first, end):
                layers[layer] = mine[0].tensors(layer)
                continue
            layers[layer] = layout.empty(layer, end - first, device)
            for shard in mine:
                low, high = max(shard.first, first), min(shard.end, end)
                for whole, part in zip(layers[layer], shard.tensors(layer, low, high), strict=True):
                    whole[low - first : high - first] = part
        return layers


def mapped_tables(manifest: Manifest) -> set[str]:
    """The tables that are memory mapped, the largest ones; others are read, so that mappings stay few."""
    records = sorted((item["table"] for item in manifest["segments"]), key=lambda record: -record["bytes"])
    return {record["file"] for record in records[:MOST_MAPPED] if record["bytes"] > SMALL_FILE}


def shard_layers(record: ShardRecord, layout: TensorLayout) -> list[int]:
    """The memory layers that a shard holds: one, or all."""
    return [record["layer"]] if "layer" in record else list(layout.shapes)


def open_bank(
    directory: str | Path, model: KnowsOrigin | None = None, tokenizer: object = None, verify: bool = True
) -> BankReader:
    """Open the bank that lies in a directory.

    Args:
        model: that is to read it; its `memory_origin(tokenizer)` is compared with the bank's before anything else is
            read. None: not compared.
        verify: compare the SHA-256 of every file that is read. Places, sizes, shapes and counts are always checked;
            turn this off only for files that you wrote yourself.

    Raises:
        BankFormatError: if the directory is no bank or a damaged one, naming file, cause and remedy.
        ValueError: if another model made it, listing every difference; or if its code is of another release.
    """
    check_interface(model)
    directory = Path(directory)
    manifest = read_manifest(directory)
    try:
        origin = BankOrigin.from_manifest(manifest)
    except ValueError as error:
        raise format_error(directory / MANIFEST, str(error)) from error
    if model is not None:
        check_origin(origin, model.memory_origin(tokenizer))
    return BankReader(directory, manifest, origin, verify)


def read_bank(
    directory: str | Path,
    model: KnowsOrigin | None,
    tokenizer: object,
    verify: bool,
    read: Callable[[BankReader], Read],
) -> Read:
    """Open the bank that lies in a directory and read it; anew if a writer has changed it meanwhile.

    Args:
        model, tokenizer, verify: as of `open_bank`.
        read: what is done with the open bank; it may be called several times.

    Raises:
        BankFormatError, ValueError: as `open_bank`, and what `read` raises about a bank that nobody has changed.
    """
    for attempt in range(TRIES):
        reader = open_bank(directory, model, tokenizer, verify)
        try:
            return read(reader)
        except BankFormatError:
            # Else a writer has removed what this manifest names: its next one is there.
            if attempt + 1 == TRIES or read_manifest(reader.directory)["checksum"] == reader.manifest["checksum"]:
                raise
    raise AssertionError
