"""The table of a bank's documents in Arrow; pyarrow is imported when a bank is saved or loaded, and not before.

transformers refuses remote code whose import statements name a missing package, and a bank that is neither saved nor
loaded does not need this one. pyarrow has no types of its own: the protocols below name what is used of it.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 32
ROWS_PER_BATCH = 16_384  # a reader finds a row by walking over batches


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


def read_stream(path: Path) -> ArrowTable:
    """Memory map a table; what its offsets say has not been looked at.

    Raises:
        ValueError: if it is no Arrow stream (`pyarrow.ArrowInvalid`).
        OSError: if it cannot be read.
    """
    pa = pyarrow()
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        table: ArrowTable = reader.read_all()
    return table


def write_stream(table: ArrowTable, path: Path) -> None:
    """Write a table to a file as an uncompressed Arrow stream."""
    pa = pyarrow()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
