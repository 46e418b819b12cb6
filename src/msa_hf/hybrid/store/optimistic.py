"""`update`: changing an item by what it is, with no change of another writer lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

from ...json_object import JsonObject
from .errors import StoreUnavailable, VersionConflict
from .item import Item
from .memory_store import MemoryStore


def update(
    store: MemoryStore,
    partition: str,
    sort: str,
    type: str,
    change: Callable[[JsonObject | None], JsonObject],
    *,
    timeout: float = 30.0,
) -> Item:
    """Read an item, change its data and write it if nobody has meanwhile; else begin again.

    Args:
        type: of the item if there is none yet; one that is there keeps its type and its time of expiry.
        change: from the data, None if there is no item, to the new data. May be called several times.
        timeout: seconds of trying.

    Raises:
        StoreUnavailable: if others were faster for that long.
    """
    deadline = time.monotonic() + timeout
    wait = 0.001
    while True:
        found = store.get(partition, sort)
        new = Item(partition, sort, type, {}) if found is None else found
        new = replace(new, data=change(None if found is None else found.data))
        try:
            return store.put(new, expected=0 if found is None else found.version)
        except VersionConflict as conflict:
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"{partition!r}/{sort!r}: other writers were faster for {timeout:g} s; spread the writes over more "
                    "items."
                ) from conflict
        time.sleep(random.uniform(0, wait))
        wait = min(2 * wait, 0.1)
