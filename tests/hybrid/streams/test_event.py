"""Messages and events."""

from __future__ import annotations

import json

import pytest

from msa_hf.hybrid.streams import BadEvent, MemoryEvent, decode_event, encode_event
from msa_hf.hybrid.streams import event as event_module

GOOD = {"key": "k", "version": 3, "text": "t"}
BAD: list[tuple[object, str]] = [
    (b"", "not JSON"),
    (b"\xff", "not JSON"),
    (b"{" * 100_000, "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "a JSON list, not an object"),
    (b"null", "a JSON NoneType, not an object"),
    ({**GOOD, "vresion": 4}, "unknown fields ['vresion']"),
    ({"version": 3, "text": "t"}, "`key` must be a text that is not empty, got None"),
    ({**GOOD, "key": ""}, "`key` must be a text that is not empty"),
    ({**GOOD, "key": 7}, "`key` must be a text that is not empty, got 7"),
    ({**GOOD, "key": "é" * 513}, "`key` has 1026 bytes, at most 1024"),
    ({**GOOD, "key": "\ud800"}, "`key` is not Unicode"),
    ({"key": "k", "text": "t"}, "`version` must be an integer from 0 to 2^62, got None"),
    ({**GOOD, "version": "3"}, "`version` must be an integer"),
    ({**GOOD, "version": 3.0}, "`version` must be an integer"),
    ({**GOOD, "version": True}, "`version` must be an integer"),
    ({**GOOD, "version": -1}, "`version` must be an integer"),
    ({**GOOD, "version": 2**62 + 1}, "`version` must be an integer"),
    ({"key": "k", "version": 3}, "either `text` or `delete`"),
    ({**GOOD, "delete": True}, "either `text` or `delete`"),
    ({"key": "k", "version": 3, "delete": False}, "either `text` or `delete`"),
    ({"key": "k", "version": 3, "delete": "yes"}, "`delete` must be true or false, got 'yes'"),
    ({**GOOD, "text": 5}, "`text` must be a text"),
    ({**GOOD, "text": " \n"}, "`text` is empty"),
    ({**GOOD, "text": "é" * 51}, "`text` has 102 bytes, at most 100"),
    ({**GOOD, "text": "\udfff"}, "`text` is not Unicode"),
    ({**GOOD, "delete": 1}, "`delete` must be true or false, got 1"),
    ({"key": "k", "version": 3, "delete": 1}, "`delete` must be true or false, got 1"),
    ({**GOOD, "delete": None}, "`delete` must be true or false"),
    (b'{"key":"k","version":3,"text":"t","version":4}', "stands twice"),
    (b'{"key":"k","version":3,"text":"t","metadata":{"a":1,"a":2}}', "stands twice"),
    ({**GOOD, "metadata": [1]}, "`metadata` must be an object"),
    ({**GOOD, "metadata": []}, "`metadata` must be an object"),
    ({**GOOD, "metadata": ""}, "`metadata` must be an object"),
    ({**GOOD, "metadata": {"x": "y" * 2**20}}, "`metadata` has 1048585 bytes, at most 1048576"),
    ({**GOOD, "metadata": {"x": "\ud800"}}, "`metadata` is not JSON in Unicode"),
    (b'{"key":"k","version":3,"text":"t","metadata":{"x":NaN}}', "`metadata` is not JSON"),
]


@pytest.mark.parametrize(("body", "reason"), BAD, ids=range(len(BAD)))
def test_what_is_no_event_is_refused_with_the_reason(body: object, reason: str) -> None:
    with pytest.raises(BadEvent) as caught:
        decode_event(body if isinstance(body, bytes) else json.dumps(body).encode(), max_text=100)
    assert reason in str(caught.value) and len(str(caught.value)) < 400


def test_events_come_back_as_they_were() -> None:
    for event in (
        MemoryEvent("k", 0, "text", {}),
        MemoryEvent("é" * 512, 2**62, "line\nline \U0001f600", {"a": [1, {"b": None}]}),
        MemoryEvent("k", 5, None),
    ):
        assert decode_event(encode_event(event)) == event
    assert decode_event(b'{"key":"k","version":1,"text":"t","delete":false,"metadata":null}').metadata == {}


def test_what_is_far_too_long_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what may be an event with every character escaped is not."""
    event = MemoryEvent("k", 1, "\x01" * 1000)
    assert decode_event(encode_event(event), max_text=1000) == event
    most = event_module.ESCAPED * (1000 + event_module.MAX_KEY + event_module.MAX_METADATA) + 4096
    monkeypatch.setattr(event_module.json, "loads", lambda *given, **options: pytest.fail("was parsed"))
    with pytest.raises(BadEvent, match=f"{most + 1} bytes, more than {most}.*split it"):
        decode_event(b" " * (most + 1), max_text=1000)
