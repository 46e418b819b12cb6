"""A bank and a store in LangChain, the real one: retriever and chat history."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core")
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory

from msa_hf import MemoryBank
from msa_hf.bank import BankStore
from msa_hf.hybrid.store import Item, ItemTooLarge, SQLiteStore, StoreFormatError
from msa_hf.integrations import LangChainHistory, LangChainRetriever


class Seen(BaseCallbackHandler):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_retriever_start(self, serialized: Any, query: str, **kwargs: Any) -> None:
        self.calls.append(("start", (query, kwargs["tags"])))

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        self.calls.append(("end", [document.id for document in documents]))

    def on_retriever_error(self, error: BaseException, **kwargs: Any) -> None:
        self.calls.append(("error", type(error)))


class SeenLater(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.found: list[str] = []

    async def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        self.found = [document.id for document in documents]


# The retriever --------------------------------------------------------------------------------------------------------


def test_what_it_finds_is_what_the_bank_finds(bank: MemoryBank, routers: dict[str, Any]) -> None:
    retriever = LangChainRetriever(bank=bank, search_kwargs={"k": 2, "mode": "lexical"})
    assert isinstance(retriever, BaseRetriever)
    documents = retriever.invoke("heron in the reeds")
    hits = bank.search("heron in the reeds", 2, "lexical")
    assert [item.id for item in documents] == [hit.key for hit in hits] == ["heron", "otter"]
    assert [item.page_content for item in documents] == [hit.text for hit in hits]
    first, second = documents
    assert (first.metadata["page"], first.metadata["of"]) == (3, {"book": "Birds"})
    assert second.metadata["score"] == "theirs", "what was given stays as it was"
    assert first.metadata["msa_hf"]["score"] == hits[0].score and first.metadata["msa_hf"]["rank"] == 1
    assert first.metadata["msa_hf"]["mode"] == "lexical" and "heron" in first.metadata["msa_hf"]["why"]["terms"]
    for mode in ("router", "hybrid"):
        asked = LangChainRetriever(bank=bank, search_kwargs={"mode": mode, **routers})
        expected = [hit.key for hit in bank.search("old cedar", 10, mode, **routers)]
        assert [item.id for item in asked.invoke("old cedar")] == expected
        assert [item.id for item in asked.invoke("old cedar", k=1)] == expected[:1]
        assert [item.id for item in asyncio.run(asked.ainvoke("old cedar", k=1))] == expected[:1]
    assert retriever.invoke("nothing like it") == []


def test_async_batch_and_chains(bank: MemoryBank) -> None:
    retriever = LangChainRetriever(bank=bank, search_kwargs={"k": 1, "mode": "lexical"})
    queries = ["heron", "otter", "cedar"] * 4

    async def many() -> list[Any]:
        return await asyncio.gather(*(retriever.ainvoke(query) for query in queries), retriever.abatch(queries))

    *single, batch = asyncio.run(many())
    assert [found[0].id for found in single] == [found[0].id for found in batch] == queries
    assert [found[0].id for found in retriever.batch(queries)] == queries
    chain = retriever | RunnableLambda(lambda found: found[0].page_content)
    assert chain.invoke("cedar") == asyncio.run(chain.ainvoke("cedar")) == "The cedar is old."


def test_copies_and_pickles(bank: MemoryBank, routers: dict[str, Any], tmp_path: Path) -> None:
    retriever = LangChainRetriever(bank=bank, search_kwargs={"k": 2, "mode": "router", **routers})
    found = retriever.invoke("heron")
    for copied in (copy.copy(retriever), copy.deepcopy(retriever), pickle.loads(pickle.dumps(retriever))):
        assert copied.invoke("heron") == found
    with BankStore(routers["model"], tmp_path, routers["tokenizer"], lexical=True) as store:
        store.upsert("bird", "A heron.")
        with pytest.raises(TypeError, match=r"pass `store\.snapshot\(\)`"):
            pickle.dumps(LangChainRetriever(bank=store))
        kept = pickle.dumps(LangChainRetriever(bank=store.snapshot(), search_kwargs={"mode": "lexical"}))
    assert [item.id for item in pickle.loads(kept).invoke("heron")] == ["bird"]


def test_callbacks(bank: MemoryBank) -> None:
    retriever = LangChainRetriever(bank=bank, search_kwargs={"k": 1, "mode": "lexical"}, tags=["notes"])
    seen, later = Seen(), SeenLater()
    retriever.invoke("heron", config={"callbacks": [seen]})
    asyncio.run(retriever.ainvoke("otter", config={"callbacks": [seen, later]}))
    started = [("start", (query, ["notes"])) for query in ("heron", "otter")]
    assert seen.calls == [started[0], ("end", ["heron"]), started[1], ("end", ["otter"])]
    assert later.found == ["otter"]
    seen.calls.clear()
    with pytest.raises(ValueError, match="empty"):
        retriever.invoke(" ", config={"callbacks": [seen]})
    assert seen.calls[1] == ("error", ValueError)


def test_what_it_is_not_made_of(bank: MemoryBank, routers: dict[str, Any], tmp_path: Path) -> None:
    for wrong, said in (
        ({"k": 0}, "`k` must be an integer of at least 1"),
        ({"k": "3"}, "`k` must be"),
        ({"mode": "bm25"}, "`mode` must be one of"),
        ({"where": ["year"]}, "`where` must be a mapping"),
        ({"filter": {"year": 1}}, "`filter` is no option of `bank.search`, which takes k, mode, .* where"),
    ):
        with pytest.raises(ValueError, match=said):
            LangChainRetriever(bank=bank, search_kwargs=wrong)
        with pytest.raises(ValueError, match=said):
            LangChainRetriever(bank=bank).invoke("heron", **wrong)
    for name, value in (("k", 3), ("where", {"year": 1}), ("model", routers["model"])):
        with pytest.raises(ValueError, match=rf"give it as search_kwargs=\{{'{name}': \.\.\.\}}"):
            LangChainRetriever(bank=bank, **{name: value})
    with pytest.raises(ValueError, match=r"filter\n  Extra inputs are not permitted"):
        LangChainRetriever(bank=bank, filter={"year": 1})
    with pytest.raises(ValueError, match="`bank` must be a MemoryBank or a BankStore, got str"):
        LangChainRetriever(bank="my-bank")
    with pytest.raises(ValueError, match="Searching by routers needs"):
        LangChainRetriever(bank=bank, search_kwargs={"mode": "router"}).invoke("heron")
    numbers = routers["model"].encode_documents([[7, 8, 9]], show_progress=False)
    with pytest.raises(ValueError, match="does not keep the text of '0'"):
        LangChainRetriever(bank=numbers, search_kwargs={"mode": "router", **routers}).invoke("heron")


def test_a_bank_that_changes(routers: dict[str, Any], tmp_path: Path) -> None:
    with BankStore(routers["model"], tmp_path, routers["tokenizer"], lexical=True) as store:
        retriever = LangChainRetriever(bank=store, search_kwargs={"mode": "lexical"})
        assert retriever.invoke("heron") == []
        store.upsert("one", "The heron stands in the reeds.", metadata={"page": 1})
        assert [(item.id, item.metadata["page"]) for item in retriever.invoke("heron")] == [("one", 1)]
        store.delete("one")
        assert retriever.invoke("heron") == []


# The history ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    opened = SQLiteStore(tmp_path / "chats.db")
    yield opened
    opened.close()


SAID = [
    SystemMessage("Be brief."),
    HumanMessage([{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:x"}}]),
    AIMessage("", tool_calls=[{"name": "look", "args": {"at": [1, 2.5, None]}, "id": "call-1"}]),
    ToolMessage("a heron", tool_call_id="call-1", artifact={"page": 3}),
    AIMessage("A heron – 鷺.", id="answer", additional_kwargs={"x": {"y": True}}, response_metadata={"tokens": 4}),
]


def test_messages_come_back_whole(store: SQLiteStore) -> None:
    history = LangChainHistory(store, "ada")
    assert isinstance(history, BaseChatMessageHistory) and history.messages == []
    history.add_messages(SAID)
    history.add_user_message("And now?")
    assert LangChainHistory(store, "ada").messages == [*SAID, HumanMessage("And now?")]
    assert LangChainHistory(store, "ada", last=2).messages == [SAID[-1], HumanMessage("And now?")]
    assert LangChainHistory(store, "bob").messages == []
    LangChainHistory(store, "bob").add_ai_message("Hello.")
    history.clear()
    assert history.messages == [] and LangChainHistory(store, "bob").messages == [AIMessage("Hello.")]
    history.add_user_message("Again.")
    assert [message.content for message in history.messages] == ["Again."]


def test_async(store: SQLiteStore) -> None:
    async def talk() -> list[Any]:
        history = LangChainHistory(store, "ada")
        await history.aadd_messages(SAID)
        found = await history.aget_messages()
        await history.aclear()
        return found

    assert asyncio.run(talk()) == SAID and LangChainHistory(store, "ada").messages == []


def test_no_message_of_many_writers_is_lost(store: SQLiteStore) -> None:
    def write(name: int) -> None:
        history = LangChainHistory(store, "all")
        for number in range(8):
            history.add_messages([HumanMessage(f"{name} {number} a"), AIMessage(f"{name} {number} b")])

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = [str(message.content) for message in LangChainHistory(store, "all").messages]
    assert len(found) == 64
    for name in range(4):
        own = [text for text in found if text.startswith(f"{name} ")]
        assert own == [f"{name} {number} {part}" for number in range(8) for part in "ab"], "in the order of the writer"


def test_what_cannot_be_kept_changes_nothing(store: SQLiteStore) -> None:
    history = LangChainHistory(store, "ada")
    for bad, error in (
        (HumanMessage("x" * 500_000), ItemTooLarge),
        (HumanMessage("half \ud83d"), ValueError),
        (AIMessage("", additional_kwargs={"p": float("nan")}), ValueError),
    ):
        with pytest.raises(error, match="chat#ada"):
            history.add_messages([HumanMessage("first"), bad])
        assert history.messages == []
    for name in ("", "x" * 901, None):
        with pytest.raises(ValueError, match="`session` must be a name"):
            LangChainHistory(store, name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`last` must be"):
        LangChainHistory(store, "ada", last=0)
    store.put(Item("chat#ada", "message#000000000001", "note", {"text": "of another program"}))
    with pytest.raises(StoreFormatError, match="no message of LangChain"):
        _ = history.messages


def test_expiry(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    LangChainHistory(store, "ada", ttl=60).add_user_message("Soon gone.")
    LangChainHistory(store, "ada").add_user_message("Stays.")
    assert len(LangChainHistory(store, "ada").messages) == 2
    later = store.now() + 3600
    monkeypatch.setattr(store, "now", lambda: later)
    assert [message.content for message in LangChainHistory(store, "ada").messages] == ["Stays."]


def test_a_chat_with_a_memory_of_documents_and_of_itself(store: SQLiteStore, bank: MemoryBank) -> None:
    retriever = LangChainRetriever(bank=bank, search_kwargs={"k": 1, "mode": "lexical"})
    prompt = ChatPromptTemplate.from_messages(
        [("system", "{notes}"), MessagesPlaceholder("history"), ("human", "{question}")]
    )
    prompts: list[Any] = []

    def note(value: Any) -> Any:
        prompts.append(value.to_messages())
        return value

    def with_notes(asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "notes": retriever.invoke(asked["question"])[0].page_content}

    chain = RunnableLambda(with_notes) | prompt | RunnableLambda(note) | FakeListChatModel(responses=["Reeds.", "Old."])
    chat = RunnableWithMessageHistory(
        chain,
        lambda session: LangChainHistory(store, session),
        input_messages_key="question",
        history_messages_key="history",
    )
    config = {"configurable": {"session_id": "ada"}}
    assert chat.invoke({"question": "Where is the heron?"}, config).content == "Reeds."
    assert chat.invoke({"question": "And the cedar?"}, config).content == "Old."
    texts = [message.content for message in prompts[1]]
    assert texts == ["The cedar is old.", "Where is the heron?", "Reeds.", "And the cedar?"]
    assert len(LangChainHistory(store, "ada").messages) == 4
