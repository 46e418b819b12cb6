"""One forward that routes, in all processes that share a bank at once."""

from __future__ import annotations

from collections.abc import Hashable
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ...model.chunks_msa import ContextRows
from ...model.dense_layer_msa import address_of
from ...model.document_rows_msa import ChunkLayout, score_chosen, scores_at
from ...model.ops_msa import OPERATIONS, PLAIN
from ...model.routing_msa import NO_SCORE, RoutingRequest, score_documents
from ...ops.gather_documents import gather_documents, most_rows
from .agreement import HEADER, SAME, Given, Header, Masks, Sizes, check_headers, header_of
from .collectives import Collectives
from .rankings import merge, pack
from .share import Share

# Rows of a sample that may be exchanged without knowing how many are really there; above, the device is waited for.
MOST_UNKNOWN_ROWS = 4096


class ShardSession:
    """One forward that routes, in all processes at once.

    Args:
        share: of this process.
        layout: of the whole bank.
        ranks: the processes.
        inputs: `SAME` or `DIFFERENT`.
        request: what this process wants; None where it only serves the others.

    Raises:
        RankFailed: where a process is gone.
    """

    def __init__(
        self, share: Share, layout: ChunkLayout, ranks: Collectives, inputs: str, request: RoutingRequest | None
    ) -> None:
        self.share, self.layout, self.ranks = share, layout, ranks
        self.together = inputs == SAME
        self._request = request
        self._mask = None if request is None else request.routing_mask.cpu()
        self.header: Header = dict.fromkeys(HEADER, 0)
        if request is not None and self._mask is not None:
            self.header = header_of(request, self._mask)
        self._message = ranks.start_gather(torch.tensor([self.header[name] for name in HEADER]))
        self._met = False
        self._refused: ValueError | None = None
        self._sizes: Sizes | None = None
        self._masks: Masks | None = None
        self._given: Given | None = None
        self._chosen: Tensor | None = None
        if self.together and self.header["active"]:
            # What all are to have said: a layer begins with it, and looks at what they said before it exchanges.
            self._take([self.header] * ranks.size)

    # Agreeing ---------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Tell whether any process has something to route.

        Raises:
            ValueError: in all processes, where what they want does not fit together.
            RankFailed: where a process is gone.
        """
        self._meet()
        return self._sizes is not None

    @property
    def sizes(self) -> Sizes:
        """The sizes of what is exchanged; waits for the other processes where inputs differ."""
        if not self.together:
            self._meet()
        assert self._sizes is not None
        return self._sizes

    def _meet(self) -> None:
        """Look, once, at what the others want; before the first exchange of a layer."""
        if self._met:
            return
        self._met = True
        headers = [dict(zip(HEADER, row, strict=True)) for row in self._message.wait().tolist()]
        try:
            check_headers(headers, self.together)
        except ValueError as error:
            self._refused = error
            raise
        if not self.together and any(header["active"] for header in headers):
            self._take(headers)

    def _take(self, headers: list[Header]) -> None:
        """Take what the processes want for what is done."""
        sizes = self._sizes = Sizes.of(headers)
        if not self.together:
            self._masks = Masks.exchanged(self._mask, sizes, self.ranks)
        if sizes.all_scores or not any(sizes.forces):
            return
        forced = None if self._request is None else self._request.documents
        given = torch.empty(0, 0, dtype=torch.int64) if forced is None else forced.cpu()
        if self.together:
            self._given = Given.of(given, sizes.forces[:1] * given.shape[0], self.share)
            return
        padded = torch.full((sizes.batch, sizes.columns), -1)
        padded[: given.shape[0], : given.shape[1]] = given
        forces = [forced_there for forced_there in sizes.forces for _ in range(sizes.batch)]
        self._given = Given.of(self.ranks.gather(padded).flatten(0, 1), forces, self.share)

    def addresses(self, device: torch.device, k: int) -> tuple[Hashable, ...] | None:
        """The addresses of all that choosing `k` documents reads besides the layer; see `LaunchesAlone`.

        What the other processes want is looked at here too: nothing is played that they do not play.
        """
        plain = OPERATIONS["route_documents"] is PLAIN["route_documents"]
        if plain or not self.together or not self.ranks.is_queued_on(device) or self.share.is_empty:
            return None
        if self._given is not None or self.sizes.all_scores or self.layout.most_rows(k) > MOST_UNKNOWN_ROWS:
            return None
        self._meet()
        self.ranks.check_open()
        read = (
            self.share.local_offsets(device),
            self.share.numbers(device),
            self.layout.offsets_on(device),
            self.layout.alive_on(device),
        )
        return self.ranks.number, *map(address_of, read)

    def __enter__(self) -> ShardSession:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:  # all came through, or those that did not are heard of
            self._meet()
            self.ranks.gather(torch.ones(1, dtype=torch.int64))
        elif self._refused is None:  # else all of them raise
            self.ranks.fail(error)

    # What every process needs of the others' inputs -------------------------------------------------------------------

    def _everyones(self, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Router queries [S, t, H, D] of the samples of all processes, and which of them are there [S, t]."""
        sizes = self.sizes
        if queries.shape[2] != sizes.heads:
            raise ValueError(f"A layer has {queries.shape[2]} query heads, the configuration says {sizes.heads}.")
        if self._masks is None:
            return queries, mask
        packed = queries.new_zeros(sizes.batch, sizes.tokens, *queries.shape[2:], dtype=torch.float32)
        if self._masks.order is not None:
            order = self._masks.order.to(queries.device)
            index = order[..., None, None].expand(-1, -1, *queries.shape[2:])
            packed[: queries.shape[0], : order.shape[1]] = queries.float().gather(1, index)
        return self.ranks.gather(packed).flatten(0, 1), self._masks.routes.to(queries.device)

    def _own(self, results: Tensor) -> Tensor:
        """This process' samples of [S, ...]."""
        if self.together:
            return results
        start = self.ranks.rank * self.sizes.batch
        return results[start : start + self.header["batch"]]

    # What processes find out together in a layer ----------------------------------------------------------------------

    def exchange(self, queries: Tensor, mask: Tensor, keys: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
        """Route and score in all processes, of which some may route while others are given documents.

        Returns:
            documents and scores [B, k] of the best, and scores of given documents [B, columns], for the samples of this
            process; of no meaning where it did not ask for that.
        """
        queries, mask = self._everyones(queries, mask)
        sizes, given = self.sizes, self._given
        if given is None:
            documents, best = self._route(queries, mask, keys, similarity)
            self._chosen = documents
            return self._own(documents), self._own(best), self._own(best)
        given_scores = self._score_given(queries, mask, keys, given, similarity)
        documents = queries.new_full((queries.shape[0], sizes.k), -1, dtype=torch.int64)
        best = given_scores
        if sizes.routes:
            documents, best = self._route(queries, mask & ~given.forces.to(mask.device), keys, similarity)
        if not self.together:
            wide = torch.nn.functional.pad(documents, (0, sizes.columns - documents.shape[1]), value=-1)
            self._chosen = torch.where(given.forces.to(wide.device), given.documents.to(wide.device), wide)
        return self._own(documents), self._own(best), self._own(given_scores)

    def _route(self, queries: Tensor, mask: Tensor, keys: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
        """The best documents [S, k] of the bank for the samples of all processes."""
        rows, k = self.share.own_rows, self.sizes.k
        if self.share.is_empty:
            documents = queries.new_full((queries.shape[0], k), -1, dtype=torch.int64)
            scores = documents.new_full(documents.shape, float("-inf"), dtype=torch.float32)
        else:
            alive = self.layout.alive_on(keys.device)
            places, scores = OPERATIONS["route_documents"](
                queries,
                mask,
                keys,
                self.share.local_offsets(keys.device),
                k,
                alive=None if alive is None else alive[rows],
                similarity=similarity,
            )
            documents = self.share.numbers(keys.device).take(places)
        self._meet()  # the device scores meanwhile
        return merge(self.ranks.gather(pack(documents, scores)), k)

    def _score_given(self, queries: Tensor, mask: Tensor, keys: Tensor, given: Given, similarity: str) -> Tensor:
        """Scores [S, columns] of the documents that samples are given."""
        found = None
        if given.counts[self.ranks.rank]:
            here = given.here.to(keys.device)
            found = score_chosen(queries, mask, keys, here, self.sizes.scoring(similarity))
        return scores_at(self._join(found, given.counts, queries), given.places.to(keys.device))

    def _join(self, found: Tensor | None, counts: np.ndarray, queries: Tensor) -> Tensor:
        """Scores [S, sum of counts] of all processes' documents from those of each, [S, its count], None of none."""
        scores = queries.new_full((queries.shape[0], int(counts.max())), NO_SCORE, dtype=torch.float32)
        if found is not None:
            scores[:, : found.shape[1]] = found
        self._meet()
        parts = self.ranks.gather(scores)
        return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)

    def score(self, queries: Tensor, mask: Tensor, keys: Tensor, similarity: str) -> Tensor:
        """Scores [B, R] of all documents of the bank for the samples of this process; no gradient."""
        queries, mask = self._everyones(queries.detach(), mask)
        counts = np.diff(self.share.rows)
        found = None
        if counts[self.ranks.rank]:
            offsets = self.share.local_offsets(keys.device)
            found = score_documents(queries, mask, keys, offsets, self.sizes.scoring(similarity))
        return self._own(self._join(found, counts, queries))

    def gather(self, documents: Tensor, content: Tensor) -> ContextRows:
        """The rows of documents [B, n] of the whole bank, of which this process has `content`.

        More rows than are needed, so that nobody waits for the device to learn how many these are.
        """
        sizes, everyones = self.sizes, documents
        if not self.together and sizes.all_scores:
            padded = documents.new_full((sizes.batch, sizes.columns), -1)
            padded[: documents.shape[0], : documents.shape[1]] = documents
            everyones = self.ranks.gather(padded).flatten(0, 1)
        elif not self.together:
            assert self._chosen is not None
            everyones = self._chosen
        offsets = self.layout.offsets_on(content.device)
        width = self.layout.most_rows(everyones.shape[1])
        if width > MOST_UNKNOWN_ROWS:
            width = most_rows(everyones, offsets)
        first, _ = self.share.own_chunks
        *parts, valid, slots = gather_documents(everyones, offsets, content, width, first=first)
        # Documents may have been named by the caller, without an exchange of a layer.
        self._meet()
        if self.together:
            keys, values = self.ranks.join(torch.stack(parts)).unbind(0)
        else:
            both = torch.stack(parts, dim=1).unflatten(0, (self.ranks.size, sizes.batch))
            own = self.ranks.scatter_join(both)[: self.header["batch"]]
            keys, values = (part.contiguous() for part in own.unbind(1))
        return ContextRows(keys, values, self._own(valid), self._own(slots))
