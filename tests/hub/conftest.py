"""A Hub of its own for every test of a file, and a bank to put there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, using_hub
from scripted import COMPACT, bank_of, byte_tokenizer, memory_model

from msa_hf import MemoryBank


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    return memory_model(tokenizer, COMPACT)


@pytest.fixture(scope="session")
def bank(model: Any, tokenizer: Any) -> MemoryBank:
    return bank_of(model, tokenizer, COMPACT)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def session(cache: Path) -> Iterator[tuple[FakeHub, pytest.MonkeyPatch]]:
    with using_hub(cache) as both:
        yield both


@pytest.fixture
def hub(session: tuple[FakeHub, pytest.MonkeyPatch]) -> FakeHub:
    return session[0]


@pytest.fixture
def patch(session: tuple[FakeHub, pytest.MonkeyPatch]) -> pytest.MonkeyPatch:
    return session[1]
