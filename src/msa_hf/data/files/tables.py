"""Tables: csv and tsv with a line of names, parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...model.arrow_msa import pyarrow
from ..errors import DataError
from ..lines import LONGEST, MARK, open_text
from .found import Found

BATCH = 256  # rows of a parquet file that are held at a time


def _read_separated(separator: str, path: Path, encoding: str | None, first: int = 0) -> Iterator[Found]:
    """The rows of a file whose first line has the names of the columns; all values are text."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    with open_text(path, encoding) as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = next(lines, [])
            names[:1] = [name.removeprefix(MARK) for name in names[:1]]
            _check_names(path, names, separator)
            number = lines.line_num + 1
            for values in lines:
                if values and number >= first:
                    place = f"{path}, line {number}"
                    row: dict[str, object] | DataError = dict(zip(names, values, strict=False))
                    if len(values) != len(names):
                        row = DataError(f"{place}: {len(values)} values, but the first line names {len(names)} columns")
                    elif any("\0" in value for value in values):
                        row = DataError(f"{place}: holds a zero byte; is the file UTF-16? Name its --encoding")
                    yield Found(number, row)
                number = lines.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {lines.line_num}: not a table of values ({error})") from error


def _check_names(path: Path, names: list[str], separator: str) -> None:
    if any("\0" in name for name in names):
        raise DataError(f"{path}, line 1: holds a zero byte; is the file UTF-16? Name its --encoding")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}, line 1: two columns have the name {twice!r}; name columns apart")
    others = [mark for mark in ",;\t|" if mark != separator and len(names) == 1 and mark in names[0]]
    if others:
        raise DataError(
            f"{path}, line 1: one column, {names[0]!r:.80}, that seems to be several separated by {others[0]!r}; "
            f"save the table with {separator!r} between values{', or name it .tsv' if others[0] == chr(9) else ''}"
        )


read_csv = partial(_read_separated, ",")
read_tsv = partial(_read_separated, "\t")


def read_parquet(path: Path, encoding: str | None, first: int = 0) -> Iterator[Found]:
    """The rows of a parquet file, which knows its own encoding."""
    try:
        pyarrow()
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: {error}") from error
    try:
        with parquet.ParquetFile(path) as file:
            number, groups = 0, list(range(file.num_row_groups))
            while groups and number + file.metadata.row_group(groups[0]).num_rows <= first:
                number += file.metadata.row_group(groups.pop(0)).num_rows
            for batch in file.iter_batches(batch_size=BATCH, row_groups=groups):
                for row in batch.to_pylist():
                    if number >= first:
                        yield Found(number, row)
                    number += 1
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a parquet file that can be read ({error})") from error
