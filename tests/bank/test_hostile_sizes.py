"""Files whose sizes lie: they are refused before memory is allocated for what they state."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bank_files import sign
from fake_model import FakeModel
from peak_memory import Measured, measured

from msa_hf.bank import BankDamaged, BankStore
from msa_hf.generation.protocol import COMPACT
from msa_hf.model import bank_files_msa, bank_format_msa, bank_log_msa, bank_manifest_msa, bounds_msa
from msa_hf.model.arrow_msa import MOST_BATCHES, read_stream, table_schema, write_stream
from msa_hf.model.bank_format_msa import BankFormatError, deletions_payload

MOST = 64 * 2**20  # bytes beside those of the bank's own files
MANY = 10_000_000  # of `{}`: 30 MB
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured through /proc")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    with BankStore(FakeModel(), directory) as bank:
        bank.add([{"key": f"k{row}", "text": f"text {row}", "n": row} for row in range(4)])
        bank.checkpoint()  # in the manifest, not in the log
        bank.add([{"key": "other", "text": "another one"}])
        bank.checkpoint()
    return directory


@pytest.fixture(scope="module")
def measure(original: Path) -> Iterator[Measured]:
    with measured(original) as process:
        yield process


@pytest.fixture
def bank(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bank"))


def put(directory: Path, record: dict[str, Any], write: Callable[[Path], object]) -> None:
    """Replace a data file, with its size and hash in its record put right."""
    path = directory / record["file"]
    path.unlink()
    write(path)
    record.update(bytes=path.stat().st_size, sha256=bank_files_msa.file_digest(path))


def rows(count: int, text: str = "") -> pa.Table:
    ids = list(range(count))
    columns = {
        "key": [f"k{row}" for row in ids],
        "text": [text] * count,
        "metadata": [None] * count,
        "tokens": [6] * count,
        "chunks": [2] * count,
        "id": ids,
        "version": [None] * count,
        "digest": [None] * count,
    }
    return pa.table(columns, schema=table_schema(2))


def compressed(kind: str) -> Callable[[Path, dict[str, Any]], None]:
    def change(directory: Path, manifest: dict[str, Any]) -> None:
        def write(path: Path) -> None:
            options = pa.ipc.IpcWriteOptions(compression=kind)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
                writer.write_table(table)

        table = rows(4, "z" * 2**26)
        put(directory, manifest["segments"][0]["table"], write)

    return change


def first_segment(directory: Path, manifest: dict[str, Any], documents: int, chunks: int, lost: str) -> None:
    """Let the first segment count so much; files of it whose name begins with `lost` are missing."""
    segment = manifest["segments"][0]
    old = segment["documents"][1]
    segment["documents"][1] = documents
    segment["chunks"] = segment["tensors"][0]["chunks"][1] = chunks
    segment["index"]["bytes"] = documents * bank_format_msa.INDEX_ENTRY
    following = manifest["segments"][1]
    following["documents"] = [documents, documents + following["documents"][1] - old]
    manifest["counts"].update(documents=following["documents"][1], chunks=chunks + following["chunks"])
    for path in directory.iterdir():
        if path.name.startswith(tuple(lost.split())) and path.name in str(segment):
            path.unlink()


def claims(documents: int, chunks: int, lost: str) -> Callable[[Path, dict[str, Any]], None]:
    return lambda directory, manifest: first_segment(directory, manifest, documents, chunks, lost)


def long_header(kind: str) -> Callable[[Path, dict[str, Any]], None]:
    """A shard or the prefix with a header of millions of tensors without numbers."""

    def change(directory: Path, manifest: dict[str, Any]) -> None:
        def write(path: Path) -> None:
            tensors = ",".join(
                f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(count)
            )
            header = f"{{{tensors}}}".encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header)

        count = 500_000
        put(directory, manifest["prefix"] if kind == "prefix" else manifest["segments"][0]["tensors"][0], write)

    return change


def many_batches(directory: Path, manifest: dict[str, Any]) -> None:
    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
            for _ in range(40_000):
                writer.write_batch(nothing)

    table = rows(4)
    nothing = pa.RecordBatch.from_pylist([], schema=table.schema)
    put(directory, manifest["segments"][0]["table"], write)


def many_deletions(directory: Path, manifest: dict[str, Any]) -> None:
    """Remembered deletions of keys."""
    keys = np.arange(3 * 500_000, dtype=np.uint64).reshape(-1, 3)
    record = {"file": f"deletions-{0:010d}-{'0' * 16}.bin", "rows": 0, "keys": len(keys)}
    (directory / record["file"]).touch()
    put(directory, record, lambda path: path.write_bytes(deletions_payload(np.empty(0, np.int64), keys)))
    manifest["deletions"] = [record]


def long_schema(directory: Path, manifest: dict[str, Any]) -> None:
    def write(path: Path) -> None:
        fields = [pa.field(f"column {number}", pa.int8()) for number in range(100_000)]
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema(fields)):
            pass

    put(directory, manifest["segments"][0]["table"], write)


def metadata(directory: Path, manifest: dict[str, Any]) -> None:
    """A document whose metadata is a list of millions of nothing."""
    table = rows(4).drop_columns("metadata").to_pydict()
    long = pa.table({**table, "metadata": [None, '{"n": [' + ",".join(["{}"] * MANY) + "]}", None, None]})
    put(directory, manifest["segments"][0]["table"], lambda path: write_stream(long.select(names).cast(schema), path))


schema = table_schema(2)
names = [field.name for field in schema]


@pytest.mark.parametrize(
    ("change", "reader", "error"),
    [
        (compressed("zstd"), "load", "it is compressed"),
        (compressed("lz4"), "load_unverified", "it is compressed"),
        (compressed("zstd"), "open_bank", None),
        (claims(2**18, 2**18, "documents"), "open_bank", None),
        (claims(2**20, 2**20, "documents"), "open_bank", "counts 1048577 documents"),
        (claims(2**18, 2**18, "documents index chunks"), "open_bank", None),
        (claims(2**40, 2**40, "documents"), "open_bank", "counts 1099511627777 documents"),
        (claims(2**40, 2**40, "documents"), "load", "No such file"),
        (claims(4, 2**40, "documents chunks"), "open_bank", "1099511627776 chunks are too many"),
        (claims(4, 2**31 - 1, "documents chunks"), "open_bank", "counts 5 documents with"),
        (claims(4, 2**40, "chunks"), "open_bank", "1099511627776 chunks are too many"),
        (claims(4, 2**21, "documents chunks"), "open_bank", None),
        (long_header("shard"), "load", "a header of"),
        (long_header("shard"), "open_bank", None),
        (long_header("prefix"), "load", "a header of"),
        (many_batches, "load", None),
        (many_batches, "load_unverified", None),
        (many_deletions, "load", None),
        (many_deletions, "open_bank", None),
        (long_schema, "load", "begin with a schema"),
        (metadata, "load", "so many values"),
    ],
)
def test_banks(
    change: Callable[[Path, dict[str, Any]], None], reader: str, error: str | None, bank: Path, measure: Measured
) -> None:
    manifest = copy.deepcopy(dict(bank_manifest_msa.read_manifest(bank)))
    change(bank, manifest)
    sign(bank, manifest)
    check(measure.run(reader, bank), error, size_of(bank))


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def check(found: dict[str, Any], error: str | None, size: int) -> None:
    assert (error or "") in (found["error"] or ""), found
    assert (found["error"] is None) == (error is None), found
    assert found["grown"] <= size + MOST, (found, size)
    assert found["seconds"] < 10, found


NOTHING = b"[" + b"{}," * MANY + b"{}]"


def hostile_sidecar(name: str, fields: dict[str, Any]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        start = json.dumps(fields)[:-1].encode()
        (directory / name).write_bytes(start + (b", " if fields else b"") + b'"more": ' + NOTHING + b"}")

    return write


def long_line(name: str) -> Callable[[Path], None]:
    return lambda directory: (
        (directory / name).write_bytes(b'{"key": "a", "text": "b", "n": ' + NOTHING + b"}\n") and None
    )


def part_record(directory: Path) -> None:
    (directory / ".encoding").mkdir()
    hostile_sidecar(".encoding/part.json", {"part": "part"})(directory)


def long_manifest(count: int) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        text = (directory / "manifest.json").read_bytes()[1:]
        (directory / "manifest.json").write_bytes(b'{"more": [' + b"{}," * count + b"{}]," + text)

    return write


def wide_manifest(directory: Path) -> None:
    """One character that takes four bytes, so that all do; a long name besides, no values."""
    text = (directory / "manifest.json").read_bytes()[1:]
    (directory / "manifest.json").write_bytes(b'{"more": "' + "\U0001f600".encode() + b"a" * 5_000_000 + b'",' + text)


def long_backup(directory: Path) -> None:
    long_manifest(2_000_000)(directory)
    (directory / "manifest.json").rename(directory / bank_format_msa.BACKUP)


def long_commit(directory: Path) -> None:
    """A commit behind the manifest."""
    generation = bank_manifest_msa.read_checkpoint(directory)[0].get("generation", 0)
    hostile_sidecar(bank_log_msa.entry_name(generation + 1), {"format": "x"})(directory)


def vectors(directory: Path) -> None:
    """Vectors whose file begins with a long header."""
    header = b'{"__metadata__":{' + b",".join(b'"%d":"x"' % number for number in range(500_000)) + b"}}"
    path = directory / f"vectors-0-{'0' * 16}.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    entry = {"file": path.name, "bytes": path.stat().st_size, "rows": 5, "vectors": 2**40}
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    commit = bank_format_msa.commit_id(bank_manifest_msa.read_manifest(directory))
    record = {
        "kind": "msa_hf-vectors",
        "version": 1,
        "commit": commit,
        "dimension": 2**30,
        "files": [entry],
        "probe": [],
    }
    (directory / "vectors.json").write_text(json.dumps({**record, "model": "m"}))


@pytest.mark.parametrize(
    ("write", "reader", "error"),
    [
        (long_manifest(80_000_000), "load", "beside so few files"),
        (long_manifest(1_000_000), "open_bank", "beside so few files"),
        (wide_manifest, "load", "beside so few files"),
        (long_backup, "load", "is missing, but"),
        (long_commit, "load", "commit"),
        (hostile_sidecar("lexical.json", {"kind": "msa_hf-lexical-index"}), "search_words", "damaged"),
        (hostile_sidecar("vectors.json", {"kind": "msa_hf-vectors"}), "open_vectors", "brings them up to date"),
        (vectors, "open_vectors", "a header of"),
        (part_record, "find_parts", "no part"),
        (hostile_sidecar("memory_protocol.json", COMPACT.to_dict()), "read_protocol", "so many values"),
        (hostile_sidecar("fusion.json", {"format": "x"}), "read_fusion", "so many values"),
        (long_line("corpus.jsonl"), "read_corpus corpus.jsonl", "so many values"),
        (long_line("questions.jsonl"), "read_questions questions.jsonl", "so many values"),
    ],
)
def test_files_of_json(write: Callable[[Path], None], reader: str, error: str, bank: Path, measure: Measured) -> None:
    write(bank)
    reader, _, name = reader.partition(" ")
    check(measure.run(reader, bank / name), error, size_of(bank))


def test_a_manifest_may_be_as_large_as_its_files_need(bank: Path) -> None:
    """The records of files that are there are read, however many; the same without the files are not."""
    manifest: Any = copy.deepcopy(dict(bank_manifest_msa.read_manifest(bank)))
    manifest["more"] = [{"file": f"chunks-{number:010d}-{number:016x}", "sha256": "0" * 64} for number in range(60_000)]
    sign(bank, manifest)
    with pytest.raises(BankFormatError, match="beside so few files"):
        bank_manifest_msa.read_manifest(bank)
    for number in range(3000):
        (bank / f"chunks-{number}").touch()
    assert bank_manifest_msa.read_manifest(bank)["more"] == manifest["more"]


@pytest.mark.parametrize(
    "text", ["[" + ",".join(item * 20_000) + "]" for item in (["{}"], ["[]"], ['{"a":1}'], ["1e5"], ['""'])]
)
def test_reckoned_memory_is_enough(text: str) -> None:
    import tracemalloc

    tracemalloc.start()
    decoded = json.loads(text)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert decoded and taken <= bounds_msa.structure_memory(text) == bounds_msa.structure_memory(text.encode())


@pytest.mark.parametrize("count", [1, MOST_BATCHES, MOST_BATCHES + 1, 3 * MOST_BATCHES + 5])
def test_tables_of_many_batches_are_read(tmp_path: Path, count: int) -> None:
    table = rows(count, "text")
    with pa.OSFile(str(tmp_path / "many"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    found: Any = read_stream(tmp_path / "many", table_schema(2))
    assert found.equals(table)
    write_stream(found, tmp_path / "few")
    again: Any = read_stream(tmp_path / "few", table_schema(2))
    assert again.equals(table) and len(again.to_batches()) == 1


def test_a_table_without_rows_can_be_written(tmp_path: Path) -> None:
    write_stream(table_schema(2).empty_table(), tmp_path / "none")
    assert len(read_stream(tmp_path / "none", table_schema(2))) == 0


def test_a_lost_table_leaves_the_other_documents(bank: Path) -> None:
    first = bank_manifest_msa.read_manifest(bank)["segments"][0]
    (bank / first["table"]["file"]).unlink()
    with BankStore(FakeModel(), bank) as store:
        assert [document.key for document in store.documents] == ["other"]
        with pytest.raises(BankDamaged, match="'k0' may be the key"):
            store.get("k0")
        assert store.stat()["damaged"] == 4 and store.snapshot().num_tokens == len("another one")
        (damage, *_) = store.verify()
        assert damage.keys == (None,) * 4
        assert store.discard_damaged() == 4
        store.upsert("k0", "again")
    loaded = BankStore(FakeModel(), bank, read_only=True).snapshot()
    assert [(document.key, document.text) for document in loaded.documents] == [
        ("other", "another one"),
        ("k0", "again"),
    ]
