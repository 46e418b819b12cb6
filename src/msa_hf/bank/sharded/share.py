"""The share of a bank that lies in one of several processes."""

from __future__ import annotations

import torch
from torch import Tensor


class Share:
    """A run of documents that follow each other, and their chunks.

    Args:
        offsets: [R + 1] int64 on the CPU, chunks of the documents of the whole bank.
        rows: [W + 1], first row of each process' documents, and the end.
        rank: of this process.

    Attributes:
        own_rows: the rows of the bank's documents that lie here.
        own_chunks: first and end of the chunks that lie here.
    """

    def __init__(self, offsets: Tensor, rows: list[int], rank: int) -> None:
        self.offsets = offsets
        self.rows = rows
        self.rank = rank
        self.own_rows = slice(rows[rank], rows[rank + 1])
        self.own_chunks = int(offsets[self.own_rows.start]), int(offsets[self.own_rows.stop])
        self._local: dict[torch.device, Tensor] = {}
        self._numbers: dict[torch.device, Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """No documents lie here."""
        return self.own_rows.start == self.own_rows.stop

    def local_offsets(self, device: torch.device) -> Tensor:
        """[n + 1] int64, chunks of the documents here, counted from the first of them."""
        if device not in self._local:
            mine = self.offsets[self.own_rows.start : self.own_rows.stop + 1]
            self._local[device] = (mine - mine[0]).to(device)
        return self._local[device]

    def numbers(self, device: torch.device) -> Tensor:
        """[n + 1] int64, the rows of the bank's documents that lie here; the last, for which -1 stands, is -1."""
        if device not in self._numbers:
            rows = torch.arange(self.own_rows.start, self.own_rows.stop)
            self._numbers[device] = torch.nn.functional.pad(rows, (0, 1), value=-1).to(device)
        return self._numbers[device]


def shares(offsets: Tensor, parts: int) -> list[int]:
    """Cut documents with chunks at `offsets` [R + 1] into `parts` runs of about as many chunks: [parts + 1] rows."""
    wanted = [int(offsets[-1]) * part // parts for part in range(parts)]
    cuts = torch.searchsorted(offsets, torch.tensor(wanted)).tolist()
    return [*cuts, len(offsets) - 1]
