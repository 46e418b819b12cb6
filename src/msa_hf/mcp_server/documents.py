"""Documents as resources: their addresses, and what a client gets of them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from ..model.document_table_msa import Document

SCHEME = "msa-hf"
BANK_URI = f"{SCHEME}://bank"
DOCUMENT_URI = f"{SCHEME}://document/"
TEMPLATE = DOCUMENT_URI + "{key}"


def uri_of(key: str) -> str:
    """The address of a document."""
    return DOCUMENT_URI + quote(key, safe="")


def key_of(uri: str) -> str | None:
    """The key in a document's address; None for the address of anything else."""
    if not uri.startswith(DOCUMENT_URI):
        return None
    try:
        return unquote(uri.removeprefix(DOCUMENT_URI), errors="strict")
    except UnicodeDecodeError:
        return None


def excerpt_of(text: str | None, length: int) -> tuple[str | None, bool]:
    """The beginning of a text, and whether there is more."""
    return (text, False) if text is None or len(text) <= length else (text[:length], True)


def title_of(document: Document) -> str:
    """The title of a document in a client's list: its first words, or its key."""
    words = " ".join((document.text or "")[:200].split())
    return (words[:77] + "..." if len(words) > 80 else words) or document.key
