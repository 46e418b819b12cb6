"""Pages of the web and books of them: html and epub, by Beautiful Soup."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote
from xml.etree import ElementTree

from ...json_object import JsonObject
from ..compressed import open_bytes
from ..errors import DataError
from ..lines import LONGEST, decode
from .libraries import library, opened_archive, reading

if TYPE_CHECKING:
    from bs4 import BeautifulSoup

SILENT = ("script", "style", "template", "noscript", "head")
BLOCKS = tuple(
    "address article aside blockquote dd details div dl dt fieldset figcaption figure footer form".split()  # noqa: SIM905
    + "h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section summary table tr ul".split()  # noqa: SIM905
)
CONTAINER = "META-INF/container.xml"


def read_html(path: Path, encoding: str | None) -> JsonObject:
    """The text of a page as a reader sees it, a line for each paragraph; its title is metadata.

    The encoding is the one given, else what the page says of itself, else UTF-8.
    """
    with open_bytes(path) as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise DataError(f"{path}: a page of more than {LONGEST >> 20} MiB")
    return _page(data, str(path), encoding)


def _page(data: bytes, place: str, encoding: str | None = None) -> JsonObject:
    bs4 = library("bs4", place, "beautifulsoup4")
    if encoding is None:
        stated = bs4.dammit.EncodingDetector.find_declared_encoding(data, is_html=True)
        # A page that can be searched for "utf-16" byte by byte is not UTF-16.
        encoding = None if stated is None or stated.lower().startswith(("utf-8", "utf8", "utf-16")) else stated
    try:
        text = decode(data, place, encoding)
    except LookupError as error:
        raise DataError(
            f"{place}: says that its encoding is {encoding!r}, which nobody knows; name it: --encoding"
        ) from error
    with reading(place, "Beautiful Soup"):
        soup = bs4.BeautifulSoup(text, "html.parser")
        for tag in soup.find_all(string=lambda text: type(text) is not bs4.NavigableString):
            tag.extract()  # comments, declarations, scripts
        title = soup.title.get_text(" ", strip=True) if soup.title is not None else ""
        made: JsonObject = {"text": _visible_text(soup)}
    if title:
        made["title"] = title
    return made


def _visible_text(soup: BeautifulSoup) -> str:
    for tag in soup.find_all(SILENT):
        tag.decompose()
    kept = {id(text) for pre in soup.find_all("pre") for text in pre.find_all(string=True)}
    for text in soup.find_all(string=True):
        if id(text) not in kept:
            text.replace_with(re.sub(r"\s+", " ", text))
    for tag in soup.find_all("br"):
        tag.replace_with("\n")
    for tag in soup.find_all(("td", "th")):
        tag.append("\t")
    for tag in soup.find_all(BLOCKS):
        tag.insert_before("\n")
        tag.append("\n")
    lines = [line.rstrip() if line.startswith("  ") else line.strip() for line in soup.get_text().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_epub(path: Path, encoding: str | None) -> JsonObject:
    """The pages of a book in its order of reading, put together; its title is metadata."""
    library("bs4", str(path), "beautifulsoup4")
    with reading(str(path), "the reader of epub"), opened_archive(path) as book:
        (root,) = ElementTree.fromstring(book.read(CONTAINER)).iterfind("{*}rootfiles/{*}rootfile[1]")
        package_name = root.attrib["full-path"]
        package = ElementTree.fromstring(book.read(package_name))
        items = {item.attrib["id"]: item.attrib["href"] for item in package.iterfind("{*}manifest/{*}item")}
        names = [items[item.attrib["idref"]] for item in package.iterfind("{*}spine/{*}itemref")]
        title = package.findtext("{*}metadata/{http://purl.org/dc/elements/1.1/}title") or ""
        texts = []
        for name in names:
            inside = posixpath.normpath(posixpath.join(posixpath.dirname(package_name), unquote(name.split("#")[0])))
            texts.append(_page(book.read(inside), f"{path}, {inside}")["text"])
    made: JsonObject = {"text": "\n\n".join(text for text in texts if text)}
    if title.strip():
        made["title"] = title.strip()
    return made
