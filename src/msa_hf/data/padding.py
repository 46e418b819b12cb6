"""Rows of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Rows [B, T] int64, as long as the longest and one at least, filled up with `value`.

    Args:
        left: fill in front of a row instead of behind it.
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = pad_sequence(tensors, True, value, padding_side="left" if left else "right")
    return padded if padded.shape[1] else padded.new_full((len(rows), 1), value)
