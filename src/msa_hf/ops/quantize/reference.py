"""`quantize_keys`, in PyTorch on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import FORMATS, format_of, scaled_formats


def quantize_keys(keys: Tensor, kind: torch.dtype | str) -> tuple[Tensor, Tensor]:
    """Numbers and scales of routing keys: `key = scale * number`, rounded to the nearest.

    Args:
        keys: [C, E] floating.
        kind: a format with scales (formats.py): `"fp8"` (or `torch.float8_e4m3fn`), `"int8"` (or `torch.int8`) or
            `"int4"`.

    Returns:
        numbers [C, E] float8_e4m3fn or int8, for int4 packed [C, ceil(E / 2)] uint8 (`unpack_int4`); scales [C]
        float32, positive, also for a key of zeros.
    """
    found = FORMATS.get(kind) if isinstance(kind, str) else format_of(kind)
    if found is None or not found.scaled:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, scaled_formats()))}, got {kind!r}.")
    return found.quantize(keys)
