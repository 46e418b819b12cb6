"""Banks of earlier format versions: what their first commit makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...generation.document_ids import DocumentIds
from ...model.bank_format_msa import FORMAT_VERSION, Manifest, format_error, lineage_of
from ...model.memory_msa import DocumentTable
from .segments import Segment, with_ids


def as_version_2(path: Path, manifest: Manifest, segments: Sequence[Segment]) -> Manifest:
    """A manifest of format version 1 as the first commit will write it, its documents with the ids they have.

    Raises:
        BankFormatError: about the manifest at `path`, if two documents have the same id.
    """
    first = 0
    given: list[int | None] = []
    for segment in segments:
        documents = DocumentTable(segment.table.drop_columns(["id", "version", "digest"]))
        numbers = [DocumentIds.of(first + row, document) for row, document in enumerate(documents)]
        own = [
            first + row == number and (document.metadata or {}).get("id") != number
            for row, (number, document) in enumerate(zip(numbers, documents, strict=True))
        ]
        given += [None if mine else number for mine, number in zip(own, numbers, strict=True)]
        first += len(segment)
    stored = [number for number in given if number is not None]
    if len(set(stored)) < len(stored):
        raise format_error(path, "two documents have the same id in their metadata", "Encode the documents again")
    taken, next_id = set(stored), max([first - 1, *stored]) + 1
    ids = np.empty(first, np.int64)
    for position, number in enumerate(given):
        if number is None and position in taken:  # a stored id has the right of way
            number, next_id = next_id, next_id + 1
        ids[position] = position if number is None else number
    first = 0
    for segment in segments:
        plain = segment.table.drop_columns(["id", "version", "digest"])
        segment.table = with_ids(plain, ids[first : first + len(segment)])
        first += len(segment)
    return {**manifest, "format_version": 2, "generation": 0, "next_id": next_id, "deletions": []}


def as_version_3(manifest: Manifest) -> Manifest:
    """A manifest of format version 2 as the next checkpoint will write it: with a log."""
    return {
        **manifest,
        "format_version": FORMAT_VERSION,
        "lineage": lineage_of(manifest),
        "checkpoint": manifest["generation"],
        "watermark": None,
    }
