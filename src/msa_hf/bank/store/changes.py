"""The changes of a commit to each key that it touches, worked out before anything is encoded or written."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...model.arrow_msa import ArrowTable, table_of
from ...model.bank_format_msa import KeyHash, key_hash
from ...model.encoding_msa import token_ids
from ...model.metadata_msa import checked_metadata
from ...model.unicode_msa import check_unicode
from .state import State

if TYPE_CHECKING:
    from ...generation.protocol import PromptProtocol

MAX_VERSION = 2**62


@dataclass(frozen=True)
class Known:
    """A key as it is known: its version, and the document if there is one."""

    version: int | None = None
    id: int | None = None
    digest: bytes | None = None
    metadata: str | None = None
    exists: bool = False


@dataclass(frozen=True)
class Change:
    """The change of a key by a commit.

    Attributes:
        known: the key after it.
        row: the row that goes, None where there was none.
        text, input_ids: what is encoded; `copy` instead: the row's tensors are taken over.
    """

    known: Known
    row: int | None
    text: str | None = None
    input_ids: object = None
    copy: bool = False


@dataclass(frozen=True)
class GivenDocument:
    """A document as a user gave it: nothing of it has been looked at."""

    key: object
    text: object
    tokens: object
    version: object
    metadata: Mapping[str, object]

    @classmethod
    def of(cls, document: object) -> GivenDocument:
        """From a text, token ids, or a mapping with `text` or `input_ids`, and perhaps more."""
        if not isinstance(document, Mapping):
            document = {"text" if isinstance(document, str) else "input_ids": document}
        fields = dict(document)
        key, version = fields.pop("key", None), fields.pop("version", None)
        text, tokens = fields.pop("text", None), fields.pop("input_ids", None)
        if set(fields) == {"metadata"} and isinstance(fields["metadata"], Mapping | None):
            fields = dict(fields["metadata"] or {})
        return cls(key, text, tokens, version, fields)


class Changes:
    """The changes of one commit, in the order in which keys were first touched.

    Args:
        committed: what the bank knows of a key, and its row there.
        next_id: the first id that no document ever had.
        protocol: what wraps the texts, None for nothing.
        watermark: versions up to which no event has an effect.
    """

    def __init__(
        self,
        committed: Callable[[str], tuple[Known, int | None]],
        next_id: int,
        protocol: PromptProtocol | None,
        watermark: int | None = None,
    ) -> None:
        self._committed = committed
        self._protocol, self._watermark = protocol, watermark
        self.next_id = next_id
        self.of_keys: dict[str, Change] = {}
        self._before: dict[str, Change | None] | None = None  # of the keys that changed since `all_or_none` began

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A block whose changes are taken back where it raises: the commit may go on without them."""
        outer, next_id = self._before, self.next_id
        before: dict[str, Change | None] = {}
        self._before = before
        try:
            yield
        except BaseException:
            for key, change in before.items():
                if change is None:
                    del self.of_keys[key]
                else:
                    self.of_keys[key] = change
            self.next_id = next_id
            raise
        else:
            if outer is not None:
                for key, change in before.items():
                    outer.setdefault(key, change)
        finally:
            self._before = outer

    def _change(self, key: str, change: Change) -> None:
        if self._before is not None:
            self._before.setdefault(key, self.of_keys.get(key))
        self.of_keys[key] = change

    def known(self, key: str) -> tuple[Known, int | None]:
        """Look a key up, in the changes or else in the bank, and its row there."""
        if key in self.of_keys:
            return self.of_keys[key].known, self.of_keys[key].row
        return self._committed(key)

    def put(
        self,
        key: str,
        text: object,
        tokens: object,
        version: object,
        metadata: Mapping[str, object] | None,
    ) -> bool:
        """Put a document in, or in the place of the one with its key; returns whether anything changed."""
        known, row = self.known(key)
        stated = None if version is None else checked_version(version)
        if self._is_late(known, stated):
            return False
        if not isinstance(text, str | None):
            raise TypeError(f"Document {key!r}: its text is a {type(text).__name__}.")
        if self._protocol is not None and tokens is not None:
            raise ValueError(f"Document {key!r} has `input_ids`, but it is this bank's protocol that wraps the texts.")
        if (text is None and tokens is None) or (self._protocol is not None and not text):
            raise ValueError(f"Document {key!r} has no text; leave it out.")
        if text is not None:
            check_unicode(text, f"Document {key!r}: its text")
            text = str(text)
        if tokens is not None:
            tokens = token_ids(tokens, f"Document {key!r}")
        checked = checked_metadata(metadata or {}, f"Document {key!r}")
        encoded = json.dumps(checked, ensure_ascii=False, allow_nan=False) if checked else None
        digest = text_digest("" if self._protocol is None else self._protocol.document, text, tokens)
        same = known.exists and known.digest == digest
        latest = known.version if stated is None else stated
        if same and encoded == known.metadata and latest == known.version:
            return False
        id = known.id if known.exists else self.next_id
        assert id is not None
        if not known.exists:
            self.next_id += 1
        # An unchanged text whose row is in the bank keeps its tensors; else what is pending is encoded once anyway.
        copied = same and (key not in self.of_keys or self.of_keys[key].copy)
        self._change(key, Change(Known(latest, id, digest, encoded, True), row, text, tokens, copied))
        return True

    def delete(self, key: str, version: int | None) -> bool:
        """Delete a document; returns whether there was one."""
        known, row = self.known(key)
        stated = None if version is None else checked_version(version)
        if self._is_late(known, stated) or (not known.exists and version is None):
            return False
        version = known.version if version is None else version
        self._change(key, Change(Known(version), row))
        return known.exists

    def _is_late(self, known: Known, version: int | None) -> bool:
        """Tell whether an event comes after one that is newer, or may have been forgotten."""
        latest = [item for item in (known.version, self._watermark) if item is not None]
        return version is not None and bool(latest) and version <= max(latest)

    def written(self) -> dict[str, Change]:
        """Those that write a document: first those that encode it, then those that copy its tensors."""
        there = {key: change for key, change in self.of_keys.items() if change.known.exists}
        return dict(sorted(there.items(), key=lambda item: item[1].copy))  # stable: else in order

    def gone(self) -> NDArray[np.int64]:
        """Rows that go, ascending."""
        return np.array(sorted(item.row for item in self.of_keys.values() if item.row is not None), np.int64)

    def deleted_versions(self) -> dict[KeyHash, int]:
        """Versions of the deleted keys that have one, by the hash of the key."""
        return {
            key_hash(key): change.known.version
            for key, change in self.of_keys.items()
            if not change.known.exists and change.known.version is not None
        }


def committed(state: State, versions: Mapping[KeyHash, int], key: str) -> tuple[Known, int | None]:
    """Look up what a bank knows of a key, and its row; `versions` are those of deleted keys."""
    row = state.find(key)
    if row is None:
        return Known(versions.get(key_hash(key))), None
    segment, place = state.place(row)
    found = segment.fields(place, ["version", "id", "digest", "metadata"])
    return Known(found["version"], found["id"], found["digest"], found["metadata"], exists=True), row


def written_table(changes: Mapping[str, Change], tokens: Sequence[int], chunk_size: int) -> ArrowTable:
    """The table of written documents, which have so many tokens."""
    return table_of(
        {
            "key": list(changes),
            "text": [change.text for change in changes.values()],
            "metadata": [change.known.metadata for change in changes.values()],
            "tokens": list(tokens),
            "chunks": [-(-count // chunk_size) for count in tokens],
            "id": [change.known.id for change in changes.values()],
            "version": [change.known.version for change in changes.values()],
            "digest": [change.known.digest for change in changes.values()],
        }
    )


def text_digest(wrapping: str, text: str | None, tokens: object) -> bytes:
    """A digest of what is encoded: a text with what wraps it (`PromptProtocol.document`, or nothing), or token ids."""
    digest = hashlib.sha256(json.dumps([wrapping, text is None, tokens is None]).encode())
    digest.update((text or "").encode())
    if tokens is not None:
        digest.update(np.asarray(tokens, np.int64).tobytes())
    return digest.digest()


def checked_version(version: object) -> int:
    """A version that a user gave.

    Raises:
        ValueError: for what is no integer from 0 to 2^62.
    """
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise ValueError(f"`version` must be an integer from 0 to 2^62, got {version!r:.80}.")
    return version
