"""Opening a directory for a bank that changes: a new one, what lies there, and what an interrupted writer left."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...model.bank_format_msa import (
    MANIFEST,
    BankFormatError,
    KeyHash,
    Manifest,
    TensorLayout,
    TensorPair,
    format_error,
    new_manifest,
)
from ...model.bank_reader_msa import FEW_ROWS, BankReader, check_claims, read_manifest, referenced_files
from ...model.bank_writer_msa import BankWriter, remove_unnamed
from ...model.origin_msa import BankOrigin
from .encoder import DocumentEncoder
from .format_v1 import as_version_2
from .segments import Damage, Loss, Segment, damage_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """The files that a manifest names.

    Attributes:
        manifest: of the current format version.
        segments: in order; what of them is lost is marked in them.
        deleted: [n] int64 rows of deleted documents, ascending.
        versions: of deleted keys, by the hash of the key.
        prefix: keys and values per layer, None where their file is damaged.
        damage: what is not what was written.
    """

    manifest: Manifest
    segments: tuple[Segment, ...]
    deleted: NDArray[np.int64]
    versions: dict[KeyHash, int]
    prefix: dict[int, TensorPair] | None
    damage: list[Damage]


def read_contents(reader: BankReader, opened: Iterable[Segment], device: torch.device) -> Contents:
    """Open what a manifest names, the prefix on `device`; segments that are `opened` already are taken over.

    Raises:
        BankFormatError: for what a bank cannot do without, and where a writer changes it meanwhile.
    """
    manifest = reader.manifest
    path = reader.directory / MANIFEST
    if manifest["counts"]["documents"] > FEW_ROWS:
        check_claims(reader.directory, manifest)
    old = {item.record["table"]["file"]: item for item in opened}
    segments: list[Segment] = []
    losses: list[tuple[Segment, Loss]] = []
    for record in manifest["segments"]:
        known = old.get(record["table"]["file"])
        if known is not None and known.record == record:
            segments.append(known)
        else:
            segment, found = Segment.open(reader, record)
            segments.append(segment)
            losses += [(segment, loss) for loss in found]
    if losses and read_manifest(reader.directory)["checksum"] != manifest["checksum"]:
        raise format_error(path, "the bank was changed while it was opened", "Open it again")
    if losses:
        check_claims(reader.directory, manifest)
    deletions = reader.deletions()
    damage = [damage_of(segment, loss, deletions.rows) for segment, loss in losses]
    versions: dict[KeyHash, int] = {}
    for first, second, version in deletions.keys.tolist():
        versions[first, second] = max(version, versions.get((first, second), -1))
    prefix = None
    try:
        prefix = replace(reader, verify=True).prefix(device)
    except BankFormatError as error:
        assert manifest["prefix"] is not None
        damage.append(Damage(manifest["prefix"]["file"], str(error)))
    if manifest["format_version"] == 1:
        manifest = as_version_2(path, manifest, segments)
    return Contents(manifest, tuple(segments), deletions.rows, versions, prefix, damage)


def new_bank(
    directory: Path | None, encoder: DocumentEncoder, origin: BankOrigin
) -> tuple[Manifest, dict[int, TensorPair], dict[int, TensorPair]]:
    """Begin a bank without documents, in a directory or in memory alone.

    Returns:
        its manifest; its prefix; per layer, no routing keys and no content, which say what they will look like.
    """
    like = encoder.encode([[0]])  # one token
    layers = {layer: (memory.routing_keys[:0], memory.pooled_kv[:0]) for layer, memory in like.layers.items()}
    manifest = new_manifest(origin.to_manifest(), TensorLayout.of_tensors(layers))
    if directory is not None:
        with BankWriter(directory) as writer:
            manifest["prefix"] = writer.prefix(like.prefix)
            writer.commit(manifest)
    return manifest, like.prefix, layers


def remove_leftovers(directory: Path) -> None:
    """Remove what a writer left that died before its commit, or after it and before it had tidied up."""
    kept = referenced_files(directory)
    if count := remove_unnamed(directory, kept):
        logger.warning("%s: removed %d files of an interrupted write; the last commit is intact.", directory, count)
