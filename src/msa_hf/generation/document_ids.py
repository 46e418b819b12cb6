"""Ids of documents: how a model names them, and where they stand in a bank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..model.memory_msa import Document, Memory

ID_FIELD = "id"  # of a document's metadata


class DocumentIds:
    """Ids of a bank's documents: stable numbers that adding or deleting documents does not change.

    In a bank that can be changed every document has its `id`. In others a document's id is the one among its metadata,
    else its position. Where a stored id equals the position of a document without one, the stored one has it.

    Args:
        bank: `MemoryBank`; only its `documents` are read.
    """

    def __init__(self, bank: Memory) -> None:
        self._documents = bank.documents
        self._next_id = getattr(bank, "next_id", None)
        self._index: Mapping[int, int] | None = None

    @staticmethod
    def of(position: int, document: Document) -> int:
        """Id of a document that stands at `position`."""
        stored = _stored_id(document)
        return position if stored is None else stored

    def id_of(self, position: int) -> int:
        """Id of the document at a position."""
        return self.of(position, self._documents[position])

    def position_of(self, id: int) -> int | None:
        """Position of the document with an id; None where there is none."""
        in_range = 0 <= id < len(self._documents)
        if in_range and _stored_id(self._documents[id]) == id:
            return id  # nothing was ever moved: no need to look at the others
        if self._index is None and (ids := getattr(self._documents, "ids", lambda: None)()) is not None:
            self._index = _SortedIds(ids)
        if self._index is None:
            index: dict[int, int] = {}
            self._index = index
            for position, document in enumerate(self._documents):
                if (stored := _stored_id(document)) is not None and index.setdefault(stored, position) != position:
                    raise ValueError(
                        f"Documents {self._documents[index[stored]].key!r} and {document.key!r} have the same "
                        f"id {stored}, so the model cannot name them."
                    )
        if id in self._index:
            return self._index[id]
        return id if in_range and _stored_id(self._documents[id]) is None else None

    def next_id(self) -> int:
        """The first id above all that are taken or, in a bank that can be changed, were ever given."""
        if self._next_id is not None:
            return self._next_id
        return max((self.of(position, document) for position, document in enumerate(self._documents)), default=-1) + 1


class _SortedIds(Mapping[int, int]):
    """Position of each id, from the ids [N] of all positions: two arrays where a dictionary would hold objects."""

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self._order = ids.argsort()
        self._ids = ids[self._order]

    def __getitem__(self, id: int) -> int:
        place = int(self._ids.searchsorted(id))
        if place == len(self._ids) or self._ids[place] != id:
            raise KeyError(id)
        return int(self._order[place])

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    def __len__(self) -> int:
        return len(self._ids)


def _stored_id(document: Document) -> int | None:
    if (number := getattr(document, "id", None)) is not None:
        return number
    stored = (document.metadata or {}).get(ID_FIELD)
    return stored if type(stored) is int and stored >= 0 else None
