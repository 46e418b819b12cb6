"""`SQLiteStore`: a store in one SQLite file, for several threads and processes of a machine."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .errors import StoreError, StoreFormatError, StoreUnavailable, VersionConflict
from .item import (
    MAX_ITEM,
    Item,
    check_expected,
    check_key,
    check_partition,
    check_range,
    check_version,
    decode_data,
    encode_item,
    next_version,
)

APPLICATION = 0x4D534148  # "MSAH": says whose file this is
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE items (
    partition TEXT NOT NULL,
    sort TEXT NOT NULL,
    type TEXT NOT NULL,
    version INTEGER NOT NULL,
    expires_at INTEGER,
    data TEXT NOT NULL,
    PRIMARY KEY (partition, sort)
) WITHOUT ROWID
"""
INDEX = "CREATE INDEX expiring ON items (expires_at) WHERE expires_at IS NOT NULL"
COLUMNS = "partition, sort, type, data, version, expires_at"
PAGE = 256  # items that a query reads at once


class SQLiteStore:
    """A `MemoryStore` in a file, in write-ahead mode: readers and a writer do not wait for each other.

    Several threads may share it, several processes may open the file. A write is on the disk when it returns; one that
    was interrupted has not happened. The file must lie on a local disk: SQLite's locks fail on many network drives.

    Args:
        path: the file, made if it is missing; `-wal` and `-shm` lie beside it.
        timeout: seconds to wait for another writer.
        clock: seconds since 1970; for expiry and versions.
        max_item_bytes: of an item. Default: what DynamoDB takes.

    Raises:
        StoreFormatError: for a file that is no SQLite file, another program's, or of another schema.
        StoreUnavailable: if another writer keeps the file locked.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        timeout: float = 30.0,
        clock: Callable[[], float] = time.time,
        max_item_bytes: int = MAX_ITEM,
    ) -> None:
        if str(path) == ":memory:":
            raise ValueError("A SQLiteStore lies in a file; take one in a temporary folder.")
        self.path = Path(path).absolute()  # connections are made later as well, wherever the process is then
        self._timeout, self._clock, self._max_bytes = timeout, clock, max_item_bytes
        self._free: list[sqlite3.Connection] = []
        self._inherited: list[sqlite3.Connection] = []
        self._process = os.getpid()
        self._closed = False
        self._file: tuple[int, int] | None = None  # what the connections have open
        with self._connection() as connection:
            self._prepare(connection)
            self._file = self._file_there()

    def now(self) -> float:
        """See `MemoryStore`."""
        return self._clock()

    # Reading ----------------------------------------------------------------------------------------------------------

    def get(self, partition: str, sort: str) -> Item | None:
        """See `MemoryStore`."""
        check_key(partition, sort)
        with self._connection() as connection:
            found = _read(connection, partition, sort)
        return found if found is not None and found.lives(self.now()) else None

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
        """See `MemoryStore`."""
        check_partition(partition)
        check_range(prefix, after, type, limit)
        return self._pages(partition, prefix, after, type, reverse, limit)

    def _pages(
        self, partition: str, prefix: str, after: str | None, type: str | None, reverse: bool, limit: int | None
    ) -> Iterator[Item]:
        # No byte of UTF-8 is 0xff, so that all texts with the prefix lie before this one. SQLite compares bytes.
        end = prefix.encode() + b"\xff"
        left = -1 if limit is None else limit
        while left:
            start = "" if after is None else f"AND sort {'<' if reverse else '>'} :after"
            of_type = "" if type is None else "AND type = :type"
            statement = f"""
                SELECT {COLUMNS} FROM items
                WHERE partition = :partition AND sort >= :prefix AND sort < CAST(:end AS TEXT) {start} {of_type}
                  AND (expires_at IS NULL OR expires_at > :now)
                ORDER BY sort {"DESC" if reverse else "ASC"} LIMIT :page
            """
            page = PAGE if left < 0 else min(PAGE, left)
            values = {"partition": partition, "prefix": prefix, "end": end, "after": after, "type": type}
            with self._connection() as connection:
                rows = connection.execute(statement, {**values, "now": self.now(), "page": page}).fetchall()
            yield from map(_item, rows)
            if len(rows) < page:
                return
            after = rows[-1][1]
            left -= len(rows) if left > 0 else 0

    # Writing ----------------------------------------------------------------------------------------------------------

    def put(self, item: Item, *, expected: int | None = None) -> Item:
        """See `MemoryStore`."""
        check_expected(expected)
        data = encode_item(item, self._max_bytes)
        with self._writing() as connection:
            found = _read(connection, item.partition, item.sort)
            now = self.now()
            _check_version(item.partition, item.sort, found, expected, now)
            written = replace(item, version=next_version(now, 0 if found is None else found.version))
            _write(connection, written, data)
        return written

    def delete(self, partition: str, sort: str, *, expected: int | None = None) -> bool:
        """See `MemoryStore`."""
        check_key(partition, sort)
        check_expected(expected, 1)
        with self._writing() as connection:
            found, now = _read(connection, partition, sort), self.now()
            _check_version(partition, sort, found, expected, now)
            connection.execute("DELETE FROM items WHERE partition = ? AND sort = ?", (partition, sort))
        return found is not None and found.lives(now)

    def write(self, items: Iterable[Item], deletes: Iterable[tuple[str, str]] = ()) -> None:
        """See `MemoryStore`; here all of it happens, or nothing."""
        encoded = []
        for item in items:
            check_version(item)
            encoded.append((item, encode_item(item, self._max_bytes)))
        gone = list(deletes)
        for key in gone:
            check_key(*key)
        with self._writing() as connection:
            now = self.now()
            for item, data in encoded:
                _write(connection, replace(item, version=next_version(now, item.version)), data)
            connection.executemany("DELETE FROM items WHERE partition = ? AND sort = ?", gone)

    def purge(self) -> int:
        """See `MemoryStore`."""
        with self._writing() as connection:
            return connection.execute("DELETE FROM items WHERE expires_at <= ?", (self.now(),)).rowcount

    # Connections ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See `MemoryStore`; a store that is used again afterwards raises."""
        self._closed = True
        while self._free:
            self._free.pop().close()

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one operation: a free one, or a new one."""
        if self._closed:
            raise StoreError(f"{self.path}: this store was closed.")
        if self._process != os.getpid():
            # Forked: the parent's connections must not be used here, nor closed, which would free the parent's locks.
            self._inherited, self._free, self._process = self._free, [], os.getpid()
        self._check_file()
        with self._reported():
            try:
                connection = self._free.pop()
            except IndexError:
                connection = self._connect()
            try:
                yield connection
            except StoreError:
                if connection.in_transaction:
                    connection.close()
                else:
                    self._give_back(connection)
                raise
            except BaseException:
                connection.close()  # undoes what was begun
                raise
        self._give_back(connection)

    def _file_there(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _check_file(self) -> None:
        """Raise StoreError where the file has been taken away: what would be written now, nobody would find."""
        if self._file is not None and self._file_there() != self._file:
            raise StoreError(
                f"{self.path} was removed or replaced since it was opened. What was written since then lies in the old "
                "file; close all who use it, remove what is left of `-wal` and `-shm`, and open it again."
            )

    def _give_back(self, connection: sqlite3.Connection) -> None:
        if self._closed:
            connection.close()
        else:
            self._free.append(connection)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:  # SQLite undoes by itself what a full disk has ended
                    connection.execute("ROLLBACK")
                raise
            try:
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise
                raise StoreUnavailable(
                    f"{self.path}: {error}, at the end of a write. Whether it is there will be seen when the disk "
                    "answers again: read before repeating it."
                ) from error
            self._check_file()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, self._timeout, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = FULL")  # a commit survives a loss of power
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the schema in an empty file, or compare that of the file."""
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._write_ahead(connection)
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # nobody was faster
                connection.execute(SCHEMA)
                connection.execute(INDEX)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION:
            raise StoreFormatError(f"{self.path} is a SQLite file of another program; choose another path.")
        if version != SCHEMA_VERSION:
            raise StoreFormatError(
                f"{self.path} has schema version {version}, this release knows {SCHEMA_VERSION}: open it with the "
                "msa-hf that wrote it."
            )
        found = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'items'").fetchone()
        if found is None or found[0].split() != SCHEMA.split():
            raise StoreFormatError(f"{self.path}: its table `items` was changed; restore the file from a copy.")

    def _write_ahead(self, connection: sqlite3.Connection) -> None:
        """Have a new file keep a log; SQLite itself does not wait for others who do the same."""
        end = time.monotonic() + self._timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn SQLite's errors into a store's."""
        try:
            yield
        except sqlite3.Error as error:
            code = _code(error)
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreUnavailable(
                    f"{self.path}: another writer has kept it locked for {self._timeout:g} s ({error})."
                ) from error
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise StoreFormatError(
                    f"{self.path} is no SQLite file, or a damaged one ({error}). Choose another path, or restore it "
                    "from a copy."
                ) from error
            hint = ""
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                hint = " Nothing of this call was written; make room on the disk, or look whether it fails."
            elif code == sqlite3.SQLITE_CANTOPEN:
                hint = " Does its folder exist, and may this process write there?"
            raise StoreError(f"{self.path}: {error}.{hint}") from error


def _code(error: sqlite3.Error) -> int:
    """The kind of an error of SQLite."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _read(connection: sqlite3.Connection, partition: str, sort: str) -> Item | None:
    """The item of a key, expired or not."""
    statement = f"SELECT {COLUMNS} FROM items WHERE partition = ? AND sort = ?"
    row = connection.execute(statement, (partition, sort)).fetchone()
    return None if row is None else _item(row)


def _item(row: tuple[str, str, str, str, int, int | None]) -> Item:
    partition, sort, type, data, version, expires_at = row
    return Item(partition, sort, type, decode_data(partition, sort, data), version, expires_at)


def _write(connection: sqlite3.Connection, item: Item, data: str) -> None:
    values = (item.partition, item.sort, item.type, data, item.version, item.expires_at)
    connection.execute(f"INSERT OR REPLACE INTO items ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", values)


def _check_version(partition: str, sort: str, found: Item | None, expected: int | None, now: float) -> None:
    if expected is None:
        return
    version = found.version if found is not None and found.lives(now) else None
    if (version or 0) != expected:
        raise VersionConflict(partition, sort, expected, version)
