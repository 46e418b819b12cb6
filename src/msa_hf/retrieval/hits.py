"""The results of a search: documents, and why each was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..json_object import JsonObject


@dataclass(frozen=True, slots=True)
class Found:
    """The place of a document in what one way of searching found.

    Attributes:
        rank: from 1, in this way's own list.
        score: its own: BM25, a cosine, or the mean of the layers' router scores. Not to be compared between ways.
    """

    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class FoundByLayer:
    """The place that the router of a memory layer gives a document among all of them.

    Attributes:
        layer: its index in the model.
        rank: from 1.
        score: as the router gave it.
    """

    layer: int
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Why:
    """Why a document was found; None and empty where a way was not asked, or did not have it among its best.

    Attributes:
        router: all layers together.
        layers: each of them.
        lexical: the lexical index.
        terms: words of the query that the text has, as the query spells them.
        dense: the embedding model.
        reader: reading the text again (`reread`), whose score is a log-likelihood.
        fused_by: how the ways were put together: "reciprocal ranks", "learned weights", or the one way that is as good,
            with ", then wording" where the best were read for theirs; None where one was asked.
    """

    router: Found | None = None
    layers: tuple[FoundByLayer, ...] = ()
    lexical: Found | None = None
    terms: tuple[str, ...] = ()
    dense: Found | None = None
    reader: Found | None = None
    fused_by: str | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that was found.

    Attributes:
        rank: from 1, best first.
        key: its name in the bank.
        position: in `bank.documents`.
        id: the number that models name it by (`DocumentIds`).
        score: by which hits are ordered, descending; of this query and mode alone.
        text: None where the bank does not keep it.
        metadata: as it was given, or None.
        why: which ways found it.
    """

    rank: int
    key: str
    position: int
    id: int
    score: float
    text: str | None
    metadata: JsonObject | None
    why: Why

    def to_dict(self) -> JsonObject:
        """JSON values, all of the above."""
        return asdict(self)
