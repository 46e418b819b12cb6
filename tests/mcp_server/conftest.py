"""A bank of msa-hf-tiny, and servers of it: one in a process of its own over stdio, others in this one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="mcp is not installed: pip install msa-hf[mcp]")
pytest.importorskip("tantivy")

from assistants import CARD, TEXTS, Assistant, connected, over_stdio
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.generation import PromptProtocol
from msa_hf.mcp_server.limits import Limits
from msa_hf.mcp_server.server import MemoryServer
from msa_hf.mcp_server.shared_bank import Options, Reader, SharedBank
from msa_hf.mcp_server.tools import tools_for


@pytest.fixture(scope="session")
def reader() -> Reader:
    model = MSAForCausalLM.from_pretrained(CARD, dtype="float32").eval()
    return Reader(model, AutoTokenizer.from_pretrained(CARD), PromptProtocol.from_pretrained(CARD))


@pytest.fixture(scope="session")
def made(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank to copy."""
    directory = tmp_path_factory.mktemp("mcp") / "made"
    with BankStore(reader.model, directory, reader.tokenizer, reader.protocol, lexical=True) as bank:
        bank.add({"key": key, "text": text, "place": place} for place, (key, text) in enumerate(TEXTS.items()))
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A bank of this test alone."""
    return Path(shutil.copytree(made, tmp_path / "bank"))


@pytest.fixture(scope="session")
def shared(made: Path) -> Path:
    """The bank of the server over stdio; tests clean up what they put into it."""
    return Path(shutil.copytree(made, made.parent / "shared"))


@pytest.fixture(scope="session")
def log(shared: Path) -> Path:
    """The stderr of the server over stdio."""
    return shared.parent / "stderr"


@pytest.fixture(scope="session")
def assistant(shared: Path, log: Path) -> Iterator[Assistant]:
    """A client of the server over stdio."""
    with connected(
        over_stdio(log, shared, "--model", CARD, "--dtype", "float32", "--max-k", 20, "--wait", 0)
    ) as client:
        yield client


ServerOf = Callable[..., Any]


@pytest.fixture
def server_of(reader: Reader) -> ServerOf:
    """Makes servers in this process: `server_of(directory, with_model=True, limits=..., **options)`."""

    def make(directory: Path, with_model: bool = True, limits: Limits | None = None, **options: Any) -> Any:
        bank: Future[SharedBank] = Future()
        bank.set_result(SharedBank(directory, reader if with_model else None, Options(**options)))
        tools = tools_for(with_model, options.get("read_only", False))
        return MemoryServer("test", bank, tools, limits or Limits()).protocol

    return make
