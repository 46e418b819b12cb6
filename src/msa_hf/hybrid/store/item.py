"""`Item`: what stores hold, and the checks that are the same for all of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from ...json_object import JsonObject
from .errors import ItemTooLarge, StoreFormatError

# DynamoDB's limits, in bytes of UTF-8. All stores have them, so that items can move between stores.
MAX_PARTITION, MAX_SORT, MAX_ITEM = 2048, 1024, 400 * 1024
OVERHEAD = 192  # bytes of an item besides keys, type and data, at most: names of attributes and numbers
DEPTH = 100  # of dicts and lists in each other: what is deeper may be written and never read again
MAX_VERSION = 2**62


@dataclass(frozen=True, slots=True)
class Item:
    """An item of a single-table store.

    Attributes:
        partition: items of one partition are read together, in the order of `sort`.
        sort: unique in the partition; ordered by the bytes of its UTF-8.
        type: what the item is, such as `"turn"`.
        data: a JSON object.
        version: given by the store, which makes it grow with every write of the key; 0: not written yet.
        expires_at: seconds since 1970 from which on the item is gone; None: never.
    """

    partition: str
    sort: str
    type: str
    data: JsonObject
    version: int = 0
    expires_at: int | None = None

    def lives(self, now: float) -> bool:
        """Tell whether the item is not expired at `now`."""
        return self.expires_at is None or self.expires_at > now


def check_partition(partition: str) -> None:
    """Raise ValueError for a partition that no store takes."""
    _check_name("partition", partition, MAX_PARTITION)
    if not partition:
        raise ValueError("`partition` is empty.")


def check_key(partition: str, sort: str) -> None:
    """Raise ValueError for a key that no store takes."""
    check_partition(partition)
    _check_name("sort", sort, MAX_SORT)
    if not sort:
        raise ValueError(f"`sort` is empty (partition {partition!r:.80}).")


def check_range(prefix: str, after: str | None, type_: str | None, limit: int | None) -> None:
    """Raise ValueError for what no query takes."""
    _check_name("prefix", prefix, MAX_SORT)
    if type_ is not None:
        _check_name("type", type_, MAX_SORT)
    if after is not None:
        _check_name("after", after, MAX_SORT)
        if not after or not after.startswith(prefix):
            raise ValueError(f"`after` must begin with the prefix {prefix!r:.80}, got {after!r:.80}.")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"`limit` must be an integer of at least 1, got {limit!r:.80}.")


def check_expected(expected: int | None, least: int = 0) -> None:
    """Raise ValueError for a number that is no version."""
    if expected is not None and (type(expected) is not int or expected < least):
        raise ValueError(f"`expected` must be None or an integer of at least {least}, got {expected!r:.80}.")


def check_version(item: Item) -> None:
    """Raise ValueError for an item with a version that no store gives."""
    if type(item.version) is not int or not 0 <= item.version < MAX_VERSION:
        raise ValueError(
            f"{item.partition!r:.80}/{item.sort!r:.80}: `version` must be the one that the item was read with, or 0, "
            f"got {item.version!r:.80}."
        )


def encode_item(item: Item, max_bytes: int) -> str:
    """The data of an item as JSON, after a check of all its fields.

    Raises:
        ValueError: for a key, type, time or data that cannot be written, or that JSON would change.
        ItemTooLarge: for an item of more than `max_bytes`.
    """
    check_key(item.partition, item.sort)
    name = f"{item.partition!r:.80}/{item.sort!r:.80}"
    _check_name("type", item.type, MAX_SORT)
    if not item.type:
        raise ValueError(f"{name}: `type` is empty.")
    if item.expires_at is not None and (type(item.expires_at) is not int or not 0 <= item.expires_at < 2**53):
        raise ValueError(f"{name}: `expires_at` must be whole seconds since 1970, got {item.expires_at!r:.80}.")
    if _deeper(item.data, DEPTH):
        raise ValueError(f"{name}: its data has more than {DEPTH} dicts and lists in each other; make it flatter.")
    try:
        text = json.dumps(item.data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: its data cannot be written as JSON: {error}.") from error
    if not isinstance(item.data, dict) or json.loads(text) != item.data:
        raise ValueError(
            f"{name}: its data would come back changed; take a dict of strings, numbers, lists and dicts with strings "
            "as keys."
        )
    size += len((item.partition + item.sort + item.type).encode()) + OVERHEAD
    if size > max_bytes:
        raise ItemTooLarge(
            f"{name}: {size} bytes, a store takes {max_bytes} per item. Split it, or keep the large part in a file or "
            "object store and its address here."
        )
    return text


def decode_data(partition: str, sort: str, text: str) -> JsonObject:
    """The data of an item as it was written.

    Raises:
        StoreFormatError: for what no store wrote.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreFormatError(f"{partition!r:.80}/{sort!r:.80}: its data is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise StoreFormatError(f"{partition!r:.80}/{sort!r:.80}: its data is no JSON object.")
    return data


def next_version(now: float, previous: int = 0) -> int:
    """The version of a write: microseconds since 1970, and more than the previous one.

    A key that was deleted and written again has a version that it never had, as far as clocks agree.
    """
    return max(previous + 1, int(now * 1e6))


def expiry(now: float, seconds: float) -> int:
    """`expires_at` of an item that lives for `seconds`, rounded up to whole ones."""
    return math.ceil(now + seconds)


def _deeper(value: object, depth: int) -> bool:
    """Tell whether dicts and lists in each other, or in themselves, are more than `depth`."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list | tuple) and (not depth or any(_deeper(item, depth - 1) for item in value))


def _check_name(what: str, text: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except (UnicodeEncodeError, AttributeError) as error:
        raise ValueError(f"`{what}` must be a text of Unicode, got {text!r:.80}.") from error
    if size > limit:
        raise ItemTooLarge(f"`{what}` has {size} bytes, at most {limit} are allowed: {text!r:.80}.")
