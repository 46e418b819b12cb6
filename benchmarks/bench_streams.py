"""Events per second from a Redis stream into a bank, with encoding and without.

    python benchmarks/bench_streams.py model_cards/msa-hf-tiny --events 4000 --batch 256 1024

Starts a redis-server of its own. Of the events 10 % delete, 20 % replace a document, 10 % come twice; documents have
about 36 tokens. The time that the model takes is measured around it: without encoding means without that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis
import torch
from transformers import AutoTokenizer

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.generation import PromptProtocol
from msa_hf.hybrid.streams import MemoryEvent, RedisSource, StreamConsumer, encode_event

WORDS = [
    "the",
    "of",
    "and",
    "station",
    "garden",
    "river",
    "keeper",
    "opens",
    "closes",
    "north",
    "bridge",
    "market",
    "in",
]


class TimedModel:
    """A model, and the seconds that encoding took."""

    def __init__(self, model: Any) -> None:
        self._model, self.device = model, model.device
        self.seconds, self.cpu_seconds, self.documents, self.tokens = 0.0, 0.0, 0, 0
        self.memory_origin, self.encode_prefix = model.memory_origin, model.encode_prefix

    def encode_documents(self, documents: Iterable[object], tokenizer: object = None, **options: object) -> MemoryBank:
        start, cpu = time.perf_counter(), time.process_time()
        bank: MemoryBank = self._model.encode_documents(documents, tokenizer, **options)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu
        self.documents += len(bank)
        self.tokens += bank.num_tokens
        return bank


def events(count: int, seed: int = 0) -> list[bytes]:
    """Messages; versions are numbers of events."""
    pick = random.Random(seed)
    keys: list[str] = []
    bodies: list[bytes] = []
    for number in range(count):
        if bodies and pick.random() < 0.1:
            bodies.append(pick.choice(bodies[-200:]))  # comes twice
            continue
        known = bool(keys) and pick.random() < 0.3
        key = pick.choice(keys) if known else f"document {number}"
        keys.append(key)
        text = None if known and pick.random() < 1 / 3 else " ".join(pick.choices(WORDS, k=pick.randint(12, 24)))
        bodies.append(encode_event(MemoryEvent(key, number, text, {"number": number})))
    return bodies


def measure(
    name: str, dtype: str, url: str, stream: str, batch: int, directory: Path, lexical: bool
) -> dict[str, object]:
    """Rates of applying a whole stream."""
    tokenizer, protocol = AutoTokenizer.from_pretrained(name), PromptProtocol.from_pretrained(name)
    model = TimedModel(MSAForCausalLM.from_pretrained(name, dtype=dtype).eval())
    with BankStore(model, directory, tokenizer, protocol, lexical=lexical) as bank:
        consumer = StreamConsumer(RedisSource(url, stream, f"batch-{batch}"), bank, batch_size=batch, wait=0.01)
        model.seconds = model.cpu_seconds = 0.0  # opening a bank may have encoded something
        model.documents = model.tokens = 0
        start, cpu = time.perf_counter(), time.process_time()
        metrics = consumer.run(until_idle=True)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        stat = bank.stat()
    return {
        "dtype": dtype,
        "batch": batch,
        "lexical": lexical,
        "events": metrics.events,
        "encoded_documents": model.documents,
        "encoded_tokens": model.tokens,
        "commits": metrics.commits,
        "segments": stat["segments"],
        "seconds": round(seconds, 2),
        "encoding_seconds": round(model.seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "encoding_cpu_seconds": round(model.cpu_seconds, 2),
        "events_per_second": round(metrics.events / seconds),
        "events_per_second_without_encoding": round(metrics.events / (seconds - model.seconds)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a checkpoint with a protocol")
    parser.add_argument("--events", type=int, default=4000)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lexical", action="store_true", help="keep a lexical index as well")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            url = f"redis://127.0.0.1:{port}"
            client = redis.Redis.from_url(url, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 100))
            pipeline = client.pipeline(transaction=False)
            for body in events(args.events):
                pipeline.xadd("events", {"event": body})
            pipeline.execute()
            for batch in args.batch:
                bank = Path(folder) / f"bank-{batch}"
                found.append(measure(args.model, args.dtype, url, "events", batch, bank, args.lexical))
                print(json.dumps(found[-1]), flush=True)
        finally:
            server.terminate()
            server.wait()
    if args.json is not None:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "redis": redis.__version__,
            "command": " ".join(["python", *sys.argv]),
        }
        args.json.write_text(json.dumps({"machine": machine, "runs": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
