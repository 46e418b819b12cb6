"""A consumer to be killed, and events for it: `python stream_worker.py` forks one for every line it reads.

A line is a JSON object: `bank`, `url`, `stream`, `group`, `batch`. The worker says `pid n`, and `dead` when it is gone.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile

from msa_hf.hybrid.streams import MemoryEvent, RedisSource, StreamConsumer, encode_event, open_when_free

State = dict[str, tuple[int, str | None, dict[str, object]]]  # key -> version, text or None, metadata
BAD = [b"no JSON", b'{"key":"","version":1,"text":"x"}', b'{"key":"k","version":-1,"text":"x"}', b"\xff\xfe"]


def events(count: int, first: int = 0, seed: int = 0) -> list[MemoryEvent]:
    """Events whose version is their number; two with the same key and version are the same."""
    found = []
    for number in range(first, first + count):
        pick = random.Random(f"{seed}/{number}")
        text = None if pick.random() < 0.25 else f"text {number} " + "x" * pick.randint(0, 9)
        metadata: dict[str, object] = {"number": number} if text is not None and pick.random() < 0.5 else {}
        found.append(MemoryEvent(f"key {pick.randrange(40)}", number, text, metadata))
    return found


def disordered(ordered: list[MemoryEvent], pick: random.Random) -> list[bytes]:
    """Messages of events as a stream may bring them: a fifth twice or more, moved by up to 20 places, some bad."""
    placed = [(place, encode_event(event)) for place, event in enumerate(ordered)]
    placed += [pick.choice(placed) for _ in range(len(placed) // 5)] if placed else []
    placed += [(pick.randrange(len(ordered) + 1), pick.choice(BAD)) for _ in range(len(ordered) // 25)]
    return [body for _, body in sorted(placed, key=lambda item: item[0] + pick.uniform(0, 20))]


def expected(happened: list[MemoryEvent]) -> dict[str, tuple[str, dict[str, object] | None, int]]:
    """Text, metadata and version by key, after every event was seen once."""
    state: State = {}
    for event in happened:
        if event.version > state.get(event.key, (-1, None, {}))[0]:
            state[event.key] = (event.version, event.text, event.metadata)
    return {key: (text, data or None, version) for key, (version, text, data) in state.items() if text is not None}


def work(told: dict[str, str]) -> None:
    bank = open_when_free(lambda: BankStore(FakeModel(), told["bank"]), poll=0.01)
    source = RedisSource(told["url"], told["stream"], told["group"])
    StreamConsumer(source, bank, batch_size=int(told["batch"]), wait=0.2).run()


if __name__ == "__main__":
    import torch
    from fake_model import FakeModel

    from msa_hf.bank import BankStore
    from msa_hf.hybrid.streams import InMemorySource

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm, BankStore(FakeModel(), warm) as first_bank:
        # What is imported on first use is there before the first fork.
        StreamConsumer(InMemorySource(map(encode_event, events(30))), first_bank).step()
        import redis as redis

    for line in sys.stdin:
        if (child := os.fork()) == 0:
            try:
                os.write(1, f"pid {os.getpid()}\n".encode())
                work(json.loads(line))
            finally:
                os._exit(1)
        if not json.loads(line).get("background"):
            os.waitpid(child, 0)
            os.write(1, b"dead\n")
