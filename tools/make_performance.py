"""Put what benchmarks/bench_ops.py measured into the tables of docs/performance.md, between their markers.

    python tools/make_performance.py          # write
    python tools/make_performance.py --check  # say whether the document is what would be written

Reads docs/bench_ops.json (a GPU) and docs/bench_ops_cpu.json. Text outside the markers is left as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from computed_tables import run, table

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = {"gpu": ROOT / "docs" / "bench_ops.json", "cpu": ROOT / "docs" / "bench_ops_cpu.json"}
# Milliseconds that the published MSA code takes for 100M tokens, as measured on an H200 in a run of its own.
PUBLISHED = {"1 x 32": 56, "1 x 256": 103, "1 x 1024": 260, "16 x 32": 789}
NATIVE = {"gpu": "cuda", "cpu": "cpp"}

Row = dict[str, Any]


def load(machine: str) -> dict[str, Any]:
    return json.loads(RESULTS[machine].read_text())


def milliseconds(row: Row | None) -> str:
    """Of the replayed graph where there is one."""
    if row is None:
        return ""
    taken = row["call_ms"] if row["device_ms"] is None else row["device_ms"]
    return f"{taken:.4g}"


def with_goal(row: Row | None) -> str:
    """Time, share of the ceiling, and what was asked for."""
    if row is None:
        return ""
    text = milliseconds(row)
    if row["share"] is not None:
        times = row["ceiling"] == "times"
        text += f", {row['share']:.2f} {'x' if times else 'of ' + row['ceiling']}"
    if row["goal"] is not None:
        text += f" ({'>=' if row['reached'] else '**missed**'} {row['goal']:g})"
    return text


def found(rows: list[Row], operation: str) -> dict[tuple[str, str], Row]:
    """(case, backend) -> row."""
    return {(row["case"], row["backend"]): row for row in rows if row["operation"] == operation}


def machine_line(machine: str) -> str:
    """Hardware, versions, ceilings."""
    results = load(machine)
    ceilings = results["ceilings"]
    said = [f"copy {ceilings['copy'] / 1e9:,.1f} GB/s (read and written)"]
    kind = "matrix product" if "bus" in ceilings else "float32 matrix product"
    said += [f"{kind} {ceilings['matmul'] / 1e12:,.3g} TFLOP/s"]
    said += [f"pinned host to device {ceilings['bus'] / 1e9:,.3g} GB/s"] if "bus" in ceilings else []
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    tests = results["tests"].strip("= ")
    return "\n".join(
        [
            f"{results['hardware']}; {versions}; commit {results['commit']}.",
            f"Ceilings of the same run: {'; '.join(said)}.",
            f"Tests before it: {tests}.",
        ]
    )


def routing(machine: str) -> str:
    """A line per shape of queries and number of documents."""
    native = NATIVE[machine]
    rows = found(load(machine)["rows"], "route_documents")
    cases = list(dict.fromkeys(case.removesuffix(", bf16") for case, _ in rows if case.endswith(", bf16")))
    head = ["query", "chunks", "documents", "bf16, ms", "fp8, ms", "int8, ms", "recall"]
    head += ["Triton bf16, fp8"] if machine == "gpu" else []
    head += ["PyTorch operation", "plain products"] + (["published code"] if machine == "gpu" else [])
    lines = []
    for case in cases:
        query, chunks, documents = case.split(", ")
        quantized = {kind: rows.get((f"{case}, {kind} and scored again", native)) for kind in ("fp8", "int8")}
        recalls = [row["recall"] for row in quantized.values() if row is not None]
        line = [query, chunks.removesuffix(" chunks"), documents.removesuffix(" documents")]
        line += [with_goal(rows.get((f"{case}, bf16", native))), *map(with_goal, quantized.values())]
        line += [f"{min(recalls):.4f}" if recalls else ""]
        if machine == "gpu":
            triton = [rows.get((f"{case}, {kind}", "triton")) for kind in ("bf16", "fp8 and scored again")]
            line += [", ".join(filter(None, map(milliseconds, triton)))]
        line += [milliseconds(rows.get((f"{case}, bf16", name))) for name in ("pytorch", "plain matmul")]
        line += [str(PUBLISHED.get(query, ""))] if machine == "gpu" else []
        lines.append(line)
    return table(head, lines)


def others(machine: str, operation: str) -> str:
    """A line per case: native with its share, and the other implementations."""
    native = NATIVE[machine]
    rows = found(load(machine)["rows"], operation)
    cases = list(dict.fromkeys(case for case, _ in rows))
    names = [name for name in ("triton", "pytorch", "as published") if any(name == backend for _, backend in rows)]
    titles = {"triton": "Triton, ms", "pytorch": "PyTorch, ms", "as published": "as published, ms"}
    lines = []
    for case in cases:
        row = rows.get((case, native))
        rate = "" if row is None else f"{row['bytes'] / float(milliseconds(row)) / 1e6:,.1f}"
        cells = [case, "" if row is None else f"{row['bytes'] / 1e6:,.1f}", milliseconds(row), rate, shares(row)]
        lines.append([*cells, *(milliseconds(rows.get((case, name))) for name in names)])
    return table(["what", "MB", f"{native}, ms", "GB/s", "share", *(titles[name] for name in names)], lines)


def shares(row: Row | None) -> str:
    """Share of the ceiling, and what was asked for: a share, or GB/s."""
    if row is None or row["share"] is None:
        return ""
    text = f"{row['share']:.2f} of {row['ceiling']}"
    if row["goal"] is not None:
        unit = " GB/s" if row["goal"] > 2 else ""
        text += f" ({'>=' if row['reached'] else '**missed**'} {row['goal']:g}{unit})"
    return text


def recalls(machine: str) -> str:
    """Share of the exact documents among candidates."""
    measured = load(machine)["recall"]
    counts = list(dict.fromkeys(count for kinds in measured.values() for shares in kinds.values() for count in shares))
    lines = [
        [f"{keys}, {kind}", *(f"{shares[count]:.4f}" if count in shares else "" for count in counts)]
        for keys, kinds in measured.items()
        for kind, shares in kinds.items()
    ]
    return table(["keys", *(f"{count} candidates" for count in counts)], lines)


def memory(machine: str) -> str:
    """Most that a call took beyond its inputs, by operation, as a sentence."""
    rows = load(machine)["rows"]
    said = []
    for operation in ("route_documents", "pool_chunks", "gather_documents"):
        of = [row for row in rows if row["operation"] == operation and row["peak_MB"] is not None]
        mine = max((row["peak_MB"] for row in of if row["backend"] == NATIVE[machine]), default=0.0)
        reference = max((row["peak_MB"] for row in of if row["backend"] == "pytorch"), default=0.0)
        said.append(f"`{operation}` {mine:,.1f} MB ({reference:,.1f} in PyTorch)")
    return f"Memory beyond the inputs, results included, the most of any case: {', '.join(said)}."


TABLES: dict[str, Callable[[], str]] = {
    f"{name} on the {machine}": partial(make, machine)
    for machine in RESULTS
    for name, make in {
        "machine": machine_line,
        "routing": routing,
        "pooling": partial(others, operation="pool_chunks"),
        "gathering": partial(others, operation="gather_documents"),
        "recall": recalls,
        "memory": memory,
    }.items()
}


def main(arguments: list[str] | None = None) -> int:
    return run("make_performance.py", __doc__, DOCUMENT, TABLES, arguments)


if __name__ == "__main__":
    sys.exit(main())
