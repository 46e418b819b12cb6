"""`MemoryEvent`: a document as it is from now on, or the end of one; and its form in a message."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ...json_object import JsonObject
from .errors import BadEvent

MAX_KEY = 1024  # bytes of UTF-8
MAX_TEXT = 2**20  # bytes of UTF-8: longer ones are refused before they are tokenized
MAX_VERSION = 2**62  # as of `BankStore`
MAX_METADATA = 2**20  # bytes of JSON
ESCAPED = 6  # bytes of JSON for a byte of text, at most: \u0000
FIELDS = {"key", "version", "text", "metadata", "delete"}


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """The state of a document from a version on.

    Attributes:
        key: of the document.
        version: from 0 to 2^62; grows with every event about this key. What is not newer than what the bank knows has
            no effect, so events may be repeated and come in any order.
        text: of the document; None: it is deleted.
        metadata: JSON values by name.
    """

    key: str
    version: int
    text: str | None
    metadata: JsonObject = field(default_factory=dict)


def encode_event(event: MemoryEvent) -> bytes:
    """The message of an event: a JSON object of `key`, `version`, and `text` with `metadata`, or `"delete": true`."""
    record: JsonObject = {"key": event.key, "version": event.version}
    if event.text is None:
        record["delete"] = True
    else:
        record["text"] = event.text
        if event.metadata:
            record["metadata"] = event.metadata
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def decode_event(body: bytes, max_text: int = MAX_TEXT) -> MemoryEvent:
    """The event of a message.

    Raises:
        BadEvent: naming what is wrong with it.
    """
    most = (
        ESCAPED * (MAX_KEY + max_text + MAX_METADATA) + 4096
    )  # before it is parsed, which takes several times as much
    if len(body) > most:
        raise BadEvent(f"{len(body)} bytes, more than {most}, which an event of this size never has; split it")
    try:
        record = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadEvent(f"not JSON in UTF-8: {error}"[:300]) from None
    if not isinstance(record, dict):
        raise BadEvent(f"a JSON {type(record).__name__}, not an object")
    if unknown := sorted(record.keys() - FIELDS):
        raise BadEvent(f"unknown fields {unknown!r:.200}; an event has {sorted(FIELDS)}")
    key, version = record.get("key"), record.get("version")
    if not isinstance(key, str) or not key:
        raise BadEvent(f"`key` must be a text that is not empty, got {key!r:.80}")
    if (size := _bytes_of("key", key)) > MAX_KEY:
        raise BadEvent(f"`key` has {size} bytes, at most {MAX_KEY} are allowed")
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise BadEvent(f"`version` must be an integer from 0 to 2^62, got {version!r:.80}")
    text, delete, metadata = record.get("text"), record.get("delete", False), record.get("metadata")
    if text is not None and not isinstance(text, str):
        raise BadEvent(f"`text` must be a text, got {text!r:.80}")
    if not isinstance(delete, bool):
        raise BadEvent(f"`delete` must be true or false, got {delete!r:.80}")
    if delete is (text is not None):
        raise BadEvent("an event has either `text` or `delete`")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise BadEvent(f"`metadata` must be an object, got {metadata!r:.80}")
    try:
        size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError) as error:
        raise BadEvent(f"`metadata` is not JSON in Unicode: {error}"[:300]) from None
    if size > MAX_METADATA:
        raise BadEvent(f"`metadata` has {size} bytes, at most {MAX_METADATA} are allowed")
    if text is not None:
        if not text.strip():
            raise BadEvent("`text` is empty; delete the document instead")
        if (size := _bytes_of("text", text)) > max_text:
            raise BadEvent(f"`text` has {size} bytes, at most {max_text} are allowed; split it into documents")
    return MemoryEvent(key, version, text, metadata)


def _once(pairs: list[tuple[str, Any]]) -> JsonObject:
    """An object of JSON; a name that stands twice leaves open what was meant."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return made


def _bytes_of(name: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise BadEvent(f"`{name}` is not Unicode ({error.reason})") from None
