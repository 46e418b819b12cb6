"""Documents of a bank as the server lists, shows and changes them; a change says what it expects to find."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..bank import BankDamaged, BankError, BankStore, CommitOutcomeUnknown
from ..bank.store.changes import MAX_VERSION
from ..json_object import JsonObject
from ..model.memory_msa import Document
from .errors import ApiError

logger = logging.getLogger(__name__)
EXCERPT = 240  # characters of a text in a list
ANY = "*"


@dataclass(frozen=True)
class Expected:
    """The state of a document that a change was made for; what is None is not asked.

    Attributes:
        version: that the document has; 0: there is none with this key.
        matches: ETags, one of which it has; `*`: any.
        matches_none: ETags of which it has none; `*`: there is no document.
    """

    version: int | None = None
    matches: tuple[str, ...] | None = None
    matches_none: tuple[str, ...] | None = None

    def check(self, key: str, found: Document | None, within: str = "") -> None:
        """Make sure that a document is as it was expected.

        Args:
            within: the place of the document in the request, before the names of its fields.

        Raises:
            ApiError: 409 where it is not, with its version.
        """
        tag = None if found is None else etag(found)
        # A document may have version 0: who expects 0 expects none all the same.
        there = self.version == 0 if found is None else self.version != 0 and self.version == found.version
        if self.version is not None and not there:
            why = f"version {self.version} was expected" if self.version else "no document was expected"
            raise conflict(key, found, why, f"{within}expected_version")
        if self.matches is not None and (tag is None or (ANY not in self.matches and tag not in self.matches)):
            raise conflict(key, found, "If-Match names another state", "If-Match")
        refused = self.matches_none or ()
        if tag is not None and (ANY in refused or tag in refused):
            raise conflict(key, found, "If-None-Match names this state", "If-None-Match")


@dataclass(frozen=True)
class Given:
    """A document that is to be put in.

    Attributes:
        within: its place in the request, before the names of its fields: `documents[1].`, or nothing.
    """

    key: str
    text: str
    metadata: Mapping[str, object] | None
    version: int | None
    expected: Expected
    within: str = ""


def conflict(key: str, found: Document | None, why: str, param: str) -> ApiError:
    """A change that was made for another state, as `param` says."""
    if found is None:
        state = "there is no document with this key"
    else:
        state = "it has no version" if found.version is None else f"it has version {found.version}"
    message = f"Document {key[:100]!r}: {why}, but {state}. Get it, and decide anew."
    headers = {} if found is None else {"ETag": etag(found)}
    return ApiError(409, message, "version_conflict", param, headers)


def no_newer_version(given: Given) -> ApiError:
    """A change without a version, of a document whose next one would be none."""
    message = (
        f"Document {given.key[:100]!r}: version 2^62 is known of it, the highest there is, so that no change can "
        "be newer. Put it in under another key; nothing has changed."
    )
    return ApiError(400, message, "version_exhausted", f"{given.within}version")


def not_there(key: str) -> ApiError:
    """A key without a document."""
    return ApiError(404, f"There is no document with the key {key[:100]!r}.", "document_not_found", "key")


def etag(document: Document) -> str:
    """The ETag of a document: another one after every change of its text, metadata or version."""
    values = [document.id, document.version, document.text, document.metadata]
    return f'"{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]}"'


def described(document: Document, whole: bool = True) -> JsonObject:
    """A document as JSON values; without `whole` an excerpt of its text."""
    text = document.text
    record: JsonObject = {
        "object": "document",
        "key": document.key,
        "id": document.id,
        "version": document.version,
        "tokens": document.tokens,
        "chunks": document.chunks,
        "etag": etag(document),
    }
    if whole:
        return {**record, "text": text, "metadata": document.metadata}
    cut = text is not None and len(text) > EXCERPT
    return {**record, "excerpt": text[:EXCERPT] + "…" if cut and text else text}


class Documents:
    """The documents of a bank. Reading needs no turn of the model; `put` and `delete` must run on its thread alone.

    Attributes:
        broken: what happened to the bank that only opening it again can mend; empty while nothing has.
    """

    def __init__(self, store: BankStore) -> None:
        self.store = store
        self.broken = ""

    @contextlib.contextmanager
    def _changing(self, documents: Sequence[Given] = ()) -> Iterator[BankStore]:
        """The bank, in one commit of these documents; its errors as clients get them."""
        if self.store.read_only:
            raise ApiError(403, "This server reads its bank, and does not change it.", "read_only")
        try:
            with self.store.batch() as store:
                yield store
        except ApiError:
            raise
        except CommitOutcomeUnknown as error:
            self.broken = str(error)
            message = "The end of this commit is not known; the server must be started again. Get the document then."
            raise ApiError(500, message, "commit_outcome_unknown") from error
        except BankDamaged as error:
            raise ApiError(503, f"The bank is damaged and takes no changes: {error}", "bank_damaged") from error
        except BankError as error:
            logger.error("the bank takes no changes: %s", error)
            raise ApiError(
                503, "The bank takes no changes now; the log of the server says why.", "bank_error"
            ) from error
        except OSError as error:
            logger.error("a commit failed: %s", error)
            message = f"The change could not be written ({error.strerror}); nothing has changed."
            raise ApiError(507, message, "storage_error") from error
        except (ValueError, TypeError) as error:
            text, of_length, _ = str(error).partition(" Pass too_long=")
            if of_length:
                text += " Send it in parts, each with a key of its own."
            at = next((given.within for given in documents if f"(key {given.key!r})" in text), "")
            raise ApiError(400, text, "document_too_long" if of_length else "invalid_document", f"{at}text") from error

    def follow(self) -> None:
        """Move on to the last commit, where another process writes."""
        if self.store.read_only:
            self.store.refresh()

    def page(self, after: int, limit: int) -> JsonObject:
        """Documents by their ids, which never change: whoever turns all pages sees each that was there throughout once.

        Args:
            after: id of the last document of the page before; -1 for the first page.
            limit: documents of a page.
        """
        self.follow()
        documents = self.store.documents
        ids = documents.ids()
        if ids is None:
            ids = np.empty(0, np.int64)
        places = np.flatnonzero(ids > after)
        if len(places) > limit:
            places = places[np.argpartition(ids[places], limit - 1)[:limit]]
        places = places[np.argsort(ids[places])]
        rows = [described(documents[int(place)], whole=False) for place in places]
        last = rows[-1]["id"] if rows else None
        more = bool(rows) and bool((ids > last).any())
        return {
            "object": "list",
            "data": rows,
            "total": len(documents),
            "has_more": more,
            "next": last if more else None,
        }

    def get(self, key: str) -> Document:
        """A document.

        Raises:
            ApiError: 404 where there is none.
        """
        self.follow()
        found = self.store.get(key)
        if found is None:
            raise not_there(key)
        return found

    def put(self, documents: Sequence[Given]) -> list[tuple[Document, bool, bool]]:
        """Put documents in, in one commit; each as it is then, whether it is new, and whether anything changed.

        A document whose `version` is not given gets the next one. One that comes again with its version
        changes nothing.

        Raises:
            ApiError: 409 where one is not as expected or has a newer version; 400 where one cannot be encoded. Nothing
                has changed then.
        """
        new = []
        with self._changing(documents) as store:
            for place, given in enumerate(documents):
                if any(given.key == other.key for other in documents[:place]):
                    raise ApiError(
                        400, f"Two documents have the key {given.key[:100]!r}.", "duplicate_key", f"{given.within}key"
                    )
                found = store.get(given.key)
                given.expected.check(given.key, found, given.within)
                same = (
                    found is not None and found.text == given.text and (found.metadata or {}) == (given.metadata or {})
                )
                known = store.known_version(given.key)
                version = given.version
                if version is None:
                    version = known if same else (known or 0) + 1
                    if version is not None and version > MAX_VERSION:
                        raise no_newer_version(given)
                elif known is not None and version <= known and not (same and version == known):
                    why = f"version {version} is not newer"
                    raise conflict(given.key, found, why, f"{given.within}version")
                changed = False
                if not (same and found is not None and version == found.version):
                    changed = store.upsert(given.key, given.text, version=version, metadata=given.metadata)
                new.append((found is None, changed))
        return [(self.get(given.key), fresh, changed) for given, (fresh, changed) in zip(documents, new, strict=True)]

    def delete(self, key: str, expected: Expected) -> Document:
        """Delete a document; returns what it was.

        Raises:
            ApiError: 404 where there is none, 409 where it is not as expected.
        """
        with self._changing() as store:
            found = store.get(key)
            expected.check(key, found)
            if found is None:
                raise not_there(key)
            store.delete(key)
            return found
