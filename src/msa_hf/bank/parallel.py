"""Memory Parallel: a bank whose documents lie in several processes, each of which runs the whole model.

Every process has a share of the documents, a run of them that follow each other: their routing keys and their content.
The table of documents is everywhere. In a layer each process scores its own documents, one exchange of the `k` best
tells all of them the same best of all, and one exchange of content gives everyone the rows of those. Neither waits for
the device: numbers of rows are bounded by what the bank's longest documents have.

Processes talk twice more per forward that routes, by messages of the hosts: before it they agree on what it is, after
it they hear whether all came through. Generating a token exchanges nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from .. import attention_msa
from ..chosen_msa import Chosen, score_chosen, scores_at
from ..chunks_msa import chunk_rows
from ..memory_msa import BankOrigin, DocumentTable, LayerMemory, MemoryBank
from ..routing_msa import NO_SCORE, score_documents, select_documents
from ..storage_msa import (
    DTYPES,
    check_shard,
    layer_shapes,
    read_deletions,
    read_manifest,
    read_prefix,
    read_table,
    shard_layers,
)

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
# Rows of a sample that may be exchanged without knowing how many are really there; above, the device is waited for.
MOST_UNKNOWN_ROWS = 4096
HEADS, QUERIES, CHUNKS = ("mean", "max"), ("max", "mean", "last"), ("max", "mean")
# What processes tell each other before a forward, in this order.
FLAGS, SIZES = ("active", "all_scores", "forced"), ("batch", "tokens", "heads", "k", "columns")
HEADER = (*FLAGS, *SIZES, "head", "query", "chunk", "inputs")
SAME = "same"
DIFFERENT = "different"
FAILED = "failed"
SEEN = "seen/{}"
PATIENCE = timedelta(seconds=5)  # of a process that fails, for the others to read its error


class RankFailed(RuntimeError):
    """Another process of a shared memory failed. The message holds its error where it could still tell it."""


class Ranks:
    """The processes that share a memory, and how they talk.

    Tensors of the CPU go through gloo, others through the backend of `group`. All of it over process groups of its own,
    so that nothing else that the processes exchange gets in between.

    Args:
        group: of the processes; None for all. Without torch.distributed there is one process.
        timeout: of every exchange.
    """

    def __init__(self, group: Any, timeout: timedelta) -> None:
        self.timeout = timeout
        self.rank, self.size, self.control, self.data = 0, 1, None, None
        self.closed = False
        if not dist.is_available() or not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RuntimeError(
                    "This is one of several processes, but they are not connected yet: make an `accelerate.Accelerator`"
                    " or call `torch.distributed.init_process_group` first."
                )
            return
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("This process does not belong to `group`.")
        options: dict[str, Any] = {"timeout": timeout}
        if group is not None:  # processes outside of it do not take part
            options.update(ranks=dist.get_process_group_ranks(group), use_local_synchronization=True)
        backend = dist.get_backend(group)
        self.control = dist.new_group(backend="gloo", **options)
        if backend != "gloo":
            self.data = dist.new_group(backend=backend, **options)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes [W, ...], of one shape."""
        if self.size == 1:
            return part[None]
        return self._talk(_gather_into, part, lambda shape: (self.size, *shape))

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return part
        return self._talk(_sum_into, part, lambda shape: shape)

    def scatter_sum(self, parts: Tensor) -> Tensor:
        """[W, ...] -> this process' part of the sum over all processes."""
        if self.size == 1:
            return parts[0]
        return self._talk(_scatter_sum, parts, lambda shape: shape[1:])

    def _talk(
        self, exchange: Callable[..., Any], given: Tensor, shape_of: Callable[[torch.Size], tuple[int, ...]]
    ) -> Tensor:
        self.check_open()
        device = given.device
        group = self.control if device.type == "cpu" or self.data is None else self.data
        sent = given.contiguous() if group is self.data else given.cpu().contiguous()
        if not given.numel():
            return given.new_empty(shape_of(given.shape))
        if sent.element_size() == 1 and sent.is_floating_point():
            sent = sent.view(torch.uint8)  # of content in eight bits all but one part are zero
        # Backends take the first dimension of the longer tensor for the processes.
        result = sent.new_empty(shape_of(sent.shape))
        flat = result.flatten() if exchange is not _sum_into else result
        try:
            exchange(flat, sent.flatten() if exchange is not _sum_into else sent, group=group)
        except RuntimeError as error:
            raise self.failure(error) from error
        return result.view(given.dtype).to(device)

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, any that can be pickled."""
        if self.size == 1:
            return [value]
        self.check_open()
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.control)
        except RuntimeError as error:
            raise self.failure(error) from error
        return values

    def check_open(self) -> None:
        if self.closed:
            raise RankFailed("This shared memory was closed, or a process of it failed before; share the bank again.")

    def failure(self, error: BaseException) -> RankFailed:
        """What an exchange that broke off means: another process' error, or that it is gone."""
        message = (
            f"Another process of this shared memory died, or did not answer within {self.timeout.total_seconds():g} "
            f"seconds ({error})."
        )
        with suppress(RuntimeError):  # the store goes with the process that holds it
            store = self._store()
            deadline = time.monotonic() + 1.0  # connections may break before the error is written
            while not store.check([FAILED]) and time.monotonic() < deadline:
                time.sleep(0.05)
            if store.check([FAILED]):
                message = store.get(FAILED).decode(errors="replace")
                store.set(SEEN.format(self.rank), "")
        self.close()
        return RankFailed(message)

    def fail(self, error: BaseException) -> None:
        """Tell the others of this process' error, and leave."""
        if self.closed or isinstance(error, RankFailed):
            return
        if self.size > 1:
            with suppress(RuntimeError):
                text = "".join(traceback.format_exception(error))
                text = f"Process {self.rank} of this shared memory failed:\n{text}"
                store = self._store()
                first = store.compare_set(FAILED, "", text).decode(errors="replace") == text
                store.set(SEEN.format(self.rank), "")
                self.close()
                if first:  # the store may lie in this process
                    store.wait([SEEN.format(rank) for rank in range(self.size)], PATIENCE)
        self.close()

    def _store(self) -> Any:
        assert self.control is not None
        return self.control.get_group_store()

    def close(self) -> None:
        """Close the connections: whoever waits for this process hears of it."""
        self.closed = True
        data, control, self.data, self.control = self.data, self.control, None, None
        for group in (data, control):
            with suppress(RuntimeError, ValueError):
                if group is data and group is not None:
                    group.abort()  # what the device still waits for
                if group is not None:
                    dist.destroy_process_group(group)


# Newer versions of PyTorch name these otherwise.
def _gather_into(result: Tensor, part: Tensor, group: Any) -> None:
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(result, part, group=group)


def _scatter_sum(result: Tensor, parts: Tensor, group: Any) -> None:
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(result, parts, group=group)


def _sum_into(result: Tensor, part: Tensor, group: Any) -> None:
    dist.all_reduce(result.copy_(part), group=group)


class ShardedBank(MemoryBank):
    """A bank whose documents lie in several processes; `shard_bank` makes one.

    `model.forward`, `generate` and `MemoryInterleave` take it as they take any bank. `documents`, `offsets` and
    `prefix` are those of the whole bank, `layers` hold this process' chunks alone.

    Use it in a `with` block: at its end a process waits for the others, and serves their questions meanwhile; an error
    inside reaches all of them.

    Attributes:
        rank, size: of this process, and how many there are.
        rows: [W + 1], first row of each process' documents, and the end.
    """

    def __init__(
        self, layers: dict[int, LayerMemory], whole: MemoryBank, rows: list[int], ranks: Ranks, inputs: str
    ) -> None:
        counts = whole.num_chunks, whole.num_tokens
        super().__init__(layers, whole.offsets, whole.prefix, whole.documents, whole.origin, counts, whole.next_id)
        self.rows = rows
        self.inputs = inputs
        self._ranks = ranks
        self._bounds: dict[int, int] = {}
        self._local: dict[torch.device, Tensor] = {}

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def size(self) -> int:
        return self._ranks.size

    @property
    def own_rows(self) -> slice:
        """The rows of `documents` that lie here."""
        return slice(self.rows[self.rank], self.rows[self.rank + 1])

    @property
    def own_chunks(self) -> tuple[int, int]:
        """First and end of the chunks that lie here."""
        return int(self.offsets[self.own_rows.start]), int(self.offsets[self.own_rows.stop])

    def local_offsets(self, device: torch.device) -> Tensor:
        """[n + 1] int64, chunks of the documents here, counted from the first of them."""
        if device not in self._local:
            mine = self.offsets[self.own_rows.start : self.own_rows.stop + 1]
            self._local[device] = (mine - mine[0]).to(device)
        return self._local[device]

    def most_rows(self, documents: int) -> int:
        """The most chunks that so many documents have together."""
        if documents not in self._bounds:
            chunks = self.offsets.diff()
            self._bounds[documents] = int(chunks.topk(min(documents, len(chunks))).values.sum())
        return self._bounds[documents]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ShardedBank:
        """This process' part on another device or in another dtype."""
        moved = copy.copy(self)
        moved.layers = {layer: memory.to(device, dtype) for layer, memory in self.layers.items()}
        moved.prefix = {
            layer: (keys.to(device, dtype), values.to(device, dtype)) for layer, (keys, values) in self.prefix.items()
        }
        moved._visible = None
        return moved

    def save_pretrained(self, directory: str | Path, max_shard_size: int | str = "4GB") -> None:
        """Not of a part: save the whole bank."""
        raise ValueError("This process holds a part of the bank; save the whole one before it is shared.")

    def turn(self, config: Any, inputs: Tensor, routing_mask: Tensor, forced: Tensor | None, all_scores: bool) -> Turn:
        """What all processes do together in a forward that routes; `MSAForCausalLM` asks for it.

        Raises:
            ValueError: where scores would need a gradient, or all processes together make no sense.
            RankFailed: where another process failed.
        """
        header = _header(config, inputs, routing_mask, forced, all_scores)
        if torch.is_grad_enabled() and (config.score_bias or header["all_scores"] or header["forced"]):
            raise ValueError(
                "Scores of documents in other processes carry no gradient: call the model under `torch.no_grad()`."
            )
        return Turn(self, header, routing_mask, forced)

    def finish(self) -> None:
        """Wait until all processes are through, doing this one's part of what they ask meanwhile, and disconnect.

        Raises:
            RankFailed: where another process failed.
            ValueError: with `inputs="same"`, where another one goes on.
        """
        while not self._ranks.closed:
            turn = Turn(self, dict.fromkeys(HEADER, 0), None)
            if not turn.active:
                break
            with turn:
                turn.serve()
        self._ranks.close()

    def __enter__(self) -> ShardedBank:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
        except BaseException as failed:
            error = failed
            raise
        finally:
            if error is not None:
                self._ranks.fail(error)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, rank={self.rank} of {self.size})"


def _header(
    config: Any, inputs: Tensor, routing_mask: Tensor, forced: Tensor | None, all_scores: bool
) -> dict[str, int]:
    digest = hashlib.sha256()
    for tensor in (inputs, routing_mask, forced):
        if tensor is not None and not tensor.is_floating_point():  # embeddings may differ in their last digits
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    reductions = config.head_reduction, config.query_reduction, config.chunk_reduction
    return {
        "active": 1,
        "batch": inputs.shape[0],
        "tokens": int(routing_mask.sum(1).max()),
        "heads": config.num_attention_heads,
        "k": config.top_k,
        "all_scores": int(all_scores or (forced is None and reductions != ("mean", "max", "max"))),
        "forced": int(forced is not None),
        "columns": max(config.top_k, 0 if forced is None else forced.shape[1]),
        "head": HEADS.index(reductions[0]),
        "query": QUERIES.index(reductions[1]),
        "chunk": CHUNKS.index(reductions[2]),
        "inputs": int.from_bytes(digest.digest()[:7], "little"),
    }


@dataclass(frozen=True)
class Given:
    """Documents that samples of a forward are given, in place of those that they would choose.

    Attributes:
        documents: [S, n] int64, of the samples of all processes; -1 for none.
        forces: [S, 1] bool, samples that do not choose.
        places: [S, n] int64, places of `documents` among the distinct ones, which are ascending; -1 for none.
        counts: [W], how many of the distinct ones lie in each process, one after the other.
        here: those that lie in this process, for every sample.
    """

    documents: Tensor
    forces: Tensor
    places: Tensor
    counts: np.ndarray
    here: Chosen


class Turn:
    """One forward that routes, in all processes at once.

    Attributes:
        active: whether any process has something to route.
        operations: those of a memory layer (`OPERATIONS` in attention_msa.py), done together. Their `offsets` count all
            chunks of the bank, the keys and content given to them are this process' own.

    Raises:
        ValueError: in all processes, where these do not fit together.
        RankFailed: where a process is gone.
    """

    def __init__(
        self, bank: ShardedBank, header: dict[str, int], routing_mask: Tensor | None, forced: Tensor | None = None
    ) -> None:
        self.bank, self.ranks = bank, bank._ranks
        table = self.ranks.gather(torch.tensor([header[name] for name in HEADER])).tolist()
        rows = [dict(zip(HEADER, row, strict=True)) for row in table]
        asking = [row for row in rows if row["active"]]
        self.active = bool(asking)
        self.operations: dict[str, Callable[..., Any]] = {
            "route_documents": self.route_documents,
            "score_documents": self.score_documents,
            "score_chosen": self.score_chosen,
            "gather_documents": self.gather_documents,
        }
        if not asking:
            return
        self.together = bank.inputs == SAME
        self._check(rows, asking)
        self.own_batch = header["batch"]
        self.batch = max(row["batch"] for row in rows)
        self.tokens = max(row["tokens"] for row in rows)
        self.columns = max(row["columns"] for row in rows)
        self.shared = asking[0]
        self.all_scores = any(row["all_scores"] for row in rows)
        self.order: Tensor | None = None
        self.routes: Tensor | None = None
        self.chosen: Tensor | None = None
        self.routed = any(not row["forced"] for row in asking)
        self.given: Given | None = None
        if not self.together:
            self._exchange_masks(routing_mask)
        if not self.all_scores and any(row["forced"] for row in asking):
            self.given = self._exchange_forced(forced, [bool(row["forced"]) for row in rows])

    def _check(self, rows: list[dict[str, int]], asking: list[dict[str, int]]) -> None:
        fixed = ("heads", "k", "head", "query", "chunk")
        for name in fixed:
            if len({row[name] for row in asking}) > 1:
                raise ValueError(
                    f"Processes that share a memory must run the same model; their `{name}` are "
                    f"{[row[name] for row in rows]}."
                )
        if self.together and any(row != rows[0] for row in rows):
            shapes = [(row["batch"], row["tokens"]) if row["active"] else "finished" for row in rows]
            raise ValueError(
                'With `inputs="same"` all processes must give a model the same inputs in the same order; now they '
                f"differ (samples and routing tokens of each: {shapes}). Seed sampling alike, or share the bank with "
                'inputs="different".'
            )

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.ranks.fail(error)
        else:  # all came through, or those that did not are heard of
            self.ranks.gather(torch.ones(1, dtype=torch.int64))

    # What every process needs of the others' inputs -------------------------------------------------------------------

    def _exchange_masks(self, routing_mask: Tensor | None) -> None:
        """Note which routing tokens every process has; padded to the most of any."""
        valid = torch.zeros(self.batch, self.tokens, dtype=torch.bool)
        if routing_mask is not None:
            mask = routing_mask.cpu()
            self.order = (~mask).long().argsort(dim=1, stable=True)[:, : self.tokens]
            valid[: self.own_batch, : self.order.shape[1]] = mask.gather(1, self.order)
        self.routes = self.ranks.gather(valid).flatten(0, 1)

    def _exchange_forced(self, forced: Tensor | None, forces: list[bool]) -> Given:
        """The documents that every process' samples are given, and those of them that lie here."""
        given = torch.empty(0, 0, dtype=torch.int64) if forced is None else forced.cpu()
        if self.together:
            forces = forces[:1] * given.shape[0]
        else:
            padded = torch.full((self.batch, self.columns), -1)
            padded[: given.shape[0], : given.shape[1]] = given
            given = self.ranks.gather(padded).flatten(0, 1)
            forces = [forced_there for forced_there in forces for _ in range(self.batch)]
        places = Chosen(given, self.bank.offsets.cpu())
        distinct, rows = torch.tensor(places.distinct, dtype=torch.int64), self.bank.own_rows
        here = distinct[(distinct >= rows.start) & (distinct < rows.stop)] - rows.start
        return Given(
            given,
            torch.tensor(forces, dtype=torch.bool)[:, None],
            places.documents,
            np.diff(np.searchsorted(distinct.numpy(), self.bank.rows)),
            Chosen(here.expand(given.shape[0], -1), self.bank.local_offsets(torch.device("cpu"))),
        )

    def _everyones(self, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Router queries [S, t, H, D] float32 of the samples of all processes, and which of them are there [S, t]."""
        if queries.shape[2] != self.shared["heads"]:
            raise ValueError(
                f"A layer has {queries.shape[2]} query heads, the configuration says {self.shared['heads']}."
            )
        if self.together:
            return queries, mask
        packed = queries.new_zeros(self.batch, self.tokens, *queries.shape[2:], dtype=torch.float32)
        if self.order is not None:
            order = self.order.to(queries.device)
            index = order[..., None, None].expand(-1, -1, *queries.shape[2:])
            packed[: self.own_batch, : order.shape[1]] = queries.float().gather(1, index)
        assert self.routes is not None
        return self.ranks.gather(packed).flatten(0, 1), self.routes.to(queries.device)

    def _own(self, results: Tensor) -> Tensor:
        """This process' samples of [S, ...]."""
        if self.together:
            return results
        start = self.ranks.rank * self.batch
        return results[start : start + self.own_batch]

    # The operations of a layer ----------------------------------------------------------------------------------------

    def route_documents(
        self,
        queries: Tensor,
        routing_mask: Tensor,
        routing_keys: Tensor,
        offsets: Tensor,
        k: int,
        *,
        alive: Tensor | None = None,
        similarity: str = "cosine",
    ) -> tuple[Tensor, Tensor]:
        """`routing_msa.route_documents` of the whole bank."""
        with torch.no_grad():
            if self.all_scores:
                scores = self.score_documents(queries, routing_mask, routing_keys, offsets, similarity=similarity)
                return select_documents(scores if alive is None else scores.masked_fill(~alive, NO_SCORE), k)
            documents, scores, _ = self._exchange(queries, routing_mask, routing_keys, similarity)
            return documents, scores

    def score_chosen(
        self, queries: Tensor, routing_mask: Tensor, routing_keys: Tensor, chosen: Chosen, **options: str
    ) -> Tensor:
        """`chosen_msa.score_chosen` of the whole bank; no gradient."""
        if self.all_scores:
            scores = self.score_documents(queries, routing_mask, routing_keys, self.bank.offsets, **options)
            return scores_at(scores[:, chosen.distinct], chosen.documents)
        with torch.no_grad():
            *_, scores = self._exchange(queries, routing_mask, routing_keys, options["similarity"])
            return scores[:, : chosen.documents.shape[1]].masked_fill(chosen.documents < 0, NO_SCORE)

    def _exchange(self, queries: Tensor, mask: Tensor, keys: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
        """What processes find out together in a layer, some of which may route while others are given documents.

        Returns:
            documents and scores [B, k] of the best, and scores of given documents [B, columns], for the samples of this
            process; of no meaning where it did not ask for that.
        """
        queries, mask = self._everyones(queries, mask)
        given, samples = self.given, queries.shape[0]
        documents = queries.new_full((samples, self.shared["k"]), -1, dtype=torch.int64)
        best = given_scores = queries.new_full((samples, self.columns), NO_SCORE, dtype=torch.float32)
        if given is not None:
            given_scores = self._score_given(queries, mask, keys, given, similarity)
            mask = mask & ~given.forces.to(mask.device)
        if self.routed:
            documents, best = self._route(queries, mask, keys, similarity)
        self.chosen = documents
        if given is not None and not self.together:
            wide = torch.nn.functional.pad(documents, (0, self.columns - documents.shape[1]), value=-1)
            self.chosen = torch.where(given.forces.to(wide.device), given.documents.to(wide.device), wide)
        return self._own(documents), self._own(best), self._own(given_scores)

    def _route(self, queries: Tensor, mask: Tensor, keys: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
        """The best documents [S, k] of the bank for the samples of all processes."""
        rows, k, visible = self.bank.own_rows, self.shared["k"], self.bank.visible
        if rows.start == rows.stop:
            documents = queries.new_full((queries.shape[0], k), -1, dtype=torch.int64)
            scores = documents.new_full(documents.shape, float("-inf"), dtype=torch.float32)
        else:
            documents, scores = attention_msa.OPERATIONS["route_documents"](
                queries,
                mask,
                keys,
                self.bank.local_offsets(keys.device),
                k,
                alive=None if visible is None else visible[0, rows].to(keys.device),
                similarity=similarity,
            )
            documents = torch.where(documents < 0, documents, documents + rows.start)
        return merge(self.ranks.gather(pack(documents, scores)), k)

    def _score_given(self, queries: Tensor, mask: Tensor, keys: Tensor, given: Given, similarity: str) -> Tensor:
        """Scores [S, columns] of the documents that samples are given."""
        found = None
        if given.counts[self.ranks.rank]:
            here = given.here.to(keys.device)
            found = score_chosen(queries, mask, keys, here, similarity=similarity, **self._reductions)
        return scores_at(self._join(found, given.counts, queries), given.places.to(keys.device))

    def _join(self, found: Tensor | None, counts: np.ndarray, queries: Tensor) -> Tensor:
        """Scores [S, sum of counts] of all processes' documents from those of each, [S, its count], None of none."""
        scores = queries.new_full((queries.shape[0], int(counts.max())), NO_SCORE, dtype=torch.float32)
        if found is not None:
            scores[:, : found.shape[1]] = found
        parts = self.ranks.gather(scores)
        return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)

    @property
    def _reductions(self) -> dict[str, str]:
        """Those of the model that asks."""
        kinds = {"head": HEADS, "query": QUERIES, "chunk": CHUNKS}
        return {f"{name}_reduction": kind[self.shared[name]] for name, kind in kinds.items()}

    def score_documents(
        self,
        queries: Tensor,
        routing_mask: Tensor,
        routing_keys: Tensor,
        offsets: Tensor,
        *,
        similarity: str = "cosine",
        head_reduction: str = "mean",
        query_reduction: str = "max",
        chunk_reduction: str = "max",
    ) -> Tensor:
        """`routing_msa.score_documents` of the whole bank; no gradient."""
        queries, routing_mask = self._everyones(queries.detach(), routing_mask)
        counts = np.diff(self.bank.rows)
        found = None
        if counts[self.ranks.rank]:
            found = score_documents(
                queries,
                routing_mask,
                routing_keys,
                self.bank.local_offsets(routing_keys.device),
                similarity=similarity,
                head_reduction=head_reduction,
                query_reduction=query_reduction,
                chunk_reduction=chunk_reduction,
            )
        return self._own(self._join(found, counts, queries))

    def gather_documents(
        self, documents: Tensor, offsets: Tensor, content: Tensor, width: int | None = None, dtype: Any = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`chunks_msa.gather_documents` of the whole bank; more rows than are needed, where `width` is not given."""
        everyones = documents
        if not self.together and self.all_scores:
            padded = documents.new_full((self.batch, self.columns), -1)
            padded[: self.own_batch, : documents.shape[1]] = documents
            everyones = self.ranks.gather(padded).flatten(0, 1)
        elif not self.together:
            assert self.chosen is not None
            everyones = self.chosen
        if width is None:
            width = self.bank.most_rows(everyones.shape[1])
            if width > MOST_UNKNOWN_ROWS:
                width = _most_rows(everyones, offsets)
        rows, slots, valid = chunk_rows(everyones, offsets, width)
        first, end = self.bank.own_chunks
        mine = valid & (rows >= first) & (rows < end)
        states = content.new_zeros(*rows.shape, *content.shape[1:])
        if first < end:
            chosen = content.index_select(0, (rows - first).clamp(0, end - first - 1).flatten())
            states = torch.where(mine[..., None, None, None], chosen.unflatten(0, rows.shape), states)
        if self.together:
            states = self.ranks.sum(states)
        else:
            states = self.ranks.scatter_sum(states.unflatten(0, (self.ranks.size, self.batch)))[: self.own_batch]
        states = states.to(dtype or content.dtype)
        keys, values = (part.transpose(1, 2).contiguous() for part in states.unbind(2))
        return keys, values, self._own(valid), self._own(slots)

    def serve(self) -> None:
        """Do this process' part of a forward of others."""
        options: dict[str, Any] = {"similarity": self.bank.origin.similarity}
        offsets = self.bank.offsets.to(self.bank.device)
        for memory in self.bank.layers.values():
            keys, content = memory.routing_keys, memory.content
            queries = keys.new_zeros(0, self.tokens, self.shared["heads"], content.shape[-1])
            mask = torch.zeros(0, self.tokens, dtype=torch.bool, device=keys.device)
            if self.all_scores:
                self.score_documents(queries, mask, keys, offsets, **options, **self._reductions)
            else:
                self._exchange(queries, mask, keys, **options)
            documents = torch.empty(0, self.columns, dtype=torch.int64, device=keys.device)
            self.gather_documents(documents, offsets, content)


def pack(documents: Tensor, scores: Tensor) -> Tensor:
    """Documents and their scores [B, k] as one tensor [B, k, 2] int64, for one exchange."""
    return torch.stack([documents, scores.float().contiguous().view(torch.int32).long()], dim=-1)


def merge(packed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of what all processes found.

    Args:
        packed: [W, B, k, 2] int64, as `pack`, each process' best first. Documents of a later process have higher
            numbers.

    Returns:
        documents [B, k] int64, scores [B, k] float32, as `routing_msa.select_documents`: equal scores go to the lower
        number.
    """
    candidates = packed.transpose(0, 1).flatten(1, 2)  # among equal scores documents ascend
    documents, bits = candidates.unbind(-1)
    places, scores = select_documents(bits.int().view(torch.float32), k)
    return documents.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1), scores


def _most_rows(documents: Tensor, offsets: Tensor) -> int:
    counts = offsets.diff()[documents.clamp(min=0)].masked_fill(documents < 0, 0)
    return int(counts.sum(1).max())


# Sharing a bank -------------------------------------------------------------------------------------------------------


def shard_bank(
    bank: Any,
    group: Any = None,
    *,
    inputs: str = SAME,
    timeout: timedelta = TIMEOUT,
    model: Any = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> ShardedBank:
    """Share a bank among the processes of `torch.distributed`; all of them call this.

    Args:
        bank: the whole bank, the same in all processes, of which each keeps its part; or a directory, of whose tensors
            each reads its part alone.
        group: the processes that share it; default all.
        inputs: `"same"`: all processes give the model the same inputs, and split the work of each forward.
            `"different"`: each has its own; any numbers of samples, of tokens and of forwards.
        timeout: how long a process waits for another, in any exchange and while that one does something else.
        model, tokenizer: as `MemoryBank.from_pretrained`; for a directory.
        device: where this process' part goes. Default: where the bank lies; for a directory, the model's device.
        verify: as `MemoryBank.from_pretrained`; a process looks at the files that it reads.

    Returns:
        A `ShardedBank`, to be used in a `with` block.

    Raises:
        ValueError: where the processes have different banks, and what `MemoryBank.from_pretrained` raises; in all of
            them, if one has to.
        RankFailed: where another process failed.
        RuntimeError: where the processes are not connected.
    """
    if inputs not in (SAME, DIFFERENT):
        raise ValueError(f'`inputs` must be "same" or "different", got {inputs!r}.')
    ranks = Ranks(group, timeout)
    error: Exception | None = None
    shared: ShardedBank | None = None
    digest = ""
    try:
        if isinstance(bank, str | os.PathLike):
            if device is None and model is not None:
                device = model.device
            shared = _read(Path(bank), ranks, inputs, model, tokenizer, device, verify)
        else:
            shared = _part(bank.snapshot() if hasattr(bank, "snapshot") else bank, ranks, inputs, device)
        digest = _digest(shared)
    except Exception as failed:  # raised below, after the others know
        error = failed
    states = ranks.everyone((digest, inputs, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        ranks.close()
        raise error
    problem = next((f"Process {rank}: {text}" for rank, (*_, text) in enumerate(states) if text is not None), None)
    if problem is not None:
        ranks.close()
        raise RankFailed(problem)
    if len(set(states)) > 1:
        ranks.close()
        raise ValueError("The processes have different banks, or differ in `inputs`; all must share the same one.")
    assert shared is not None
    if model is not None and isinstance(bank, str | os.PathLike):
        model.accept_bank(shared)  # compared while it was read
    return shared


def shares(offsets: Tensor, parts: int) -> list[int]:
    """Cut documents with chunks at `offsets` [R + 1] into `parts` runs of about as many chunks: [parts + 1] rows."""
    wanted = [int(offsets[-1]) * part // parts for part in range(parts)]
    cuts = torch.searchsorted(offsets, torch.tensor(wanted)).tolist()
    return [*cuts, len(offsets) - 1]


def _part(bank: MemoryBank, ranks: Ranks, inputs: str, device: Any) -> ShardedBank:
    rows = shares(bank.offsets, ranks.size)
    first, end = int(bank.offsets[rows[ranks.rank]]), int(bank.offsets[rows[ranks.rank + 1]])
    target = bank.device if device is None else torch.empty(0, device=device).device
    layers = {}
    for layer, memory in bank.layers.items():
        # Copies, so that the whole bank can be let go of.
        parts = (tensor[first:end].to(target, copy=True) for tensor in (memory.routing_keys, memory.content))
        layers[layer] = LayerMemory(*parts)
    shared = ShardedBank(layers, bank, rows, ranks, inputs)
    return shared if target == bank.device else shared.to(target)


def _read(
    directory: Path, ranks: Ranks, inputs: str, model: Any, tokenizer: Any, device: Any, verify: bool
) -> ShardedBank:
    manifest = read_manifest(directory)
    origin = BankOrigin.from_dict(manifest["origin"])
    if model is not None and (differences := origin.differences(model.memory_origin(tokenizer))):
        raise ValueError("This bank was not made with this model: " + "; ".join(differences) + ".")
    documents = DocumentTable(read_table(directory, manifest, verify), read_deletions(directory, manifest)[0])
    offsets = torch.from_numpy(np.concatenate([[0], documents.counts("chunks").cumsum()]))
    rows = shares(offsets, ranks.size)
    first, end = int(offsets[rows[ranks.rank]]), int(offsets[rows[ranks.rank + 1]])
    target = torch.empty(0, device=device or "cpu").device
    prefix = read_prefix(directory, manifest, target, verify)

    options: dict[str, Any] = {"dtype": DTYPES[manifest["dtype"]][0], "device": target}
    shapes = layer_shapes(manifest)
    layers = {
        layer: LayerMemory(
            torch.empty(end - first, groups * dim, **options), torch.empty(end - first, 2, groups, dim, **options)
        )
        for layer, (groups, dim) in shapes.items()
    }
    base = 0
    for segment in manifest["segments"]:
        for shard in segment["tensors"]:
            start, stop = (base + edge for edge in shard["chunks"])
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            path = check_shard(directory, shard, manifest, verify)
            with safe_open(path, framework="pt", device=str(target)) as file:
                for layer in shard_layers(shard, shapes):
                    for name, whole in (
                        ("routing_keys", layers[layer].routing_keys),
                        ("content", layers[layer].content),
                    ):
                        stored = file.get_slice(f"layers.{layer}.{name}")
                        whole[low - first : high - first] = stored[low - start : high - start]
        base += segment["chunks"]
    visible = documents.visible_rows()
    counts = int(documents.counts("chunks")[visible].sum()), int(documents.counts("tokens")[visible].sum())
    whole_bank = MemoryBank(layers, offsets, prefix, documents, origin, counts, manifest.get("next_id"))
    return ShardedBank(layers, whole_bank, rows, ranks, inputs)


def _digest(bank: ShardedBank) -> str:
    """What the parts of one bank have in common."""
    digest = hashlib.sha256(json.dumps(bank.origin.to_dict(), sort_keys=True).encode())
    digest.update(bank.offsets.numpy().tobytes() + bank.documents.deleted.tobytes() + str(bank.dtype).encode())
    step = max(len(bank.documents) // 64, 1)
    for position in range(0, len(bank.documents), step):
        digest.update(bank.documents[position].key.encode() + b"\0")
    return digest.hexdigest()
