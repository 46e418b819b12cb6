"""An array that grows at its end while views of it stay."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

GROWTH = 5 / 4  # of a buffer that is full: appending costs a few copies of each row, spare room at most a quarter


class GrowableArray:
    """An array to whose end rows are added; what was handed out before stays as it is."""

    def __init__(self, rows: Any, length: int | None = None) -> None:
        self._all = rows
        self.length = len(rows) if length is None else length

    def view(self, length: int) -> Any:
        return self._all[:length]

    def append(self, rows: Any) -> None:
        needed = self.length + len(rows)
        if needed > len(self._all):
            room = max(needed, int(len(self._all) * GROWTH))
            old = self._all
            if isinstance(old, Tensor):
                self._all = old.new_empty(room, *old.shape[1:])
            else:
                self._all = np.empty((room, *old.shape[1:]), old.dtype)
            self._all[: self.length] = old[: self.length]
        self._all[self.length : needed] = rows
        self.length = needed
