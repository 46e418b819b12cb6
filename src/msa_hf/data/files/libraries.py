"""Libraries that read documents of offices: the extra `files`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ...user_errors import UserError
from ..errors import DataError
from ..lines import LONGEST


class MissingLibrary(UserError, ImportError):
    """A library that a file needs and that is not installed; no reason to leave the file out in silence."""


def library(name: str, place: str, package: str) -> ModuleType:
    """A library of the extra, imported on first use.

    Raises:
        MissingLibrary: naming file, package and extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibrary(
            f"{place}: reading it needs {package}: pip install 'msa-hf[files]'; or leave such files out with --glob"
        ) from error


@contextlib.contextmanager
def reading(place: str, reader: str) -> Iterator[None]:
    """Turn whatever a library raises about a file into one line: damaged files make them raise almost anything.

    Raises:
        DataError: naming the file, the library and its error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{place}: {reader} cannot read it ({type(error).__name__}: {said})") from error


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Keep a library's warnings about damage that it got over out of the output."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive that a file of today's offices, or a book, is.

    Raises:
        DataError: for a file of another format, named as one of these, and for an archive whose texts would take more
            memory than a document may have.
    """
    with path.open("rb") as file:
        older = file.read(len(OLDER)) == OLDER
    if older:
        raise DataError(
            f"{path}: is locked with a password, or of the format that offices had before {path.suffix}; save it "
            "without a password, and anew"
        )
    with zipfile.ZipFile(path) as archive:
        _check_archive(archive, str(path))
        yield archive


def _check_archive(archive: zipfile.ZipFile, place: str) -> None:
    size = sum(item.file_size for item in archive.infolist() if not item.filename.lower().endswith(IMAGES))
    if size > LONGEST:
        raise DataError(f"{place}: holds {size >> 20} MiB of text, of which {LONGEST >> 20} are read at most")


OLDER = bytes.fromhex("d0cf11e0a1b11ae1")  # of files that hold others, before they were archives
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".emf", ".wmf", ".svg", ".mp4", ".mp3", ".wav")
