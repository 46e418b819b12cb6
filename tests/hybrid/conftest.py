"""Stores of every kind, and the servers behind them."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from manual_clock import Clock
from servers import dynalite

from msa_hf.hybrid.store import DynamoDBStore, MemoryStore, SQLiteStore

NUMBERS = itertools.count()


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: flushing a disk takes most of a commit's time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def dynamodb_server() -> Iterator[str]:
    with dynalite() as url, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "anything")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield url


Opener = Callable[..., MemoryStore]


@pytest.fixture(params=["sqlite", "dynamodb"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same empty store, once or several times."""
    if request.param == "sqlite":
        return lambda **options: SQLiteStore(tmp_path / "store.db", **options)
    url, table = request.getfixturevalue("dynamodb_server"), f"store-{next(NUMBERS)}"
    return lambda **options: DynamoDBStore(table, create=True, endpoint=url, **options)
