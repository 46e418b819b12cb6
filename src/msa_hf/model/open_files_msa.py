"""Files of tensors that are open: a bounded number of them in a process, however many a bank has.

What was opened stays open, because who writes the bank may remove it; beyond the bound the file that was not used for
the longest time is let go, and opened again when it is asked for.
"""

import errno
import os
import re
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from safetensors import safe_open

MOST_OPEN = 24
SMALL_FILE = 2**20  # bytes; a table up to here is read instead of mapped


class TensorFile:
    """A safetensors file.

    Args:
        path: of the file.
        device: of its tensors.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self._file: safe_open | None = None

    def open(self) -> safe_open:
        """The file, open.

        Raises:
            OSError: if it cannot be opened, as when it was let go and somebody has removed it.
            SafetensorError: if it is no such file.
        """
        with _lock:
            if (file := self._file) is None:
                try:
                    file = self._file = safe_open(self.path, framework="pt", device=self.device)
                except (OSError, MemoryError, RuntimeError) as error:
                    raise _numbered(error, self.path) from error
            _used(self)
        return file

    def __reduce__(self) -> tuple[type["TensorFile"], tuple[Path, str]]:
        return TensorFile, (self.path, self.device)


def _numbered(error: Exception, path: Path) -> Exception:
    """An error of the system with its number, which safetensors, and torch that maps the file, say in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    said = re.search(r"\((?:os error )?(\d+)\)$", str(error))
    if said is None and not isinstance(error, FileNotFoundError):
        return error
    number = errno.ENOENT if said is None else int(said[1])
    return OSError(number, os.strerror(number), str(path))


_lock = threading.RLock()
_open: OrderedDict[int, weakref.ref[TensorFile]] = OrderedDict()  # by id, the last one was used last


def _used(file: TensorFile) -> None:
    number = id(file)
    if number not in _open:
        _open[number] = weakref.ref(file, lambda _: _open.pop(number, None))
    _open.move_to_end(number)
    while len(_open) > MOST_OPEN:
        _, oldest = _open.popitem(last=False)
        if (found := oldest()) is not None:
            found._file = None
