"""Vectors of documents as one more layer of routing keys: the operations of routers score them, in the same tiers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..model.dense_layer_msa import own_tensor
from ..model.document_rows_msa import ChunkLayout
from ..ops import route_documents
from .embedders import Embedder

PASSAGE_CHARACTERS = 1000  # of a passage; all-MiniLM-L6-v2 looks at about as many
DIGEST_BYTES = 16
TEXTS_AT_ONCE = 4096  # passages that are embedded before the next texts are read
DTYPE = torch.float16  # of vectors of length 1: eleven bits behind the point
# What tells one model from another, whatever it is called.
PROBES = ("Where was the treaty signed?", "The office moved to the third floor in May.")
SAME_MODEL = 0.99  # least cosine between two vectors of a probe


def passages_of(text: str, characters: int | None = PASSAGE_CHARACTERS) -> list[str]:
    """A text in pieces of at most so many characters, cut between words where there are any; None: in one piece."""
    if characters is None or len(text) <= characters:
        return [text]
    pieces, start = [], 0
    while start < len(text):
        end = start + characters
        if end < len(text) and (space := max(text.rfind(mark, start + characters // 2, end) for mark in " \n")) > 0:
            end = space
        pieces.append(text[start:end].strip() or text[start:end])
        start = end
    return pieces


def text_digest(text: str) -> bytes:
    """The digest that a vector is known by: that of an equal text is taken over."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]


@dataclass(frozen=True)
class Vectors:
    """Vectors of a run of rows.

    Attributes:
        keys: [C, D] `DTYPE`, L2-normalized, those of a row follow each other. A row without a text has one of zeros.
        counts: [R] int64, vectors of each row, at least 1.
        digests: [R, 16] uint8 of the texts, zeros for a row without a text.
    """

    keys: Tensor
    counts: np.ndarray
    digests: np.ndarray

    def __getstate__(self) -> dict[str, object]:
        """The vectors without the rest of the file that they lie in."""
        object.__setattr__(self, "keys", own_tensor(self.keys))
        return dict(vars(self))

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def known(self) -> np.ndarray:
        """[R] bool, the rows that have a text."""
        return np.asarray(self.digests.any(1))


class VectorMaker:
    """Makes vectors of texts, and takes over those of texts that have some.

    Args:
        embedder: None: nothing can be made, only taken over.
        characters: of a passage.
        dimension: of vectors; None: as the embedder makes them.
    """

    def __init__(self, embedder: Embedder | None, characters: int | None, dimension: int | None = None) -> None:
        self.embedder, self.characters, self.dimension = embedder, characters, dimension

    def make(self, count: int, texts: Iterable[tuple[int, str | None]], old: Sequence[Vectors] = ()) -> Vectors:
        """Vectors of `count` rows.

        Args:
            texts: number of a row, below `count` and ascending, and its text, of rows that have a document.
            old: whose vectors are taken over where a text is equal.

        Raises:
            ValueError: where a text has no vectors yet and there is no embedding model to make them.
        """
        places = _places(old)  # looks at every row of these
        digests = np.zeros((count, DIGEST_BYTES), np.uint8)
        counts = np.ones(count, np.int64)
        parts: dict[int, Tensor] = {}
        waiting: list[tuple[int, list[str]]] = []
        held = 0
        for row, text in texts:
            if text is None:
                continue
            digest = text_digest(text)
            digests[row] = np.frombuffer(digest, np.uint8)
            if digest in places:
                vectors, first, end = places[digest]
                parts[row], counts[row] = vectors.keys[first:end], end - first
                continue
            if self.embedder is None:
                raise ValueError(
                    "The bank has vectors, and documents came that have none: open it with the `embedder` that made "
                    "them."
                )
            waiting.append((row, passages_of(text, self.characters)))
            counts[row] = len(waiting[-1][1])
            held += int(counts[row])
            if held >= TEXTS_AT_ONCE:
                parts.update(self._embedded(waiting))
                waiting, held = [], 0
        parts.update(self._embedded(waiting))
        width = self.dimension or 0
        keys = torch.zeros(int(counts.sum()), width, dtype=DTYPE)
        offsets = np.concatenate([[0], counts.cumsum()])
        for row, part in parts.items():
            keys[offsets[row] : offsets[row + 1]] = part
        return Vectors(keys, counts, digests)

    def _embedded(self, waiting: Sequence[tuple[int, list[str]]]) -> Iterator[tuple[int, Tensor]]:
        if not waiting or self.embedder is None:
            return
        texts = [piece for _, pieces in waiting for piece in pieces]
        found = checked(self.embedder.embed_documents(texts), len(texts), self.dimension)
        self.dimension = found.shape[1]
        start = 0
        for row, pieces in waiting:
            yield row, found[start : start + len(pieces)].to(DTYPE)
            start += len(pieces)


def normalized(vectors: Tensor) -> Tensor:
    """[N, D] of length 1, float32, on the CPU."""
    return torch.nn.functional.normalize(vectors.detach().float().cpu(), dim=1)


def checked(vectors: Tensor, count: int, dimension: int | None = None) -> Tensor:
    """`normalized` of what an embedding model returned for `count` texts.

    Args:
        dimension: of vectors; None: any.

    Raises:
        ValueError: for what is no tensor of that shape, or has numbers that are not finite.
    """
    shape = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
    wanted = [count, shape[-1] if dimension is None and isinstance(shape, list) and shape else dimension]
    if shape != wanted:
        raise ValueError(
            f"The embedding model returned {shape} for {count} texts; a tensor [{count}, {dimension or 'D'}] is wanted."
        )
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"The embedding model returned numbers that are not finite for {count} texts.")
    return normalized(vectors)


def _places(old: Sequence[Vectors]) -> dict[bytes, tuple[Vectors, int, int]]:
    places = {}
    for vectors in old:
        ends = vectors.counts.cumsum()
        for row in np.flatnonzero(vectors.known).tolist():
            end = int(ends[row])
            places[vectors.digests[row].tobytes()] = (vectors, end - int(vectors.counts[row]), end)
    return places


def joined(parts: Sequence[Vectors], dimension: int) -> Vectors:
    """Vectors of runs that follow each other, as one."""
    if len(parts) == 1:
        return parts[0]
    return Vectors(
        torch.cat([torch.empty(0, dimension, dtype=DTYPE), *(part.keys for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(part.counts for part in parts)]),
        np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *(part.digests for part in parts)]),
    )


def probe(embedder: Embedder) -> list[list[float]]:
    """The vectors of `PROBES`, to know a model by.

    Raises:
        ValueError: where these are no vectors.
    """
    query = checked(embedder.embed_queries(PROBES[:1]), 1)
    document = checked(embedder.embed_documents(PROBES[1:]), 1, query.shape[1])
    return [[round(number, 4) for number in row] for row in (query[0].tolist(), document[0].tolist())]


def check_probe(embedder: Embedder, expected: Sequence[Sequence[float]], name: str) -> None:
    """Make sure that a model is the one that made a bank's vectors.

    Raises:
        ValueError: naming both.
    """
    found, known = torch.tensor(probe(embedder)), torch.tensor(expected)
    if found.shape != known.shape or bool((torch.nn.functional.cosine_similarity(found, known) < SAME_MODEL).any()):
        raise ValueError(f"The bank's vectors were made by {name!r}; {embedder.name!r} is another embedding model.")


class DenseSearcher:
    """Vectors of the rows of a bank as one commit left them.

    Args:
        parts: of runs of rows that follow each other.
        dimension: of the vectors.
        name: of the model that made them.
        embedder: of queries; None: has to be given to `best`.
        fingerprint: of `probe`, with which another embedder is compared.
    """

    def __init__(
        self,
        parts: Sequence[Vectors],
        dimension: int,
        name: str,
        embedder: Embedder | None = None,
        fingerprint: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.parts, self.dimension, self.name, self.embedder = tuple(parts), dimension, name, embedder
        self.fingerprint = fingerprint
        self._placed: PlacedKeys | None = None
        self._counts = np.concatenate([np.empty(0, np.int64), *(part.counts for part in parts)])
        self._known = np.concatenate([np.empty(0, bool), *(part.known for part in parts)])

    def __getstate__(self) -> dict[str, object]:
        """The vectors by value; the model is not pickled, whoever searches passes it as `embedder`."""
        return {**vars(self), "embedder": None, "_placed": None}

    def __copy__(self) -> DenseSearcher:
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __len__(self) -> int:
        return int(self._known.sum())

    @property
    def rows(self) -> int:
        """Rows of the bank."""
        return len(self._counts)

    @property
    def placed(self) -> PlacedKeys | None:
        """The vectors where they are scored; None before the first search."""
        return self._placed

    @property
    def offsets(self) -> Tensor:
        """[R + 1] int64 on the CPU, vectors of the rows."""
        return torch.from_numpy(np.concatenate([[0], self._counts.cumsum()]))

    def check_embedder(self, embedder: Embedder | None) -> Embedder:
        """The model for queries.

        Raises:
            ValueError: where none is there, or another one.
        """
        chosen = embedder or self.embedder
        if chosen is None:
            raise ValueError(
                f"Queries are embedded with the model that made the bank's vectors, {self.name!r}: pass it as "
                "`embedder`."
            )
        if chosen is not self.embedder:
            if self.fingerprint is not None:
                check_probe(chosen, self.fingerprint, self.name)
            self.embedder = chosen
        return chosen

    def best(
        self,
        queries: Sequence[str],
        k: int,
        rows: np.ndarray,
        embedder: Embedder | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """The k best documents by the cosine of their best passage; equal scores go to the lower row.

        Args:
            rows: [R] bool, those that may be found: the bank's documents, or some of them.
            embedder: of queries, where none was given before.
            device: where the vectors are scored; they stay where they were scored first.

        Returns:
            rows [B, k] int64, -1 where fewer have vectors; scores [B, k] float32, -inf beside -1. On the CPU.
        """
        asked = self.check_embedder(embedder).embed_queries(list(queries))
        vectors = checked(asked, len(queries), self.dimension)
        if not self.rows:
            empty = torch.full((len(queries), k), -1)
            return empty, torch.full(empty.shape, float("-inf"))
        place = torch.empty(0, device=device).device
        question = vectors.to(place)[:, None, None]  # [B, T = 1, H = 1, D]
        mask = torch.ones(len(queries), 1, dtype=torch.bool, device=place)
        alive = torch.from_numpy(rows & self._known)
        layout = ChunkLayout(self.offsets, alive[None])
        if self._placed is None:
            self._placed = KeysOnDevice(joined(self.parts, self.dimension).keys.to(place))
        with torch.no_grad():
            best, scores = self._placed.route(question, mask, layout, k, "cosine")
        return best.cpu(), scores.cpu()

    def place(self, keys: PlacedKeys) -> DenseSearcher:
        """The same with its vectors where a bank in tiers has routing keys."""
        placed = copy.copy(self)
        placed._placed = keys
        return placed


class PlacedKeys(Protocol):
    """Vectors where they are scored."""

    def route(
        self, queries: Tensor, routing_mask: Tensor, layout: ChunkLayout, k: int, similarity: str
    ) -> tuple[Tensor, Tensor]:
        """`ops.route_documents`."""
        ...


@dataclass(frozen=True)
class KeysOnDevice:
    """Vectors [C, D] in one tensor."""

    keys: Tensor

    def route(
        self, queries: Tensor, routing_mask: Tensor, layout: ChunkLayout, k: int, similarity: str
    ) -> tuple[Tensor, Tensor]:
        """`ops.route_documents`."""
        place = self.keys.device
        offsets, alive = layout.offsets_on(place), layout.alive_on(place)
        return route_documents(queries, routing_mask, self.keys, offsets, k, alive=alive, similarity=similarity)
