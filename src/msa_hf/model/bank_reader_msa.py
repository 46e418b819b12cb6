"""The door of a bank's directory: whatever reads a bank opens it with `open_bank`.

It knows a manifest, tensors and a table of documents; what they mean is the business of `memory_msa.py` and of
`msa_hf.bank`. Nothing here trusts the directory: before memory is allocated for what a file holds, its place, size,
header and shape are checked, and its SHA-256 if that is asked for.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .arrow_msa import ArrowTable, concat_tables, numbers_of, pyarrow, read_stream, table_schema
from .bank_format_msa import (
    CHOOSE,
    DTYPES,
    INDEX_ENTRY,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MEMORY_PER_FILE,
    RESTORE,
    BankFormatError,
    FileRecord,
    Manifest,
    SegmentRecord,
    ShardRecord,
    TensorLayout,
    TensorPair,
    brief,
    data_files,
    decode_deletions,
    decode_manifest,
    deletions_of,
    file_names,
    format_error,
)
from .bounds_msa import MEMORY, bytes_there, check_header, json_memory
from .interface_msa import check_interface
from .origin_msa import BankOrigin, check_origin

# What a manifest may count beside lost files: rows, which take memory; and bytes of tensors, whose places take none.
FEW_ROWS, ROW_BYTES = 2**18, 128  # without more; one more for so many bytes that are there
FEW_TENSORS, LOST_TIMES = 2**30, 1024  # bytes without more; so many for each byte that is there
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the process or the machine: nothing is wrong with a file


class KnowsOrigin(Protocol):
    """A model, as far as a bank asks whether it is the one that made it."""

    def memory_origin(self, tokenizer: object = None) -> BankOrigin: ...


# --- files ------------------------------------------------------------------------------------------------------------


def is_bank(directory: Path) -> bool:
    """Tell whether a bank, or what claims to be one, lies in a directory."""
    return os.path.lexists(directory / MANIFEST)


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json` of a bank; returns it as decoded.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    path = directory / MANIFEST
    if not is_bank(directory):
        raise format_error(path, "there is no such file, so this is not a bank", CHOOSE)
    if (size := _regular_file(directory, MANIFEST).st_size) > MAX_MANIFEST_BYTES:
        raise format_error(path, f"larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")
    try:
        _check_memory(path, size)
        data = path.read_bytes()
        _check_memory(path, json_memory(data))
    except OSError as error:
        raise _unreadable(path, error) from error
    return decode_manifest(data, path)


def _check_memory(path: Path, needed: int) -> None:
    """Compare what a manifest takes in memory with the files that lie beside it: it names no others."""
    if needed > MEMORY and needed > (most := MEMORY + MEMORY_PER_FILE * len(os.listdir(path.parent))):
        cause = f"so large, or of so many values, that it may take {needed} bytes of memory; beside so few files a"
        raise format_error(path, f"{cause} manifest has at most {most}")


def referenced_files(directory: Path) -> set[str]:
    """Names of the data files of the bank that lies in `directory`; empty if none does."""
    return file_names(read_manifest(directory)) if is_bank(directory) else set()


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
        raise format_error(path, f"is corrupted: its SHA-256 is {digest}, the manifest says {record['sha256']}")
    return path


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


def _unreadable(path: Path, error: Exception) -> Exception:
    """What to raise for a file that cannot be read; what the process lacks is no damage, and stays what it was."""
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        return error
    remedy = f"{RESTORE}; where another process saved the bank meanwhile, load it again"
    return format_error(path, f"cannot be read ({error})", remedy)


def _tensor_shapes(path: Path, names: set[str], dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Shapes in the header of a safetensors file that must hold exactly `names`, all of `dtype`."""
    try:
        check_header(path, len(names))
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
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
    """Tensors of a run of chunks, in one file that is opened once: others may remove it meanwhile.

    Attributes:
        first, end: the chunks; of the segment or of the bank, as whoever opened it counts.
        layers: that it holds.
        file: None if it is damaged.
    """

    first: int
    end: int
    layers: list[int]
    file: safe_open | None

    def tensors(self, layer: int, first: int | None = None, end: int | None = None) -> TensorPair:
        """Routing keys and content of a layer, memory mapped on the CPU; or a copy of chunks [first, end) of them."""
        if self.file is None:
            raise ValueError("A damaged shard has no tensors.")
        names = f"layers.{layer}.routing_keys", f"layers.{layer}.content"
        low, high = self.first if first is None else first, self.end if end is None else end
        if (low, high) == (self.first, self.end):
            return self.file.get_tensor(names[0]), self.file.get_tensor(names[1])
        keys, content = (self.file.get_slice(name)[low - self.first : high - self.first] for name in names)
        return keys, content


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
        table = concat_tables(tables + [self.segment_table(segment) for segment in manifest["segments"]])
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

    def segment_table(self, segment: SegmentRecord) -> ArrowTable:
        """Memory map the table of a segment, with the columns of the format's version."""
        schema = table_schema(self.manifest["format_version"])
        path = self.file(segment["table"])
        try:
            table = read_stream(path, schema)
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
        """Memory map the index of a segment, [3, rows]; see `index_of`."""
        path = self.file(segment["index"])
        try:
            return np.memmap(path, "<u8", "r").view(np.ndarray).reshape(INDEX_ENTRY // 8, -1)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error

    def deletions(self) -> Deletions:
        """What was deleted; each file says it twice, so that one damaged place brings no document back."""
        rows, keys = [np.empty(0, np.int64)], [np.empty((0, 3), np.uint64)]
        for record in deletions_of(self.manifest):
            path = checked_file(self.directory, record, verify=False)
            found = decode_deletions(path.read_bytes(), record["rows"])
            if found is None:
                raise format_error(path, "is damaged in both of its copies, so that deleted documents are not known")
            rows.append(found[0])
            keys.append(found[1])
        dead, documents = np.sort(np.concatenate(rows)), self.manifest["counts"]["documents"]
        if len(dead) and (dead[0] < 0 or dead[-1] >= documents or (np.diff(dead) == 0).any()):
            cause = f"`deletions` name documents twice, or none of these {documents}"
            raise format_error(self.directory / MANIFEST, cause)
        return Deletions(dead, np.concatenate(keys))

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
        _tensor_shapes(path, {name for pair in names.values() for name in pair}, self.layout.dtype)
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {layer: (file.get_tensor(keys), file.get_tensor(values)) for layer, (keys, values) in names.items()}

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
        if (found := _tensor_shapes(path, set(wanted), layout.dtype)) != wanted:
            raise format_error(path, f"tensors have the shapes {found} instead of {wanted}")
        try:
            file = safe_open(path, framework="pt", device=str(device))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
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
