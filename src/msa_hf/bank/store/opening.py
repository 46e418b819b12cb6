"""What a directory holds when a bank is opened there: its contents, and what an interrupted writer left."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.memory_msa import BankOrigin, MemoryBank
from ...model.storage_msa import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    LEFTOVER,
    MANIFEST,
    OWN_FILE,
    BankFormatError,
    data_files,
    format_error,
    library_version,
    read_deletions,
    read_manifest,
    read_prefix,
    remove_leftover,
)
from .segments import Damage, Loss, Segment, damage_of
from .version_1 import as_version_2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What a manifest names.

    Attributes:
        manifest: of the current format version.
        segments: in order; what of them is lost is marked in them.
        deleted: [n] int64 rows of deleted documents, ascending.
        versions: of deleted keys, by the hash of the key.
        prefix: keys and values per layer, None where their file is damaged.
        damage: what is not what was written.
    """

    manifest: dict[str, Any]
    segments: tuple[Segment, ...]
    deleted: np.ndarray
    versions: dict[tuple[int, int], int]
    prefix: dict[int, tuple[Tensor, Tensor]] | None
    damage: list[Damage]


def read_contents(
    directory: Path, manifest: dict[str, Any], opened: Iterable[Segment], device: torch.device
) -> Contents:
    """Open what a manifest names, the prefix on `device`; segments that are `opened` already are taken over.

    Raises:
        BankFormatError: for what a bank cannot do without, and where a writer changes it meanwhile.
    """
    old = {item.record["table"]["file"]: item for item in opened}
    segments: list[Segment] = []
    losses: list[tuple[Segment, Loss]] = []
    for record in manifest["segments"]:
        known = old.get(record["table"]["file"])
        if known is not None and known.record == record:
            segments.append(known)
        else:
            segment, found = Segment.open(directory, record, manifest)
            segments.append(segment)
            losses += [(segment, loss) for loss in found]
    if losses and read_manifest(directory)["checksum"] != manifest["checksum"]:
        raise BankFormatError("The bank was changed while it was opened.")
    deleted, keys = read_deletions(directory, manifest)
    damage = [damage_of(segment, loss, deleted) for segment, loss in losses]
    versions: dict[tuple[int, int], int] = {}
    for first, second, version in keys.tolist():
        versions[first, second] = max(version, versions.get((first, second), -1))
    prefix = None
    try:
        prefix = read_prefix(directory, manifest, device, verify=True)
    except BankFormatError as error:
        damage.append(Damage(manifest["prefix"]["file"], str(error)))
    if manifest["format_version"] == 1:
        manifest = as_version_2(manifest, segments)
    return Contents(manifest, tuple(segments), deleted, versions, prefix, damage)


def origin_of(directory: Path, manifest: Mapping[str, Any]) -> BankOrigin:
    """What a bank was made with.

    Raises:
        BankFormatError: where the manifest does not say it.
    """
    try:
        return BankOrigin.from_manifest(manifest)
    except ValueError as error:
        raise format_error(directory / MANIFEST, str(error)) from error


def empty_manifest(like: MemoryBank, origin: BankOrigin) -> dict[str, Any]:
    """The manifest of a bank without documents, whose tensors will look like those of `like`."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "reader_features": [],
        "writer_features": [],
        "library_version": library_version(),
        "generation": 0,
        "next_id": 0,
        **origin.to_manifest(),
        "dtype": next(name for name, (kind, _) in DTYPES.items() if kind is like.dtype),
        "layers": [
            {"layer": layer, "groups": memory.content.shape[2], "head_dim": memory.content.shape[3]}
            for layer, memory in like.layers.items()
        ],
        "counts": {"documents": 0, "chunks": 0, "tokens": 0},
        "prefix": None,
        "segments": [],
        "deletions": [],
    }


def remove_leftovers(directory: Path) -> None:
    """Remove what a writer left that died before its commit, or after it and before it had tidied up."""
    manifest = directory / MANIFEST
    kept = {entry["file"] for entry in data_files(read_manifest(directory))} if manifest.exists() else set()
    if count := remove_unnamed(directory, kept):
        logger.warning("%s: removed %d files of an interrupted write; the last commit is intact.", directory, count)


def remove_unnamed(directory: Path, named: set[str]) -> int:
    """Remove data files that are not `named`, and files of writes that did not come to their end; returns how many."""
    left = [
        path
        for path in directory.iterdir()
        if path.name not in named and (OWN_FILE.fullmatch(path.name) or LEFTOVER.fullmatch(path.name))
    ]
    for path in left:
        remove_leftover(path)
    return len(left)
