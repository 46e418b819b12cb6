"""A memory in a graph: one opaque operation, `recall`, which asks the memory of the running forward.

Whatever kind of memory it is, it stays out of the graph, so that a commit changes nothing that was compiled, and a
memory that lies on disk may wait.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks_msa import ContextRows
from .memory_msa import LayerMemory, launches_alone
from .recording_msa import call_between
from .routing_msa import RoutingRequest, Scoring, Selection

NAMESPACE = "msa_hf_memory"
RECALL_SCHEMA = (
    "(Tensor queries, Tensor mask, Tensor layer, int k, int rows, int groups, ScalarType dtype) -> "
    "(Tensor documents, Tensor scores, Tensor keys, Tensor values, Tensor row_mask, Tensor document_index, Tensor nan, "
    "Tensor cut)"
)
Recall = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Asked:
    """The memory that `recall` asks, within one forward.

    Attributes:
        layers: layer -> what is asked.
        request: how.
    """

    layers: Mapping[int, LayerMemory]
    request: RoutingRequest


_asked: contextvars.ContextVar[Asked] = contextvars.ContextVar("asked_memory")


@contextlib.contextmanager
def asking(asked: Asked) -> Iterator[None]:
    """Have `recall` ask this memory within."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


@functools.cache
def recall_operation() -> Recall:
    """The operation `recall`, registered on first use; each copy of this file in a process has its own."""

    def recall(
        queries: Tensor, mask: Tensor, layer: Tensor, k: int, rows: int, groups: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        number, device, samples = int(layer), queries.device, queries.shape[0]

        def addresses() -> Hashable | None:
            memory = _asked.get().layers[number]
            return memory.addresses(device, samples, k) if launches_alone(memory) else None

        return call_between(lambda: ask(queries, mask, number, k, rows, dtype), addresses)

    def ask(
        queries: Tensor, mask: Tensor, layer: int, k: int, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        asked = _asked.get()
        memory, device = asked.layers[layer], queries.device
        selection = memory.route(queries, mask, k, asked.request.scoring)
        found = memory.gather(selection, dtype).to(device, dtype)
        documents, scores = (item.to(device).contiguous() for item in (selection.documents, selection.scores))
        nan = scores.new_zeros((), dtype=torch.bool) if selection.has_nan is None else selection.has_nan.to(device)
        cut = found.row_mask[:, rows:].any()

        def sized(tensor: Tensor, dim: int) -> Tensor:
            missing = rows - tensor.shape[dim]
            if missing > 0:
                return torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))
            return tensor.narrow(dim, 0, rows).contiguous()

        keys, values = sized(found.keys, 2), sized(found.values, 2)
        return documents, scores, keys, values, sized(found.row_mask, 1), sized(found.document_index, 1), nan, cut

    def shapes(
        queries: Tensor, mask: Tensor, layer: Tensor, k: int, rows: int, groups: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        batch, dim = queries.shape[0], queries.shape[3]
        states = queries.new_empty(batch, groups, rows, dim, dtype=dtype)
        columns = queries.new_empty(batch, rows, dtype=torch.long)
        flag = queries.new_empty((), dtype=torch.bool)
        return (
            queries.new_empty(batch, k, dtype=torch.long),
            queries.new_empty(batch, k, dtype=torch.float32),
            states,
            torch.empty_like(states),
            columns.bool(),
            columns,
            flag,
            torch.empty_like(flag),
        )

    own = re.sub(r"\W", "_", f"{__name__}_recall")
    while hasattr(getattr(torch.ops, NAMESPACE), own):  # this file was imported anew
        own = f"{own}_"
    # CUDA graphs are cut where it stands: it decides on the host where its parts lie.
    tags = [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else []
    # Not `custom_op`, whose calls take three times as long.
    torch.library.define(f"{NAMESPACE}::{own}", RECALL_SCHEMA, tags=tags)
    torch.library.impl(f"{NAMESPACE}::{own}", "default", recall)
    torch.library.register_fake(f"{NAMESPACE}::{own}", shapes)
    return getattr(getattr(torch.ops, NAMESPACE), own).default


class RecallingLayer:
    """A memory layer as a graph sees it; one question is asked of it.

    Args:
        recall: the operation.
        layer: [] int64 on the CPU, number of the model's layer; a tensor, so that all layers have the same graph.
        rows: of a sample's context.
        groups: key/value heads.
        dtype: of keys and values.
    """

    def __init__(self, recall: Recall, layer: Tensor, rows: int, groups: int, dtype: torch.dtype) -> None:
        self.recall, self.layer, self.rows, self.groups, self.dtype = recall, layer, rows, groups, dtype
        self.found: ContextRows | None = None
        self.cut: Tensor | None = None

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The documents, and their rows for `gather`."""
        documents, scores, keys, values, row_mask, document_index, nan, self.cut = self.recall(
            queries, mask, self.layer, k, self.rows, self.groups, self.dtype
        )
        self.found = ContextRows(keys, values, row_mask, document_index)
        return Selection(documents, scores, has_nan=nan)

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        raise NotImplementedError("A graph holds no scores of all documents.")

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows that came with the documents."""
        assert self.found is not None
        return self.found
