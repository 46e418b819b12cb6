"""Files that are decompressed while they are read: gzip, xz and bzip2 by Python, zstd by pyarrow."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ..model.arrow_msa import pyarrow
from ..user_errors import UserError
from .errors import DataError


class ByteReader(Protocol):
    """Of a file that was opened for reading bytes."""

    def peek(self, size: int = 0, /) -> bytes: ...
    def read(self, size: int = -1, /) -> bytes: ...
    def readline(self, size: int | None = -1, /) -> bytes: ...


def _open_zstd(path: Path) -> io.RawIOBase:
    stream: io.RawIOBase = pyarrow().input_stream(str(path), compression="zstd")
    return stream


OPENERS: dict[str, Callable[[Path], object]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zstd,
}


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[ByteReader]:
    """The bytes of a file, decompressed where its name ends in one of `OPENERS`.

    Raises:
        DataError: for one that cannot be opened, and where what follows is damaged or cut off.
    """
    try:
        opener = OPENERS.get(path.suffix.lower())
        if opener is None:
            with path.open("rb") as file:
                yield file
        else:
            with contextlib.closing(opener(path)) as stream, io.BufferedReader(stream) as file:  # type: ignore
                yield file
    except UserError:
        raise
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or f'damaged or cut off ({error})'}") from error
