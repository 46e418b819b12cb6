"""A server that the tests of a session share."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install msa-hf[serve]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install msa-hf[serve]")

from served import Served, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "bank") as served:
        yield served


@pytest.fixture(scope="session")
def client(server: Served) -> httpx.Client:
    return server.client()


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return tmp_path / "bank"
