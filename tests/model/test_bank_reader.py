"""Opening a bank's directory: what was written is read, and what is damaged or lying is refused by name."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from bank_files import (
    ORIGIN,
    ROW_BYTES,
    Change,
    Maker,
    assert_equal,
    change,
    make_bank,
    manifest_of,
    names,
    replace_file,
    sign,
    tampered,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from msa_hf.model import bank_manifest_msa
from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.memory_msa import BankOrigin, MemoryBank


def refused(directory: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(BankFormatError) as caught:
        MemoryBank.from_pretrained(directory, **options)
    for part in (str(directory), *parts):
        assert part in str(caught.value)


def test_several_segments_are_read(tmp_path: Path, make: Maker) -> None:
    """Version 1 writes one segment; a reader takes any number."""
    first, second = make([1, 9], seed=1), make([6, 4, 4], seed=2)
    second.prefix = first.prefix
    second.save_pretrained(tmp_path, max_shard_size=ROW_BYTES)
    later = manifest_of(tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    first.save_pretrained(tmp_path)
    manifest = manifest_of(tmp_path)
    for name, data in kept.items():
        if name != "manifest.json":
            (tmp_path / name).write_bytes(data)
    segment = later["segments"][0]
    manifest["segments"].append({**segment, "documents": [2, 5]})
    manifest["next_id"] = 3000
    manifest["counts"] = {"documents": 5, "chunks": 8, "tokens": 24}
    sign(tmp_path, manifest)
    bank = MemoryBank.from_pretrained(tmp_path)
    assert list(bank.documents) == [*first.documents, *second.documents]
    for layer in (1, 3):
        joined = torch.cat([first.layer(layer).pooled_kv, second.layer(layer).pooled_kv])
        assert torch.equal(bank.layer(layer).pooled_kv, joined)
    assert bank.offsets.tolist() == [0, 1, 4, 6, 7, 8]


def test_unknown_fields_and_writer_features_are_read(saved: Path) -> None:
    manifest = manifest_of(saved)
    manifest.update(writer_features=["tombstones"], note="ignored")
    sign(saved, manifest)
    assert len(MemoryBank.from_pretrained(saved)) == 4


# --- the model that reads ---------------------------------------------------------------------------------------------


class Model:
    def __init__(self, **changes: Any) -> None:
        self.record = {**ORIGIN.to_dict(), **changes}

    def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
        return BankOrigin.from_dict({**self.record, "tokenizer_fingerprint": tokenizer})


def test_the_model_and_tokenizer_are_compared_before_anything_is_loaded(saved: Path) -> None:
    assert len(MemoryBank.from_pretrained(saved, model=Model())) == 4
    assert len(MemoryBank.from_pretrained(saved, model=Model(), tokenizer="e" * 64)) == 4
    for name in names(saved) - {"manifest.json"}:
        (saved / name).unlink()
    with pytest.raises(ValueError) as caught:
        MemoryBank.from_pretrained(saved, model=Model(chunk_size=8, similarity="dot"), tokenizer="d")
    assert not isinstance(caught.value, BankFormatError)
    for line in (
        "chunk_size: the bank has 4, the model 8",
        "similarity: the bank has cosine, the model dot",
        "tokenizer_fi",
    ):
        assert line in str(caught.value)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_no_bank(tmp_path: Path) -> None:
    refused(tmp_path, "manifest.json", "this is not a bank", "Give the directory")
    refused(tmp_path / "missing", "this is not a bank")


def test_one_flipped_byte_is_detected(saved: Path, make: Maker) -> None:
    rng = random.Random(1)
    for path in sorted(saved / name for name in names(saved)):
        data = path.read_bytes()
        for position in [0, len(data) - 2, *(rng.randrange(len(data)) for _ in range(25))]:
            damaged = bytearray(data)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                bank = MemoryBank.from_pretrained(saved)
            except BankFormatError as error:
                assert path.name in str(error)
            else:  # white space of the manifest carries nothing
                assert path.name == "manifest.json" and data[position : position + 1].isspace()
                assert_equal(bank, make([1, 9, 4, 6]))
        path.write_bytes(data)
    assert_equal(MemoryBank.from_pretrained(saved), make([1, 9, 4, 6]))


def test_a_damaged_header_is_detected_without_verification(saved: Path) -> None:
    rng = random.Random(2)
    path = saved / manifest_of(saved)["segments"][0]["tensors"][0]["file"]
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    found = 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            MemoryBank.from_pretrained(saved, verify=False)
        except BankFormatError as error:
            found += path.name in str(error)
    assert found > 30


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_grown_and_missing_files(saved: Path, verify: bool) -> None:
    rng = random.Random(3)
    for path in sorted(saved / name for name in names(saved)):
        data = path.read_bytes()
        for size in {0, 1, 8, len(data) - 2, *(rng.randrange(len(data)) for _ in range(8))}:
            path.write_bytes(data[:size])
            refused(saved, path.name, "not valid JSON" if path.name == "manifest.json" else "truncated", verify=verify)
        path.write_bytes(data + b"x")
        refused(saved, path.name, verify=verify)
        path.unlink()
        refused(saved, path.name, verify=verify)
        path.write_bytes(data)


def test_links_and_other_kinds_of_files(saved: Path, tmp_path: Path, numbered: bool) -> None:
    name = manifest_of(saved)["prefix"]["file"]
    path = saved / name
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    refused(saved, name, "a link that leaves the directory")
    path.unlink()
    path.symlink_to(path)
    refused(saved, name, "cannot be read")
    path.unlink()
    path.mkdir()
    refused(saved, name, "not a regular file")
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for ever
    refused(saved, name, "not a regular file")
    path.unlink()
    shutil.copy(outside, saved / "elsewhere")
    path.symlink_to("elsewhere")  # stays inside
    assert len(MemoryBank.from_pretrained(saved)) == 4
    (tmp_path / "alias").symlink_to(saved)
    assert len(MemoryBank.from_pretrained(tmp_path / "alias")) == 4


def longer_index(manifest: dict[str, Any]) -> None:
    """Of one row more, so that it is not the index that contradicts."""
    if "index" in manifest["segments"][0]:
        manifest["segments"][0]["index"]["bytes"] += 24


SHARD = ("segments", 0, "tensors", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([change("format", to="other")], "not the manifest of a bank"),
        ([change("format_version", to=4)], "`format_version` is 4, this library reads up to 3. Upgrade"),
        ([change("format_version", to=0)], "`format_version` must lie between 1"),
        ([change("format_version", to=True)], "`format_version` must be of type int"),
        (
            [change("reader_features", to=["fp8"])],
            "`reader_features` has ['fp8'], which this library cannot read. Upgr",
        ),
        ([change("reader_features", to="fp8")], "`reader_features` must be of type list"),
        ([change("writer_features", to=[3])], "`writer_features` must be a list of strings"),
        ([change("dtype", to="int4")], "`dtype` must be one of"),
        ([change("dtype", to="bfloat16")], "has dtype F32, the manifest says bfloat16"),
        ([change("origin", to=[])], "`origin` must be of type dict"),
        ([change("origin", "extra", to=1)], "unknown field of the origin: extra"),
        ([change("origin", "chunk_size", to="4")], "`chunk_size` must be an integer"),
        ([change("origin", "chunk_size", to=8)], "does not fit chunks of 8 tokens"),
        ([change("origin", "memory_layers", to=[1, 2])], "`layers` are [1, 3], the origin's are [1, 2]"),
        ([change("origin", "prefix_token_ids", to=[5])], "`prefix` of layer 0"),
        ([change("layers", 0, "groups", to=10**30)], "layers[0].`groups` must lie between"),
        ([change("layers", 0, "head_dim", to=8)], "tensors have the shapes"),
        ([change("layers", 1, "layer", to=1)], "layers[1].`layer` must lie between 2"),
        ([change("layers", to=[])], "`layer` is 1, which `layers` does not list"),
        ([change("counts", "documents", to=5)], "counts.`documents` is 5, the segments hold 4"),
        ([change("counts", "chunks", to=5)], "counts.`chunks` is 5, the segments hold 7"),
        ([change("counts", "tokens", to=21)], "counts.`tokens` is 21, the documents have 20"),
        ([change("counts", "tokens", to=-1)], "counts.`tokens` must lie between 0"),
        ([change("prefix", to=None)], "`prefix` lacks the memory layers [1, 3]"),
        ([change("prefix", "layers", to=[0, 1, 3])], "holds the tensors"),
        ([change("prefix", "layers", to=[0, 0])], "distinct layer indices"),
        ([change("prefix", "file", to="../outside")], "plain name"),
        ([change("prefix", "file", to="/etc/passwd")], "plain name"),
        ([change("prefix", "file", to="a\\b")], "plain name"),
        ([change("prefix", "file", to="..")], "plain name"),
        ([change("prefix", "file", to="c:x")], "plain name"),
        ([change("prefix", "file", to="a\0b")], "plain name"),
        ([change("prefix", "file", to="manifest.json")], "plain name"),
        ([change("prefix", "file", to="x" * 5000)], "cannot be read"),
        ([change("prefix", "bytes", to=0)], "prefix.`bytes` must lie between 1"),
        ([change("prefix", "sha256", to="0" * 63)], "64 lower-case hexadecimal digits"),
        ([change("prefix", "sha256", to="0" * 64)], "is corrupted: its SHA-256 is"),
        ([change(*SHARD, "layer", to=2)], "`layer` is 2, which `layers` does not list"),
        ([change(*SHARD, "layer", to=3)], "segments[0].tensors[1].`chunks` must be [7, an end above it]"),
        ([change(*SHARD, "chunks", to=[0, 6])], "`tensors` hold 6 chunks of layer 1 instead of 7"),
        ([change(*SHARD, "chunks", to=[0, 7, 7])], "must be [0, an end above it]"),
        ([change("segments", 0, "documents", to=[0, 0])], "`documents` must be [0, an end above it]"),
        ([change("segments", 0, "documents", to=[1, 5])], "`documents` must be [0, an end above it]"),
        ([change("segments", 0, "table", to=[])], "`table` must be of type dict"),
        ([change("segments", to=[])], "counts.`documents` is 4, the segments hold 0"),
        (
            [change("segments", 0, "documents", to=[0, 5]), change("counts", "documents", to=5), longer_index],
            "holds 4 documents with 7 chunks, the manifest says 5 documents with 7 chunks",
        ),
        (
            [
                change("segments", 0, "chunks", to=10**15),
                change("counts", "chunks", to=10**15),
                change(*SHARD, "chunks", to=[0, 10**15]),
                change("segments", 0, "tensors", 1, "chunks", to=[0, 10**15]),
            ],
            "the manifest says 4 documents with 1000000000000000 chunks",
        ),
    ],
)
def test_lying_manifests(saved: Path, changes: list[Change], message: str) -> None:
    manifest = manifest_of(saved)
    for apply in changes:
        apply(manifest)
    sign(saved, manifest)
    refused(saved, message, ". ")


def test_a_file_named_twice(saved: Path) -> None:
    """A small file that counts many times would be a large bank."""
    manifest = manifest_of(saved)
    segment = manifest["segments"][0]
    manifest["segments"].append({**copy.deepcopy(segment), "documents": [4, 8]})
    manifest["counts"] = {"documents": 8, "chunks": 14, "tokens": 40}
    sign(saved, manifest)
    refused(saved, "is named more than once")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"format": NaN}', "not valid JSON (NaN is not JSON)"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b"[]", "not the manifest of a bank"),
        (b'{"format": "msa_hf-bank"}', "`format_version` is missing"),
        (b'{"format": "msa_hf-bank", "format_version": 1, "reader_features": []}', "`writer_features` is missing"),
    ],
)
def test_manifests_that_are_none(saved: Path, text: bytes, message: str) -> None:
    (saved / "manifest.json").write_bytes(text)
    refused(saved, "manifest.json", message)


def test_an_edited_manifest_and_a_huge_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(saved)
    manifest["origin"]["similarity"] = "dot"
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refused(saved, "does not match its `checksum`")
    monkeypatch.setattr(bank_manifest_msa, "MAX_MANIFEST_BYTES", 100)
    refused(saved, "larger than the 100 bytes")


# --- files that are intact but wrong ----------------------------------------------------------------------------------


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["segments"][0]["tensors"][0]


def table(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["segments"][0]["table"]


def test_wrong_tensors(saved: Path) -> None:
    keys, content = "layers.1.routing_keys", "layers.1.content"
    good = load_file(saved / shard(manifest_of(saved))["file"])
    for tensors, message in (
        ({**good, content: good[content][:6].clone()}, "tensors have the shapes"),
        ({**good, content: good[content].flatten(2)}, "tensors have the shapes"),
        ({**good, keys: good[keys].half()}, "`layers.1.routing_keys` has dtype F16, the manifest says float32"),
        ({keys: good[keys]}, "holds the tensors ['layers.1.routing_keys'] instead of"),
        ({**good, "more": torch.zeros(1)}, "holds the tensors"),
    ):
        replace_file(saved, shard, partial(save_file, tensors))
        refused(saved, "layer-001", message)
    header = b'{"layers.1.content":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    for data in (len(header).to_bytes(8, "little") + header, (2**62).to_bytes(8, "little"), b"\x80\x04N."):
        replace_file(saved, shard, partial(Path.write_bytes, data=data))
        refused(saved, "layer-001", "not a valid safetensors file")


def test_wrong_tables(saved: Path) -> None:
    file = saved / table(manifest_of(saved))["file"]
    good = pa.ipc.open_stream(pa.BufferReader(file.read_bytes())).read_all()

    def write(content: pa.Table, **options: Any) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema, **options) as writer:
                writer.write_table(content)

        return apply

    def with_column(name: str, values: list[Any], kind: Any = None) -> pa.Table:
        place = good.schema.get_field_index(name)
        kind = kind or good.schema.field(name).type
        return good.set_column(place, pa.field(name, kind), pa.array(values, kind))

    zstd = pa.ipc.IpcWriteOptions(compression="zstd")
    long = with_column("text", ["x" * 10**6] * 4)
    for writer, message in (
        (write(good.drop_columns("text")), "it has the columns"),
        (write(good.append_column("more", [[1, 2, 3, 4]])), "it has the columns"),
        (write(with_column("text", ["a"] * 4, pa.string())), "it has the columns"),
        (write(with_column("key", ["a", None, "b", "c"])), "null"),
        (write(with_column("tokens", [1, None, 4, 6])), "null"),
        (write(with_column("key", ["a", "b", "a", "c"])), "2 documents have the key 'a'"),
        (write(with_column("tokens", [2, 9, 4, 6])), "counts.`tokens` is 20, the documents have 21"),
        (write(with_column("tokens", [2, 8, 4, 6])), "'d1-0' has 8 tokens and 3 chunks"),
        (write(with_column("tokens", [-1, 11, 4, 6])), "has -1 tokens and 1 chunks"),
        (write(with_column("chunks", [2, 3, 1, 2])), "holds 4 documents with 8 chunks"),
        (write(with_column("chunks", [0, 3, 2, 2])), "by 1 or more"),
        (write(good.slice(1)), "holds 3 documents"),
        (write(long, options=zstd), "it is compressed"),
        (lambda path: path.write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f" * 4), "not the table of a bank"),
        (lambda path: path.write_bytes(b"x"), "not the table of a bank"),
    ):
        replace_file(saved, table, writer)
        refused(saved, message)

    # Counts that agree with each other, but not with the tensors: refused before room is made for so many.
    claimed = 4 * (2**31 - 1)
    replace_file(saved, table, write(with_column("chunks", [2**31 - 1] * 4)))
    honest = manifest_of(saved)
    lying = copy.deepcopy(honest)
    lying["segments"][0]["chunks"] = lying["counts"]["chunks"] = claimed
    for entry in lying["segments"][0]["tensors"]:
        entry["chunks"] = [0, claimed]
    sign(saved, lying)
    refused(saved, "tensors have the shapes")
    sign(saved, honest)

    # Bytes that are not UTF-8, and offsets that leave the text, inside an intact frame.
    replace_file(saved, table, write(good))
    data = (saved / file.name).read_bytes()
    for old, new in (
        (b"d2-0", b"d\xff\xff0"),
        (bytes([4, 0, 0, 0, 8, 0, 0, 0, 12, 0, 0, 0]), b"\4\0\0\0\0\0\0\x40\14\0\0\0"),
    ):
        assert data.count(old) == 1
        damaged = data.replace(old, new)
        replace_file(saved, table, partial(Path.write_bytes, data=damaged))
        refused(saved, "not the table of a bank")

    for text in ("{", "[1]", "NaN", "[" * 100_000):
        replace_file(saved, table, write(with_column("metadata", [None, text, None, None])))
        bank = MemoryBank.from_pretrained(saved)
        assert bank.documents[0].metadata is None
        with pytest.raises(BankFormatError, match="Document 'd1-0': its metadata is not JSON"):
            bank.documents[1]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bank of version 1; tests/bank/test_hostile.py has one of version 2."""
    directory = tmp_path_factory.mktemp("fuzzed")
    make_bank([1, 9, 4, 6]).save_pretrained(directory, max_shard_size=2 * ROW_BYTES)
    return directory, manifest_of(directory)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_manifests(fuzzed: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    directory, original = fuzzed
    sign(directory, tampered(original, data))
    try:
        bank = MemoryBank.from_pretrained(directory, verify=data.draw(st.booleans()))
    except BankFormatError as error:
        assert str(directory) in str(error)
    else:  # changes that are allowed: another origin, an unknown field, a hash that was not looked at
        assert len(bank) == 4 and bank.num_chunks == 7
