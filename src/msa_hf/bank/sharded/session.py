"""One forward that routes, in all processes that share a bank at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ...model.chunks_msa import ContextRows, chunk_rows
from ...model.dense_layer_msa import DenseLayer, select_scored
from ...model.document_rows_msa import ChunkLayout, DocumentRows, score_chosen, scores_at
from ...model.ops_msa import OPERATIONS
from ...model.routing_msa import (
    NO_SCORE,
    SCORINGS,
    RoutingRequest,
    Scoring,
    Selection,
    score_documents,
    select_of_rankings,
)
from ...ops.gather_documents import most_rows
from .collectives import Collectives
from .share import Share

# Rows of a sample that may be exchanged without knowing how many are really there; above, the device is waited for.
MOST_UNKNOWN_ROWS = 4096
# What processes tell each other before a forward, in this order.
FLAGS, SIZES = ("active", "all_scores", "forced"), ("batch", "tokens", "heads", "k", "columns")
REDUCTIONS = ("heads", "tokens", "chunks")
HEADER = (*FLAGS, *SIZES, *(f"reduce_{name}" for name in REDUCTIONS), "inputs")
SAME = "same"
DIFFERENT = "different"


def header_of(request: RoutingRequest) -> dict[str, int]:
    """The message of a process about its forward."""
    digest, forced, scoring = hashlib.sha256(), request.documents, request.scoring
    for tensor in (request.inputs, request.routing_mask, forced):
        if tensor is not None and not tensor.is_floating_point():  # embeddings may differ in their last digits
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "active": 1,
        "batch": request.routing_mask.shape[0],
        "tokens": int(request.routing_mask.sum(1).max()),
        "heads": request.heads,
        "k": request.k,
        "all_scores": int(request.all_scores or (forced is None and not scoring.has_operation)),
        "forced": int(forced is not None),
        "columns": max(request.k, 0 if forced is None else forced.shape[1]),
        **{f"reduce_{name}": list(SCORINGS[name]).index(vars(scoring)[name]) for name in REDUCTIONS},
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
    here: DocumentRows


class ShardSession:
    """One forward that routes, in all processes at once.

    Args:
        share: of this process.
        layout: of the whole bank.
        ranks: the processes.
        inputs: `SAME` or `DIFFERENT`.
        header: what this process wants.
        request: the same in full; None where it only serves the others.

    Attributes:
        active: whether any process has something to route.

    Raises:
        ValueError: in all processes, where these do not fit together.
        RankFailed: where a process is gone.
    """

    def __init__(
        self,
        share: Share,
        layout: ChunkLayout,
        ranks: Collectives,
        inputs: str,
        header: dict[str, int],
        request: RoutingRequest | None,
    ) -> None:
        self.share, self.layout, self.ranks = share, layout, ranks
        table = self.ranks.gather(torch.tensor([header[name] for name in HEADER])).tolist()
        rows = [dict(zip(HEADER, row, strict=True)) for row in table]
        asking = [row for row in rows if row["active"]]
        self.active = bool(asking)
        if not asking:
            return
        self.together = inputs == SAME
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
            self._exchange_masks(None if request is None else request.routing_mask)
        if not self.all_scores and any(row["forced"] for row in asking):
            forced = None if request is None else request.documents
            self.given = self._exchange_forced(forced, [bool(row["forced"]) for row in rows])

    def _check(self, rows: list[dict[str, int]], asking: list[dict[str, int]]) -> None:
        fixed = ("heads", "k", *(f"reduce_{name}" for name in REDUCTIONS))
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

    def __enter__(self) -> ShardSession:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
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
        places = DocumentRows(given, self.share.offsets)
        distinct, rows = torch.tensor(places.distinct, dtype=torch.int64), self.share.own_rows
        here = distinct[(distinct >= rows.start) & (distinct < rows.stop)] - rows.start
        return Given(
            given,
            torch.tensor(forces, dtype=torch.bool)[:, None],
            places.documents,
            np.diff(np.searchsorted(distinct.numpy(), self.share.rows)),
            DocumentRows(here.expand(given.shape[0], -1), self.share.local_offsets(torch.device("cpu"))),
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

    # What processes find out together in a layer ----------------------------------------------------------------------

    def exchange(self, queries: Tensor, mask: Tensor, keys: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
        """Route and score in all processes, of which some may route while others are given documents.

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
        rows, k = self.share.own_rows, self.shared["k"]
        if rows.start == rows.stop:
            documents = queries.new_full((queries.shape[0], k), -1, dtype=torch.int64)
            scores = documents.new_full(documents.shape, float("-inf"), dtype=torch.float32)
        else:
            alive = self.layout.alive_on(keys.device)
            documents, scores = OPERATIONS["route_documents"](
                queries,
                mask,
                keys,
                self.share.local_offsets(keys.device),
                k,
                alive=None if alive is None else alive[rows],
                similarity=similarity,
            )
            documents = torch.where(documents < 0, documents, documents + rows.start)
        return merge(self.ranks.gather(pack(documents, scores)), k)

    def _score_given(self, queries: Tensor, mask: Tensor, keys: Tensor, given: Given, similarity: str) -> Tensor:
        """Scores [S, columns] of the documents that samples are given."""
        found = None
        if given.counts[self.ranks.rank]:
            here = given.here.to(keys.device)
            found = score_chosen(queries, mask, keys, here, self._scoring(similarity))
        return scores_at(self._join(found, given.counts, queries), given.places.to(keys.device))

    def _join(self, found: Tensor | None, counts: np.ndarray, queries: Tensor) -> Tensor:
        """Scores [S, sum of counts] of all processes' documents from those of each, [S, its count], None of none."""
        scores = queries.new_full((queries.shape[0], int(counts.max())), NO_SCORE, dtype=torch.float32)
        if found is not None:
            scores[:, : found.shape[1]] = found
        parts = self.ranks.gather(scores)
        return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)

    def _scoring(self, similarity: str) -> Scoring:
        """That of the model that asks."""
        return Scoring(similarity, *(list(SCORINGS[name])[self.shared[f"reduce_{name}"]] for name in REDUCTIONS))

    def score(self, queries: Tensor, mask: Tensor, keys: Tensor, scoring: Scoring) -> Tensor:
        """Scores [B, R] of all documents of the bank for the samples of this process; no gradient."""
        queries, mask = self._everyones(queries.detach(), mask)
        counts = np.diff(self.share.rows)
        found = None
        if counts[self.ranks.rank]:
            found = score_documents(queries, mask, keys, self.share.local_offsets(keys.device), scoring)
        return self._own(self._join(found, counts, queries))

    def gather(self, documents: Tensor, pooled_kv: Tensor) -> ContextRows:
        """The rows of documents [B, n] of the whole bank, of which this process has `pooled_kv`.

        More rows than are needed, so that nobody waits for the device to learn how many these are.
        """
        everyones = documents
        if not self.together and self.all_scores:
            padded = documents.new_full((self.batch, self.columns), -1)
            padded[: self.own_batch, : documents.shape[1]] = documents
            everyones = self.ranks.gather(padded).flatten(0, 1)
        elif not self.together:
            assert self.chosen is not None
            everyones = self.chosen
        offsets = self.layout.offsets_on(pooled_kv.device)
        width = self.layout.most_rows(everyones.shape[1])
        if width > MOST_UNKNOWN_ROWS:
            width = most_rows(everyones, offsets)
        rows, document_index, row_mask = chunk_rows(everyones, offsets, width)
        first, end = self.share.own_chunks
        mine = row_mask & (rows >= first) & (rows < end)
        states = pooled_kv.new_zeros(*rows.shape, *pooled_kv.shape[1:])
        if first < end:
            chosen = pooled_kv.index_select(0, (rows - first).clamp(0, end - first - 1).flatten())
            states = torch.where(mine[..., None, None, None], chosen.unflatten(0, rows.shape), states)
        if self.together:
            states = self.ranks.sum(states)
        else:
            states = self.ranks.scatter_sum(states.unflatten(0, (self.ranks.size, self.batch)))[: self.own_batch]
        keys, values = (part.transpose(1, 2).contiguous() for part in states.unbind(2))
        return ContextRows(keys, values, self._own(row_mask), self._own(document_index))

    def serve(self, layers: Iterable[DenseLayer], similarity: str) -> None:
        """Do this process' part of a forward of others.

        Args:
            layers: what it has of every memory layer.
            similarity: that of the bank.
        """
        for memory in layers:
            keys = memory.routing_keys
            queries = keys.new_zeros(0, self.tokens, self.shared["heads"], memory.pooled_kv.shape[-1])
            mask = torch.zeros(0, self.tokens, dtype=torch.bool, device=keys.device)
            if self.all_scores:
                self.score(queries, mask, keys, self._scoring(similarity))
            else:
                self.exchange(queries, mask, keys, similarity)
            documents = torch.empty(0, self.columns, dtype=torch.int64, device=keys.device)
            self.gather(documents, memory.pooled_kv)


@dataclass(frozen=True)
class ShardedLayer:
    """A memory layer whose documents lie in several processes; for one forward, in all of them at once.

    Attributes:
        part: this process' chunks.
        session: the forward.
    """

    part: DenseLayer
    session: ShardSession

    # `LayerMemory` ----------------------------------------------------------------------------------------------------

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The `k` best documents of each sample, from the best of every process."""
        if self.session.all_scores:
            return select_scored(self.score(queries, mask, scoring), k)
        keys = self.part.routing_keys
        with torch.no_grad():
            queries, mask = queries.to(keys.device), mask.to(keys.device)
            documents, scores, _ = self.session.exchange(queries, mask, keys, scoring.similarity)
        return Selection(documents, scores)

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        """Scores of all documents, or of those that are given; no gradient."""
        session, keys = self.session, self.part.routing_keys
        queries, mask = queries.to(keys.device), mask.to(keys.device)
        if documents is None:
            return session.layout.hide(session.score(queries, mask, keys, scoring))
        if session.all_scores:
            scores = session.layout.hide(session.score(queries, mask, keys, scoring))
            return scores_at(scores, documents.to(keys.device))
        with torch.no_grad():
            *_, scores = session.exchange(queries, mask, keys, scoring.similarity)
            shown = session.layout.without_hidden(documents).to(keys.device)
            return scores[:, : shown.shape[1]].masked_fill(shown < 0, NO_SCORE)

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows of documents, wherever they lie."""
        pooled_kv = self.part.pooled_kv
        rows = self.session.gather(selection.documents.to(pooled_kv.device), pooled_kv)
        return rows.to(pooled_kv.device, dtype)


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
    documents, bits = packed.transpose(0, 1).flatten(1, 2).unbind(-1)
    return select_of_rankings(documents, bits.int().view(torch.float32), k)
