"""The format of a bank on disk, versions 1 to 3: `docs/bank_format.md` is the specification.

What a manifest says, as types and as checks; the names of files; the content of indices and of deletions. Nothing here
opens a file, and nothing trusts what one says: every name, size, shape and count is checked before memory is allocated
for it.
"""

import hashlib
import importlib.metadata
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrow_msa import DIGEST_BYTES, ArrowTable, numbers_of
from .hub_cache_msa import is_snapshot

FORMAT = "msa_hf-bank"
FORMAT_VERSION = 3
READER_FEATURES: frozenset[str] = frozenset()  # what this reader understands beyond the format's versions
MANIFEST = "manifest.json"
BACKUP = "manifest.backup.json"  # a copy of it
LOCK = ".lock"
PARTS = ".encoding"  # a folder in a bank's directory: the parts of a run of `msa-hf encode` that is not complete

# dtype in the manifest -> (torch's, the name in a safetensors header)
DTYPES = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
}
MAX_MANIFEST_BYTES = 256 * 2**20
MEMORY_PER_FILE = 16 * 2**10  # that a manifest may take once decoded, for each file in the directory
MAX_WIDTH = 2**20  # of groups and of head_dim: keeps products of manifest numbers far from overflow
OWN_FILE = re.compile(r"(layer|chunks|prefix|documents|index|deletions)(-\d+)*-[0-9a-f]{16}\.(safetensors|arrow|bin)")
LEFTOVER = re.compile(r"\.[a-z]+(-\d+)*-[0-9a-f]{32}\.tmp")  # what a writer that was killed had not yet renamed
INDEX_ENTRY = 24  # bytes: two halves of a key's hash, and a row
KEY_ENTRY = 24  # bytes: two halves of a key's hash, and a version

RESTORE = "Restore the bank from a copy, or encode the documents again"
DOWNLOAD = "Download the bank again: load it by its name on the Hub with force_download=True"
CHOOSE = "Give the directory that a bank was saved to"
UPGRADE = "Upgrade: `pip install -U msa-hf`"

TensorPair = tuple[Tensor, Tensor]
KeyHash = tuple[int, int]
T = TypeVar("T")


# --- errors -----------------------------------------------------------------------------------------------------------


class BankError(Exception):
    """A reason not to open or write a bank: the base of all such errors."""


class BankFormatError(BankError, ValueError):
    """A directory is not a readable bank. The message names the file, the cause and the remedy."""


class BankUnreadable(BankError, OSError):
    """A file of a bank cannot be read now, for want of descriptors, permission or a working disk: it is not damaged."""


class CommitOutcomeUnknown(BankError, RuntimeError):
    """A commit was begun and then something failed: whether it is on the disk, only opening the bank again tells.

    A `BankStore` is closed then. What the bank held before is intact, and so is the commit as a whole if it is there.
    """


def format_error(file: Path, cause: str, remedy: str | None = None) -> BankFormatError:
    """The error about a file of a bank, in the words that all of them have.

    Args:
        remedy: default `DOWNLOAD` for a file in the Hub's cache, which keeps a damaged one, else `RESTORE`.
    """
    if remedy is None:
        remedy = DOWNLOAD if is_snapshot(file.parent) else RESTORE
    return BankFormatError(f"{file}: {cause}. {remedy}.")


# --- what a manifest holds --------------------------------------------------------------------------------------------


class FileRecord(TypedDict):
    """A data file beside the manifest."""

    file: str
    bytes: int
    sha256: str


class ShardRecord(FileRecord):
    """Tensors of a run of chunks, counted within the segment; of one layer, or of all."""

    chunks: list[int]
    layer: NotRequired[int]


class PrefixRecord(FileRecord):
    layers: list[int]


class DeletionsRecord(FileRecord):
    rows: int
    keys: int


class PartNote(TypedDict):
    """By what `msa-hf encode` knows a segment again."""

    part: str
    tokens: int
    next_id: int


class SegmentRecord(TypedDict):
    """A run of rows; `index` only in format version 2."""

    documents: list[int]
    chunks: int
    tensors: list[ShardRecord]
    table: FileRecord
    index: NotRequired[FileRecord]
    part: NotRequired[PartNote]


class LayerRecord(TypedDict):
    layer: int
    groups: int
    head_dim: int


class Counts(TypedDict):
    """Numbers of rows, and of what these have."""

    documents: int
    chunks: int
    tokens: int


class OriginEntries(TypedDict):
    """The record of what the bank was made with; `BankOrigin` reads it."""

    origin: dict[str, object]
    made_with: NotRequired[dict[str, object]]


class Manifest(OriginEntries):
    """A checked manifest, as decoded; it may have fields that nobody here knows.

    Attributes:
        generation, next_id, deletions: from format version 2 on.
        lineage: from version 3 on; another one wherever rows were numbered anew.
        checkpoint: the generation that `manifest.json` itself has; later ones are those of commits in the log.
        watermark: versions of events up to which nothing has an effect any more.
    """

    format: str
    format_version: int
    reader_features: list[str]
    writer_features: list[str]
    library_version: str
    dtype: str
    layers: list[LayerRecord]
    counts: Counts
    prefix: PrefixRecord | None
    segments: list[SegmentRecord]
    checksum: NotRequired[str]
    generation: NotRequired[int]
    next_id: NotRequired[int]
    deletions: NotRequired[list[DeletionsRecord]]
    lineage: NotRequired[str]
    checkpoint: NotRequired[int]
    watermark: NotRequired[int | None]


@dataclass(frozen=True)
class TensorLayout:
    """The shapes and dtype of a bank's tensors.

    Attributes:
        dtype: of all of them.
        shapes: memory layer, ascending -> (G, D): routing keys are [C, G * D], content is [C, 2, G, D].
    """

    dtype: torch.dtype
    shapes: dict[int, tuple[int, int]]

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> "TensorLayout":
        shapes = {item["layer"]: (item["groups"], item["head_dim"]) for item in manifest["layers"]}
        return cls(DTYPES[manifest["dtype"]][0], shapes)

    @classmethod
    def of_tensors(cls, layers: Mapping[int, TensorPair]) -> "TensorLayout":
        """The layout of routing keys and content per layer.

        Raises:
            ValueError: for a dtype that the format does not have.
        """
        kind = next(iter(layers.values()))[0].dtype
        if all(kind is not known for known, _ in DTYPES.values()):
            raise ValueError(f"A bank of {kind} cannot be saved, only of {list(DTYPES)}: save `bank.to(dtype=...)`.")
        return cls(kind, {layer: (content.shape[2], content.shape[3]) for layer, (_, content) in layers.items()})

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def records(self) -> list[LayerRecord]:
        """As a manifest says it."""
        return [{"layer": layer, "groups": groups, "head_dim": dim} for layer, (groups, dim) in self.shapes.items()]

    def chunk_bytes(self, layers: Sequence[int]) -> int:
        """Bytes of a chunk's routing keys and content in some layers."""
        return sum(3 * groups * dim for groups, dim in map(self.shapes.__getitem__, layers)) * self.dtype.itemsize

    def zeros(self, layer: int, chunks: int) -> TensorPair:
        """Chunks of zeros that take up no memory."""
        (groups, dim), zero = self.shapes[layer], torch.zeros((), dtype=self.dtype)
        return zero.expand(chunks, groups * dim), zero.expand(chunks, 2, groups, dim)

    def empty(self, layer: int, chunks: int, device: torch.device) -> TensorPair:
        """Room for chunks."""
        groups, dim = self.shapes[layer]
        keys = torch.empty(chunks, groups * dim, dtype=self.dtype, device=device)
        return keys, torch.empty(chunks, 2, groups, dim, dtype=self.dtype, device=device)


@cache
def library_version() -> str:
    """Version of the package, for manifests."""
    try:
        return importlib.metadata.version("msa-hf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # the files travel with a checkpoint and run without the package


def new_manifest(origin: OriginEntries, layout: TensorLayout, version: int = FORMAT_VERSION) -> Manifest:
    """The manifest of a bank without documents."""
    manifest: Manifest = {
        "format": FORMAT,
        "format_version": version,
        "reader_features": [],
        "writer_features": [],
        "library_version": library_version(),
        **origin,
        "dtype": layout.dtype_name,
        "layers": layout.records(),
        "counts": {"documents": 0, "chunks": 0, "tokens": 0},
        "prefix": None,
        "segments": [],
    }
    if version > 1:
        manifest.update({"generation": 0, "next_id": 0, "deletions": []})
    if version > 2:
        manifest.update({"lineage": uuid.uuid4().hex, "checkpoint": 0, "watermark": None})
    return manifest


def lineage_of(manifest: Manifest) -> str:
    """A name of the numbering of a bank's rows: of two banks with an equal one, one begins with the rows of the other.

    Before format version 3 it is that of these rows alone.
    """
    if "lineage" in manifest:
        return manifest["lineage"]
    names = [segment["table"]["file"] for segment in manifest["segments"]]  # which have hashes of the content
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]


def commit_id(manifest: Manifest) -> str:
    """A name of the state that a manifest describes, by which it is told from all others of a directory.

    From format version 3 on it does not depend on how the state lies in files.
    """
    if "lineage" in manifest:
        return f"{manifest['lineage']}-{manifest['generation']}"
    return manifest["checksum"]


def counts_of(tables: Iterable[ArrowTable]) -> Counts:
    """The counts of a bank with the rows of these tables."""
    counts: Counts = {"documents": 0, "chunks": 0, "tokens": 0}
    for table in tables:
        counts["documents"] += len(table)
        counts["chunks"] += int(numbers_of(table, "chunks").sum())
        counts["tokens"] += int(numbers_of(table, "tokens").sum())
    return counts


def data_files(manifest: Manifest) -> list[FileRecord]:
    """The records of all data files that a manifest names."""
    files: list[FileRecord] = [] if manifest["prefix"] is None else [manifest["prefix"]]
    for segment in manifest["segments"]:
        files += [*segment["tensors"], segment["table"]]
        files += [segment["index"]] if "index" in segment and manifest["format_version"] > 1 else []
    return [*files, *deletions_of(manifest)]


def deletions_of(manifest: Manifest) -> list[DeletionsRecord]:
    """The records of the files of deletions; format version 1 has none."""
    return manifest["deletions"] if manifest["format_version"] > 1 else []


def file_names(manifest: Manifest) -> set[str]:
    """Names of all data files that a manifest names."""
    return {record["file"] for record in data_files(manifest)}


def manifest_checksum(manifest: Mapping[str, object]) -> str:
    """SHA-256 of a manifest, or of a commit, without its `checksum`, as canonical JSON (RFC 8785)."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


# --- checking one -----------------------------------------------------------------------------------------------------


def decode_manifest(data: bytes, path: Path) -> Manifest:
    """Decode and check a manifest that was read from `path`.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        decoded = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise format_error(path, f"not valid JSON ({error})") from error
    try:
        _check_manifest(decoded, path)
        manifest: Manifest = decoded
        check_unique(manifest, path)
    except BankFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise format_error(path, str(error)) from error
    return manifest


def check_unique(manifest: Manifest, path: Path) -> None:
    """Make sure that no file is named twice: it would let a small bank claim the memory of a large one.

    Raises:
        BankFormatError: naming the file.
    """
    for name, times in Counter(record["file"] for record in data_files(manifest)).items():
        if times > 1:
            raise format_error(path, f"the file {brief(name)} is named more than once")


def _check_manifest(manifest: object, path: Path) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise format_error(path, f'not the manifest of a bank: `format` must be "{FORMAT}"', CHOOSE)
    version = _count(manifest, "", "format_version", least=1)
    if version > FORMAT_VERSION:
        raise format_error(path, f"`format_version` is {version}, this library reads up to {FORMAT_VERSION}", UPGRADE)
    for name in ("reader_features", "writer_features"):
        if any(not isinstance(feature, str) for feature in _get(manifest, "", name, list)):
            raise ValueError(f"`{name}` must be a list of strings")
    if unknown := sorted(set(manifest["reader_features"]) - READER_FEATURES):
        raise format_error(path, f"`reader_features` has {brief(unknown)}, which this library cannot read", UPGRADE)
    if _get(manifest, "", "checksum", str) != manifest_checksum(manifest):
        raise ValueError("the content does not match its `checksum`: corrupted, or edited by hand")
    _get(manifest, "", "origin", dict)
    if _get(manifest, "", "dtype", str) not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {brief(manifest['dtype'])}")
    layers = _check_layers(manifest)
    if _get(manifest, "", "prefix", object) is not None:
        held = _get(manifest["prefix"], "prefix.", "layers", list)
        if any(type(layer) is not int or not 0 <= layer <= MAX_WIDTH for layer in held) or len(set(held)) != len(held):
            raise ValueError(f"prefix.`layers` must be distinct layer indices, got {brief(held)}")
        _check_file(manifest["prefix"], "prefix.")
    totals = {"documents": 0, "chunks": 0}
    for number, segment in enumerate(_get(manifest, "", "segments", list)):
        _check_segment(segment, f"segments[{number}].", totals["documents"], layers, version)
        totals = {"documents": segment["documents"][1], "chunks": totals["chunks"] + segment["chunks"]}
    counts = _get(manifest, "", "counts", dict)
    _count(counts, "counts.", "tokens")
    for name, total in totals.items():
        if _count(counts, "counts.", name) != total:
            raise ValueError(f"counts.`{name}` is {counts[name]}, the segments hold {total}")
    if version > 1:
        _count(manifest, "", "generation")
        _count(manifest, "", "next_id")
        _check_deletions(manifest, totals["documents"])
    if version > 2:
        if not re.fullmatch("[0-9a-f]{32}", lineage := _get(manifest, "", "lineage", str)):
            raise ValueError(f"`lineage` must be 32 lower-case hexadecimal digits, got {brief(lineage)}")
        if _count(manifest, "", "checkpoint") != manifest["generation"]:
            raise ValueError(f"`checkpoint` is {manifest['checkpoint']}, `generation` is {manifest['generation']}")
        if _get(manifest, "", "watermark", object) is not None:
            _count(manifest, "", "watermark")


def _get(record: object, where: str, name: str, kind: type[T]) -> T:
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{where}`{name}` is missing")
    value = record[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}`{name}` must be of type {kind.__name__}, got {brief(value)}")
    return value


def _count(record: object, where: str, name: str, least: int = 0, most: int = 2**62) -> int:
    value = _get(record, where, name, int)
    if not least <= value <= most:
        raise ValueError(f"{where}`{name}` must lie between {least} and {most}, got {brief(value)}")
    return value


def _range(record: object, where: str, name: str, first: int) -> int:
    value = _get(record, where, name, list)
    if len(value) != 2 or any(type(edge) is not int for edge in value) or value[0] != first or not first < value[1]:
        raise ValueError(f"{where}`{name}` must be [{first}, an end above it], got {brief(value)}")
    end: int = value[1]
    return end


def brief(value: object) -> str:
    """A value of a stranger, short enough for a message."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_file(record: object, where: str) -> None:
    name = _get(record, where, "file", str)
    if not name.isprintable() or name in ("", ".", "..", MANIFEST, BACKUP) or re.search(r"[/\\:]", name):
        raise ValueError(f"{where}`file` must be the plain name of a file beside the manifest, got {brief(name)}")
    _count(record, where, "bytes", least=1)
    if not re.fullmatch("[0-9a-f]{64}", digest := _get(record, where, "sha256", str)):
        raise ValueError(f"{where}`sha256` must be 64 lower-case hexadecimal digits, got {brief(digest)}")


def _check_layers(manifest: object) -> list[int]:
    layers: list[int] = []
    for number, record in enumerate(_get(manifest, "", "layers", list)):
        where = f"layers[{number}]."
        for name in ("groups", "head_dim"):
            _count(record, where, name, 1, MAX_WIDTH)
        layers.append(_count(record, where, "layer", max(layers, default=-1) + 1, MAX_WIDTH))
    return layers


def _check_segment(record: object, where: str, first: int, layers: Sequence[int], version: int) -> None:
    end = _range(record, where, "documents", first)
    chunks = _count(record, where, "chunks", least=end - first)
    ends = dict.fromkeys(layers, 0)
    for number, shard in enumerate(_get(record, where, "tensors", list)):
        inside = f"{where}tensors[{number}]."
        held = list(ends)
        if version == 1 or not isinstance(shard, dict) or "layer" in shard:
            layer = _get(shard, inside, "layer", int)
            if layer not in ends:
                raise ValueError(f"{inside}`layer` is {brief(layer)}, which `layers` does not list")
            held = [layer]
        for layer in held:
            ends[layer] = _range(shard, inside, "chunks", ends[layer])
        _check_file(shard, inside)
    for layer, covered in ends.items():
        if covered != chunks:
            raise ValueError(f"{where}`tensors` hold {covered} chunks of layer {layer} instead of {chunks}")
    _check_file(_get(record, where, "table", dict), f"{where}table.")
    if version > 1:
        index, inside = _get(record, where, "index", dict), f"{where}index."
        _check_file(index, inside)
        _check_size(index, inside, (end - first) * INDEX_ENTRY)


def checked_segment(record: object, first: int, layers: Sequence[int]) -> None:
    """Check the record of a segment that begins at row `first`, of a bank with these layers."""
    _check_segment(record, "segment.", first, layers, FORMAT_VERSION)


def checked_deletions(record: object) -> None:
    """Check the record of a file of deletions."""
    _check_deletions_record(record, "deletions.")


def count_of(record: object, name: str, least: int = 0) -> int:
    """A number of a record, checked."""
    return _count(record, "", name, least)


def _check_size(record: object, where: str, size: int) -> None:
    if (stated := _get(record, where, "bytes", int)) != size:
        raise ValueError(f"{where}`bytes` is {stated} instead of {size}")


def _check_deletions(manifest: object, documents: int) -> None:
    deleted = 0
    for number, record in enumerate(_get(manifest, "", "deletions", list)):
        deleted += _check_deletions_record(record, f"deletions[{number}].")
    if deleted > documents:
        raise ValueError(f"`deletions` name {deleted} documents of {documents}")


def _check_deletions_record(record: object, where: str) -> int:
    rows, keys = _count(record, where, "rows"), _count(record, where, "keys")
    _check_file(record, where)
    _check_size(record, where, 2 * (DIGEST_BYTES + 8 * rows + KEY_ENTRY * keys))
    return rows


# --- indices and deletions --------------------------------------------------------------------------------------------


def key_hash(key: str) -> KeyHash:
    """The number by which an index and the deletions know a key: the first 16 bytes of its SHA-256, as two numbers."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def index_of(keys: Sequence[str]) -> NDArray[np.uint64]:
    """The index of a segment, [3, rows]: ascending hashes, in three columns: first half, second half, row."""
    halves = np.array([key_hash(key) for key in keys], np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    return np.stack([halves[order, 0], halves[order, 1], order.astype(np.uint64)])


def index_payload(index: NDArray[np.uint64]) -> bytes:
    """The content of the file of an index."""
    return index.astype("<u8").tobytes()


def deletions_payload(rows: NDArray[np.int64], keys: NDArray[np.uint64]) -> bytes:
    """The content of a file of deletions: twice the same, so that one damaged place brings no document back.

    Args:
        rows: [n] of deleted documents.
        keys: [m, 3], halves of the hash of a deleted key, and the version.
    """
    payload = rows.astype("<i8").tobytes() + keys.astype("<u8").tobytes()
    return 2 * (hashlib.sha256(payload).digest() + payload)


def decode_deletions(data: bytes, rows: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]] | None:
    """The inverse of `deletions_payload`, None if both copies are damaged."""
    for copy in (data[: len(data) // 2], data[len(data) // 2 :]):
        payload = copy[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() == copy[:DIGEST_BYTES]:
            keys = np.frombuffer(payload, "<u8", offset=8 * rows).astype(np.uint64).reshape(-1, 3)
            return np.frombuffer(payload, "<i8", rows).astype(np.int64), keys
    return None


def parse_size(size: int | str) -> int:
    """Bytes of `"4GB"`, `"512MiB"`, `"100KB"` (decimal and binary units) or of a plain number of at least 1."""
    match = re.fullmatch(r"(\d+)\s*(?:([KMGT])(I?)B|B)?", str(size).strip().upper())
    value = 0
    if match is not None:
        number, unit, binary = match.groups()
        value = int(number) * (1024 if binary else 1000) ** (" KMGT".index(unit) if unit else 0)
    if value < 1:
        raise ValueError(f"`max_shard_size` must be bytes or a size such as '4GB', got {size!r}.")
    return value


def chunk_ranges(offsets: NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """Cut [0, offsets[-1]) between documents into ranges of at most `most` chunks, or of one longer document."""
    ranges, first = [], 0
    while first < len(offsets) - 1:
        end = max(int(np.searchsorted(offsets, offsets[first] + most, side="right")) - 1, first + 1)
        ranges.append((int(offsets[first]), int(offsets[end])))
        first = end
    return ranges
