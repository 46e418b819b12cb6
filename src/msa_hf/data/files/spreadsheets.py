"""Spreadsheets: xlsx by openpyxl."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...json_object import JsonObject
from .libraries import library, opened_archive, reading


def read_xlsx(path: Path, encoding: str | None) -> JsonObject:
    """The sheets of a spreadsheet, each under its name, a line for each row and tabs between values.

    Values are those that formulas had when the file was saved. Rows without any are left out.
    """
    openpyxl = library("openpyxl", str(path), "openpyxl")
    with reading(str(path), "openpyxl"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a sheet has beside values
        with opened_archive(path):
            pass
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            sheets = []
            for sheet in book.worksheets:
                sheet.reset_dimensions()  # what a file says of its size may be wrong
                lines = [line for line in _lines(sheet.iter_rows(values_only=True)) if line]
                if lines:
                    sheets.append("\n".join([sheet.title, *lines]))
        finally:
            book.close()
    return {"text": "\n\n".join(sheets)}


def _lines(rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    for row in rows:
        yield "\t".join(_shown(value) for value in row).rstrip()


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()  # a day has no other type there
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(str(value).split())
