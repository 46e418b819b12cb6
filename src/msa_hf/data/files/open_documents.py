"""Texts of open offices: odt, an archive with a tree of elements."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from ...json_object import JsonObject
from ..errors import DataError
from .libraries import opened_archive, reading

TITLE = ".//{http://purl.org/dc/elements/1.1/}title"
SPACES = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}c"
# What is no part of the text: comments, what was deleted or stands for something else, and numbers of notes.
SILENT = {"annotation", "tracked-changes", "forms", "title", "desc", "binary-data", "note-citation", "variable-decls"}
INSIDE = {"note", "frame", "text-box", "custom-shape", "g"}  # what stands in a paragraph, with paragraphs of its own
MOST_SPACES = 1000  # in a row; a file may state any number


def read_odt(path: Path, encoding: str | None) -> JsonObject:
    """The paragraphs, lists and tables of an odt in order, notes and text boxes behind their paragraphs; its title is
    metadata."""
    with reading(str(path), "the reader of odt"), opened_archive(path) as archive:
        if b"encryption-data" in archive.read("META-INF/manifest.xml"):
            raise DataError(f"{path}: is locked with a password; save it without one")
        text = ElementTree.fromstring(archive.read("content.xml")).find("{*}body/{*}text")
        if text is None:
            raise DataError(f"{path}: holds no text but another kind of document; save it as one that is read")
        made: JsonObject = {"text": "\n".join(_lines(text)).strip()}
        if "meta.xml" in archive.namelist():
            title = ElementTree.fromstring(archive.read("meta.xml")).findtext(TITLE) or ""
            if title.strip():
                made["title"] = title.strip()
    return made


def _lines(element: Element) -> Iterator[str]:
    """The paragraphs of an element, a line for each; a row of a table is one."""
    for child in element:
        name = _name(child)
        if name in ("p", "h"):
            yield _words(child)
            for inside in child.iter():
                if _name(inside) in INSIDE:
                    yield from _lines(inside)
        elif name == "table-row":
            yield "\t".join(" ".join(line for line in _lines(cell) if line) for cell in child).rstrip()
        elif name not in SILENT:
            yield from _lines(child)


def _words(element: Element) -> str:
    """The words of a paragraph or a part of one; white space counts once unless an element stands for it."""
    found = [_once(element.text)]
    for child in element:
        name = _name(child)
        if name == "s":
            found.append(" " * min(int(child.get(SPACES, "1")), MOST_SPACES))
        elif name == "tab":
            found.append("\t")
        elif name == "line-break":
            found.append("\n")
        elif name not in SILENT | INSIDE:
            found.append(_words(child))
        found.append(_once(child.tail))
    return "".join(found)


def _once(text: str | None) -> str:
    return re.sub(r"[ \t\r\n]+", " ", text or "")


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]
