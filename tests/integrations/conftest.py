"""A bank with metadata and a lexical index, its model, and a store of it."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import COMPACT, byte_tokenizer, memory_model

from msa_hf import MemoryBank

NOTES = [
    {"key": "heron", "text": "The heron stands in the reeds.", "metadata": {"page": 3, "of": {"book": "Birds"}}},
    {"key": "otter", "text": "An otter came by the reeds at dawn.", "metadata": {"score": "theirs"}},
    {"key": "cedar", "text": "The cedar is old."},
]


@pytest.fixture(scope="session")
def routers() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    model.config.routers_trained = True
    return {"model": model, "tokenizer": tokenizer}


@pytest.fixture(scope="session")
def bank(routers: dict[str, Any]) -> MemoryBank:
    pytest.importorskip("tantivy")
    from msa_hf.retrieval import add_lexical_index

    rows = [{"key": note["key"], "text": note["text"], **note.get("metadata", {})} for note in NOTES]
    made = routers["model"].encode_documents(rows, routers["tokenizer"], show_progress=False)
    add_lexical_index(made)
    return made
