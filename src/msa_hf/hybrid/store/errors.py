"""The errors of stores; all of them are `StoreError`s."""

from __future__ import annotations


class StoreError(Exception):
    """A store could not do what it was asked for. The message names cause and remedy."""


class StoreFormatError(StoreError, ValueError):
    """A file or table that is no store, or one of another schema."""


class StoreUnavailable(StoreError, ConnectionError):
    """A store that did not answer in time. A write may have been done all the same: read before repeating it."""


class ItemTooLarge(StoreError, ValueError):
    """An item, or a key, of more bytes than the store takes."""


class VersionConflict(StoreError):
    """A conditional write found another version than the expected one; nothing was written.

    Attributes:
        partition, sort: the key.
        expected: the version that was asked for, 0 for none.
        found: the version that lies there, None if nothing does.
    """

    def __init__(self, partition: str, sort: str, expected: int, found: int | None) -> None:
        self.partition, self.sort, self.expected, self.found = partition, sort, expected, found
        wanted = f"version {expected}" if expected else "no item"
        there = "no item" if found is None else f"version {found}"
        super().__init__(
            f"{partition!r}/{sort!r}: expected {wanted}, found {there}. Read it again and repeat the change, "
            "as `update` does."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return VersionConflict, (self.partition, self.sort, self.expected, self.found)
