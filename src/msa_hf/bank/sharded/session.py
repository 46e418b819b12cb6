"""One forward that routes, in all processes that share a bank at once (parallel.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...model import attention_msa
from ...model.chosen_msa import DocumentRows, score_chosen, scores_at
from ...model.chunks_msa import chunk_rows
from ...model.routing_msa import NO_SCORE, SCORINGS, Scoring, columns, score_documents, scoring_of, select_documents
from ...ops.gather_documents import most_rows

if TYPE_CHECKING:
    from .bank import ShardedBank

# Rows of a sample that may be exchanged without knowing how many are really there; above, the device is waited for.
MOST_UNKNOWN_ROWS = 4096
# What processes tell each other before a forward, in this order.
FLAGS, SIZES = ("active", "all_scores", "forced"), ("batch", "tokens", "heads", "k", "columns")
REDUCTIONS = ("heads", "tokens", "chunks")
HEADER = (*FLAGS, *SIZES, *(f"reduce_{name}" for name in REDUCTIONS), "inputs")
SAME = "same"
DIFFERENT = "different"


def header_of(
    config: Any, inputs: Tensor, routing_mask: Tensor, forced: Tensor | None, all_scores: bool, rows: int
) -> dict[str, int]:
    """The message of a process about its turn; `rows` are those of the whole bank."""
    k = columns(config.top_k, rows)
    digest = hashlib.sha256()
    for tensor in (inputs, routing_mask, forced):
        if tensor is not None and not tensor.is_floating_point():  # embeddings may differ in their last digits
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    scoring = scoring_of(config, config.similarity)
    reductions = {f"reduce_{name}": list(SCORINGS[name]).index(vars(scoring)[name]) for name in REDUCTIONS}
    return {
        "active": 1,
        "batch": inputs.shape[0],
        "tokens": int(routing_mask.sum(1).max()),
        "heads": config.num_attention_heads,
        "k": k,
        "all_scores": int(all_scores or (forced is None and not scoring.has_operation)),
        "forced": int(forced is not None),
        "columns": max(k, 0 if forced is None else forced.shape[1]),
        **reductions,
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


class Turn:
    """One forward that routes, in all processes at once.

    Attributes:
        active: whether any process has something to route.
        operations: those of a memory layer (`Operations` in ops_msa.py), done together. Their `offsets` count all
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
        places = DocumentRows(given, self.bank.offsets.cpu())
        distinct, rows = torch.tensor(places.distinct, dtype=torch.int64), self.bank.own_rows
        here = distinct[(distinct >= rows.start) & (distinct < rows.stop)] - rows.start
        return Given(
            given,
            torch.tensor(forces, dtype=torch.bool)[:, None],
            places.documents,
            np.diff(np.searchsorted(distinct.numpy(), self.bank.rows)),
            DocumentRows(here.expand(given.shape[0], -1), self.bank.local_offsets(torch.device("cpu"))),
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
                scores = self.score_documents(queries, routing_mask, routing_keys, offsets, Scoring(similarity))
                return select_documents(scores if alive is None else scores.masked_fill(~alive, NO_SCORE), k)
            documents, scores, _ = self._exchange(queries, routing_mask, routing_keys, similarity)
            return documents, scores

    def score_chosen(
        self, queries: Tensor, routing_mask: Tensor, routing_keys: Tensor, chosen: DocumentRows, scoring: Scoring
    ) -> Tensor:
        """`chosen_msa.score_chosen` of the whole bank; no gradient."""
        if self.all_scores:
            scores = self.score_documents(queries, routing_mask, routing_keys, self.bank.offsets, scoring)
            return scores_at(scores[:, chosen.distinct], chosen.documents)
        with torch.no_grad():
            *_, scores = self._exchange(queries, routing_mask, routing_keys, scoring.similarity)
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

    def score_documents(
        self,
        queries: Tensor,
        routing_mask: Tensor,
        routing_keys: Tensor,
        offsets: Tensor,
        scoring: Scoring,
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
                scoring,
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
                width = most_rows(everyones, offsets)
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
        similarity = self.bank.origin.similarity
        offsets = self.bank.offsets.to(self.bank.device)
        for memory in self.bank.layers.values():
            keys, content = memory.routing_keys, memory.content
            queries = keys.new_zeros(0, self.tokens, self.shared["heads"], content.shape[-1])
            mask = torch.zeros(0, self.tokens, dtype=torch.bool, device=keys.device)
            if self.all_scores:
                self.score_documents(queries, mask, keys, offsets, self._scoring(similarity))
            else:
                self._exchange(queries, mask, keys, similarity)
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
