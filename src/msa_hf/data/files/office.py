"""Documents of offices: pdf by pypdf, docx by python-docx, pptx by python-pptx."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ...json_object import JsonObject
from ..errors import DataError
from .libraries import library, opened_archive, quiet, reading


class Paragraph(Protocol):
    text: str


class Cell(Protocol):
    text: str


class Row(Protocol):
    cells: Iterable[Cell]


class Table(Protocol):
    rows: Iterable[Row]


def read_pdf(path: Path, encoding: str | None) -> JsonObject:
    """The text of a pdf's pages, which are divided by a blank line."""
    pypdf = library("pypdf", str(path), "pypdf")
    with reading(str(path), "pypdf"), quiet("pypdf"), path.open("rb") as file:
        reader = pypdf.PdfReader(file)
        if reader.is_encrypted and not _opens(reader):
            raise DataError(f"{path}: is locked with a password; save it without one")
        pages = [page.extract_text().strip() for page in reader.pages]
    # Fonts may map one sign to both halves of a character; put together they are one.
    text = "\n\n".join(page for page in pages if page)
    return {"text": text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")}


class LockedReader(Protocol):
    def decrypt(self, password: str) -> int: ...


def _opens(reader: LockedReader) -> bool:
    """Tell whether a pdf opens without a password, as those do whose printing alone is restricted."""
    try:
        return bool(reader.decrypt(""))
    except Exception:  # an algorithm that needs a further library
        return False


def read_docx(path: Path, encoding: str | None) -> JsonObject:
    """The paragraphs and tables of a docx in order, without headers and footers."""
    docx = library("docx", str(path), "python-docx")
    with reading(str(path), "python-docx"):
        with opened_archive(path):
            pass
        blocks = docx.Document(str(path)).iter_inner_content()
        texts = [line for block in blocks for line in ([block.text] if hasattr(block, "text") else _rows(block))]
    return {"text": "\n".join(texts).strip()}


def read_pptx(path: Path, encoding: str | None) -> JsonObject:
    """The texts, tables and notes of a pptx, slide by slide, which are divided by a blank line."""
    pptx = library("pptx", str(path), "python-pptx")
    with reading(str(path), "python-pptx"):
        with opened_archive(path):
            pass
        slides = []
        for slide in pptx.Presentation(str(path)).slides:
            lines = [line for shape in slide.shapes for line in _shape_lines(shape)]
            if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
                lines.append(slide.notes_slide.notes_text_frame.text)
            slides.append("\n".join(line for line in lines if line.strip()))
    return {"text": "\n\n".join(slide for slide in slides if slide)}


class TextFrame(Protocol):
    text: str


class Shape(Protocol):
    has_text_frame: bool
    has_table: bool
    text_frame: TextFrame
    table: Table
    shapes: Iterable[Shape]


def _shape_lines(shape: Shape) -> Iterator[str]:
    if shape.has_text_frame:
        yield shape.text_frame.text
    elif shape.has_table:
        yield from _rows(shape.table)
    else:
        for part in getattr(shape, "shapes", ()):  # of a group
            yield from _shape_lines(part)


def _rows(table: Table) -> Iterator[str]:
    for row in table.rows:
        yield "\t".join(cell.text.strip() for cell in row.cells).rstrip()
