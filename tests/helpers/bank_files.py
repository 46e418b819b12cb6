"""Banks in directories, for tests of reading and writing them: made, looked into, and tampered with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from msa_hf.model.bank_files_msa import file_digest
from msa_hf.model.bank_format_msa import LOCK, manifest_checksum
from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable, MemoryBank

CHUNK = 4
GROUPS, DIM = 2, 4
ORIGIN = BankOrigin("f" * 64, "e" * 64, "qwen3", CHUNK, (1, 3), "cosine", False, (5, 6))
ROW_BYTES = 3 * GROUPS * DIM * 4  # of a float32 chunk

Change = Callable[[dict[str, Any]], None]
Maker = Callable[..., MemoryBank]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["../outside.bin", "/etc/passwd", "manifest.json", ".", "x"])


def make_bank(
    lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0, numbered: bool = False
) -> MemoryBank:
    """A bank of documents of so many tokens; `numbered`: with ids, so that it is saved in format version 2."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    chunks = [-(-length // CHUNK) for length in lengths]
    total = sum(chunks)
    rows = [
        Document(
            f"d{row}-{seed}",
            None if row == 2 else f"text\n{row} 記憶",
            {"n": [row, None]} if row % 2 else None,
            *pair,
            id=3 * row + 1000 * seed if numbered else None,
        )
        for row, pair in enumerate(zip(lengths, chunks, strict=True))
    ]
    layers = {i: DenseLayer(rand(total, GROUPS * DIM), rand(total, 2, GROUPS, DIM)) for i in (1, 3)}
    # Keys and values of the prefix are interleaved views of one tensor, as a model may well hand them over.
    pairs = {layer: rand(GROUPS, 2, 2, DIM) for layer in range(4)}
    prefix = {layer: (pair[:, 0], pair[:, 1]) for layer, pair in pairs.items()}
    return MemoryBank(layers, torch.tensor([0, *chunks]).cumsum(0), prefix, DocumentTable(rows), ORIGIN)


def assert_equal(bank: MemoryBank, expected: MemoryBank) -> None:
    assert list(bank.documents) == list(expected.documents)
    assert bank.origin == expected.origin and bank.dtype == expected.dtype
    assert torch.equal(bank.offsets, expected.offsets) and bank.offsets.dtype == torch.int64
    assert list(bank.layers) == list(expected.layers) and list(bank.prefix) == list(expected.prefix)
    for layer, memory in expected.layers.items():
        assert torch.equal(bank.layer(layer).routing_keys, memory.routing_keys)
        assert torch.equal(bank.layer(layer).pooled_kv, memory.pooled_kv)
    for layer, pair in expected.prefix.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(bank.prefix[layer], pair, strict=True))


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


def sign(directory: Path, manifest: Any) -> None:
    """Write a manifest with the right checksum: what remains wrong is its content."""
    if isinstance(manifest, dict):
        manifest["checksum"] = manifest_checksum(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def replace_file(
    directory: Path, pick: Callable[[dict[str, Any]], dict[str, Any]], write: Callable[[Path], Any]
) -> None:
    """Replace a data file by another, with its size and SHA-256 in the manifest put right."""
    manifest = manifest_of(directory)
    entry = pick(manifest)
    path = directory / entry["file"]
    path.unlink()
    write(path)
    entry.update(bytes=path.stat().st_size, sha256=file_digest(path))
    sign(directory, manifest)


def names(directory: Path) -> set[str]:
    """What lies in a directory, but the lock of its writers."""
    return {path.name for path in directory.iterdir()} - {LOCK}


def change(*path: Any, to: Any) -> Change:
    """A change of a manifest: what lies at `path` becomes `to`."""

    def apply(manifest: dict[str, Any]) -> None:
        node: Any = manifest
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = to

    return apply


def _paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(path for step, value in inner for path in _paths(value, (*at, step)))]


def tampered(original: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A manifest in which up to three things at random places were replaced, removed, repeated or counted otherwise."""
    manifest: Any = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_paths(manifest)[1:] or [()]))
        if not path:
            break
        node = manifest
        for step in path[:-1]:
            node = node[step]
        action = data.draw(st.sampled_from(["replace", "remove", "copy", "number", "name"]))
        if action == "remove":
            del node[path[-1]]
        elif action == "copy" and isinstance(node, list):
            node.append(copy.deepcopy(node[path[-1]]))
        elif action == "number" and type(node[path[-1]]) is int:
            node[path[-1]] += data.draw(st.integers(-2, 2))
        elif action == "name" and isinstance(node[path[-1]], str):
            node[path[-1]] = data.draw(NAMES)
        else:
            node[path[-1]] = data.draw(JSON)
    return manifest
