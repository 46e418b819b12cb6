"""Writing computed tables into a document, as the make_*.py do: its text outside the markers is left as it is."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Tables = Mapping[str, Callable[[], str]]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    names = list(header)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(text: str, tables: Tables) -> str:
    """The document with its tables computed again."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- computed: {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        text, count = pattern.subn(lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"error: the document has {count} places for the table {name!r}")
    return text


def run(script: str, description: str | None, document: Path, tables: Tables, arguments: list[str] | None) -> int:
    """The command line of the script that computes these tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the tables differ")
    parser.add_argument("--document", type=Path, default=document)
    options = parser.parse_args(arguments)
    old = options.document.read_text()
    new = written(old, tables)
    if options.check:
        if new != old:
            print(f"{options.document}: not what tools/{script} writes", file=sys.stderr)
        return int(new != old)
    options.document.write_text(new)
    return 0
