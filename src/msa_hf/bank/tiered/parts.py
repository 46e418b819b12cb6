"""Parts of the rows of a layer: tensors, or rows of a file, which is mapped while they are looked at.

A bank may lie in hundreds of files. To keep all of them mapped would take as many mappings; `open_files_msa.py` bounds
how many are open at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...model.shard_msa import Shard


@dataclass(frozen=True)
class FileRows:
    """Rows of a layer that stay in a file of the bank.

    Attributes:
        shard: the file.
        layer: of the model.
        column: 0 for routing keys, 1 for content.
        shape, dtype: of the rows.
    """

    shard: Shard
    layer: int
    column: int
    shape: torch.Size
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """The rows, mapped as long as this tensor lives.

        Raises:
            BankFormatError: if the file was let go of, and somebody has removed it meanwhile.
        """
        return self.shard.tensors(self.layer)[self.column]


Part = Tensor | FileRows


class LayerPart(Protocol):
    """Chunks of a layer that follow each other: a `DenseLayer`, or rows of a file."""

    @property
    def routing_keys(self) -> Part: ...
    @property
    def pooled_kv(self) -> Part: ...


@dataclass(frozen=True)
class FileLayer:
    """Routing keys [c, G * D] and content [c, 2, G, D] of chunks that lie in a file."""

    routing_keys: FileRows
    pooled_kv: FileRows

    @classmethod
    def of(cls, shard: Shard, layer: int, shape: tuple[int, int], dtype: torch.dtype) -> FileLayer:
        """Those of a layer of `shape`, (groups, head_dim)."""
        count, (groups, dim) = shard.end - shard.first, shape
        shapes = torch.Size((count, groups * dim)), torch.Size((count, 2, groups, dim))
        return cls(*(FileRows(shard, layer, column, size, dtype) for column, size in enumerate(shapes)))


def tensor_of(part: Part) -> Tensor:
    """The rows of a part."""
    return part if isinstance(part, Tensor) else part.tensor()
