"""A bank in LlamaIndex, the real one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.core")
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, QueryBundle

from msa_hf import MemoryBank
from msa_hf.bank import BankStore
from msa_hf.integrations import LlamaIndexRetriever


class Ends(BaseEventHandler):
    found: list[list[str]] = []

    @classmethod
    def class_name(cls) -> str:
        return "Ends"

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, RetrievalEndEvent):
            self.found.append([node.node_id for node in event.nodes])


def test_what_it_finds_is_what_the_bank_finds(bank: MemoryBank, routers: dict[str, Any]) -> None:
    retriever = LlamaIndexRetriever(bank, k=2, mode="lexical")
    assert isinstance(retriever, BaseRetriever)
    nodes = retriever.retrieve("heron in the reeds")
    hits = bank.search("heron in the reeds", 2, "lexical")
    assert [(node.node_id, node.score, node.text) for node in nodes] == [(hit.key, hit.score, hit.text) for hit in hits]
    first, second = nodes
    assert (first.metadata["page"], first.metadata["of"]) == (3, {"book": "Birds"})
    assert second.metadata["score"] == "theirs" and second.metadata["msa_hf"]["rank"] == 2
    shown = first.node.get_content(metadata_mode=MetadataMode.LLM)
    assert "page: 3" in shown and "msa_hf" not in shown and "rank" not in shown
    for mode in ("router", "hybrid"):
        asked = LlamaIndexRetriever(bank, 3, mode, search_kwargs=routers)
        expected = [hit.key for hit in bank.search("old cedar", 3, mode, **routers)]
        assert [node.node_id for node in asked.retrieve(QueryBundle("old cedar"))] == expected
    assert retriever.retrieve("nothing like it") == []


def test_async(bank: MemoryBank) -> None:
    retriever = LlamaIndexRetriever(bank, 1, "lexical")
    queries = ["heron", "otter", "cedar"] * 4

    async def many() -> list[Any]:
        return await asyncio.gather(*(retriever.aretrieve(query) for query in queries))

    assert [nodes[0].node_id for nodes in asyncio.run(many())] == queries


def test_callbacks_and_events(bank: MemoryBank) -> None:
    debug, ends = LlamaDebugHandler(print_trace_on_end=False), Ends()
    get_dispatcher().add_event_handler(ends)
    try:
        retriever = LlamaIndexRetriever(bank, 1, "lexical", callback_manager=CallbackManager([debug]))
        retriever.retrieve("heron")
        asyncio.run(retriever.aretrieve("otter"))
    finally:
        get_dispatcher().event_handlers.remove(ends)
    assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 2
    assert ends.found == [["heron"], ["otter"]]


def test_a_query_engine(bank: MemoryBank) -> None:
    engine = RetrieverQueryEngine.from_args(LlamaIndexRetriever(bank, 1, "lexical"), llm=MockLLM())
    answer = engine.query("Where is the heron?")
    assert "The heron stands in the reeds." in str(answer)  # the mock says its prompt again
    assert [node.node_id for node in answer.source_nodes] == ["heron"]


def test_what_it_is_not_made_of(bank: MemoryBank, routers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1, got 0"):
        LlamaIndexRetriever(bank, 0)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        LlamaIndexRetriever(bank, mode="bm25")
    with pytest.raises(ValueError, match=r"`filters` is no option of `bank\.search`"):
        LlamaIndexRetriever(bank, search_kwargs={"filters": {"year": 1}})
    for name, value in (("k", 3), ("mode", "lexical")):
        with pytest.raises(ValueError, match=f"`{name}` is an argument of its own"):
            LlamaIndexRetriever(bank, search_kwargs={name: value})
    with pytest.raises(TypeError, match="`bank` must be a MemoryBank or a BankStore, got str"):
        LlamaIndexRetriever("my-bank")  # type: ignore[arg-type]
    numbers = routers["model"].encode_documents([[7, 8, 9]], show_progress=False)
    with pytest.raises(ValueError, match="does not keep the text of '0'"):
        LlamaIndexRetriever(numbers, 1, "router", search_kwargs=routers).retrieve("heron")


def test_a_bank_that_changes(routers: dict[str, Any], tmp_path: Path) -> None:
    with BankStore(routers["model"], tmp_path, routers["tokenizer"], lexical=True) as store:
        retriever = LlamaIndexRetriever(store, mode="lexical")
        assert retriever.retrieve("heron") == []
        store.upsert("one", "The heron stands in the reeds.", metadata={"page": 1})
        assert [(node.node_id, node.metadata["page"]) for node in retriever.retrieve("heron")] == [("one", 1)]
