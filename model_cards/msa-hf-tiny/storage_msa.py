"""The bank on disk, format version 1: `docs/bank_format.md` is the specification, this file reads and writes it.

It knows tensors, an Arrow table and a manifest; what they mean is the business of `memory_msa.py`. Nothing here trusts
the directory: every name, size, shape and count is checked before memory is allocated for it.
"""

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import stat
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "msa_hf-bank"
FORMAT_VERSION = 1
READER_FEATURES: frozenset[str] = frozenset()  # what this reader understands beyond format version 1
MANIFEST = "manifest.json"

# dtype in the manifest -> (torch's, the name in a safetensors header)
DTYPES = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
}
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_WIDTH = 2**20  # of groups and of head_dim: keeps products of manifest numbers far from overflow
ROWS_PER_BATCH = 16_384  # of the documents' table; a reader finds a row by walking over batches
OWN_FILE = re.compile(r"(layer|prefix|documents)(-\d+)*-[0-9a-f]{16}\.(safetensors|arrow)")

RESTORE = "Restore the bank from a copy, or encode the documents again"
CHOOSE = "Give the directory that a bank was saved to"
UPGRADE = "Upgrade: `pip install -U msa-hf`"

TensorPair = tuple[Tensor, Tensor]


class BankFormatError(ValueError):
    """A directory is not a readable bank. The message names the file, the cause and the remedy."""


def _error(file: Path, cause: str, remedy: str = RESTORE) -> BankFormatError:
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


def table_schema() -> Any:
    """The Arrow schema of the documents' table."""
    pa = pyarrow()
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("text", pa.large_string()),
            pa.field("metadata", pa.string()),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("chunks", pa.int32(), nullable=False),
        ]
    )


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


def _check_segment(record: Any, where: str, first: int, layers: Mapping[int, Any]) -> None:
    chunks = _count(record, where, "chunks", least=_range(record, where, "documents", first) - first)
    ends = dict.fromkeys(layers, 0)
    for number, shard in enumerate(_get(record, where, "tensors", list)):
        inside = f"{where}tensors[{number}]."
        layer = _get(shard, inside, "layer", int)
        if layer not in ends:
            raise ValueError(f"{inside}`layer` is {_brief(layer)}, which `layers` does not list")
        ends[layer] = _range(shard, inside, "chunks", ends[layer])
        _check_file(shard, inside)
    for layer, end in ends.items():
        if end != chunks:
            raise ValueError(f"{where}`tensors` hold {end} chunks of layer {layer} instead of {chunks}")
    _check_file(_get(record, where, "table", dict), f"{where}table.")


def _layer_shapes(manifest: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """(groups, head_dim) of each memory layer, ascending."""
    shapes: dict[int, tuple[int, int]] = {}
    for number, record in enumerate(_get(manifest, "", "layers", list)):
        where = f"layers[{number}]."
        shape = _count(record, where, "groups", 1, MAX_WIDTH), _count(record, where, "head_dim", 1, MAX_WIDTH)
        shapes[_count(record, where, "layer", max(shapes, default=-1) + 1, MAX_WIDTH)] = shape
    return shapes


def _files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of all data files that a manifest names."""
    files = [] if manifest["prefix"] is None else [manifest["prefix"]]
    for segment in manifest["segments"]:
        files += [*segment["tensors"], segment["table"]]
    return files


def _check_manifest(manifest: dict[str, Any]) -> None:
    _get(manifest, "", "origin", dict)
    if _get(manifest, "", "dtype", str) not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {_brief(manifest['dtype'])}")
    layers = _layer_shapes(manifest)
    if _get(manifest, "", "prefix", object) is not None:
        held = _get(manifest["prefix"], "prefix.", "layers", list)
        if any(type(layer) is not int or not 0 <= layer <= MAX_WIDTH for layer in held) or len(set(held)) != len(held):
            raise ValueError(f"prefix.`layers` must be distinct layer indices, got {_brief(held)}")
        _check_file(manifest["prefix"], "prefix.")
    totals = {"documents": 0, "chunks": 0}
    for number, segment in enumerate(_get(manifest, "", "segments", list)):
        _check_segment(segment, f"segments[{number}].", totals["documents"], layers)
        totals = {"documents": segment["documents"][1], "chunks": totals["chunks"] + segment["chunks"]}
    counts = _get(manifest, "", "counts", dict)
    _count(counts, "counts.", "tokens")
    for name, total in totals.items():
        if _count(counts, "counts.", name) != total:
            raise ValueError(f"counts.`{name}` is {counts[name]}, the segments hold {total}")
    # A file that counted twice would let a small bank claim the memory of a large one.
    for name, times in Counter(record["file"] for record in _files(manifest)).items():
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
        raise _error(path, "there is no such file, so this is not a bank", CHOOSE)
    if _regular_file(directory, MANIFEST).st_size > MAX_MANIFEST_BYTES:
        raise _error(path, f"larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _error(path, f'not the manifest of a bank: `format` must be "{FORMAT}"', CHOOSE)
    try:
        version = _count(manifest, "", "format_version", least=1)
        if version > FORMAT_VERSION:
            raise _error(path, f"`format_version` is {version}, this library reads up to {FORMAT_VERSION}", UPGRADE)
        for name in ("reader_features", "writer_features"):
            if any(not isinstance(feature, str) for feature in _get(manifest, "", name, list)):
                raise ValueError(f"`{name}` must be a list of strings")
        if unknown := sorted(set(manifest["reader_features"]) - READER_FEATURES):
            raise _error(path, f"`reader_features` has {_brief(unknown)}, which this library cannot read", UPGRADE)
        if _get(manifest, "", "checksum", str) != manifest_checksum(manifest):
            raise ValueError("the content does not match its `checksum`: corrupted, or edited by hand")
        _check_manifest(manifest)
    except BankFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise _error(path, str(error)) from error
    return manifest


# --- reading ----------------------------------------------------------------------------------------------------------


def _regular_file(directory: Path, name: str) -> os.stat_result:
    path = directory / name
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError) as error:
        remedy = f"{RESTORE}; where another process saved the bank meanwhile, load it again"
        raise _error(path, f"cannot be read ({error})", remedy) from error
    if resolved.parent != directory.resolve():
        remedy = "Copy the bank with its files, not links to them (`snapshot_download(..., local_dir=...)`)"
        raise _error(path, "a link that leaves the directory of the bank", remedy)
    if not stat.S_ISREG(status.st_mode):
        raise _error(path, "not a regular file")
    return status


def _checked(directory: Path, entry: Mapping[str, Any], verify: bool) -> Path:
    path = directory / entry["file"]
    size = _regular_file(directory, entry["file"]).st_size
    if size != entry["bytes"]:
        raise _error(path, f"has {size} bytes, the manifest says {entry['bytes']}: truncated or overwritten")
    if verify and (digest := _sha256(path)) != entry["sha256"]:
        raise _error(path, f"is corrupted: its SHA-256 is {digest}, the manifest says {entry['sha256']}")
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: Path, names: set[str], dtype: str) -> dict[str, tuple[int, ...]]:
    """Shapes in the header of a safetensors file that must hold exactly `names`, all of `dtype`."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _error(path, f"not a valid safetensors file ({error})") from error
    if found.keys() != names:
        raise _error(path, f"holds the tensors {_brief(sorted(found))} instead of {_brief(sorted(names))}")
    for name, (_, kind) in found.items():
        if kind != DTYPES[dtype][1]:
            raise _error(path, f"`{name}` has dtype {kind}, the manifest says {dtype}")
    return {name: shape for name, (shape, _) in found.items()}


def _tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


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
    shapes, dtype = _layer_shapes(manifest), manifest["dtype"]
    # All headers first: what is allocated below is then known to lie on disk.
    shards: dict[int, list[tuple[int, Mapping[str, Any]]]] = {layer: [] for layer in shapes}
    base = 0
    for segment in manifest["segments"]:
        for shard in segment["tensors"]:
            path = _checked(directory, shard, verify=False)
            layer, (first, end) = shard["layer"], shard["chunks"]
            groups, dim = shapes[layer]
            wanted = {
                f"layers.{layer}.routing_keys": (end - first, groups * dim),
                f"layers.{layer}.content": (end - first, 2, groups, dim),
            }
            if (found := _header(path, set(wanted), dtype)) != wanted:
                raise _error(path, f"tensors have the shapes {found} instead of {wanted}")
            shards[layer].append((base + first, shard))
        base += segment["chunks"]

    prefix = {}
    if (entry := manifest["prefix"]) is not None:
        path = _checked(directory, entry, verify)
        _header(path, {f"layers.{layer}.{part}" for layer in entry["layers"] for part in ("keys", "values")}, dtype)
        tensors = _tensors(path, device)
        prefix = {
            layer: (tensors[f"layers.{layer}.keys"], tensors[f"layers.{layer}.values"]) for layer in entry["layers"]
        }

    layers: dict[int, TensorPair] = {}
    for layer, (groups, dim) in shapes.items():
        if len(shards[layer]) != 1:
            options: dict[str, Any] = {"dtype": DTYPES[dtype][0], "device": device}
            layers[layer] = torch.empty(base, groups * dim, **options), torch.empty(base, 2, groups, dim, **options)
        for start, shard in shards[layer]:
            tensors = _tensors(_checked(directory, shard, verify), device)
            parts = tensors[f"layers.{layer}.routing_keys"], tensors[f"layers.{layer}.content"]
            for whole, part in zip(layers.setdefault(layer, parts), parts, strict=True):
                if whole is not part:
                    whole[start : start + len(part)] = part
    return layers, prefix


def read_table(directory: Path, manifest: Mapping[str, Any], verify: bool) -> Any:
    """Memory map the documents' table: a `pyarrow.Table` with the columns of `table_schema()`.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
        ImportError: where pyarrow is missing.
    """
    pa = pyarrow()
    tables = [table_schema().empty_table()]
    for segment in manifest["segments"]:
        path = _checked(directory, segment["table"], verify)
        try:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
                table = reader.read_all()
            # Only a full check makes offsets and UTF-8 safe to follow; it reads everything, as `verify` does anyway.
            table.validate(full=verify)
            fields = [(field.name, field.type) for field in table.schema]
            if fields != [(field.name, field.type) for field in table_schema()]:
                raise ValueError(f"it has the columns {fields}")
            if any(table[name].null_count for name in ("key", "tokens", "chunks")):
                raise ValueError("key, tokens or chunks are null somewhere")
            if table.nbytes > segment["table"]["bytes"]:
                raise ValueError("it is compressed, which format version 1 does not allow")
        except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
            raise _error(path, f"not the table of a bank ({error})") from error
        first, end = segment["documents"]
        chunks = int(table["chunks"].to_numpy().sum(dtype=np.int64))
        if (len(table), chunks) != (end - first, segment["chunks"]):
            stated = f"{end - first} documents with {segment['chunks']} chunks"
            raise _error(path, f"holds {len(table)} documents with {chunks} chunks, the manifest says {stated}")
        tables.append(table.replace_schema_metadata(None).cast(table_schema()))
    table = pa.concat_tables(tables)
    tokens = int(table["tokens"].to_numpy().sum(dtype=np.int64))
    if tokens != (stated := manifest["counts"]["tokens"]):
        raise _error(directory / MANIFEST, f"counts.`tokens` is {stated}, the documents have {tokens}")
    return table


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


def _library_version() -> str:
    try:
        return importlib.metadata.version("msa-hf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # the files travel with a checkpoint and run without the package


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory and needs no flush of one
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(directory: Path, stem: str, payload: Any, created: list[Path]) -> dict[str, Any]:
    """Write tensors by name, or an Arrow table, to a file named after its content; where new, add it to `created`."""
    temporary = directory / f".{stem}-{uuid.uuid4().hex}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        if isinstance(payload, dict):
            # Always a copy: safetensors refuses tensors that share storage, as the halves of one K/V tensor do.
            tensors = {name: part.detach().to("cpu", copy=True).contiguous() for name, part in payload.items()}
            save_file(tensors, temporary)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
        else:
            pa = pyarrow()
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, payload.schema) as writer:
                writer.write_table(payload, max_chunksize=ROWS_PER_BATCH)
        _sync(temporary)
        digest, size = _sha256(temporary), temporary.stat().st_size
        target = directory / f"{stem}-{digest[:16]}.{'safetensors' if isinstance(payload, dict) else 'arrow'}"
        if not target.exists():
            created.append(target)
        # Also over an equal file: that one may be damaged, and whoever has it mapped keeps it.
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": target.name, "bytes": size, "sha256": digest}


def _referenced(directory: Path) -> set[str]:
    """Names of the data files of the bank that lies in `directory`; empty where none does."""
    if not os.path.lexists(directory / MANIFEST):
        return set()
    return {entry["file"] for entry in _files(read_manifest(directory))}


def _chunk_ranges(offsets: np.ndarray, most: int) -> list[tuple[int, int]]:
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
) -> None:
    """Write a bank, all or nothing; one that lies in `directory` is replaced at the last step. One writer at a time.

    Args:
        directory: made where missing.
        origin: what the bank was made with, for the manifest.
        layers: per memory layer, routing keys [C, G * D] and content [C, 2, G, D].
        prefix: per layer, keys and values [G, p, D].
        table: `pyarrow.Table` of `table_schema()`, N rows.
        offsets: [N + 1] int64, first chunk of each document.
        max_shard_size: bytes of tensors per file, `"4GB"` or a number. A file never splits a document.

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
        old = _referenced(directory)
    except BankFormatError as error:
        raise _error(
            directory, f"not overwritten, because what lies there cannot be read ({error})", "Save elsewhere"
        ) from error
    documents, chunks = len(offsets) - 1, int(offsets[-1])
    created: list[Path] = []
    temporary = directory / f".manifest-{uuid.uuid4().hex}.tmp"
    try:
        prefix_record, shards, segments = None, [], []
        if prefix:
            names = [(f"layers.{layer}.keys", f"layers.{layer}.values") for layer in prefix]
            tensors = {
                name: part
                for pair in zip(names, prefix.values(), strict=True)
                for name, part in zip(*pair, strict=True)
            }
            prefix_record = {**_publish(directory, "prefix", tensors, created), "layers": list(prefix)}
        for layer, (keys, content) in layers.items():
            row_bytes = sum(tensor.shape[1:].numel() for tensor in (keys, content)) * keys.element_size()
            for first, end in _chunk_ranges(offsets.numpy(), max(limit // row_bytes, 1)):
                tensors = {
                    f"layers.{layer}.routing_keys": keys[first:end],
                    f"layers.{layer}.content": content[first:end],
                }
                entry = _publish(directory, f"layer-{layer:03d}-{first:010d}", tensors, created)
                shards.append({**entry, "layer": layer, "chunks": [first, end]})
        if documents:
            entry = _publish(directory, f"documents-{0:010d}", table, created)
            segments.append({"documents": [0, documents], "chunks": chunks, "tensors": shards, "table": entry})
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "reader_features": [],
            "writer_features": [],
            "library_version": _library_version(),
            "origin": dict(origin),
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
        manifest["checksum"] = manifest_checksum(manifest)
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(temporary)
        _sync(directory)  # the names of the data files, before anything refers to them
        os.replace(temporary, directory / MANIFEST)
    except BaseException:
        temporary.unlink(missing_ok=True)
        # Asked of the directory and not of a flag: an interrupt may arrive just after the manifest was replaced.
        kept = _referenced(directory)
        for path in created:
            if path.name not in kept:
                path.unlink(missing_ok=True)
        raise
    _sync(directory)
    for name in old - _referenced(directory):
        if OWN_FILE.fullmatch(name):  # a manifest by another hand may name any file of the directory
            with suppress(OSError):  # Windows keeps a mapped file; it does no harm
                (directory / name).unlink(missing_ok=True)
