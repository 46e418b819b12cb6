"""`MemoryStore`: what every store of sessions, history and state can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from .item import Item


class MemoryStore(Protocol):
    """Items by partition and sort key, in one table.

    A write of one item is whole and on the disk when the call returns. Expired items are gone for every method, whether
    or not their room was reclaimed. Threads may share a store.
    """

    def now(self) -> float:
        """The time of the store's clock, in seconds since 1970."""

    def get(self, partition: str, sort: str) -> Item | None:
        """The item of a key as it was last written, None if there is none."""

    def query(
        self,
        partition: str,
        prefix: str = "",
        *,
        after: str | None = None,
        type: str | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[Item]:
        """The items of a partition whose sort keys begin with `prefix`, in their order.

        They are read in pages while they are asked for: a write meanwhile may or may not be seen.

        Args:
            after: only those that come after this sort key; it must begin with `prefix`.
            type: only those of this type.
            reverse: the last one first; `after` then means before.
            limit: at most so many.
        """

    def put(self, item: Item, *, expected: int | None = None) -> Item:
        """Write an item, or in the place of the one with its key; returns it with its new version.

        Args:
            item: its `version` does not matter.
            expected: only if the version is this one; 0: only if there is none. None: in any case.

        Raises:
            VersionConflict: if another version lies there.
            ItemTooLarge: for an item that the store does not take.
        """

    def delete(self, partition: str, sort: str, *, expected: int | None = None) -> bool:
        """Delete an item; returns whether there was one.

        Args:
            expected: only if the version is this one.

        Raises:
            VersionConflict: if another version lies there, or none.
        """

    def write(self, items: Iterable[Item], deletes: Iterable[tuple[str, str]] = ()) -> None:
        """Write and delete many items without conditions; of several about one key the last one counts.

        Each is whole; all are done when the call returns. If it fails, a store may have done some of them. Nobody else
        should write these keys meanwhile.

        Args:
            items: with the versions that they were read with, or 0.
            deletes: keys, which go after all items were written.
        """

    def purge(self) -> int:
        """Reclaim the room of expired items; returns how many there were."""

    def close(self) -> None:
        """Let go of files and connections."""
