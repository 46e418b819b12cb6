"""Run the code of a notebook in this process, cell by cell, and keep what it prints as the cells' outputs.

    python tools/run_notebook.py docs/tutorial.ipynb          # write
    python tools/run_notebook.py docs/tutorial.ipynb --check  # change nothing; exit code 1 if a cell prints otherwise

It needs no Jupyter. Cells print what they show: a value on a cell's last line is not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the notebook with the outputs of a run.

    Raises:
        Exception: whatever a cell raises; the file name in its traceback is the notebook's with the cell's number.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    count = 0
    for number, cell in enumerate(notebook["cells"]):
        cell = dict(cell)
        if cell["cell_type"] == "code":
            count += 1
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"{name}[{number}]", "exec"), names)
            text = printed.getvalue().splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
            cell["execution_count"] = count
        cells.append(cell)
    return {**notebook, "cells": cells}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a cell prints otherwise")
    options = parser.parse_args(arguments)
    old = json.loads(options.notebook.read_text(encoding="utf-8"))
    new = run(old, options.notebook.name)
    for number, (before, after) in enumerate(zip(old["cells"], new["cells"], strict=True)):
        if before != after:
            print(f"{options.notebook}: cell {number} prints", *after["outputs"][:1], sep="\n", file=sys.stderr)
    if not options.check:
        options.notebook.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(options.check and old != new)


if __name__ == "__main__":
    sys.exit(main())
