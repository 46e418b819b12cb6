"""Documents in groups, and the findings that are extracted from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from ...json_object import JsonObject
from ..chains.sources import Source


@dataclass(frozen=True, slots=True)
class DocumentGroup:
    """Documents that are read together.

    Attributes:
        name: of the group.
        documents: with their keys and texts.
    """

    name: str
    documents: tuple[Source, ...]

    def keys(self) -> set[str]:
        """The keys of its documents."""
        return {document.key for document in self.documents}


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer that one document gives to one question.

    Attributes:
        question: that was asked, or the name of a field.
        answer: in few words.
        evidence: the words of the document that say so.
        key: of the document.
        group: that it was read in.
        quoted: whether the evidence stands in the document word for word; else a model made it up or changed it.
    """

    question: str
    answer: str
    evidence: str
    key: str
    group: str = ""
    quoted: bool = True

    def to_dict(self) -> JsonObject:
        """JSON values, all of the above."""
        return asdict(self)


def group_documents(documents: Iterable[Mapping[str, object] | Source], size: int) -> list[DocumentGroup]:
    """Documents in groups of `size`, in order.

    Args:
        documents: each with `key` and `text`.
        size: documents of a group; the last one may have fewer.

    Raises:
        ValueError: for a document without key or text, or a key that stands twice.
    """
    if type(size) is not int or size < 1:
        raise ValueError(f"`size` must be an integer of at least 1, got {size!r}.")
    found: dict[str, Source] = {}
    for place, item in enumerate(documents):
        key, text = (item.key, item.text) if isinstance(item, Source) else (item.get("key"), item.get("text"))
        if not isinstance(key, str) or not key or not isinstance(text, str) or not text.strip():
            raise ValueError(f"Document {place} needs a key and a text that are not empty, got {key!r} and {text!r}.")
        if key in found:
            raise ValueError(f"There are two documents {key!r}; citations could not tell them apart.")
        found[key] = item if isinstance(item, Source) else Source(key, text)
    rows = list(found.values())
    return [
        DocumentGroup(f"group {start // size + 1}", tuple(rows[start : start + size]))
        for start in range(0, len(rows), size)
    ]
