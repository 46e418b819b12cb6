"""Time and files of changing a bank at several sizes: opening, adding, deleting, looking up, snapshots, compaction.

    python benchmarks/bench_bank.py --documents 10000 100000 1000000 --directory /tmp/bench --json docs/bench_bank.json

Content is synthetic and small (one memory layer of 2 groups of 4), so that the number of documents is what is measured
and a million of them fit on any disk. Documents are one chunk each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from msa_hf.bank import BankStore
from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable, MemoryBank

GROUPS, DIM, LAYER = 2, 4, 0
CHANGED = 1000


class Synthetic:
    """Stands for a model: encodes any document as one chunk of random numbers."""

    device = torch.device("cpu")

    def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
        return BankOrigin("0" * 64, None, "synthetic", 64, (LAYER,), "cosine", False, ())

    def encode_documents(self, documents: Iterable[Any], tokenizer: Any = None, **options: Any) -> MemoryBank:
        rows = [
            Document(str(row.get("key", place)) if isinstance(row, dict) else str(place), None, None, 64, 1)
            for place, row in enumerate(documents)
        ]
        count = len(rows)
        numbers = torch.randn(count, 3 * GROUPS * DIM).to(torch.bfloat16)
        memory = DenseLayer(
            numbers[:, : GROUPS * DIM].contiguous(),
            numbers[:, GROUPS * DIM :].reshape(count, 2, GROUPS, DIM).contiguous(),
        )
        return MemoryBank({LAYER: memory}, torch.arange(count + 1), {}, DocumentTable(rows), self.memory_origin())


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what came of it."""
    start = time.perf_counter()
    result = run()
    return 1e3 * (time.perf_counter() - start), result


def text_of(row: int) -> str:
    return f"Document {row} says that its number is {row} and that {row % 97} is what remains after 97. " * 2


def documents(first: int, end: int) -> list[dict[str, Any]]:
    return [{"key": f"key-{row}", "text": text_of(row)} for row in range(first, end)]


def measure(count: int, directory: Path) -> dict[str, Any]:
    """All figures of one size, milliseconds."""
    figures: dict[str, Any] = {"documents": count}
    step = 250_000
    bank = BankStore(Synthetic(), directory)
    figures["build"] = sum(
        timed(lambda first=first: bank.add(documents(first, min(first + step, count))))[0]
        for first in range(0, count, step)
    )
    bank.close()
    figures["bytes"] = sum(path.stat().st_size for path in directory.iterdir())
    figures["open"], bank = timed(lambda: BankStore(Synthetic(), directory))

    def change(first: int) -> None:
        for row in range(first, first + CHANGED):
            bank.delete(f"key-{row * (count // (4 * CHANGED))}", 1)

    def deleted(first: int) -> None:
        with bank.batch():
            change(first)

    figures["lookup_1000"], _ = timed(lambda: [bank.get(f"key-{row}") for row in range(count - CHANGED, count)])
    figures["add_1000"], _ = timed(lambda: bank.add(documents(count, count + CHANGED)))
    figures["delete_1000"], _ = timed(lambda: deleted(0))
    figures["add_one"], _ = timed(lambda: bank.add(documents(count + CHANGED, count + CHANGED + 1)))
    figures["first_snapshot"], _ = timed(bank.snapshot)
    bank.add(documents(2 * count, 2 * count + 1))  # makes room in memory, once
    figures["add_1000_in_memory"], _ = timed(lambda: bank.add(documents(2 * count + 1, 2 * count + 1 + CHANGED)))
    figures["delete_1000_in_memory"], _ = timed(lambda: deleted(CHANGED))
    figures["snapshot"], _ = timed(bank.snapshot)
    figures["verify"], damage = timed(bank.verify)
    assert damage == []
    figures["compact"], _ = timed(bank.compact)
    assert len(bank) == count + 2  # as many were deleted as added, but two
    bank.close()
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--directory", type=Path, help="where the banks are made, and removed again")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for count in args.documents:
        if args.directory is not None:
            args.directory.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=args.directory))
        try:
            rows.append(measure(count, place))
        finally:
            shutil.rmtree(place)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    names = [name for name in rows[0] if name not in ("documents", "bytes", "peak_bytes")]
    print(f"{'milliseconds':24}" + "".join(f"{row['documents']:>14,}" for row in rows))
    for name in names:
        print(f"{name:24}" + "".join(f"{row[name]:14.1f}" for row in rows))
    for name in ("bytes", "peak_bytes"):
        print(f"{name:24}" + "".join(f"{row[name]:14,}" for row in rows))
    if args.json is not None:
        machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
        args.json.write_text(
            json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
