"""Jupyter notebooks: their texts, their code, and what the code wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ...json_object import JsonObject
from ...model.bounds_msa import check_json
from ..errors import DataError
from ..lines import read_text


def read_ipynb(path: Path, encoding: str | None) -> JsonObject:
    """The cells of a notebook in order, with what code wrote as text behind it; blank lines divide them.

    Images and pages in outputs are left out, and so are errors.
    """
    text = read_text(path, encoding)
    if not text.strip():
        return {"text": ""}
    try:
        check_json(text)
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a notebook, as it is not valid JSON ({error})") from error
    try:
        return {"text": "\n\n".join(piece for piece in _pieces(notebook) if piece.strip())}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a notebook that can be read ({type(error).__name__}: {error})") from error


def _pieces(notebook: JsonObject) -> Iterator[str]:
    sheets = [notebook] if "cells" in notebook else notebook["worksheets"]  # as notebooks before version 4 had
    for sheet in sheets:
        for cell in sheet["cells"]:
            yield _joined(cell["input"] if "input" in cell else cell["source"])
            for output in cell.get("outputs", ()):
                written = output.get("data", output)
                yield _joined(written.get("text/plain", written.get("text", "")))


def _joined(lines: str | list[str]) -> str:
    """A text, which notebooks keep whole or as lines."""
    return (lines if isinstance(lines, str) else "".join(lines)).rstrip()
