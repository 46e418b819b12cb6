"""The manifest that lies in a bank's directory, with the commits since it was written, and its copy."""

import json
import os
from pathlib import Path

from .bank_files_msa import regular_file, unreadable
from .bank_format_msa import (
    BACKUP,
    CHOOSE,
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MEMORY_PER_FILE,
    OWN_FILE,
    RESTORE,
    BankFormatError,
    Manifest,
    TensorLayout,
    check_unique,
    decode_manifest,
    file_names,
    format_error,
)
from .bank_log_msa import ENTRY_FILE, MAX_ENTRY_BYTES, decode_entry, entry_name, entry_names, manifest_after
from .bounds_msa import MEMORY, bytes_there, check_json, json_memory

# What a manifest may count beside lost files: rows, which take memory; and bytes of tensors, whose places take none.
FEW_ROWS, ROW_BYTES = 2**18, 128  # without more; one more for so many bytes that are there
FEW_TENSORS, LOST_TIMES = 2**30, 1024  # bytes without more; so many for each byte that is there
FOREIGN_BYTES = 2**20  # at most, of a manifest that is looked at for being of something else
TRIES = 10  # of a reader whose files a writer removes meanwhile


def is_bank(directory: Path) -> bool:
    """Tell whether a bank, or what claims to be one, lies in a directory."""
    path = directory / MANIFEST
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def holds_bank(path: Path) -> bool:
    """Tell whether a bank lies in what may as well be documents: a folder whose manifest is of something else, such as
    a web application's, is none; one whose manifest is damaged is a bank, which is to be told."""
    if not is_bank(path):
        return False
    manifest = path / MANIFEST
    try:
        if not manifest.is_file() or manifest.stat().st_size > FOREIGN_BYTES:
            return True
        found = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(found, dict) or found.get("format") == FORMAT


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a bank, and the commits since it was written.

    Returns:
        the manifest of the last commit, as decoded.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    for attempt in range(TRIES):
        manifest, mark = read_checkpoint(directory)
        if "lineage" not in manifest:
            return manifest
        # A writer removes the commits that its next manifest has: then that one is there, and of the commits that were
        # found some may be missing, in the middle or at the end.
        try:
            later = _with_log(directory, manifest)
        except BankFormatError:
            if attempt + 1 == TRIES or manifest_mark(directory) == mark:
                raise
        else:
            if attempt + 1 == TRIES or manifest_mark(directory) == mark:
                return later
    raise AssertionError


def read_checkpoint(directory: Path) -> tuple[Manifest, tuple[int, ...]]:
    """Read and check `manifest.json` alone, without the commits since; returns it and its `manifest_mark`.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    path = directory / MANIFEST
    if not is_bank(directory):
        raise missing_manifest(directory)
    data, mark = _manifest_bytes(directory, MANIFEST)
    try:
        return decode_manifest(data, path), mark
    except BankFormatError as error:
        if backup_of(directory) is None or ("checksum" not in str(error) and "JSON" not in str(error)):
            raise
        raise BankFormatError(f"{str(error).removesuffix('.')}; {_RESTORE_BACKUP.format(directory)}.") from error


def _manifest_bytes(directory: Path, name: str) -> tuple[bytes, tuple[int, ...]]:
    """The content of a manifest or its copy, which takes no more memory than one of these files does; and its mark."""
    path = directory / name
    regular_file(directory, name)
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())  # a writer may have put another in its place since
            if status.st_size > MAX_MANIFEST_BYTES:
                raise format_error(path, f"larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")
            _check_memory(path, status.st_size)
            data, mark = file.read(status.st_size), _mark(status)
        _check_memory(path, json_memory(data))
    except OSError as error:
        raise unreadable(path, error) from error
    return data, mark


def manifest_mark(directory: Path) -> tuple[int, ...] | None:
    """A mark of the file `manifest.json` that is another one once it was replaced; None where there is none."""
    try:
        return _mark(os.stat(directory / MANIFEST))
    except OSError:
        return None


def _mark(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _with_log(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest after the commits that lie beside it."""
    later = sorted(number for number in log_generations(directory) if number > manifest["generation"])
    for number in later:
        path = directory / entry_name(number)
        if number != manifest["generation"] + 1:
            missing = directory / entry_name(manifest["generation"] + 1)
            raise format_error(missing, f"is missing, and with it the commits after it, up to {path.name}")
        try:
            if regular_file(directory, path.name).st_size > MAX_ENTRY_BYTES:
                raise format_error(path, f"larger than the {MAX_ENTRY_BYTES} bytes that a commit may have")
            data = path.read_bytes()
            check_json(data)
        except OSError as error:
            raise unreadable(path, error) from error
        except ValueError as error:
            raise format_error(path, str(error)) from error
        manifest = manifest_after(manifest, decode_entry(data, path, manifest))
    check_unique(manifest, directory / MANIFEST)
    return manifest


def log_generations(directory: Path) -> list[int]:
    """Generations of the commits whose files lie in a directory, in any order."""
    found = (ENTRY_FILE.fullmatch(name) for name in os.listdir(directory))
    return [int(match[1]) for match in found if match is not None]


def missing_manifest(directory: Path) -> BankFormatError:
    """The error about a directory without a manifest, by what else lies there."""
    path = directory / MANIFEST
    if left := data_left(directory):
        cause = f"is missing, but {len(left)} data files of a bank are there ({left[0]}, ...)"
        remedy = f"{RESTORE}; if `msa-hf encode` was interrupted, run it again"
        if backup_of(directory) is not None:
            remedy = _RESTORE_BACKUP.format(directory)
        return format_error(path, cause, f"Nothing was removed. {remedy}")
    return format_error(path, "there is no such file, so this is not a bank", CHOOSE)


_RESTORE_BACKUP = f"`msa-hf bank restore {{}}` puts the copy in its place that is kept in {BACKUP}"


def data_left(directory: Path) -> list[str]:
    """Names of files of a bank in a directory, but for a prefix, which a bank that was never begun may leave."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    return [
        name
        for name in names
        if name == BACKUP or ENTRY_FILE.fullmatch(name) or (OWN_FILE.fullmatch(name) and not name.startswith("prefix-"))
    ]


def backup_of(directory: Path) -> Manifest | None:
    """The copy of the manifest that is kept beside it, None where there is none that is intact."""
    try:
        return decode_manifest(_manifest_bytes(directory, BACKUP)[0], directory / BACKUP)
    except (OSError, BankFormatError):
        return None


def _check_memory(path: Path, needed: int) -> None:
    """Compare what a manifest takes in memory with the files that lie beside it: it names no others."""
    if needed > MEMORY and needed > (most := MEMORY + MEMORY_PER_FILE * len(os.listdir(path.parent))):
        cause = f"so large, or of so many values, that it may take {needed} bytes of memory; beside so few files a"
        raise format_error(path, f"{cause} manifest has at most {most}")


def referenced_files(directory: Path) -> set[str]:
    """Names of the data files of the bank that lies in `directory`, and of its log; empty if none does.

    Raises:
        BankFormatError: for a manifest that cannot be read, or that is missing while data files are there.
    """
    if not is_bank(directory) and not data_left(directory):
        return set()
    manifest = read_manifest(directory)
    return file_names(manifest) | entry_names(manifest)


def check_claims(directory: Path, manifest: Manifest) -> None:
    """Compare rows and tensors that a manifest counts with what lies in the directory, of which some may be lost.

    Rows of lost tables and tensors of lost shards keep their places.

    Raises:
        BankFormatError: where these would be more than what is there lets expect.
    """
    counts, layout = manifest["counts"], TensorLayout.of_manifest(manifest)
    tensors = counts["chunks"] * layout.chunk_bytes(list(layout.shapes))
    try:
        there = bytes_there(directory)
    except OSError as error:
        raise unreadable(directory, error) from error
    if counts["documents"] > FEW_ROWS + there // ROW_BYTES or tensors > FEW_TENSORS + LOST_TIMES * there:
        stated = f"{counts['documents']} documents with {tensors} bytes of tensors"
        raise format_error(directory / MANIFEST, f"counts {stated}, but the directory has {there} bytes")
