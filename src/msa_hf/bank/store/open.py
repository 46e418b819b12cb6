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
    CHOOSE,
    MANIFEST,
    BankFormatError,
    Manifest,
    TensorLayout,
    TensorPair,
    format_error,
    new_manifest,
)
from ...model.bank_lock_msa import missing_commit, noted_commit
from ...model.bank_manifest_msa import (
    FEW_ROWS,
    backup_of,
    check_claims,
    is_bank,
    read_checkpoint,
    read_manifest,
    referenced_files,
)
from ...model.bank_reader_msa import BankReader, mapped_tables
from ...model.bank_writer_msa import BankWriter, keep_copy, remove_unnamed
from ...model.origin_msa import BankOrigin
from .deleted_keys import DeletedKeys
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
        keys: of deleted documents, with their versions.
        prefix: keys and values per layer, None where their file is damaged.
        damage: what is not what was written.
    """

    manifest: Manifest
    segments: tuple[Segment, ...]
    deleted: NDArray[np.int64]
    keys: DeletedKeys
    prefix: dict[int, TensorPair] | None
    damage: list[Damage]


def make_directory(directory: Path) -> None:
    """Make the directory of a bank, and those above it, where they are missing.

    Raises:
        BankFormatError: where a file has the name of one of them.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise format_error(directory, "a file is where the directory of a bank is to be", CHOOSE) from error


def read_contents(reader: BankReader, opened: Iterable[Segment], device: torch.device) -> Contents:
    """Open what a manifest names, the prefix on `device`; segments that are `opened` already are taken over.

    With `reader.verify` what decides about keys, versions and ids is compared with its SHA-256: the tables. Indices and
    deletions always are, tensors are not.

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
    mapped = mapped_tables(manifest)
    for record in manifest["segments"]:
        known = old.get(record["table"]["file"])
        if known is not None and known.record == record:
            segments.append(known)
        else:
            segment, found = Segment.open(reader, record, record["table"]["file"] in mapped)
            segments.append(segment)
            losses += [(segment, loss) for loss in found]
    if losses and read_manifest(reader.directory)["checksum"] != manifest["checksum"]:
        raise format_error(path, "the bank was changed while it was opened", "Open it again")
    if losses:
        check_claims(reader.directory, manifest)
    deletions = reader.deletions()
    damage = [damage_of(segment, loss, deletions.rows) for segment, loss in losses]
    prefix = None
    try:
        prefix = replace(reader, verify=True).prefix(device)
    except BankFormatError as error:
        assert manifest["prefix"] is not None
        damage.append(Damage(manifest["prefix"]["file"], str(error)))
    if manifest["format_version"] == 1:
        manifest = as_version_2(path, manifest, segments)
    return Contents(manifest, tuple(segments), deletions.rows, DeletedKeys(deletions.keys), prefix, damage)


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
    """Remove what a writer left that died before its commit, or after it and before it had tidied up.

    Where later commits were made than the manifest knows, as where an older one was put in its place, nothing is
    removed: the files may be those of these commits, and their manifest may be the copy.

    Raises:
        BankFormatError: for a manifest that cannot be read, or that is missing while data files are there: what it
            named is then not known.
    """
    noted = noted_commit(directory)  # before what it is compared with
    kept = referenced_files(directory)
    if is_bank(directory):
        manifest = read_manifest(directory)
        if missing_commit(directory, manifest.get("lineage"), manifest.get("generation", 0), noted):
            logger.warning(
                "%s: files that no commit names were left where they are, and the copy of the manifest as well: they "
                "may be what is missing. The next writer behind another commit removes them.",
                directory,
            )
            return
    if is_bank(directory) and backup_of(directory) != read_checkpoint(directory)[0]:
        keep_copy(directory)  # before what the copy names is removed
    if count := remove_unnamed(directory, kept):
        logger.warning("%s: removed %d files of an interrupted write; the last commit is intact.", directory, count)
