"""Many queries over one snapshot of a bank, in Ray tasks on as many machines as there are.

    python examples/deploying/ray_batch.py my-bank queries.txt

A snapshot is sent by value: machines need no file of the bank, and all of them search the same state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray

from msa_hf.bank import BankStore
from msa_hf.model.memory_msa import MemoryBank

PART = 100  # queries of a task


@ray.remote
def found(bank: MemoryBank, queries: list[str]) -> list[list[str]]:
    """The keys of the best documents for each query, by words."""
    return [[hit.key for hit in hits] for hits in bank.search(queries, k=3, mode="lexical")]


def search_all(directory: str, queries: list[str], part: int = PART) -> list[list[str]]:
    """The keys that fit each query, in order."""
    with BankStore(None, directory, read_only=True) as bank:
        snapshot = ray.put(bank.snapshot())  # once; each machine fetches it once
    tasks = [found.remote(snapshot, queries[start : start + part]) for start in range(0, len(queries), part)]
    return [keys for task in ray.get(tasks) for keys in task]


if __name__ == "__main__":
    queries = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    for query, keys in zip(queries, search_all(sys.argv[1], queries), strict=True):
        print(json.dumps({"query": query, "keys": keys}, ensure_ascii=False))
