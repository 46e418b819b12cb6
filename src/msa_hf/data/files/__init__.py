"""The kinds of files that documents lie in: a reader for each, found by the end of a file's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...json_object import JsonObject
from ..compressed import OPENERS
from ..errors import DataError
from ..lines import read_text
from . import json_files, notebooks, office, open_documents, pages, spreadsheets, tables
from .found import Found


class RowReader(Protocol):
    """Reads a file of rows from row or line `first` on, without holding it in memory.

    What yields a `DataError` instead of a row goes on with the next one; what raises it does not.
    """

    def __call__(self, path: Path, encoding: str | None, first: int = 0) -> Iterator[Found]: ...


@dataclass(frozen=True)
class Rows:
    """Files in which every row is a document.

    Attributes:
        unit: what rows are counted in: `"line"` or `"row"`.
        compressible: they may be compressed as a whole, such as `.jsonl.gz`.
    """

    read: RowReader
    unit: str
    compressible: bool = True


@dataclass(frozen=True)
class Whole:
    """Files that are a document each.

    Attributes:
        read: the document, a mapping with `text` and perhaps more.
        converted: reading takes long, so that what was read is kept.
    """

    read: Callable[[Path, str | None], JsonObject]
    converted: bool = True
    compressible: bool = False


def _read_plain(path: Path, encoding: str | None) -> JsonObject:
    return {"text": read_text(path, encoding)}


TEXT = Whole(_read_plain, converted=False, compressible=True)
PROSE = "adoc asciidoc bib log markdown md mdx org po rst srt tex text txt vtt"
SOURCE = (
    "bash bat c cc cfg clj cmake conf cpp cs css cu cuh cxx dart diff el erl ex f90 fish go gradle graphql groovy h "
    "hpp hs ini java jl js jsx kt less lisp lua m mk ml patch php pl pm proto ps1 py pyi pyx r rb rs sass scala scss "
    "sh sql svelte swift toml ts tsx vue xml yaml yml zig zsh"
)
KINDS: dict[str, Rows | Whole] = {
    **{f".{name}": TEXT for name in (PROSE + " " + SOURCE).split()},
    ".jsonl": Rows(json_files.read_lines_of_json, "line"),
    ".ndjson": Rows(json_files.read_lines_of_json, "line"),
    ".json": Rows(json_files.read_array, "row"),
    ".csv": Rows(tables.read_csv, "line"),
    ".tsv": Rows(tables.read_tsv, "line"),
    ".parquet": Rows(tables.read_parquet, "row", compressible=False),
    ".html": Whole(pages.read_html),
    ".htm": Whole(pages.read_html),
    ".xhtml": Whole(pages.read_html),
    ".epub": Whole(pages.read_epub),
    ".pdf": Whole(office.read_pdf),
    ".docx": Whole(office.read_docx),
    ".pptx": Whole(office.read_pptx),
    ".xlsx": Whole(spreadsheets.read_xlsx),
    ".odt": Whole(open_documents.read_odt),
    ".ipynb": Whole(notebooks.read_ipynb),
}
NAMED = (
    ".txt, .md, .rst, .html, source code, .ipynb, .csv, .tsv, .parquet, .json, .jsonl, .pdf, .docx, .pptx, .xlsx, "
    ".odt, .epub"
)


def kind_of(name: str) -> Rows | Whole | None:
    """The kind of a file by its name, None for one that is not read."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in OPENERS:
        kind = KINDS.get(Path(path.stem).suffix.lower())
        return kind if kind is not None and kind.compressible else None
    return KINDS.get(suffix)


__all__ = ["KINDS", "NAMED", "TEXT", "DataError", "Found", "Rows", "Whole", "kind_of"]
