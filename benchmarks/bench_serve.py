"""Requests per second, latencies and wrong answers of `msa-hf serve` under clients that ask while documents change.

    python benchmarks/bench_serve.py model_cards/msa-hf-tiny --documents 300 --clients 1 8 50 --seconds 60

The documents are an invented world's, so that every answer is known. Clients ask one-hop and two-hop questions, each
client the next one once it has its answer. Writers beside them put in a document, ask for a fact of it, delete it, and
ask again: the answer must be there, and then gone. Asked are questions that the checkpoint answers rightly alone, with
and without the documents that come and go; so whatever is wrong is the server's fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.evaluation.metrics import exact_match
from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.synthetic.corpora import Question, make_corpus

SEED = 15
NEW_TOKENS = 24
CHANGING = 16  # documents that come and go


@dataclass
class Work:
    """What clients and writers do, and what must come of it."""

    asked: list[Question]
    changing: list[tuple[str, str, Question]]  # key, text and a question of it


@dataclass
class Load:
    """What came of it, for one number of clients.

    Attributes:
        wrong: answers that are not the known one.
        stale: answers of writers that do not know a document which was put in, or know one that was deleted.
        failed: requests that were not answered with 200, by status.
    """

    clients: int
    writers: int
    seconds: float = 0.0
    requests: int = 0
    requests_per_second: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    commits: int = 0
    commit_p50: float = 0.0
    commit_p99: float = 0.0
    questions_per_batch: float = 0.0
    wrong: int = 0
    stale: int = 0
    failed: dict[str, int] = field(default_factory=dict)


def prepare(checkpoint: str, documents: int, directory: Path) -> Work:
    """Make the bank, and choose questions that the checkpoint answers rightly, whatever changes meanwhile."""
    tokenizer, protocol = AutoTokenizer.from_pretrained(checkpoint), PromptProtocol.from_pretrained(checkpoint)
    model = MSAForCausalLM.from_pretrained(checkpoint).eval()
    corpus = make_corpus(documents + CHANGING, seed=SEED, split="test")
    texts = corpus.texts()
    kinds = [corpus.questions(3 * documents, "one_hop", SEED), corpus.questions(60, "two_hop", SEED)]
    questions = [item for kind in kinds for item in kind]
    stable = [item for item in questions if all(place < documents for place in item.positives)][:160]
    new = {item.positives[0]: item for item in reversed(kinds[0]) if item.positives[0] >= documents}
    with BankStore(model, directory, tokenizer, protocol) as store:
        store.add([{"key": f"doc-{place}", "text": text} for place, text in enumerate(texts[:documents])])
        without = store.snapshot()
        asker = MemoryInterleave(model, tokenizer, without, protocol, max_new_tokens=NEW_TOKENS)
        before = [answer.text for answer in asker.ask([item.text for item in stable], batch_size=16)]
        keys = {place: f"doc-{place}" for place in sorted(new)}
        store.add([{"key": key, "text": texts[place]} for place, key in keys.items()])
        asker = MemoryInterleave(model, tokenizer, store.snapshot(), protocol, max_new_tokens=NEW_TOKENS)
        after = [answer.text for answer in asker.ask([item.text for item in stable], batch_size=16)]
        known = [answer.text for answer in asker.ask([item.text for item in new.values()], batch_size=16)]
        for key in keys.values():
            store.delete(key)
    asked = [
        item
        for item, one, other in zip(stable, before, after, strict=True)
        if exact_match(one, item.answer) and exact_match(other, item.answer)
    ]
    changing = [
        (keys[place], texts[place], item)
        for (place, item), text in zip(new.items(), known, strict=True)
        if exact_match(text, item.answer)
    ]
    print(f"{len(asked)} questions and {len(changing)} documents that come and go", file=sys.stderr)
    return Work(asked, changing)


class Clients:
    """Clients and writers at work on a server."""

    def __init__(self, url: str, name: str, work: Work, load: Load) -> None:
        self.url, self.name, self.work, self.load = url, name, work, load
        self.taken: list[float] = []
        self.commits: list[float] = []

    async def run(self, seconds: float) -> None:
        """Ask for so long, and fill in the figures."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            before = await self.figures(client)
            self.end = (start := time.perf_counter()) + seconds
            shares = [self.work.changing[number :: self.load.writers] for number in range(self.load.writers)]
            asking = [self.ask_on(client, number) for number in range(self.load.clients)]
            await asyncio.gather(*asking, *(self.write_on(client, share) for share in shares))
            after, load = await self.figures(client), self.load
            load.seconds = time.perf_counter() - start
        batches = after["batch_questions_count"] - before["batch_questions_count"]
        load.questions_per_batch = (after["batch_questions_sum"] - before["batch_questions_sum"]) / max(batches, 1)
        load.requests, load.commits = len(self.taken), len(self.commits)
        load.requests_per_second = load.requests / load.seconds
        load.p50, load.p99 = quantiles(self.taken)
        load.commit_p50, load.commit_p99 = quantiles(self.commits)

    async def figures(self, client: httpx.AsyncClient) -> dict[str, float]:
        """The server's own counts."""
        lines = (await client.get("/metrics")).text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("msa_hf_serve_batch_questions_"))
        return {name.removeprefix("msa_hf_serve_"): float(value) for name, value in found.items()}

    async def ask(self, client: httpx.AsyncClient, question: Question) -> str | None:
        """An answer; None where there was none."""
        body = {"model": self.name, "messages": [{"role": "user", "content": question.text}], "max_tokens": NEW_TOKENS}
        start = time.perf_counter()
        answer = await client.post("/v1/chat/completions", json=body)
        self.taken.append(time.perf_counter() - start)
        if answer.status_code != 200:
            self.load.failed[str(answer.status_code)] = self.load.failed.get(str(answer.status_code), 0) + 1
            return None
        return answer.json()["choices"][0]["message"]["content"]

    async def ask_on(self, client: httpx.AsyncClient, number: int) -> None:
        """One client."""
        pick = random.Random(number)
        while time.perf_counter() < self.end:
            question = pick.choice(self.work.asked)
            text = await self.ask(client, question)
            if text is not None and not exact_match(text, question.answer):
                self.load.wrong += 1
                print(f"wrong: {question.text!r}: {text!r}, not {question.answer!r}", file=sys.stderr)

    async def write_on(self, client: httpx.AsyncClient, documents: list[tuple[str, str, Question]]) -> None:
        """One writer."""
        while time.perf_counter() < self.end:
            for key, text, question in documents:
                await self.commit(client.put(f"/v1/documents/{key}", json={"text": text}))
                found = await self.ask(client, question)
                self.load.stale += found is not None and not exact_match(found, question.answer)
                await self.commit(client.delete(f"/v1/documents/{key}"))
                found = await self.ask(client, question)
                self.load.stale += found is not None and exact_match(found, question.answer)
                if time.perf_counter() > self.end:
                    return

    async def commit(self, request: Any) -> None:
        """A change, timed."""
        start = time.perf_counter()
        (await request).raise_for_status()
        self.commits.append(time.perf_counter() - start)


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    if len(seconds) < 2:
        return (seconds[0], seconds[0]) if seconds else (0.0, 0.0)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return cuts[49], cuts[98]


def start_server(checkpoint: str, bank: Path, batch: int) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its URL."""
    command = ["serve", checkpoint, str(bank), "--port", "0", "--max-batch", str(batch), "--name", "model"]
    code = "import sys; from msa_hf.cli import main; sys.exit(main())"
    server = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if "documents at" in line:
            return server, line.split()[-1]
    raise SystemExit(f"the server ended with {server.wait()}")


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a checkpoint with a protocol")
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 50])
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="--max-batch of the server (default: 16)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of clients (default: 60)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(arguments)
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(args.model, args.documents, Path(folder, "bank"))
        server, url = start_server(args.model, Path(folder, "bank"), args.batch)
        try:
            for clients in args.clients:
                load = Load(clients, args.writers)
                asyncio.run(Clients(url, "model", work, load).run(args.seconds))
                print(json.dumps(asdict(load)), flush=True)
                loads.append(load)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(120)
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_of_the_machine": os.getloadavg()[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", *sys.argv]),
        "exit_code_of_the_server": code,
    }
    if args.json is not None:
        record = {"machine": machine, "loads": [asdict(load) for load in loads]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(bool(code) or any(load.wrong or load.stale or load.failed for load in loads))


if __name__ == "__main__":
    sys.exit(main())
