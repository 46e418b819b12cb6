"""Versions of deleted keys: they say which late events about a key have no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ...model.bank_format_msa import KeyHash

MOST_RECENT = 4096  # then they join the others


class DeletedKeys(Mapping[KeyHash, int]):
    """Versions of deleted keys, by the hash of the key; looking one up costs the same however many there are.

    Args:
        keys: [m, 3] uint64, halves of a hash and a version; of a hash that occurs twice, the highest version counts.
    """

    def __init__(self, keys: NDArray[np.uint64] | None = None) -> None:
        self._sorted: NDArray[np.uint64] = newest(np.empty((0, 3), np.uint64) if keys is None else keys)
        self._recent: dict[KeyHash, int] = {}

    def __getitem__(self, key: KeyHash) -> int:
        recent = self._recent.get(key)
        if recent is not None:
            return recent
        first = self._sorted[:, 0]
        place = int(np.searchsorted(first, np.uint64(key[0])))
        while place < len(first) and int(first[place]) == key[0]:
            if int(self._sorted[place, 1]) == key[1]:
                return int(self._sorted[place, 2])
            place += 1
        raise KeyError(key)

    def __iter__(self) -> Iterator[KeyHash]:
        yield from (key for key in map(_pair, self._sorted.tolist()) if key not in self._recent)
        yield from list(self._recent)

    def __len__(self) -> int:
        if self._recent:
            self._settle()
        return len(self._sorted)

    def update(self, versions: Mapping[KeyHash, int]) -> None:
        """Add deletions; of a key that is known the higher version counts."""
        for key, version in versions.items():
            self._recent[key] = max(version, self.get(key, -1))
        if len(self._recent) > MOST_RECENT:
            self._settle()

    def array(self) -> NDArray[np.uint64]:
        """All of them, [m, 3] as they were given, ascending."""
        self._settle()
        return self._sorted

    def forget(self, until: int) -> None:
        """Drop versions up to `until`."""
        self._settle()
        self._sorted = self._sorted[self._sorted[:, 2] > np.uint64(until)]

    def _settle(self) -> None:
        if self._recent:
            fresh = np.array([(*key, version) for key, version in self._recent.items()], np.uint64)
            self._sorted, self._recent = newest(np.concatenate([self._sorted, fresh])), {}


def newest(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Rows [m, 3] by ascending hash, of each hash the one with the highest version."""
    order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    last = np.ones(len(ordered), bool)
    last[:-1] = (ordered[1:, :2] != ordered[:-1, :2]).any(1)
    return np.ascontiguousarray(ordered[last])


def _pair(row: list[int]) -> KeyHash:
    return row[0], row[1]
