"""Chains at work on fakes: values, sources, conditions, loops, repairs, traces, and going on after a kill."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_chat import FakeChat, FakeMemory, FakeRetriever

from msa_hf.hybrid.chains import ChainError, ChainRunner, StepError, TraceError, chain_from_dict

TEXTS = {
    "lamp": "The Oskel Lantern was made by Mira Vale.",
    "mira": "Mira Vale was taught by Tom Reed.",
    "tom": "Tom Reed was born in Harrow Bay.",
    "bay": "Harrow Bay has 40 houses.",
}
LANGUAGE = {"lamp": {"lang": "en"}, "mira": {"lang": "en"}, "tom": {"lang": "de"}, "bay": {"lang": "de", "n": 1}}


def reply(prompt: str) -> str:
    """The last name of the first source, or the prompt in capitals."""
    if "SOURCES" in prompt:
        line = prompt.partition("SOURCES\n")[2].splitlines()
        return line[0].rstrip(".").split("by ")[-1].split("in ")[-1] if line else "nothing"
    return prompt.upper()


def steps(*items: dict[str, Any], **fields: Any) -> Any:
    return chain_from_dict({"name": "test", "steps": list(items), **fields})


def runner(**changes: Any) -> ChainRunner:
    given = {"retriever": FakeRetriever(TEXTS, LANGUAGE), "chats": {"chat": FakeChat(reply)}, **changes}
    return ChainRunner(**given)


HOPS = steps(
    {"name": "start", "prompt": "{question}"},
    {
        "name": "hops",
        "loop": {
            "at_most": 4,
            "start": {"asked": "Oskel Lantern"},
            "steps": [
                {"name": "found", "prompt": "Who? {asked} SOURCES\n{sources}", "retrieve": {"query": "{asked}", "k": 1}}
            ],
            "next": {"asked": "{found}"},
            "until": {"field": "found", "equals": "harrow bay"},
            "result": "{found}",
        },
    },
    {"name": "shout", "prompt": "{hops/last} ({hops/all})", "when": {"field": "hops/last", "is": "filled"}},
    answer="{shout}|{start}",
)  # fmt: skip


def plain(records: Any) -> list[dict[str, Any]]:
    """Records without the time they took."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_a_loop_follows_three_hops_and_the_trace_says_all(tmp_path: Path) -> None:
    result = runner().run(HOPS, "who?", tmp_path / "trace.jsonl")
    assert result.answer == "HARROW BAY (MIRA VALE\nTOM REED\nHARROW BAY)|WHO?"
    assert result.values["hops"] == {"last": "Harrow Bay", "all": ["Mira Vale", "Tom Reed", "Harrow Bay"]}
    assert [source["key"] for source in result.sources()] == ["lamp", "mira", "tom"]
    header, *records = map(json.loads, (tmp_path / "trace.jsonl").read_text().splitlines())
    assert header["chain"] == "test" and header["question"] == "who?" and header["models"] == {"chat": "fake"}
    assert records == list(result.records)
    assert [record["step"] for record in records] == [
        "start", "hops[0].found", "hops[1].found", "hops[2].found", "hops", "shout"
    ]  # fmt: skip
    found = records[2]
    assert found["query"] == "Mira Vale" and found["mode"] == "hybrid" and found["k"] == 1
    assert found["sources"][0] | {"score": 0} == {
        "key": "mira", "text": TEXTS["mira"], "score": 0, "position": 1, "id": 1, "metadata": {"lang": "en"}
    }  # fmt: skip
    assert found["prompt"] == [{"role": "user", "content": f"Who? Mira Vale SOURCES\n[mira] {TEXTS['mira']}"}]
    assert (found["output"], found["value"]) == ("Tom Reed", "Tom Reed")
    assert records[4]["ended"] == "until" and records[4]["rounds"] == 3


def test_bounds_end_a_loop_and_items_beyond_them_are_counted() -> None:
    chain = steps(
        {"name": "items", "prompt": "a\nb\nc\n{question}", "model": None, "extract": "list"},
        {
            "name": "each",
            "loop": {
                "over": "items",
                "at_most": 3,
                "steps": [{"name": "say", "prompt": "{item}!"}],
                "result": "{say}",
            },
        },
    )
    result = runner().run(chain, "d")
    assert result.values["each"] == {"last": "C!", "all": ["A!", "B!", "C!"]}
    assert (result.records[-1]["ended"], result.records[-1]["left_out"]) == ("at_most", 1)
    wide = chain_from_dict(json.loads(json.dumps(_data(chain)).replace('"at_most": 3', '"at_most": 4')))
    result = runner().run(wide, "d")
    assert (result.records[-1]["ended"], result.records[-1]["left_out"]) == ("over", 0)
    text = chain_from_dict(json.loads(json.dumps(_data(chain)).replace('"list"', '"text"').replace('"extract": {"text": {}, "repairs": 1}, ', "")))  # noqa: E501 # fmt: skip
    with pytest.raises(StepError, match="no list"):
        runner().run(text, "d")


def _data(chain: Any) -> dict[str, Any]:
    from msa_hf.hybrid.chains import chain_to_dict

    return chain_to_dict(chain)


def test_a_skipped_step_is_nothing_and_an_empty_query_an_error() -> None:
    skipped = {"name": "a", "prompt": "x", "when": {"field": "question", "contains": "never"}}
    result = runner().run(steps(skipped, {"name": "b", "prompt": "[{a}]"}), "now")
    assert result.values == {"a": None, "b": "[]"} and result.records[0]["skipped"] is True
    with pytest.raises(StepError, match="step b: its query is empty"):
        runner().run(steps(skipped, {"name": "b", "prompt": "x", "retrieve": {"query": "{a}"}}), "now")
    with pytest.raises(StepError, match="step b: its prompt is empty"):
        runner().run(steps(skipped, {"name": "b", "prompt": "{a}"}), "now")
    with pytest.raises(ValueError, match="question"):
        runner().run(HOPS, " ")


def test_filters_and_the_budget_of_sources() -> None:
    def asked(filters: dict[str, Any], **more: Any) -> list[str]:
        retrieve = {"query": "Mira Vale Tom Reed Harrow Bay", "k": 3, "filters": filters, **more}
        chain = steps(
            {"name": "pick", "prompt": "de", "model": None},
            {"name": "a", "prompt": "Texts: {sources}", "retrieve": retrieve},
        )
        result = runner().run(chain, "x")
        return [source["key"] for source in result.records[-1]["sources"]]

    assert set(asked({})) == {"mira", "tom", "bay"} and set(asked({"lang": "{pick}"})) == {"tom", "bay"}
    assert set(asked({"lang": ["en", "fr"]})) == {"lamp", "mira"} and asked({"n": 1}) == ["bay"]
    assert asked({"n": True}) == asked({"n": "1"}) == asked({"lang": "{pick}", "n": 2}) == []
    assert asked({}, max_tokens=17) == ["mira", "tom"] and asked({}, max_tokens=1) == []


def test_the_memory_model_answers_from_its_own_or_given_sources() -> None:
    memory = FakeMemory({"Who made it?": "Mira Vale", "Who taught Mira Vale?": "Tom Reed"})
    chain = steps(
        {"name": "one", "prompt": "Who made it?", "model": "memory"},
        {"name": "two", "prompt": "Who taught {one}?", "model": "memory", "retrieve": {"query": "{one}", "k": 2}},
    )
    result = runner(memory=memory).run(chain, "x")
    assert result.answer == "Tom Reed" and memory.asked == ["Who made it?", "Who taught Mira Vale?"]
    assert [source["key"] for source in result.sources()] == ["memory", "mira", "lamp"]
    with pytest.raises(ChainError, match="pass `memory`"):
        runner().run(chain, "x")
    with pytest.raises(ChainError, match="pass `retriever`"):
        runner(retriever=None, memory=memory).run(chain, "x")
    with pytest.raises(ChainError, match=r"'big', which is not there \(there: chat\)"):
        runner().run(steps({"name": "a", "prompt": "x", "model": "big"}), "x")
    with pytest.raises(ValueError, match="memory model's"):
        runner(chats={"memory": FakeChat(reply)})


JSON = steps(
    {
        "name": "a",
        "prompt": "{question}",
        "extract": {
            "json": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
            "repairs": 2,
        },
    },
    answer="{a/n}",
)


def test_json_is_repaired_so_often_and_then_shown() -> None:
    chat = FakeChat(["no", '{"n": "7"}', 'Here: {"n": 7}.'])
    result = runner(chats={"chat": chat}).run(JSON, "x")
    assert result.answer == "7" and [item["output"] for item in result.records[0]["attempts"]] == ["no", '{"n": "7"}']
    assert [len(messages) for messages in chat.asked] == [1, 3, 5] and chat.schemas[0] == JSON.steps[0].extract.schema
    assert "it.n must be an integer" in chat.asked[2][-1].content
    with pytest.raises(
        StepError, match=r"step a: its answer is not the JSON asked for after 3 attempts: .*'last'"
    ) as e:
        runner(chats={"chat": FakeChat(["no", "no", "last"])}).run(JSON, "x")
    assert (e.value.step, e.value.answer) == ("a", "last")
    with pytest.raises(StepError, match="max_new_tokens is reached"):
        runner(chats={"chat": FakeChat(['{"n"'] * 3, cut=True)}).run(JSON, "x")


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", range(6))
def test_a_run_goes_on_from_its_trace_with_the_same_result(tmp_path: Path, calls: int) -> None:
    """Whatever call of a model or the bank fails, nothing that was done is done again."""
    whole = runner().run(HOPS, "who?")
    left = calls

    def failing(prompt: str) -> str:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return reply(prompt)

    trace = tmp_path / "trace.jsonl"
    if calls < 5:
        with pytest.raises(Killed):
            runner(chats={"chat": FakeChat(failing)}).run(HOPS, "who?", trace)
    else:
        runner(chats={"chat": FakeChat(failing)}).run(HOPS, "who?", trace)
    again = FakeChat(reply)
    result = runner(chats={"chat": again}).run(HOPS, "who?", trace)
    assert result.answer == whole.answer and plain(result.records) == plain(whole.records)
    assert len(again.asked) == 5 - calls
    assert len(trace.read_text().splitlines()) == 1 + len(whole.records)


def test_a_cut_line_is_done_again_wherever_it_was_cut(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    whole = runner().run(HOPS, "who?", trace)
    content = trace.read_bytes()
    pick = random.Random(0)
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    for size in [0, 1, 5, 12, *ends, *(end - 1 for end in ends), *(pick.randrange(len(content)) for _ in range(30))]:
        trace.write_bytes(content[:size])
        result = runner().run(HOPS, "who?", trace)
        assert result.answer == whole.answer and plain(result.records) == plain(whole.records), size
        lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
        assert lines[0] == json.loads(content.splitlines()[0]) and lines[1:] == list(result.records), size


def _slowly(trace: str) -> None:
    import time

    def slow(prompt: str) -> str:
        time.sleep(0.02)
        return reply(prompt)

    runner(chats={"chat": FakeChat(slow)}).run(HOPS, "who?", trace)


def test_a_killed_process_leaves_a_trace_to_go_on_from(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    whole = runner().run(HOPS, "who?")
    pick = random.Random(1)
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        trace.unlink(missing_ok=True)
        child = context.Process(target=_slowly, args=(str(trace),))
        child.start()
        child.join(pick.random() * 0.2)
        if child.pid is not None and child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        result = runner().run(HOPS, "who?", trace)
        assert result.answer == whole.answer and plain(result.records) == plain(whole.records)


def test_traces_of_something_else_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    runner().run(HOPS, "who?", trace)
    kept = trace.read_bytes()

    def refused(says: str, content: bytes = kept, question: str = "who?", chain: Any = HOPS, **changes: Any) -> None:
        trace.write_bytes(content)
        with pytest.raises(TraceError, match=says):
            runner(**changes).run(chain, question, trace)
        assert trace.read_bytes() == content

    refused("its question is", question="what?")
    refused("its chain is" if JSON.name != HOPS.name else "its digest is", chain=JSON)
    refused("its models is", chats={"chat": FakeChat(reply, name="other")})
    refused("not a trace", b'{"a": 1}\n')
    refused("not a trace", b"notes without a line break")
    refused("line 2: damaged", kept.splitlines(True)[0] + b"{...\n")
    refused("line 2: not a record", kept.splitlines(True)[0] + b"[]\n")
    refused("a record is damaged", kept.splitlines(True)[0] + b'{"step": "a"}\n')
    refused("a record is damaged", kept + kept.splitlines(True)[1])
    refused("its version is 9", kept.replace(b'"version": 1', b'"version": 9'))
    import fcntl

    with trace.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused("another run is writing")


def test_a_run_is_the_same_every_time_and_keeps_odd_texts(tmp_path: Path) -> None:
    odd = "a\nb\u2028c\ud800{question}\x00"
    first = runner().run(HOPS, odd, tmp_path / "a.jsonl")
    assert plain(first.records) == plain(runner().run(HOPS, odd).records)
    again = runner().run(HOPS, odd, tmp_path / "a.jsonl")
    assert again.resumed == len(again.records) and list(again.records) == list(first.records)
