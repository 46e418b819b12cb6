"""Write the tables of docs/benchmarks.md from results of `msa-hf bench`, between their markers.

    python tools/make_benchmarks.py          # write
    python tools/make_benchmarks.py --check  # say whether the document is what would be written

Text outside the markers is left as it is.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from pathlib import Path

from computed_tables import run, table

from msa_hf.bench.report import short
from msa_hf.bench.result import Result

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENT = DOCS / "benchmarks.md"
# Name of a table -> the file of results, and the axes of its rows.
RESULTS = {
    "needles of msa-hf-tiny": ("bench_needles_tiny.json", ("kind", "tokens")),
    "chains of msa-hf-tiny": ("bench_chains_tiny.json", ("kind", "tokens")),
    "twins of msa-hf-tiny": ("bench_chains_tiny.json", ("twin_of", "tokens")),
    "chains of msa-hf-tiny, 1M tokens": ("bench_chains_tiny_1m.json", ("kind", "tokens")),
    "needles of msa-hf-smollm2-135m": ("bench_needles_smollm2.json", ("kind", "tokens")),
    "needles of msa-hf-smollm2-135m, router": ("bench_needles_smollm2_router.json", ("kind", "tokens")),
    "needles of msa-hf-smollm2-135m, hybrid": ("bench_needles_smollm2_hybrid.json", ("kind", "tokens")),
    "needles of msa-hf-smollm2-135m, hybrid, 256K": ("bench_needles_smollm2_hybrid_256k.json", ("kind", "tokens")),
    "needles of msa-hf-smollm2-135m, hybrid, 120K": ("bench_needles_smollm2_hybrid_120k.json", ("kind", "tokens")),
    "needles of msa-hf-smollm2-135m, hybrid, 1M": ("bench_needles_smollm2_hybrid_1m.json", ("kind", "tokens")),
    "needles of msa-hf-smollm2-135m, hybrid, 1M, three times as many": (
        "bench_needles_smollm2_hybrid_1m_81.json",
        ("kind", "tokens"),
    ),
    "needles of msa-hf-smollm2-135m, hybrid, 10M": ("bench_needles_smollm2_hybrid_10m.json", ("kind", "tokens")),
    "several needles of msa-hf-smollm2-135m, hybrid": ("bench_needles_smollm2_several.json", ("kind", "tokens")),
    "scaling of msa-hf-tiny among articles": ("bench_scaling_tiny_wikipedia.json", ("kind", "tokens")),
    "msa-hf-tiny on this documentation": ("bench_mine_tiny.json", ("kind", "hops", "tokens")),
}


def measured(file: str, axes: tuple[str, ...]) -> str:
    """A table of shares with intervals and what broke, and below it how it was measured."""
    result = Result.load(DOCS / file)
    rows = []
    for cell in result.cells(*axes):
        broke = Counter(
            str(trial.detail["broke"])
            for trial in result.trials
            if not trial.right and tuple({"kind": trial.kind, **trial.axes}.get(axis) for axis in axes) == cell.values
        )
        words = ", ".join(f"{count} {rung}" for rung, count in sorted(broke.items()))
        rows.append([*map(short, cell.values), f"{cell.right} of {cell.asked}", str(cell), words])
    return f"{table([*axes, 'right', 'share', 'what broke'], rows)}\n\n{how(result)}"


def how(result: Result) -> str:
    """Hardware, versions, time and command of a result's longest run, in a sentence and a block.

    The last one may have found everything answered, on another machine, and written a page.
    """
    longest = max(result.runs, key=lambda run: run["seconds"])
    versions = ", ".join(f"{name} {longest['versions'][name]}" for name in ("torch", "transformers"))
    seconds = sum(run["seconds"] for run in result.runs)
    said = f"{longest['hardware']}, {result.model['dtype']}, {versions}; {seconds:.0f} s, on a machine with other work:"
    return f"{said}\n\n```bash\n{longest['command']}\n```"


TABLES = {name: partial(measured, *given) for name, given in RESULTS.items()}


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, or compare them; returns the exit code."""
    return run("make_benchmarks.py", __doc__, DOCUMENT, TABLES, arguments)


if __name__ == "__main__":
    sys.exit(main())
