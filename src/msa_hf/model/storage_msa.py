"""The bank on disk, format versions 1 and 2: `docs/bank_format.md` is the specification.

This file reads both and writes whole banks; `msa_hf.bank` changes banks in place, with the pieces found here. It knows
tensors, an Arrow table and a manifest; what they mean is the business of `memory_msa.py`. Nothing here trusts the
directory: every name, size, shape and count is checked before memory is allocated for it.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "msa_hf-bank"
FORMAT_VERSION = 2
READER_FEATURES: frozenset[str] = frozenset()  # what this reader understands beyond the format's versions
MANIFEST = "manifest.json"
LOCK = ".lock"

# dtype in the manifest -> (torch's, the name in a safetensors header)
DTYPES = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
}
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_WIDTH = 2**20  # of groups and of head_dim: keeps products of manifest numbers far from overflow
ROWS_PER_BATCH = 16_384  # of the documents' table; a reader finds a row by walking over batches
OWN_FILE = re.compile(r"(layer|chunks|prefix|documents|index|deletions)(-\d+)*-[0-9a-f]{16}\.(safetensors|arrow|bin)")
LEFTOVER = re.compile(r"\.[a-z]+(-\d+)*-[0-9a-f]{32}\.tmp")  # what a writer that was killed had not yet renamed
DIGEST_BYTES = 32
INDEX_ENTRY = 24  # bytes: two halves of a key's hash, and a row
KEY_ENTRY = 24  # bytes: two halves of a key's hash, and a version

RESTORE = "Restore the bank from a copy, or encode the documents again"
CHOOSE = "Give the directory that a bank was saved to"
UPGRADE = "Upgrade: `pip install -U msa-hf`"

TensorPair = tuple[Tensor, Tensor]


class BankFormatError(ValueError):
    """A directory is not a readable bank. The message names the file, the cause and the remedy."""


def format_error(file: Path, cause: str, remedy: str = RESTORE) -> BankFormatError:
    return BankFormatError(f"{file}: {cause}. {remedy}.")


def pyarrow() -> Any:
    """The module `pyarrow`, imported on first use.

    transformers refuses remote code whose import statements name a missing package, and a bank that is neither saved
    nor loaded does not need this one.
    """
    try:
        importlib.import_module("pyarrow.ipc")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError("Saving and loading a memory bank needs pyarrow: `pip install pyarrow`.") from error


def table_schema(version: int = 1) -> Any:
    """The Arrow schema of the documents' table in a version of the format."""
    pa = pyarrow()
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("text", pa.large_string()),
        pa.field("metadata", pa.string()),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("chunks", pa.int32(), nullable=False),
    ]
    if version > 1:
        fields += [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("version", pa.int64()),
            pa.field("digest", pa.binary(DIGEST_BYTES)),
        ]
    return pa.schema(fields)


# --- the manifest -----------------------------------------------------------------------------------------------------


def _get(record: Any, where: str, name: str, kind: type) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{where}`{name}` is missing")
    if not isinstance(record[name], kind) or (kind is int and isinstance(record[name], bool)):
        raise ValueError(f"{where}`{name}` must be of type {kind.__name__}, got {_brief(record[name])}")
    return record[name]


def _count(record: Any, where: str, name: str, least: int = 0, most: int = 2**62) -> int:
    value = _get(record, where, name, int)
    if not least <= value <= most:
        raise ValueError(f"{where}`{name}` must lie between {least} and {most}, got {_brief(value)}")
    return value


def _range(record: Any, where: str, name: str, first: int) -> int:
    value = _get(record, where, name, list)
    if len(value) != 2 or any(type(edge) is not int for edge in value) or value[0] != first or not first < value[1]:
        raise ValueError(f"{where}`{name}` must be [{first}, an end above it], got {_brief(value)}")
    return value[1]


def _brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_file(record: Any, where: str) -> None:
    name = _get(record, where, "file", str)
    if not name.isprintable() or name in ("", ".", "..", MANIFEST) or re.search(r"[/\\:]", name):
        raise ValueError(f"{where}`file` must be the plain name of a file beside the manifest, got {_brief(name)}")
    _count(record, where, "bytes", least=1)
    if not re.fullmatch("[0-9a-f]{64}", _get(record, where, "sha256", str)):
        raise ValueError(f"{where}`sha256` must be 64 lower-case hexadecimal digits, got {_brief(record['sha256'])}")


def _check_segment(record: Any, where: str, first: int, layers: Mapping[int, Any], version: int) -> None:
    chunks = _count(record, where, "chunks", least=_range(record, where, "documents", first) - first)
    ends = dict.fromkeys(layers, 0)
    for number, shard in enumerate(_get(record, where, "tensors", list)):
        inside = f"{where}tensors[{number}]."
        if version == 1 or not isinstance(shard, dict) or "layer" in shard:
            layer = _get(shard, inside, "layer", int)
            if layer not in ends:
                raise ValueError(f"{inside}`layer` is {_brief(layer)}, which `layers` does not list")
            held = [layer]
        else:
            held = list(ends)
        for layer in held:
            ends[layer] = _range(shard, inside, "chunks", ends[layer])
        _check_file(shard, inside)
    for layer, end in ends.items():
        if end != chunks:
            raise ValueError(f"{where}`tensors` hold {end} chunks of layer {layer} instead of {chunks}")
    _check_file(_get(record, where, "table", dict), f"{where}table.")
    if version > 1:
        index, inside = _get(record, where, "index", dict), f"{where}index."
        _check_file(index, inside)
        if index["bytes"] != (size := (record["documents"][1] - first) * INDEX_ENTRY):
            raise ValueError(f"{inside}`bytes` is {index['bytes']} instead of {size}")


def _check_deletions(manifest: Mapping[str, Any], documents: int) -> None:
    deleted = 0
    for number, record in enumerate(_get(manifest, "", "deletions", list)):
        where = f"deletions[{number}]."
        rows, keys = _count(record, where, "rows"), _count(record, where, "keys")
        _check_file(record, where)
        if record["bytes"] != (size := 2 * (DIGEST_BYTES + 8 * rows + KEY_ENTRY * keys)):
            raise ValueError(f"{where}`bytes` is {record['bytes']} instead of {size}")
        deleted += rows
    if deleted > documents:
        raise ValueError(f"`deletions` name {deleted} documents of {documents}")


def layer_shapes(manifest: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """(groups, head_dim) of each memory layer, ascending."""
    shapes: dict[int, tuple[int, int]] = {}
    for number, record in enumerate(_get(manifest, "", "layers", list)):
        where = f"layers[{number}]."
        shape = _count(record, where, "groups", 1, MAX_WIDTH), _count(record, where, "head_dim", 1, MAX_WIDTH)
        shapes[_count(record, where, "layer", max(shapes, default=-1) + 1, MAX_WIDTH)] = shape
    return shapes


def data_files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of all data files that a manifest names."""
    files = [] if manifest["prefix"] is None else [manifest["prefix"]]
    for segment in manifest["segments"]:
        files += [*segment["tensors"], segment["table"]]
        files += [segment["index"]] if "index" in segment and manifest["format_version"] > 1 else []
    return files + manifest["deletions"] if manifest["format_version"] > 1 else files


def _check_manifest(manifest: dict[str, Any]) -> None:
    _get(manifest, "", "origin", dict)
    if _get(manifest, "", "dtype", str) not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {_brief(manifest['dtype'])}")
    layers = layer_shapes(manifest)
    if _get(manifest, "", "prefix", object) is not None:
        held = _get(manifest["prefix"], "prefix.", "layers", list)
        if any(type(layer) is not int or not 0 <= layer <= MAX_WIDTH for layer in held) or len(set(held)) != len(held):
            raise ValueError(f"prefix.`layers` must be distinct layer indices, got {_brief(held)}")
        _check_file(manifest["prefix"], "prefix.")
    totals = {"documents": 0, "chunks": 0}
    for number, segment in enumerate(_get(manifest, "", "segments", list)):
        _check_segment(segment, f"segments[{number}].", totals["documents"], layers, manifest["format_version"])
        totals = {"documents": segment["documents"][1], "chunks": totals["chunks"] + segment["chunks"]}
    counts = _get(manifest, "", "counts", dict)
    _count(counts, "counts.", "tokens")
    for name, total in totals.items():
        if _count(counts, "counts.", name) != total:
            raise ValueError(f"counts.`{name}` is {counts[name]}, the segments hold {total}")
    if manifest["format_version"] > 1:
        _count(manifest, "", "generation")
        _count(manifest, "", "next_id")
        _check_deletions(manifest, totals["documents"])
    # A file that counted twice would let a small bank claim the memory of a large one.
    for name, times in Counter(record["file"] for record in data_files(manifest)).items():
        if times > 1:
            raise ValueError(f"the file {_brief(name)} is named more than once")


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its `checksum`, as canonical JSON (RFC 8785)."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check `manifest.json` of a bank; returns it as decoded.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise format_error(path, "there is no such file, so this is not a bank", CHOOSE)
    if regular_file(directory, MANIFEST).st_size > MAX_MANIFEST_BYTES:
        raise format_error(path, f"larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise format_error(path, f"not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise format_error(path, f'not the manifest of a bank: `format` must be "{FORMAT}"', CHOOSE)
    try:
        version = _count(manifest, "", "format_version", least=1)
        if version > FORMAT_VERSION:
            raise format_error(
                path, f"`format_version` is {version}, this library reads up to {FORMAT_VERSION}", UPGRADE
            )
        for name in ("reader_features", "writer_features"):
            if any(not isinstance(feature, str) for feature in _get(manifest, "", name, list)):
                raise ValueError(f"`{name}` must be a list of strings")
        if unknown := sorted(set(manifest["reader_features"]) - READER_FEATURES):
            raise format_error(
                path, f"`reader_features` has {_brief(unknown)}, which this library cannot read", UPGRADE
            )
        if _get(manifest, "", "checksum", str) != manifest_checksum(manifest):
            raise ValueError("the content does not match its `checksum`: corrupted, or edited by hand")
        _check_manifest(manifest)
    except BankFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise format_error(path, str(error)) from error
    return manifest


# --- reading ----------------------------------------------------------------------------------------------------------


def regular_file(directory: Path, name: str) -> os.stat_result:
    path = directory / name
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError) as error:
        remedy = f"{RESTORE}; where another process saved the bank meanwhile, load it again"
        raise format_error(path, f"cannot be read ({error})", remedy) from error
    if resolved.parent != directory.resolve():
        remedy = "Copy the bank with its files, not links to them (`snapshot_download(..., local_dir=...)`)"
        raise format_error(path, "a link that leaves the directory of the bank", remedy)
    if not stat.S_ISREG(status.st_mode):
        raise format_error(path, "not a regular file")
    return status


def checked_file(directory: Path, entry: Mapping[str, Any], verify: bool) -> Path:
    path = directory / entry["file"]
    size = regular_file(directory, entry["file"]).st_size
    if size != entry["bytes"]:
        raise format_error(path, f"has {size} bytes, the manifest says {entry['bytes']}: truncated or overwritten")
    if verify and (digest := _sha256(path)) != entry["sha256"]:
        raise format_error(path, f"is corrupted: its SHA-256 is {digest}, the manifest says {entry['sha256']}")
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_shapes(path: Path, names: set[str], dtype: str) -> dict[str, tuple[int, ...]]:
    """Shapes in the header of a safetensors file that must hold exactly `names`, all of `dtype`."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise format_error(path, f"not a valid safetensors file ({error})") from error
    if found.keys() != names:
        raise format_error(path, f"holds the tensors {_brief(sorted(found))} instead of {_brief(sorted(names))}")
    for name, (_, kind) in found.items():
        if kind != DTYPES[dtype][1]:
            raise format_error(path, f"`{name}` has dtype {kind}, the manifest says {dtype}")
    return {name: shape for name, (shape, _) in found.items()}


def shard_layers(shard: Mapping[str, Any], shapes: Mapping[int, tuple[int, int]]) -> list[int]:
    """The memory layers that a shard holds: one, or all."""
    return [shard["layer"]] if "layer" in shard else list(shapes)


def check_shard(directory: Path, shard: Mapping[str, Any], manifest: Mapping[str, Any], verify: bool) -> Path:
    """Check size, header and, with `verify`, SHA-256 of a shard; returns its path.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    path = checked_file(directory, shard, verify)
    shapes, chunks = layer_shapes(manifest), shard["chunks"][1] - shard["chunks"][0]
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in shard_layers(shard, shapes):
        groups, dim = shapes[layer]
        wanted[f"layers.{layer}.routing_keys"] = (chunks, groups * dim)
        wanted[f"layers.{layer}.content"] = (chunks, 2, groups, dim)
    if (found := tensor_shapes(path, set(wanted), manifest["dtype"])) != wanted:
        raise format_error(path, f"tensors have the shapes {found} instead of {wanted}")
    return path


def read_prefix(
    directory: Path, manifest: Mapping[str, Any], device: torch.device, verify: bool
) -> dict[int, TensorPair]:
    """Keys and values [G, p, D] of the template prefix, per layer.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    if (entry := manifest["prefix"]) is None:
        return {}
    path = checked_file(directory, entry, verify)
    names = {layer: (f"layers.{layer}.keys", f"layers.{layer}.values") for layer in entry["layers"]}
    tensor_shapes(path, {name for pair in names.values() for name in pair}, manifest["dtype"])
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {layer: (file.get_tensor(keys), file.get_tensor(values)) for layer, (keys, values) in names.items()}


def read_tensors(
    directory: Path, manifest: Mapping[str, Any], device: torch.device, verify: bool
) -> tuple[dict[int, TensorPair], dict[int, TensorPair]]:
    """Load the tensors of a bank, one shard at a time, straight to `device`.

    On the CPU a layer that lies in one shard stays memory mapped.

    Returns:
        per memory layer: routing keys [C, G * D] and content [C, 2, G, D]; per prefix layer: keys and values [G, p, D].

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    shapes, dtype = layer_shapes(manifest), manifest["dtype"]
    # All headers first: what is allocated below is then known to lie on disk.
    shards: dict[int, list[tuple[int, Path]]] = {layer: [] for layer in shapes}
    base = 0
    for segment in manifest["segments"]:
        for shard in segment["tensors"]:
            path = check_shard(directory, shard, manifest, verify)
            for layer in shard_layers(shard, shapes):
                shards[layer].append((base + shard["chunks"][0], path))
        base += segment["chunks"]
    prefix = read_prefix(directory, manifest, device, verify)

    layers: dict[int, TensorPair] = {}
    for layer, (groups, dim) in shapes.items():
        if len(shards[layer]) != 1:
            options: dict[str, Any] = {"dtype": DTYPES[dtype][0], "device": device}
            layers[layer] = torch.empty(base, groups * dim, **options), torch.empty(base, 2, groups, dim, **options)
        for start, path in shards[layer]:
            with safe_open(path, framework="pt", device=str(device)) as file:
                parts = file.get_tensor(f"layers.{layer}.routing_keys"), file.get_tensor(f"layers.{layer}.content")
            for whole, part in zip(layers.setdefault(layer, parts), parts, strict=True):
                if whole is not part:
                    whole[start : start + len(part)] = part
    return layers, prefix


def open_table(directory: Path, segment: Mapping[str, Any], version: int, verify: bool) -> Any:
    """Memory map the table of a segment: a `pyarrow.Table` with the columns of `table_schema(version)`.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
        ImportError: where pyarrow is missing.
    """
    pa = pyarrow()
    schema = table_schema(version)
    path = checked_file(directory, segment["table"], verify)
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            table = reader.read_all()
        # Only a full check makes offsets and UTF-8 safe to follow; it reads everything, as `verify` does anyway.
        table.validate(full=verify)
        fields = [(field.name, field.type) for field in table.schema]
        if fields != [(field.name, field.type) for field in schema]:
            raise ValueError(f"it has the columns {fields}")
        if nulls := [field.name for field in schema if not field.nullable and table[field.name].null_count]:
            raise ValueError(f"{', '.join(nulls)} are null somewhere")
        if table.nbytes > segment["table"]["bytes"]:
            raise ValueError("it is compressed, which the format does not allow")
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise format_error(path, f"not the table of a bank ({error})") from error
    first, end = segment["documents"]
    chunks = int(table["chunks"].to_numpy().sum(dtype=np.int64))
    if (len(table), chunks) != (end - first, segment["chunks"]):
        stated = f"{end - first} documents with {segment['chunks']} chunks"
        raise format_error(path, f"holds {len(table)} documents with {chunks} chunks, the manifest says {stated}")
    return table.replace_schema_metadata(None).cast(schema)


def read_table(directory: Path, manifest: Mapping[str, Any], verify: bool) -> Any:
    """`open_table` of all segments, one after the other.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
        ImportError: where pyarrow is missing.
    """
    version = manifest["format_version"]
    tables = [table_schema(version).empty_table()]
    tables += [open_table(directory, segment, version, verify) for segment in manifest["segments"]]
    table = pyarrow().concat_tables(tables)
    tokens = int(table["tokens"].to_numpy().sum(dtype=np.int64))
    if tokens != (stated := manifest["counts"]["tokens"]):
        raise format_error(directory / MANIFEST, f"counts.`tokens` is {stated}, the documents have {tokens}")
    return table


def read_deletions(directory: Path, manifest: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What a bank's deletions say; each file holds it twice, so that one damaged place brings no document back.

    Returns:
        rows of deleted documents, ascending int64; [n, 3] uint64: halves of the hash of a deleted key, and the version.

    Raises:
        BankFormatError: where both copies of a file are damaged, or the rows are no rows of this bank.
    """
    documents, rows, keys = manifest["counts"]["documents"], [np.empty(0, np.int64)], [np.empty((0, 3), np.uint64)]
    for entry in manifest["deletions"] if manifest["format_version"] > 1 else []:
        path = checked_file(directory, entry, verify=False)
        data = path.read_bytes()
        for copy in (data[: len(data) // 2], data[len(data) // 2 :]):
            payload = copy[DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() == copy[:DIGEST_BYTES]:
                break
        else:
            raise format_error(path, "is damaged in both of its copies, so that deleted documents are not known")
        rows.append(np.frombuffer(payload, "<i8", entry["rows"]).astype(np.int64))
        keys.append(np.frombuffer(payload, "<u8", offset=8 * entry["rows"]).astype(np.uint64).reshape(-1, 3))
    dead = np.sort(np.concatenate(rows))
    if len(dead) and (dead[0] < 0 or dead[-1] >= documents or (np.diff(dead) == 0).any()):
        raise format_error(directory / MANIFEST, f"`deletions` name documents twice, or none of these {documents}")
    return dead, np.concatenate(keys)


def check_side_files(directory: Path, manifest: Mapping[str, Any], verify: bool) -> None:
    """Check sizes and, with `verify`, SHA-256 of deletions and of indices, which only a writer needs.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    if manifest["format_version"] > 1:
        for entry in (*(segment["index"] for segment in manifest["segments"]), *manifest["deletions"]):
            checked_file(directory, entry, verify)


def deletions_payload(rows: np.ndarray, keys: np.ndarray) -> bytes:
    """The content of a file of deletions; see `read_deletions`."""
    payload = rows.astype("<i8").tobytes() + keys.astype("<u8").tobytes()
    return 2 * (hashlib.sha256(payload).digest() + payload)


def key_hash(key: str) -> tuple[int, int]:
    """What an index and the deletions know a key by: the first 16 bytes of its SHA-256, as two numbers."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def index_payload(keys: Sequence[str]) -> bytes:
    """The index of a segment: ascending hashes, in three columns of 8 bytes: first half, second half, row."""
    halves = np.array([key_hash(key) for key in keys], np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    return np.stack([halves[order, 0], halves[order, 1], order.astype(np.uint64)]).astype("<u8").tobytes()


# --- writing ----------------------------------------------------------------------------------------------------------


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


@functools.cache
def library_version() -> str:
    """Version of the package, for manifests."""
    try:
        return importlib.metadata.version("msa-hf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # the files travel with a checkpoint and run without the package


def sync(path: Path) -> None:
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


def publish_file(directory: Path, stem: str, payload: Any, created: list[Path]) -> dict[str, Any]:
    """Write tensors by name, an Arrow table or bytes to a file named after its content; a new one joins `created`."""
    # In a folder of its own, because safetensors writes beside the file it was asked for and renames: whatever a kill
    # leaves of that is found under a name of ours.
    folder = directory / f".{stem}-{uuid.uuid4().hex}.tmp"
    temporary = folder / "payload"
    try:
        folder.mkdir()
        temporary.touch()
        mode = temporary.stat().st_mode
        if isinstance(payload, dict):
            # Always a copy: safetensors refuses tensors that share storage, as the halves of one K/V tensor do.
            tensors = {name: part.detach().to("cpu", copy=True).contiguous() for name, part in payload.items()}
            save_file(tensors, temporary)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
        elif isinstance(payload, bytes):
            temporary.write_bytes(payload)
        else:
            pa = pyarrow()
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, payload.schema) as writer:
                writer.write_table(payload, max_chunksize=ROWS_PER_BATCH)
        sync(temporary)
        digest, size = _sha256(temporary), temporary.stat().st_size
        suffix = "safetensors" if isinstance(payload, dict) else "bin" if isinstance(payload, bytes) else "arrow"
        target = directory / f"{stem}-{digest[:16]}.{suffix}"
        if not target.exists():
            created.append(target)
        # Also over an equal file: that one may be damaged, and whoever has it mapped keeps it.
        os.replace(temporary, target)
    finally:
        remove_leftover(folder)
    return {"file": target.name, "bytes": size, "sha256": digest}


def publish_prefix(directory: Path, prefix: Mapping[int, TensorPair], created: list[Path]) -> dict[str, Any] | None:
    """Write the prefix; None where there is none."""
    if not prefix:
        return None
    tensors = {}
    for layer, (keys, values) in prefix.items():
        tensors.update({f"layers.{layer}.keys": keys, f"layers.{layer}.values": values})
    return {**publish_file(directory, "prefix", tensors, created), "layers": list(prefix)}


def commit_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Sign a manifest and put it in the place of the one that lies there: the commit."""
    manifest["checksum"] = manifest_checksum(manifest)
    temporary = directory / f".manifest-{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        sync(temporary)
        sync(directory)  # the names of the data files, before anything refers to them
        os.replace(temporary, directory / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    sync(directory)


def remove_created(directory: Path, created: Sequence[Path]) -> None:
    """Remove the files of a commit that failed, unless the manifest names them after all."""
    # Asked of the directory and not of a flag: an interrupt may arrive just after the manifest was replaced.
    kept = referenced_files(directory)
    for path in created:
        if path.name not in kept:
            path.unlink(missing_ok=True)


def remove_files(directory: Path, names: set[str]) -> None:
    """Remove data files that no manifest names any more, if they are named as a bank's are."""
    for name in names:
        if OWN_FILE.fullmatch(name):  # a manifest by another hand may name any file of the directory
            with suppress(OSError):  # Windows keeps a mapped file; it does no harm
                (directory / name).unlink(missing_ok=True)


def referenced_files(directory: Path) -> set[str]:
    """Names of the data files of the bank that lies in `directory`; empty where none does."""
    if not os.path.lexists(directory / MANIFEST):
        return set()
    return {entry["file"] for entry in data_files(read_manifest(directory))}


def chunk_ranges(offsets: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut [0, offsets[-1]) between documents into ranges of at most `most` chunks, or of one longer document."""
    ranges, first = [], 0
    while first < len(offsets) - 1:
        end = max(int(np.searchsorted(offsets, offsets[first] + most, side="right")) - 1, first + 1)
        ranges.append((int(offsets[first]), int(offsets[end])))
        first = end
    return ranges


def write_bank(
    directory: Path,
    origin: Mapping[str, Any],
    layers: Mapping[int, TensorPair],
    prefix: Mapping[int, TensorPair],
    table: Any,
    offsets: Tensor,
    max_shard_size: int | str,
    next_id: int = 0,
) -> None:
    """Write a bank, all or nothing; one that lies in `directory` is replaced at the last step. One writer at a time.

    Args:
        directory: made where missing.
        origin: the entries of the manifest that say what the bank was made with.
        layers: per memory layer, routing keys [C, G * D] and content [C, 2, G, D].
        prefix: per layer, keys and values [G, p, D].
        table: `pyarrow.Table` of a `table_schema`, N rows; the format's version is that of its columns.
        offsets: [N + 1] int64, first chunk of each document.
        max_shard_size: bytes of tensors per file, `"4GB"` or a number. A file never splits a document.
        next_id: of a table with ids, the first above all that were ever given.

    Raises:
        ValueError: for a dtype that the format does not have, or an unreadable size.
        BankFormatError: where the directory holds a manifest that cannot be read.
    """
    limit = parse_size(max_shard_size)
    kind = next(iter(layers.values()))[0].dtype
    dtype = next((name for name, (known, _) in DTYPES.items() if known is kind), None)
    if dtype is None:
        raise ValueError(f"A bank of {kind} cannot be saved, only of {list(DTYPES)}: save `bank.to(dtype=...)`.")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        old = referenced_files(directory)
    except BankFormatError as error:
        raise format_error(
            directory, f"not overwritten, because what lies there cannot be read ({error})", "Save elsewhere"
        ) from error
    version = 2 if "id" in table.column_names else 1
    documents, chunks = len(offsets) - 1, int(offsets[-1])
    created: list[Path] = []
    try:
        shards, segments = [], []
        prefix_record = publish_prefix(directory, prefix, created)
        for layer, (keys, content) in layers.items():
            row_bytes = sum(tensor.shape[1:].numel() for tensor in (keys, content)) * keys.element_size()
            for first, end in chunk_ranges(offsets.numpy(), max(limit // row_bytes, 1)):
                tensors = {
                    f"layers.{layer}.routing_keys": keys[first:end],
                    f"layers.{layer}.content": content[first:end],
                }
                entry = publish_file(directory, f"layer-{layer:03d}-{first:010d}", tensors, created)
                shards.append({**entry, "layer": layer, "chunks": [first, end]})
        if documents:
            entry = publish_file(directory, f"documents-{0:010d}", table, created)
            segments.append({"documents": [0, documents], "chunks": chunks, "tensors": shards, "table": entry})
            if version > 1:
                index = index_payload(table["key"].to_pylist())
                segments[0]["index"] = publish_file(directory, f"index-{0:010d}", index, created)
        manifest = {
            "format": FORMAT,
            "format_version": version,
            "reader_features": [],
            "writer_features": [],
            "library_version": library_version(),
            **origin,
            "dtype": dtype,
            "layers": [
                {"layer": layer, "groups": content.shape[2], "head_dim": content.shape[3]}
                for layer, (_, content) in layers.items()
            ],
            "counts": {
                "documents": documents,
                "chunks": chunks,
                "tokens": int(table["tokens"].to_numpy().sum(dtype=np.int64)),
            },
            "prefix": prefix_record,
            "segments": segments,
        }
        if version > 1:
            manifest.update(generation=0, next_id=next_id, deletions=[])
        commit_manifest(directory, manifest)
    except BaseException:
        remove_created(directory, created)
        raise
    remove_files(directory, old - referenced_files(directory))
