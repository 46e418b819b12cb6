"""The door of a bank's directory: whatever reads a bank opens it with `open_bank`.

It knows a manifest, tensors and a table of documents; what they mean is the business of `memory_msa.py` and of
`msa_hf.bank`. Nothing here trusts the directory: before memory is allocated for what a file holds, its place, size,
header and shape are checked, and its SHA-256 if that is asked for.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrow_msa import ArrowTable, concat_tables, numbers_of, pyarrow, read_stream, table_schema
from .bank_files_msa import checked_file, corrupted, unreadable
from .bank_format_msa import (
    INDEX_ENTRY,
    MANIFEST,
    BankFormatError,
    DeletionsRecord,
    FileRecord,
    Manifest,
    SegmentRecord,
    ShardRecord,
    TensorLayout,
    TensorPair,
    data_files,
    decode_deletions,
    deletions_of,
    format_error,
)
from .bank_lock_msa import noted_commit, warn_of_missing_commit
from .bank_manifest_msa import TRIES, read_manifest
from .interface_msa import check_interface
from .open_files_msa import SMALL_FILE, TensorFile
from .origin_msa import BankOrigin, check_origin
from .shard_msa import Shard, shard_layers, tensor_shapes

MOST_MAPPED = 16  # tables
Read = TypeVar("Read")


class KnowsOrigin(Protocol):
    """A model, as far as a bank asks whether it is the one that made it."""

    def memory_origin(self, tokenizer: object = None) -> BankOrigin: ...


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
            raise unreadable(path, error) from error
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
            raise unreadable(path, error) from error
        if (digest := hashlib.sha256(data).hexdigest()) != segment["index"]["sha256"]:
            raise corrupted(path, digest, segment["index"])
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
            raise unreadable(path, error) from error
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
        tensor_shapes(file, {name for pair in names.values() for name in pair}, self.layout.dtype)
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
        if (found := tensor_shapes(file, set(wanted), layout.dtype)) != wanted:
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
    directory = Path(directory).absolute()  # files are opened later as well, wherever the process is then
    noted = noted_commit(directory)  # before what it is compared with
    manifest = read_manifest(directory)
    warn_of_missing_commit(directory, manifest.get("lineage"), manifest.get("generation", 0), noted)
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
