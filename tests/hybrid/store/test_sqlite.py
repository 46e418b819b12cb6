"""Files that are no store, locks, forks and threads of `SQLiteStore`."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from msa_hf.hybrid.store import Item, SQLiteStore, StoreError, StoreFormatError, StoreUnavailable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA user_version = 2", "has schema version 2, this release knows 1"),
        ("PRAGMA application_id = 7", "of another program"),
        ("ALTER TABLE items ADD COLUMN more TEXT", "its table `items` was changed"),
        ("ALTER TABLE items RENAME TO things", "its table `items` was changed"),
    ],
)
def test_a_store_of_another_schema_is_refused(path: Path, statement: str, message: str) -> None:
    SQLiteStore(path).close()
    change(path, statement)
    before = path.read_bytes()
    with pytest.raises(StoreFormatError, match=message):
        SQLiteStore(path)
    assert path.read_bytes() == before


def test_files_of_others_are_refused_and_left_alone(path: Path) -> None:
    change(path, "CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreFormatError, match="of another program"):
        SQLiteStore(path)
    assert path.read_bytes() == before
    path.write_text("These are notes, and no database. " * 40)
    with pytest.raises(StoreFormatError, match="is no SQLite file"):
        SQLiteStore(path)
    with pytest.raises(StoreError, match="unable to open"):
        SQLiteStore(path.parent)
    with pytest.raises(StoreError, match="unable to open"):
        SQLiteStore(path.parent / "missing" / "store.db")
    with pytest.raises(ValueError, match="lies in a file"):
        SQLiteStore(":memory:")


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    with SQLiteStore(path) as store:
        store.put(Item("p", "s", "t", {}))
    with SQLiteStore(path) as store:
        assert store.get("p", "s") is not None


def test_a_damaged_file_is_told_from_a_busy_one(path: Path) -> None:
    with SQLiteStore(path) as store:
        store.write(Item("p", str(number), "t", {"x": "y" * 2000}) for number in range(50))
    raw = bytearray(path.read_bytes())
    raw[8192:] = b"\x55" * (len(raw) - 8192)
    path.write_bytes(raw)
    with pytest.raises(StoreFormatError, match="damaged"), SQLiteStore(path) as store:
        list(store.query("p"))


def test_a_lock_of_another_writer_is_waited_for_but_not_for_ever(path: Path) -> None:
    store = SQLiteStore(path, timeout=0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"kept it locked for 0\.1 s"):
        store.put(Item("p", "s", "t", {}))
    assert time.monotonic() - start < 5
    assert store.get("p", "s") is None  # readers do not wait
    other.execute("ROLLBACK")
    store.put(Item("p", "s", "t", {}))
    other.close()


def test_a_batch_that_fails_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msa_hf.hybrid.store import sqlite

    store, write = SQLiteStore(path), sqlite._write

    def failing(connection: sqlite3.Connection, item: Item, data: str) -> None:
        write(connection, item, data)
        if item.sort == "2":
            raise KeyboardInterrupt

    monkeypatch.setattr(sqlite, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        store.write(Item("p", str(number), "t", {}) for number in range(4))
    assert list(store.query("p")) == []
    monkeypatch.undo()
    store.put(Item("p", "s", "t", {}))


def opened(path: Path) -> int:
    with SQLiteStore(path) as store:
        return store.put(Item("p", str(os.getpid()), "t", {})).version


def test_many_open_a_new_file_at_once(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(opened, [path] * 16))) >= 1
    other = path.with_name("other.db")
    with ProcessPoolExecutor(4, get_context("fork")) as processes:
        assert all(processes.map(opened, [other] * 8))


def test_a_fork_neither_uses_nor_frees_its_parents_connections(path: Path) -> None:
    store = SQLiteStore(path)
    store.put(Item("p", "s", "t", {}))
    with store._writing() as connection:  # the parent writes while the child lives
        connection.execute("DELETE FROM items")
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = 0 if store.get("p", "s") is not None else 2  # as committed
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        other = SQLiteStore(path, timeout=0.05)
        with pytest.raises(StoreUnavailable):
            other.put(Item("p", "t", "t", {}))
    assert store.get("p", "s") is None


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_taken_away_is_not_written_to(path: Path, replaced: bool) -> None:
    """Whoever looks for these writes would find another file, or the old log beside it."""
    with SQLiteStore(path.with_name("copy.db")) as copy:
        copy.put(Item("p", "old", "t", {}))
    store = SQLiteStore(path)
    store.put(Item("p", "s", "t", {}))
    if replaced:
        os.replace(copy.path, path)
    else:
        path.unlink()
    for call in (
        lambda: store.put(Item("p", "lost", "t", {})),
        lambda: store.write([Item("p", "lost", "t", {})]),
        lambda: store.delete("p", "s"),
        lambda: store.get("p", "s"),
        lambda: list(store.query("p")),
        store.purge,
    ):
        with pytest.raises(StoreError, match=r"was removed or replaced since it was opened.*open it again"):
            call()
    store.close()
    for name in ("-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    assert [item.sort for item in SQLiteStore(path).query("p")] == (["old"] if replaced else [])


def test_a_file_that_is_taken_away_during_a_write_is_noticed(path: Path) -> None:
    store = SQLiteStore(path)
    with pytest.raises(StoreError, match="was removed or replaced"), store._writing():
        path.unlink()


def test_a_relative_path_means_the_same_file_wherever_the_process_goes(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(path.parent)
    store = SQLiteStore(path.name)
    store.put(Item("p", "s", "t", {}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with store._connection(), store._connection() as second:  # the second one is new
        assert second.execute("SELECT count(*) FROM items").fetchone() == (1,)
    assert list(Path.cwd().iterdir()) == []


def test_a_full_disk_is_named_and_leaves_what_was_there(path: Path) -> None:
    """In a child whose files cannot grow: SQLite undoes the transaction by itself, which is not the error."""
    code = """
import resource, signal, sys
from msa_hf.hybrid.store import Item, SQLiteStore, StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = SQLiteStore(sys.argv[1])
store.put(Item("p", "s", "t", {}))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for write in (
    lambda: store.write([Item("p", f"{n}", "t", {"x": "y" * 300_000}) for n in range(30)]),
    lambda: store.put(Item("p", "large", "t", {"x": "y" * 300_000})),
):
    try:
        write()
        print("no error")
    except StoreError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.put(Item("p", "t", "t", {}))
print([item.sort for item in store.query("p") if item.sort in "st"])
"""
    lines = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    assert "disk" in lines[0] and "Nothing of this call was written; make room" in lines[0]
    assert "disk" in lines[1] and "read before repeating it" in lines[1]
    assert lines[2] == "['s', 't']"
    assert [item.sort for item in SQLiteStore(path).query("p") if item.sort in "st"] == ["s", "t"]


def test_threads_share_a_store_and_leave_few_connections(path: Path) -> None:
    store = SQLiteStore(path)

    def work(number: int) -> None:
        for step in range(10):
            store.put(Item("p", f"{number}/{step}", "t", {"n": step}))
            assert len(list(store.query("p", f"{number}/"))) == step + 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert len(list(store.query("p"))) == 120 and len(store._free) <= 4
