"""A small JSON file beside a bank's manifest that says what is kept with the bank, and of which commit it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..json_object import JsonObject
from ..model.bank_writer_msa import write_text
from ..model.bounds_msa import read_json


def read_sidecar(path: Path, kind: str) -> JsonObject | None:
    """What a file says; None where there is none, or one that is damaged or of another `kind`: it is then made anew."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("kind") == kind else None


def write_sidecar(path: Path, record: Mapping[str, object]) -> None:
    """Put a record in the place of the file that lies there, as a whole."""
    write_text(path, json.dumps(record, indent=2) + "\n", path.stem)
