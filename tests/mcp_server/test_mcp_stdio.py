"""`msa-hf mcp` over standard input and output, asked by the SDK's own client."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from assistants import TEXTS, Assistant
from mcp import MCPError

from msa_hf.bank import BankStore

QUESTION = "What is the venue of the Jethefux Crossing known for?"


def test_tools_say_what_they_do(assistant: Assistant) -> None:
    tools = {tool.name: tool for tool in assistant.list_tools().tools}
    assert list(tools) == ["search", "ask", "read", "remember", "forget"]
    hints = {name: tool.annotations for name, tool in tools.items()}
    assert [name for name, hint in hints.items() if not hint.read_only_hint] == ["remember", "forget"]
    assert [name for name, hint in hints.items() if hint.destructive_hint] == ["remember", "forget"]
    assert all(hint.idempotent_hint and hint.open_world_hint is False for hint in hints.values())
    assert all(tool.description and tool.output_schema["type"] == "object" for tool in tools.values())
    required = {name: sorted(tool.input_schema["required"]) for name, tool in tools.items()}
    assert required == {
        "search": ["query"],
        "ask": ["question"],
        "read": ["key"],
        "remember": ["key", "text"],
        "forget": ["key"],
    }


def test_ask_answers_with_its_sources(assistant: Assistant) -> None:
    told = assistant.tell("ask", question=QUESTION)
    assert told["answer"] == "roses" and told["note"] is None
    assert [source["key"] for source in told["sources"]][:2] == ["crossing", "heights/main hall?"]
    assert [source["round"] for source in told["sources"]][:2] == [1, 2]
    assert told["sources"][0]["text"] == TEXTS["crossing"]


def test_search_finds_and_says_why(assistant: Assistant) -> None:
    told = assistant.tell("search", query="known for roses", k=2)
    best = told["documents"][0]
    assert (told["mode"], best["key"], best["text"]) == ("hybrid", "heights/main hall?", TEXTS["heights/main hall?"])
    assert best["metadata"] == {"place": 1} and set(best["words"]) == {"known", "roses"}
    assert set(best["found_by"]) == {"router", "lexical"} and len(told["documents"]) == 2
    (found,) = assistant.tell("search", query="abstract class", mode="lexical")["documents"]
    assert found["truncated"] and TEXTS["long"].startswith(found["text"]) and len(found["text"]) == 2000


def test_what_is_remembered_is_on_the_disk_and_found(assistant: Assistant, shared: Path) -> None:
    note = {"key": "note", "text": "The Wibblen Gate is closed in May.", "metadata": {"by": ["me", None], "ü": 1.5}}
    assert assistant.tell("remember", **note) == {"key": "note", "uri": "msa-hf://document/note", "outcome": "added"}
    with BankStore(None, shared, read_only=True) as bank:
        document = bank.get("note")
    assert (document.text, document.metadata) == (note["text"], note["metadata"])
    assert assistant.tell("search", query="Wibblen", mode="lexical")["documents"][0]["key"] == "note"
    assert assistant.tell("remember", **note)["outcome"] == "unchanged"
    assert assistant.tell("remember", key="note", text="The Wibblen Gate is open.", version=3)["outcome"] == "replaced"
    assert assistant.tell("remember", key="note", text="It is late.", version=2)["outcome"] == "unchanged"
    read = assistant.tell("read", key="note")
    assert (read["text"], read["metadata"], read["version"]) == ("The Wibblen Gate is open.", None, 3)
    assert assistant.tell("forget", key="note")["deleted"] is True
    assert assistant.tell("forget", key="note")["deleted"] is False
    with BankStore(None, shared, read_only=True) as bank:
        assert "note" not in bank
    assert assistant.tell("search", query="Wibblen", mode="lexical")["documents"] == []


@pytest.mark.parametrize(
    ("tool", "arguments", "cause"),
    [
        ("search", {}, "`query`: Field required"),
        ("search", {"query": "x", "k": 0}, "`k`: Input should be greater than or equal to 1"),
        ("search", {"query": "x", "k": 21}, "20 documents at most (--max-k)"),
        ("search", {"query": "x", "k": "5"}, "`k`: Input should be a valid integer"),
        ("search", {"query": " "}, "not empty"),
        ("search", {"query": "x", "mode": "dense"}, "This bank has no vectors"),
        ("search", {"query": "x", "mode": "fuzzy"}, "`mode`: Input should be 'router'"),
        ("search", {"query": "x", "limit": 3}, "`limit`: Extra inputs are not permitted"),
        ("search", {"query": "x" * 8001}, "8000 at most"),
        ("ask", {"question": ""}, "not empty"),
        ("ask", {"question": "x" * 8001}, "8000 at most"),
        ("read", {"key": "nobody"}, "no document has the key 'nobody'"),
        ("remember", {"key": "x", "text": " \n"}, "blank"),
        ("remember", {"key": "", "text": "x"}, "`key`: String should have at least 1 character"),
        ("remember", {"key": "k" * 1001, "text": "x"}, "`key` has 1001 characters"),
        ("remember", {"key": "x", "text": "word " * 5000}, "Remember it in parts"),
        ("remember", {"key": "x", "text": "x", "metadata": {"a": "b" * 65536}}, "`metadata` has"),
        ("remember", {"key": "x", "text": "x", "metadata": [1]}, "`metadata`: Input should be a valid dictionary"),
        ("remember", {"key": "x", "text": "x", "version": -1}, "`version`"),
        ("remember", {"key": "x", "text": "x", "version": True}, "`version`: Input should be a valid integer"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_mistakes_are_errors_of_the_tool(
    assistant: Assistant, shared: Path, tool: str, arguments: dict[str, object], cause: str
) -> None:
    said = assistant.refusal(tool, **arguments)
    assert cause in said and "Traceback" not in said and len(said) < 1000
    with BankStore(None, shared, read_only=True) as bank:
        assert [document.key for document in bank.documents] == list(TEXTS)


def test_a_tool_that_is_not_there_is_an_error_of_the_protocol(assistant: Assistant) -> None:
    with pytest.raises(MCPError, match="no tool 'think'; there are search, ask"):
        assistant.call_tool("think", {})


def test_documents_are_resources(assistant: Assistant) -> None:
    listed = assistant.list_resources()
    assert listed.next_cursor is None
    bank, *documents = listed.resources
    assert [item.name for item in documents] == list(TEXTS)
    assert documents[1].uri == "msa-hf://document/heights%2Fmain%20hall%3F" and documents[1].size == 41
    for item, text in zip(documents, TEXTS.values(), strict=True):
        (content,) = assistant.read_resource(item.uri).contents
        assert (content.text, content.mime_type) == (text, "text/plain")
    assert '"documents": 3' in assistant.read_resource(bank.uri).contents[0].text
    assert assistant.list_resource_templates().resource_templates[0].uri_template == "msa-hf://document/{key}"
    for uri in ("msa-hf://document/nobody", "msa-hf://document/%ff", "msa-hf://", "file:///etc/passwd", "x"):
        with pytest.raises(MCPError, match="There is no resource") as raised:
            assistant.read_resource(uri)
        assert raised.value.code == -32002


def test_another_writer_is_named_and_waited_for(assistant: Assistant, shared: Path) -> None:
    with BankStore(None, shared) as bank:
        for tool, arguments in (("remember", {"key": "x", "text": "y"}), ("forget", {"key": "crossing"})):
            said = assistant.refusal(tool, **arguments)
            assert f"is open for writing in process {os.getpid()}" in said
        assert assistant.tell("ask", question=QUESTION)["answer"] == "roses"
        bank.delete("long")
        assert assistant.tell("search", query="abstract class", mode="lexical")["documents"] == []  # at once
        with pytest.raises(MCPError, match="no resource"):
            assistant.read_resource("msa-hf://document/long")
    assert assistant.tell("remember", key="long", text=TEXTS["long"], metadata={"place": 2})["outcome"] == "added"


def test_nothing_but_the_protocol_is_written(assistant: Assistant, log: Path) -> None:
    assistant.tell("search", query="roses")
    assert assistant.strays == []
    text = log.read_text()
    assert "search: done in" in text and "Traceback" not in text and "RuntimeWarning" not in text
