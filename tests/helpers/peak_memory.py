"""Readers whose memory is measured: `python peak_memory.py` runs one, in a fork of its own, for every line it reads.

A line is `reader path`; the answer is a line of JSON: bytes by which the resident memory grew at most, pages of mapped
files included, seconds, and the error that was raised.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ADDRESSES = 16 * 2**30  # that a reader may have: what asks for more than any machine has fails


def load(path: Path) -> None:
    from msa_hf.model.memory_msa import MemoryBank

    use(MemoryBank.from_pretrained(path))


def load_unverified(path: Path) -> None:
    from msa_hf.model.memory_msa import MemoryBank

    use(MemoryBank.from_pretrained(path, verify=False))


def open_bank(path: Path) -> None:
    from msa_hf.bank import BankDamaged, BankStore

    bank = BankStore(None, path, read_only=True)
    with suppress(BankDamaged):
        bank.get("k0")
    use(bank.snapshot())
    bank.verify()


def use(bank: Any) -> None:
    for _ in bank.documents:
        pass
    for layer in bank.layers.values():
        layer.routing_keys.sum()


def find_parts(path: Path) -> None:
    from msa_hf.bank.corpus_parts import Part, find_parts

    if not find_parts(path, [Part(0, 1, "part")]):
        raise ValueError("no part")


def search_words(path: Path) -> None:
    from msa_hf.retrieval.lexical_files import read_record

    if read_record(path) == {"kind": "msa_hf-lexical-index", "language": "english"}:
        raise ValueError("damaged")


def open_vectors(path: Path) -> None:
    from msa_hf.model.memory_msa import MemoryBank
    from msa_hf.retrieval.dense_files import open_vectors
    from msa_hf.retrieval.rows import CommittedRows

    bank = MemoryBank.from_pretrained(path)
    assert bank.home is not None
    open_vectors(path, CommittedRows(bank.home.commit, path, "", bank.documents))


def read_protocol(path: Path) -> None:
    from msa_hf.generation.protocol import PromptProtocol

    PromptProtocol.from_pretrained(path)


def read_fusion(path: Path) -> None:
    from msa_hf.retrieval.fusion import FusionWeights

    FusionWeights.from_pretrained(path)


def read_corpus(path: Path) -> None:
    from msa_hf.data.documents import Corpus

    Corpus(str(path))


def read_questions(path: Path) -> None:
    from msa_hf.data.questions import read_questions

    read_questions(path, {})


READERS = {
    reader.__name__: reader
    for reader in (
        load,
        load_unverified,
        open_bank,
        find_parts,
        search_words,
        open_vectors,
        read_protocol,
        read_fusion,
        read_corpus,
        read_questions,
    )
}


def main() -> None:
    import logging

    import torch

    import msa_hf.bank
    import msa_hf.data.documents
    import msa_hf.data.questions
    import msa_hf.generation.protocol
    import msa_hf.retrieval.dense_files
    import msa_hf.retrieval.fusion
    import msa_hf.retrieval.lexical_files  # noqa: F401

    logging.disable()
    torch.set_num_threads(1)
    load(Path(sys.argv[1]))  # what is imported on first use
    open_bank(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        reader, path = line.rstrip("\n").split(" ", 1)
        if os.fork() == 0:
            measure(READERS[reader], Path(path))
        os.wait()


def measure(read: Any, path: Path) -> None:
    """Run a reader, say what it took, and end the process."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    before, start, error = resident(), time.perf_counter(), None
    try:
        read(path)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {str(caught)[:500]}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"grown": grown, "seconds": time.perf_counter() - start, "error": error}), flush=True)
    os._exit(0)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Measured:
    """The process in which readers run."""

    def __init__(self, bank: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(bank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def run(self, reader: str, path: Path) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{reader} {path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"{reader} of {path} ended the process"
        found: dict[str, Any] = json.loads(answer)
        return found


@contextmanager
def measured(bank: Path) -> Iterator[Measured]:
    """A process that measures, started with a good bank."""
    made = Measured(bank)
    try:
        yield made
    finally:
        made.process.stdin.close()  # type: ignore[union-attr]
        made.process.wait()


if __name__ == "__main__":
    main()
