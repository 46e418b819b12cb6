"""One-document commits to a bank, and what they cost: `main(directory, count)` prints JSON."""

import itertools
import json
import os
import resource
from pathlib import Path

from fake_model import FakeModel

from msa_hf.bank import BankStore

RUN = 60


def seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def written() -> int:
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(io["wchar"])


def held(directory: Path) -> tuple[int, int]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), sum(str(directory) in line for line in maps)


def main(directory: Path, count: int) -> None:
    with BankStore(FakeModel(), directory) as bank:
        times, most = [seconds()], (0, 0)
        start = written()
        for number in range(count):
            bank.upsert(f"key {number}", f"the text of document {number}", version=number)
            if number % RUN == RUN - 1:
                times.append(seconds())
                most = max(most[0], held(directory)[0]), max(most[1], held(directory)[1])
        each = (written() - start) / count
        bank.snapshot()
        most = max(most[0], held(directory)[0]), max(most[1], held(directory)[1])
        segments = bank.stat()["segments"]
    with BankStore(None, directory, read_only=True) as reader:
        bank = reader.snapshot()
        most = max(most[0], held(directory)[0]), max(most[1], held(directory)[1])
        documents = len(bank)
    runs = [after - before for before, after in itertools.pairwise(times)]
    print(
        json.dumps(
            {
                "documents": documents,
                "segments": segments,
                "descriptors": most[0],
                "mappings": most[1],
                "early": min(runs[1:4]),
                "late": min(runs[-3:]),
                "written": each,
            }
        )
    )
