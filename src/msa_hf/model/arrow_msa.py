"""The table of a bank's documents in Arrow; pyarrow is imported when a bank is saved or loaded, and not before.

transformers refuses remote code whose import statements name a missing package, and a bank that is neither saved nor
loaded does not need this one. pyarrow has no types of its own: the protocols below name what is used of it.
"""

import importlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 32
ROWS_PER_BATCH = 16_384  # a reader finds a row by walking over batches
MERGED_BYTES = 16 * 2**20  # of small batches that are written as one
MOST_BATCHES = 1024  # that stay as they lie in a file: each takes some kilobytes of memory
MOST_SCHEMA_BYTES = 2**20
COMPRESSION = 3  # the number of the field of an Arrow record batch that says how its buffers are compressed


class TableRow(TypedDict, total=False):
    """A row of the table, or some columns of one."""

    key: str
    text: str | None
    metadata: str | None
    tokens: int
    chunks: int
    id: int
    version: int | None
    digest: bytes | None


class ArrowField(Protocol):
    name: str
    type: object
    nullable: bool


class ArrowSchema(Protocol):
    def __iter__(self) -> Iterator[ArrowField]: ...
    def __len__(self) -> int: ...
    def field(self, name: str) -> ArrowField: ...
    def empty_table(self) -> "ArrowTable": ...


class ArrowColumn(Protocol):
    null_count: int

    def __len__(self) -> int: ...
    def filter(self, mask: object) -> "ArrowColumn": ...
    def take(self, rows: object) -> "ArrowColumn": ...
    def unique(self) -> "ArrowColumn": ...
    def to_numpy(self) -> NDArray[np.generic]: ...
    def to_pylist(self) -> list[str]: ...


class ArrowTable(Protocol):
    schema: ArrowSchema
    column_names: list[str]
    nbytes: int

    def __len__(self) -> int: ...
    def __getitem__(self, name: str) -> ArrowColumn: ...
    def select(self, columns: Sequence[str]) -> "ArrowTable": ...
    def slice(self, offset: int, length: int) -> "ArrowTable": ...
    def filter(self, mask: object) -> "ArrowTable": ...
    def cast(self, schema: ArrowSchema) -> "ArrowTable": ...
    def validate(self, *, full: bool = False) -> None: ...
    def combine_chunks(self) -> "ArrowTable": ...
    def drop_columns(self, columns: Sequence[str]) -> "ArrowTable": ...
    def append_column(self, field: ArrowField, column: object) -> "ArrowTable": ...
    def replace_schema_metadata(self, metadata: None) -> "ArrowTable": ...
    def to_batches(self, max_chunksize: int | None = None) -> "list[ArrowTable]": ...
    def to_pylist(self) -> list[TableRow]: ...


class ArrowBuffer(Protocol):
    size: int

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ArrowMessage(Protocol):
    type: str
    metadata: ArrowBuffer


def pyarrow() -> ModuleType:
    """The module `pyarrow`, imported on first use.

    Raises:
        ImportError: if it is missing, with the remedy.
    """
    try:
        importlib.import_module("pyarrow.ipc")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError("Saving and loading a memory bank needs pyarrow: `pip install pyarrow`.") from error


def table_schema(version: int = 1) -> ArrowSchema:
    """The schema of the documents' table in a version of the bank format."""
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
    schema: ArrowSchema = pa.schema(fields)
    return schema


def table_of(columns: dict[str, list[object]]) -> ArrowTable:
    """A table of format version 2 from its columns."""
    table: ArrowTable = pyarrow().table(columns, schema=table_schema(2))
    return table


def concat_tables(tables: Iterable[ArrowTable]) -> ArrowTable:
    """Tables of one schema one after the other, without a copy."""
    table: ArrowTable = pyarrow().concat_tables(list(tables))
    return table


def numbers_of(table: ArrowTable, column: str) -> NDArray[np.int64]:
    """A column of integers without nulls, [rows] int64."""
    return table[column].to_numpy().astype(np.int64)


def kept_rows(table: ArrowTable, kept: NDArray[np.bool_]) -> ArrowTable:
    """A copy of the rows that `kept` [rows] has."""
    return table.filter(pyarrow().array(kept))


def read_stream(path: Path, schema: ArrowSchema, mapped: bool = True) -> ArrowTable:
    """Memory map a table, or read it; what its offsets say has not been looked at.

    Nothing is decoded before it is known to be what it says: a batch whose buffers are compressed would grow, and is
    refused. A table of very many batches is copied, so that these do not take more memory than the rows; its offsets
    are looked at then.

    Args:
        schema: whose names and types it must have.
        mapped: memory map it.

    Raises:
        ValueError: if it is no such table, or no Arrow stream (`pyarrow.ArrowInvalid`).
        OSError: if it cannot be read.
    """
    pa = pyarrow()
    file = pa.memory_map(str(path)) if mapped else pa.BufferReader(path.read_bytes())
    try:
        return _read_messages(pa.ipc.MessageReader.open_stream(file), schema)
    except OSError as error:
        if error.errno is None:  # of Arrow itself, about what it read
            raise ValueError(str(error)) from error
        raise


def _read_messages(messages: Iterator[ArrowMessage], schema: ArrowSchema) -> ArrowTable:
    pa = pyarrow()
    kept: list[object] = []
    batches: list[ArrowTable] = []
    first = next(messages, None)
    if first is None or first.type != "schema" or first.metadata.size > MOST_SCHEMA_BYTES:
        raise ValueError("it does not begin with a schema")
    found = pa.ipc.read_schema(first)
    fields = [(field.name, field.type) for field in found]
    if fields != [(field.name, field.type) for field in schema]:
        raise ValueError(f"it has the columns {str(fields)[:400]}")
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"it holds a {message.type}, which the format does not have")
        if _is_compressed(memoryview(message.metadata)):
            raise ValueError("it is compressed, which the format does not allow")
        batches.append(pa.ipc.read_record_batch(message, found))
        if len(batches) > MOST_BATCHES:
            kept, batches = [*kept, *_copied(batches)], []
    table: ArrowTable = pa.Table.from_batches([*kept, *batches], found)
    return table


def _copied(batches: Sequence[ArrowTable]) -> list[object]:
    """Batches as one, in memory."""
    for batch in batches:
        batch.validate(full=True)
    return list(pyarrow().Table.from_batches(batches).combine_chunks().to_batches())


def _is_compressed(batch: memoryview) -> bool:
    """Tell whether an Arrow message is a record batch with compressed buffers, from its flatbuffer.

    Raises:
        ValueError: if that cannot be followed.
    """
    try:
        (message,) = struct.unpack_from("<I", batch)
        header = _field(batch, message, 2)
        if header is None:
            raise ValueError("a message of it has no header")
        return _field(batch, header + struct.unpack_from("<I", batch, header)[0], COMPRESSION) is not None
    except struct.error as error:
        raise ValueError(f"a message of it cannot be followed ({error})") from error


def _field(batch: memoryview, table: int, number: int) -> int | None:
    """The place of a field of a flatbuffer's table, None where it has its default."""
    layout = table - struct.unpack_from("<i", batch, table)[0]
    (size,) = struct.unpack_from("<H", batch, layout)
    place = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", batch, layout + place) if place + 2 <= size else (0,)
    return table + offset if offset else None


def write_stream(table: ArrowTable, path: Path) -> None:
    """Write a table to a file as an uncompressed Arrow stream, small batches of it as one."""
    with pyarrow().OSFile(str(path), "wb") as sink:
        write_batches(table, sink)


def write_batches(table: ArrowTable, sink: object) -> None:
    """Write a table likewise to a `pyarrow.NativeFile`."""
    pa = pyarrow()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        together: list[ArrowTable] = []
        rows = size = 0
        for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH):
            rows, size = rows + len(batch), size + batch.nbytes
            if together and (rows > ROWS_PER_BATCH or size > MERGED_BYTES):
                writer.write_table(pa.Table.from_batches(together).combine_chunks())
                together, rows, size = [], len(batch), batch.nbytes
            together.append(batch)
        if together:
            writer.write_table(pa.Table.from_batches(together).combine_chunks())
