"""Questions over HTTP: what is answered is what the model answers alone, whoever else asks and however it is read."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import COMPACT, byte_tokenizer, memory_model
from served import MODEL, NEW_TOKENS, Served, serving

from msa_hf.bank import BankStore
from msa_hf.generation import MemoryInterleave
from msa_hf.generation.direct import DirectAsker
from msa_hf.serving.limits import Limits

QUESTIONS = [f"Where is the {word}?" for word in ("amber", "birch", "cedar", "dune", "ember", "reef", "pine")]


def chat(question: str, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], **options}


def ask(client: httpx.Client, question: str, **options: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json=chat(question, **options))
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a stream that ends as it should."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def alone(server: Served, question: Any, new_tokens: int = NEW_TOKENS) -> Any:
    service = server.service
    bank = service.store.snapshot()
    asker = MemoryInterleave(service.model, service.tokenizer, bank, service.protocol, max_rounds=2)
    return asker.ask(question, max_new_tokens=new_tokens)


def test_an_answer_is_that_of_the_model_with_its_sources(server: Served, client: httpx.Client) -> None:
    for question in QUESTIONS[:3]:
        expected, found = alone(server, question), ask(client, question, trace=True)
        assert text_of(found) == expected.text
        assert [item["key"] for item in found["sources"]] == [item.key for item in expected.documents]
        assert found["trace"]["rounds"][0]["read"][0]["key"] == found["sources"][0]["key"]
        assert found["usage"]["completion_tokens"] == len(expected.token_ids)
        assert found["usage"]["prompt_tokens"] == expected.prompt_tokens > len(question)
        assert found["object"] == "chat.completion" and found["model"] == MODEL
        assert found["choices"][0]["finish_reason"] == ("length" if len(expected.token_ids) == NEW_TOKENS else "stop")
    passage = "".join(part["text"] for part in found["sources"][0]["passage"])
    assert server.service.store.get(found["sources"][0]["key"]).text == passage
    assert "trace" not in ask(client, QUESTIONS[0])


def test_questions_that_wait_are_generated_together_and_answered_as_if_alone(
    server: Served, client: httpx.Client
) -> None:
    expected = [alone(server, question) for question in QUESTIONS]
    batches: list[int] = []
    watched = server.service.metrics.batch
    server.service.metrics.batch = lambda questions, seconds: batches.append(questions)  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            with server.busy():
                found = [pool.submit(ask, client, question) for question in QUESTIONS]
                server.wait_for_waiting(len(QUESTIONS))
            answers = [item.result() for item in found]
    finally:
        server.service.metrics.batch = watched  # type: ignore[method-assign]
    assert batches == [len(QUESTIONS)]
    assert [text_of(answer) for answer in answers] == [item.text for item in expected]
    for answer, item in zip(answers, expected, strict=True):
        assert [source["key"] for source in answer["sources"]] == [source.key for source in item.documents]


def test_a_question_that_cannot_be_asked_fails_alone(server: Served, client: httpx.Client) -> None:
    with ThreadPoolExecutor(3) as pool:
        with server.busy():
            long = pool.submit(client.post, "/v1/chat/completions", json=chat("reef " * 1500))
            fine = pool.submit(ask, client, QUESTIONS[0])
            server.wait_for_waiting(2)
        refused = long.result()
    assert refused.status_code == 400 and "too long" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "messages"
    assert text_of(fine.result()) == alone(server, QUESTIONS[0]).text


def test_a_batch_that_breaks_is_asked_again_one_by_one(
    server: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = MemoryInterleave.ask

    def breaks(self: Any, questions: Any, **options: Any) -> Any:
        if len(questions) > 1 or "birch" in questions[0][-1]["content"]:
            raise RuntimeError("out of memory")
        return asked(self, questions, **options)

    monkeypatch.setattr(MemoryInterleave, "ask", breaks)
    with ThreadPoolExecutor(2) as pool:
        with server.busy():
            sent = [pool.submit(client.post, "/v1/chat/completions", json=chat(text)) for text in QUESTIONS[:2]]
            server.wait_for_waiting(2)
        fine, broken = (item.result() for item in sent)
    assert broken.status_code == 500 and "out of memory" not in broken.text
    assert broken.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert text_of(fine.json()) == alone(server, QUESTIONS[0]).text


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_adds_up_to_the_answer(client: httpx.Client, usage: bool) -> None:
    for question in QUESTIONS[:3]:
        whole = ask(client, question)
        options = {"stream_options": {"include_usage": True}} if usage else {}
        found = events(client, "/v1/chat/completions", chat(question, **options))
        assert all(item["object"] == "chat.completion.chunk" for item in found)
        if usage:
            last = found.pop()
            assert last["choices"] == [] and last["usage"] == whole["usage"]
        pieces = [item["choices"][0]["delta"].get("content", "") for item in found]
        assert "".join(pieces) == text_of(whole)
        assert found[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [item["choices"][0]["finish_reason"] for item in found[:-1]] == [None] * (len(found) - 1)
        assert found[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert found[-1]["sources"] == whole["sources"]
        assert all(("usage" in item) == usage for item in found)


def test_streams_of_a_batch_do_not_mix(server: Served, client: httpx.Client) -> None:
    bodies = [chat(question) for question in QUESTIONS]
    with ThreadPoolExecutor(len(bodies)) as pool:
        with server.busy():
            sent = [pool.submit(events, client, "/v1/chat/completions", body) for body in bodies]
            server.wait_for_waiting(len(bodies))
        for question, item in zip(QUESTIONS, sent, strict=True):
            text = "".join(part["choices"][0]["delta"].get("content", "") for part in item.result())
            assert text == alone(server, question).text


def test_completions_answer_several_prompts_in_their_order(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"model": MODEL, "prompt": QUESTIONS[:3]}).json()
    assert answer["object"] == "text_completion"
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [text_of(ask(client, question)) for question in QUESTIONS[:3]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2] and answer["choices"][1]["sources"]
    found = events(client, "/v1/completions", {"model": MODEL, "prompt": QUESTIONS[:3]})
    for index, text in enumerate(texts):
        assert "".join(item["choices"][0]["text"] for item in found if item["choices"][0]["index"] == index) == text


def test_stop_texts_and_tokens_end_an_answer(server: Served, client: httpx.Client) -> None:
    whole = next(text for text in map(lambda item: alone(server, item).text, QUESTIONS) if len(text) > 4)
    question = next(item for item in QUESTIONS if alone(server, item).text == whole)
    stop = whole[2:4]
    expected = whole[: whole.index(stop)].rstrip()
    cut = ask(client, question, stop=["never in it", stop])
    assert (text_of(cut), cut["choices"][0]["finish_reason"]) == (expected, "stop")
    found = events(client, "/v1/chat/completions", chat(question, stop=stop))
    assert "".join(item["choices"][0]["delta"].get("content", "") for item in found) == expected
    short = ask(client, question, max_completion_tokens=2)
    assert short["usage"]["completion_tokens"] <= 2 and text_of(short) == alone(server, question, 2).text


def test_a_seed_decides_a_draw(client: httpx.Client) -> None:
    options = {"temperature": 1.5, "max_tokens": 6}
    drawn = [text_of(ask(client, QUESTIONS[0], seed=seed, **options)) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


@pytest.mark.parametrize("temperature", [1e-25, 1e-38, 5e-324])
def test_a_temperature_next_to_nothing_takes_the_most_likely_tokens(client: httpx.Client, temperature: float) -> None:
    most_likely = text_of(ask(client, QUESTIONS[0], max_tokens=6))
    assert text_of(ask(client, QUESTIONS[0], temperature=temperature, max_tokens=6)) == most_likely


def test_a_conversation_is_asked_as_everywhere_and_nothing_is_dropped_silently(
    server: Served, client: httpx.Client
) -> None:
    turns = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "Far off."},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    answer = client.post("/v1/chat/completions", json={"model": MODEL, "messages": turns}).json()
    expected = alone(server, turns)
    assert text_of(answer) == expected.text and "notices" not in answer
    assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens
    turns.insert(0, {"role": "system", "content": "Be brief."})
    assert "notices" in client.post("/v1/chat/completions", json={"model": MODEL, "messages": turns}).json()


def test_what_was_found_and_does_not_fit_is_said(fresh: Path) -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    with BankStore(model, fresh, tokenizer, COMPACT) as store:
        store.upsert("long", "long " * ((model.config.max_position_embeddings - 40) // 5))
    with serving(fresh) as served:
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        answer = served.client().post("/v1/chat/completions", json={"model": MODEL, "messages": messages}).json()
    assert answer["sources"] == [] and answer["notices"] == [
        "Documents were found and not read, since they do not fit the model's positions beside the question: ids 0."
    ]


def test_a_checkpoint_without_a_protocol_answers_from_its_memory(fresh: Path) -> None:
    with serving(fresh, protocol=None) as served:
        client, service = served.client(), served.service
        with ThreadPoolExecutor(3) as pool:
            with served.busy():
                sent = [pool.submit(ask, client, question, trace=True) for question in QUESTIONS[:3]]
                served.wait_for_waiting(3)
            found = [item.result() for item in sent]
        asker = DirectAsker(service.model, service.tokenizer, service.store.snapshot())
        for question, answer in zip(QUESTIONS[:3], found, strict=True):
            expected = asker.ask(question, max_new_tokens=NEW_TOKENS)
            assert text_of(answer) == expected.text
            assert [item["key"] for item in answer["sources"]] == [item.key for item in expected.documents][:16]
            assert answer["usage"]["prompt_tokens"] == len(service.tokenizer(question + "\n")["input_ids"])
            assert len(answer["trace"]["rounds"]) == 1
        whole = events(client, "/v1/chat/completions", chat(QUESTIONS[0]))
        assert "".join(item["choices"][0]["delta"].get("content", "") for item in whole) == text_of(found[0])
        empty = client.post("/v1/completions", json={"model": MODEL, "prompt": " "})
        assert (empty.status_code, empty.json()["error"]["param"]) == (400, "prompt")
        long = client.post("/v1/completions", json={"model": MODEL, "prompt": "reef " * 1500})
        assert long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
        ({"messages": None}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"seed": 2**70}, 400, "seed"),
        ({"no_such_option": 1}, 400, "no_such_option"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named(client: httpx.Client, changes: dict[str, Any], status: int, param: str) -> None:
    answer = client.post("/v1/chat/completions", json={**chat(QUESTIONS[0]), **changes})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"} and param.split("[")[0] in error["message"] + param
    assert error["type"] == "invalid_request_error"


def test_options_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    options = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": None, "user": "u"}
    assert ask(client, QUESTIONS[0], **options, response_format={"type": "text"}, stop=None, temperature=None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "half \\ud83d"}]}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "text", "bytes", "nan", "half a character", "deep", "long number"],
)
def test_what_is_no_request_is_refused(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert client.get("/healthz").status_code == 200


def test_models_are_listed(client: httpx.Client) -> None:
    assert [item["id"] for item in client.get("/v1/models").json()["data"]] == [MODEL]
    assert client.get(f"/v1/models/{MODEL}").json()["object"] == "model"
    assert client.get("/v1/models/other").status_code == 404


def test_a_client_that_goes_ends_its_generation(server: Served, client: httpx.Client) -> None:
    """Whether it waits, for a whole answer or a stream."""
    before = server.application.load.running
    for stream in (False, True):
        with server.busy():
            hasty = httpx.Client(base_url=server.url, timeout=0.2)
            with pytest.raises(httpx.TimeoutException):
                hasty.post("/v1/chat/completions", json=chat(QUESTIONS[0], stream=stream))
            hasty.close()
            server.wait_for(lambda: server.application.load.running == before)
    ask(client, QUESTIONS[0])


def test_a_stream_that_nobody_reads_ends(server: Served, client: httpx.Client, monkeypatch: Any) -> None:
    """At the next token, not at the last."""
    steps, go = [0], threading.Event()

    def slow(module: Any, arguments: Any) -> None:
        steps[0] += 1
        if steps[0] > 6:
            go.wait(20)

    hook = server.service.model.register_forward_pre_hook(slow)
    try:
        body = chat(QUESTIONS[0], stream=True, max_tokens=500)
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        server.wait_for(lambda: server.application.load.running == 0)
        go.set()
        ask(client, QUESTIONS[1])
    finally:
        go.set()
        hook.remove()
    assert steps[0] < 100


def test_what_takes_too_long_is_a_504(fresh: Path) -> None:
    with serving(fresh, Limits(seconds=0.3)) as served:
        client = served.client()
        with served.busy():
            late = client.post("/v1/chat/completions", json=chat(QUESTIONS[0]))
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            put = client.put("/v1/documents/late", json={"text": "Too late."})
            assert put.status_code == 504
    with serving(fresh) as served:
        assert served.client().get("/v1/documents/late").status_code == 404


def test_a_full_queue_is_a_429_with_the_time_to_wait(fresh: Path) -> None:
    with serving(fresh, Limits(waiting=2, requests=4)) as served, ThreadPoolExecutor(4) as pool:
        client = served.client()
        with served.busy():
            sent = [pool.submit(ask, client, question) for question in QUESTIONS[:2]]
            served.wait_for_waiting(2)
            for body in (chat(QUESTIONS[2]), chat(QUESTIONS[2], stream=True)):
                full = client.post("/v1/chat/completions", json=body)
                assert full.status_code == 429 and full.json()["error"]["type"] == "rate_limit_error"
                assert int(full.headers["retry-after"]) >= 1
            assert client.get("/v1/documents").status_code == 200  # needs no turn of the model
        assert all(text_of(item.result()) is not None for item in sent)
        figures = client.get("/metrics").text
        assert 'msa_hf_serve_rejected_total{reason="queue_full"} 2.0' in figures
        assert 'route="/v1/chat/completions",status="429"} 2.0' in figures
