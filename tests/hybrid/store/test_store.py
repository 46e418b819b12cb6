"""Every store does what a dictionary does, also when several write at once or a writer is killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from forking import ended, forked
from manual_clock import Clock

from msa_hf.hybrid.store import (
    Item,
    ItemTooLarge,
    MemoryStore,
    SQLiteStore,
    StoreError,
    VersionConflict,
    expiry,
    update,
)
from msa_hf.hybrid.store.item import MAX_ITEM, MAX_PARTITION, MAX_SORT, OVERHEAD

Opener = Callable[..., MemoryStore]
SORTS = ["a", "a#", "a#1", "a#10", "a#2", "b", "é", "éa", "\uffff", "\uffffa", "\U0001f600", "\U0001f600b", "a\x01"]
PREFIXES = ["", "a", "a#", "a#1", "é", "\uffff", "\U0001f600", "nothing"]


def living(state: dict[tuple[str, str], Item], now: float) -> list[Item]:
    return sorted((item for item in state.values() if item.lives(now)), key=lambda item: item.sort.encode())


@pytest.mark.parametrize("seed", range(3))
def test_a_store_agrees_with_a_dictionary(open_store: Opener, clock: Clock, seed: int) -> None:
    pick = random.Random(seed)
    store = open_store(clock=clock)
    state: dict[tuple[str, str], Item] = {}
    highest: dict[tuple[str, str], int] = {}
    for step in range(150):
        partition, sort = pick.choice("pq"), pick.choice(SORTS)
        key = (partition, sort)
        there = state.get(key)
        there = there if there is not None and there.lives(clock.time + 0.5) else None
        expected = pick.choice([None, None, 0, 7, there.version if there else 0])
        fits = expected is None or expected == (there.version if there else 0)
        action = pick.choice(["put", "put", "put", "delete", "batch", "pass", "query", "query"])
        if action == "put":
            life = pick.choice([None, None, 3, 30])
            item = Item(partition, sort, pick.choice("tu"), {"step": step, "é": [1.5, None, {"x": "\U0001f600"}]})
            item = replace(item, expires_at=None if life is None else expiry(clock(), life))
            if fits:
                written = store.put(item, expected=expected)
                assert written == replace(item, version=written.version)
                assert written.version > highest.get(key, 0)
                state[key], highest[key] = written, written.version
            else:
                with pytest.raises(VersionConflict) as caught:
                    store.put(item, expected=expected)
                assert caught.value.found == (there.version if there else None)
        elif action == "delete":
            if expected == 0:
                continue
            if fits:
                assert store.delete(partition, sort, expected=expected) == (there is not None)
                state.pop(key, None)
            else:
                with pytest.raises(VersionConflict):
                    store.delete(partition, sort, expected=expected)
        elif action == "batch":
            keys = [(partition, name) for name in pick.choices(SORTS, k=pick.randint(0, 5))]
            items = [state.get(key, Item(*key, "t", {"batch": step})) for key in keys]
            items = [replace(item, type="b") for item in items]
            gone = [(partition, pick.choice(SORTS))] if pick.random() < 0.3 else []
            store.write(items, gone)
            for item in items:
                state[item.partition, item.sort] = item
            for name in gone:
                state.pop(name, None)
            for name in {*keys, *gone}:
                read = store.get(*name)
                if name in state and state[name].lives(clock.time + 0.5):
                    assert read is not None
                    assert read.version > max(state[name].version, highest.get(name, 0))
                    state[name] = replace(state[name], version=read.version)
                    highest[name] = read.version
                    assert read == state[name]
                else:
                    assert read is None
                    state.pop(name, None)
        elif action == "pass":
            clock.time = float(int(clock.time)) + pick.choice([1.0, 2.0, 10.0])
        else:
            items = [item for item in living(state, clock.time + 0.5) if item.partition == partition]
            prefix = pick.choice(PREFIXES)
            items = [item for item in items if item.sort.startswith(prefix)]
            options: dict[str, object] = {}
            if pick.random() < 0.5:
                options["reverse"] = True
                items.reverse()
            if pick.random() < 0.3 and prefix:
                options["after"] = after = prefix + pick.choice(["", "1", "a"])
                items = [
                    item
                    for item in items
                    if (
                        item.sort.encode() < after.encode()
                        if "reverse" in options
                        else item.sort.encode() > after.encode()
                    )
                ]
            if pick.random() < 0.3:
                options["type"] = "t"
                items = [item for item in items if item.type == "t"]
            if pick.random() < 0.3:
                options["limit"] = limit = pick.randint(1, 4)
                items = items[:limit]
            assert list(store.query(partition, prefix, **options)) == items  # type: ignore[arg-type]
        there = state.get(key)
        expected_item = there if there is not None and there.lives(clock.time) else None
        assert store.get(partition, sort) == expected_item
    store.close()


def test_long_partitions_are_read_in_pages_also_with_a_type_that_is_rare(open_store: Opener) -> None:
    store = open_store()
    names = [f"{number:04}" for number in range(600)]
    store.write(Item("p", name, "rare" if name.endswith("77") else "t", {"filler": "x" * 3000}) for name in names)
    assert [item.sort for item in store.query("p")] == names
    assert [item.sort for item in store.query("p", "01", reverse=True)] == names[199:99:-1]
    assert [item.sort for item in store.query("p", type="rare", limit=4)] == ["0077", "0177", "0277", "0377"]
    assert [item.sort for item in store.query("p", limit=300)] == names[:300]


def test_what_others_write_while_a_query_is_read_breaks_nothing(open_store: Opener) -> None:
    store = open_store()
    names = [f"{number:04}" for number in range(300)]
    store.write(Item("p", name, "t", {}) for name in names)
    seen = []
    for item in store.query("p"):
        seen.append(item.sort)
        if len(seen) == 10:
            store.put(Item("p", "9999", "t", {}))
            store.delete("p", "0299")
    assert seen[:299] == names[:299] and set(seen) <= {*names, "9999"}


# --- several writers --------------------------------------------------------------------------------------------------


def increment(store: MemoryStore, times: int) -> None:
    for _ in range(times):
        update(store, "p", "counter", "count", lambda data: {"n": (data or {"n": 0})["n"] + 1})


def test_no_update_of_a_thread_is_lost(open_store: Opener) -> None:
    store = open_store()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: increment(store, 12), range(4)))
    found = store.get("p", "counter")
    assert found is not None and found.data == {"n": 48}


def test_no_update_of_a_process_is_lost(open_store: Opener) -> None:
    store = open_store()
    increment(store, 1)
    children = [forked(lambda: increment(store, 12)) for _ in range(3)]  # the parent's store, and one of its own
    children.append(forked(lambda: increment(open_store(), 12)))
    assert ended(*children) == [0] * 4
    found = store.get("p", "counter")
    assert found is not None and found.data == {"n": 49}


def test_without_a_condition_updates_are_lost_and_with_one_the_second_hears_of_it(open_store: Opener) -> None:
    store = open_store()
    first = store.put(Item("p", "k", "t", {"n": 1}))
    mine = yours = store.get("p", "k")
    assert mine == yours == first
    second = store.put(replace(first, data={"n": 2}), expected=first.version)
    with pytest.raises(VersionConflict, match="Read it again"):
        store.put(replace(first, data={"n": 3}), expected=first.version)
    assert store.get("p", "k") == second
    assert store.put(replace(first, data={"n": 3})).version > second.version


def test_one_of_many_creates_an_item(open_store: Opener) -> None:
    store = open_store()
    start = threading.Barrier(6)

    def create(number: int) -> int:
        start.wait()
        try:
            store.put(Item("p", "k", "t", {"by": number}), expected=0)
        except VersionConflict:
            return -1
        return number

    with ThreadPoolExecutor(6) as pool:
        (winner,) = {*pool.map(create, range(6))} - {-1}
    found = store.get("p", "k")
    assert found is not None and found.data == {"by": winner}


def test_a_key_that_was_deleted_and_written_again_is_not_taken_for_the_old_one(open_store: Opener) -> None:
    store = open_store()
    old = store.put(Item("p", "k", "t", {"n": 1}))
    store.delete("p", "k")
    store.put(Item("p", "k", "t", {"n": 1}), expected=0)
    with pytest.raises(VersionConflict):
        store.put(old, expected=old.version)


def test_versions_grow_where_clocks_do_not(open_store: Opener) -> None:
    ahead, behind = open_store(clock=lambda: 2e9), open_store(clock=lambda: 1e9)
    versions = [store.put(Item("p", "k", "t", {})).version for store in (ahead, behind, behind, ahead)]
    assert versions == sorted(set(versions))
    assert behind.put(Item("p", "k", "t", {}), expected=versions[-1]).version == versions[-1] + 1


# --- time -------------------------------------------------------------------------------------------------------------


def test_items_are_gone_when_their_time_has_come(open_store: Opener) -> None:
    now = 1000.0
    store = open_store(clock=lambda: now)
    store.put(Item("p", "short", "t", {}, expires_at=expiry(now, 0.5)))
    old = store.put(Item("p", "long", "t", {}, expires_at=expiry(now, 10)))
    assert old.expires_at == 1010 and [item.sort for item in store.query("p")] == ["long", "short"]
    now = 1001.0
    assert store.get("p", "short") is None and [item.sort for item in store.query("p")] == ["long"]
    assert not store.delete("p", "short")
    now = 1010.0
    with pytest.raises(VersionConflict) as caught:
        store.put(old, expected=old.version)
    assert caught.value.found is None
    with pytest.raises(VersionConflict):
        store.delete("p", "long", expected=old.version)
    new = store.put(Item("p", "long", "t", {"new": True}), expected=0)
    assert new.version > old.version and store.get("p", "long") == new


def test_purging_takes_the_expired_alone(open_store: Opener) -> None:
    now = 1000.0
    store = open_store(clock=lambda: now)
    for number in range(7):
        store.put(Item("p", str(number), "t", {}, expires_at=1000 + number if number else None))
    now = 1004.0
    assert (store.purge(), store.purge()) == (4, 0)
    now = 0.0  # none has come back
    assert [item.sort for item in store.query("p")] == ["0", "5", "6"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    """Dicts and lists in turns."""
    data: Any = []
    for number in range(1, depth):
        data = {"x": data} if number % 2 else [data]
    return {"x": data} if isinstance(data, list) else data


endless: list[Any] = []
endless.append(endless)
MISTAKES: list[tuple[Item, str]] = [
    (Item("", "s", "t", {}), "`partition` is empty"),
    (Item("p", "", "t", {}), "`sort` is empty"),
    (Item("p", "s", "", {}), "`type` is empty"),
    (Item("p", "\ud800", "t", {}), "must be a text of Unicode"),
    (Item("p" * (MAX_PARTITION + 1), "s", "t", {}), f"at most {MAX_PARTITION}"),
    (Item("p", "é" * (MAX_SORT // 2 + 1), "t", {}), f"at most {MAX_SORT}"),
    (Item("p", "s", "t", {"x": float("nan")}), "cannot be written as JSON"),
    (Item("p", "s", "t", {"x": "\ud800"}), "cannot be written as JSON"),
    (Item("p", "s", "t", {"x": {1, 2}}), "cannot be written as JSON"),
    (Item("p", "s", "t", {"x": (1, 2)}), "come back changed"),
    (Item("p", "s", "t", {1: 2}), "come back changed"),  # type: ignore[dict-item]
    (Item("p", "s", "t", [1]), "come back changed"),  # type: ignore[arg-type]
    (Item("p", "s", "t", {}, expires_at=1.5), "whole seconds"),  # type: ignore[arg-type]
    (Item("p", "s", "t", nested(101)), "more than 100 dicts and lists in each other"),
    (Item("p", "s", "t", {"x": endless}), "more than 100 dicts and lists in each other"),
]


def test_what_cannot_be_stored_is_refused_with_its_name(open_store: Opener) -> None:
    store = open_store()
    for item, message in MISTAKES:
        for write in (
            lambda item=item: store.put(item),
            lambda item=item: store.write([Item("p", "ok", "t", {}), item]),
        ):
            with pytest.raises(ValueError, match=message):
                write()
    assert list(store.query("p")) == []
    for call in (
        lambda: store.query("p", "a", after="b"),
        lambda: store.query("p", limit=0),
        lambda: store.query("p", limit=2.5),  # type: ignore[arg-type]
        lambda: store.query("p", type=3),  # type: ignore[arg-type]
        lambda: store.query("p", type="\ud800"),
        lambda: store.write([Item("p", "s", "t", {}, version=2**63)]),
        lambda: store.write([Item("p", "s", "t", {}, version=-1)]),
        lambda: store.get("p", ""),
        lambda: store.put(Item("p", "s", "t", {}), expected=-1),
        lambda: store.delete("p", "s", expected=0),
    ):
        with pytest.raises(ValueError):
            call()


def test_what_can_be_written_can_be_read_wherever_it_is_asked_for(open_store: Opener) -> None:
    """Deep data would end a query for its neighbors too, once the stack is deeper than that of the writer."""
    store = open_store()
    store.put(Item("p", "deep", "t", nested(60)))
    store.put(Item("p", "flat", "t", {}))

    def at_depth(depth: int) -> list[str]:
        return at_depth(depth - 1) if depth else [item.sort for item in store.query("p")]

    assert at_depth(500) == ["deep", "flat"]


def test_sizes_up_to_the_limit_are_taken_and_above_are_refused(open_store: Opener) -> None:
    store = open_store()
    room = MAX_ITEM - OVERHEAD - len("p" + "s" + "t" + '{"x":""}')
    for text in ("x" * room, "é" * (room // 2)):
        store.put(Item("p", "s", "t", {"x": text}))
        found = store.get("p", "s")
        assert found is not None and found.data == {"x": text}
        with pytest.raises(ItemTooLarge, match=f"a store takes {MAX_ITEM}"):
            store.put(Item("p", "s", "t", {"x": text + "é"}))
    store.put(Item("p" * MAX_PARTITION, "s" * MAX_SORT, "t", {}))
    many = [Item("large", str(number), "t", {"x": "y" * 390_000}) for number in range(30)]
    store.write(many)
    assert sum(len(item.data["x"]) for item in store.query("large")) == 30 * 390_000


# --- killed -----------------------------------------------------------------------------------------------------------


def test_a_killed_writer_loses_nothing_it_acknowledged(open_store: Opener) -> None:
    """Kills at random moments: the counter is what was acknowledged, or one more."""
    pick = random.Random(0)
    store = open_store()
    kills = 8 if isinstance(store, SQLiteStore) else 3  # a client of DynamoDB takes a second to make
    acknowledged = 0

    def write(pipe: int) -> None:
        mine = open_store()
        while True:
            increment(mine, 1)
            os.write(pipe, b"x")

    for _ in range(kills):
        reader, writer = os.pipe()
        child = forked(lambda writer=writer: write(writer))
        os.close(writer)
        os.read(reader, 1)  # it has begun
        acknowledged += 1
        time.sleep(pick.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        ended(child)
        while more := os.read(reader, 4096):
            acknowledged += len(more)
        os.close(reader)
        increment(store, 1)  # a request of the dead that a server has not come to yet finds another version now
        acknowledged += 1
        found = store.get("p", "counter")
        assert found is not None and found.data["n"] - acknowledged in (0, 1)
        acknowledged = found.data["n"]
    assert acknowledged >= 2 * kills
    increment(store, 1)


def test_a_closed_store_says_so_or_opens_again(open_store: Opener) -> None:
    store = open_store()
    store.put(Item("p", "s", "t", {}))
    store.close()
    try:
        assert store.get("p", "s") is not None
    except StoreError as error:
        assert "closed" in str(error)
