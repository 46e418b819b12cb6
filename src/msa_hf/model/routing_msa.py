"""Routing: from router queries and router keys to the documents that a memory layer attends to.

Plain PyTorch. Scores are accumulated and compared in float32, in tiles: never tokens x chunks at once.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Scores held at once while routing: 4 M float32 numbers, 16 MB.
TILE_ELEMENTS = 1 << 22
# Chunks per tile: wide enough for an efficient matrix product, small enough that keys in 16 bit are widened piecemeal.
TILE_CHUNKS = 8192
# On an accelerator both are so many times more: there, launching a small tile's kernels takes longer than its work.
ACCELERATOR_TILES = 16
# Up to so many documents a choice is padded to `top_k`, however few there are.
PADDED_COLUMNS = 4096
# Stands for "no score": finite, so that it survives a division by the temperature without turning into NaN.
NO_SCORE = -1e30
# Beside a squared norm, inside the root: the gradient at zero is finite.
NORM_EPSILON = 1e-12


def columns(top_k: int, documents: int) -> int:
    """The room of a layer's choice: `top_k` documents, but above `PADDED_COLUMNS` no more than there are."""
    return max(min(top_k, max(documents, PADDED_COLUMNS)), 1)


def normalize_heads(vectors: Tensor) -> Tensor:
    """L2-normalize the last dimension in float32 (float64 stays); zero vectors stay zero."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + NORM_EPSILON)


def check_name(field: str, name: str, names: Collection[str]) -> None:
    """Raise ValueError where `name` is not among `names`."""
    if name not in names:
        raise ValueError(f"`{field}` must be one of {tuple(names)}, got {name!r}.")


def _scale_by_width(vectors: Tensor) -> Tensor:
    return vectors * vectors.shape[-1] ** -0.5


@dataclass(frozen=True)
class Similarity:
    """A way to compare router queries and keys: an inner product of what is made of them.

    Attributes:
        scale_queries: makes vectors [..., D] of router queries [..., D], float32.
        normalized_keys: routing keys are L2-normalized per head where they are pooled.
    """

    scale_queries: Callable[[Tensor], Tensor]
    normalized_keys: bool


# Every similarity; what configurations, encoding and routing know of them they read here.
SIMILARITIES: dict[str, Similarity] = {
    "cosine": Similarity(normalize_heads, normalized_keys=True),
    "dot": Similarity(_scale_by_width, normalized_keys=False),  # times `D ** -0.5`
}
# The names that each field of `Scoring` may have.
SCORINGS: Mapping[str, Collection[str]] = {
    "similarity": SIMILARITIES,
    "heads": ("mean", "max"),
    "tokens": ("max", "mean", "last"),
    "chunks": ("max", "mean"),
}


@dataclass(frozen=True)
class Scoring:
    """The score of a document for a sample: `s_doc = chunks_c tokens_t heads_h sim(q_t,h , r_c,g(h))` (paper, 3.2).

    Attributes:
        similarity: of a router query and a router key, a name in `SIMILARITIES`.
        heads: the reduction over the query heads, which comes first: "mean" or "max".
        tokens: over the tokens that route: "max", "mean" or "last".
        chunks: over the chunks of a document: "max" or "mean".

    Raises:
        ValueError: for a name that is not in the table `SCORINGS`.
    """

    similarity: str = "cosine"
    heads: str = "mean"
    tokens: str = "max"
    chunks: str = "max"

    def __post_init__(self) -> None:
        for field, names in SCORINGS.items():
            check_name(field, vars(self)[field], names)

    @property
    def has_operation(self) -> bool:
        """`route_documents` computes these reductions: the mean over heads, and maxima.

        Of `"last"` the routing mask holds one token per sample, which `"max"` treats alike.
        """
        return self.heads == "mean" and self.tokens in ("max", "last") and self.chunks == "max"


DEFAULT_SCORING = Scoring()


@dataclass(frozen=True)
class Selection:
    """The documents that a memory layer attends to for every sample, on the layer's device.

    Attributes:
        documents: [B, k] int64, rows of the bank's table of documents, best first; -1 where fewer were there.
        scores: [B, k] float32, the scores of `documents`, -inf beside -1; with a gradient where the queries have one.
        has_nan: [] bool, a score was NaN; None where nobody looked.
    """

    documents: Tensor
    scores: Tensor
    has_nan: Tensor | None = None


@dataclass(frozen=True)
class RoutingRequest:
    """The question that a forward puts to a memory.

    Attributes:
        routing_mask: [B, T] bool, the tokens that route, one of each sample where the last alone counts.
        k: documents that each sample chooses; see `columns`.
        scoring: how documents are scored.
        heads: query heads H of a layer.
        documents: [B, n] int64 rows that samples attend to instead of those that they would choose, -1 for none.
        all_scores: the scores of all documents are wanted.
        score_bias: the scores of the documents chosen become part of the answer.
        inputs: [B, T] token ids, or [B, T, hidden] embeddings, of all tokens; None where no other process has to agree.
    """

    routing_mask: Tensor
    k: int
    scoring: Scoring
    heads: int
    documents: Tensor | None = None
    all_scores: bool = False
    score_bias: bool = False
    inputs: Tensor | None = None


@dataclass
class LayerRouting:
    """The choice of one memory layer.

    Attributes:
        documents: [B, k] int64, positions in the bank, best first; -1 where fewer documents were there. k is
            `columns(top_k, documents)`.
        scores: [B, k] float32, scores of `documents`; -inf beside -1.
        document_scores: [B, N] float32, scores of all documents (differentiable in training), -inf for documents that
            a sample cannot see; None unless training or asked for with `output_document_scores=True`.
    """

    documents: Tensor
    scores: Tensor
    document_scores: Tensor | None = None


class RoutingFields(Protocol):
    """The fields that routing reads of an `MSAConfig`."""

    head_reduction: str
    query_reduction: str
    chunk_reduction: str
    top_k: int
    score_bias: bool
    num_attention_heads: int


def scoring_of(config: RoutingFields, similarity: str) -> Scoring:
    """The scoring that an `MSAConfig` names, by one of its two similarities."""
    return Scoring(similarity, config.head_reduction, config.query_reduction, config.chunk_reduction)


def routing_request(
    config: RoutingFields,
    scoring: Scoring,
    routing_mask: Tensor,
    rows: int,
    *,
    documents: Tensor | None = None,
    all_scores: bool = False,
    inputs: Tensor | None = None,
) -> RoutingRequest:
    """The request of a forward.

    Args:
        config: MSAConfig.
        scoring: `scoring_of` it.
        routing_mask: [B, T] bool, the tokens that may route; the only place where those that count are told apart.
        rows: R, documents of the memory, deleted ones too.
        documents, all_scores, inputs: as `RoutingRequest`.
    """
    if scoring.tokens == "last":
        routing_mask = last_routing_tokens(routing_mask)
    return RoutingRequest(
        routing_mask,
        columns(config.top_k, rows),
        scoring,
        config.num_attention_heads,
        documents,
        all_scores,
        config.score_bias,
        inputs,
    )


class KeyRows(Protocol):
    """Routing keys [C, G * D] that are read piece by piece: a tensor is one."""

    @property
    def shape(self) -> torch.Size: ...

    def split(self, split_size: int, /) -> Iterable[Tensor]:
        """The keys, so many rows at a time, on the device of the queries; one empty piece of none."""


def scale_heads(queries: Tensor, similarity: str) -> Tensor:
    """Router queries [..., D] as float32 vectors whose inner products with routing keys are the similarity.

    Raises:
        ValueError: for a similarity that nobody knows.
    """
    check_name("similarity", similarity, SIMILARITIES)
    return SIMILARITIES[similarity].scale_queries(queries.float())


def reduce_queries(queries: Tensor, groups: int, similarity: str) -> Tensor:
    """[B, T, H, D] -> [B, T, G, D] float32, whose inner product with a routing key is the mean over heads."""
    heads = queries.shape[2]
    return scale_heads(queries, similarity).unflatten(2, (groups, heads // groups)).sum(3) / heads


def score_documents(
    queries: Tensor,
    routing_mask: Tensor,
    routing_keys: KeyRows,
    offsets: Tensor,
    scoring: Scoring = DEFAULT_SCORING,
) -> Tensor:
    """Score every document for every sample (paper, 3.2; reductions in the order heads, tokens, chunks).

    With the mean over heads the score is linear in the query heads, so the heads of one group are averaged first and
    each (token, chunk) costs one inner product of G * D numbers.

    Args:
        queries: [B, T, H, D] router queries, any floating dtype.
        routing_mask: [B, T] bool, the tokens that route.
        routing_keys: [C, G * D] router keys of the chunks, already L2-normalized per head for `"cosine"`; a tensor, or
            what hands out pieces of one.
        offsets: [N + 1] int64, chunks of document i are `offsets[i]:offsets[i + 1]`.
        scoring: similarity and reductions.

    Returns:
        [B, N] float32. Samples without a routing token score `NO_SCORE` everywhere.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, valid = pack_routing_tokens(queries, routing_mask, last_only=scoring.tokens == "last")
        if scoring.heads == "mean":
            queries = reduce_queries(queries, routing_keys.shape[1] // queries.shape[3], scoring.similarity)
        else:
            queries = scale_heads(queries, scoring.similarity)
        chunk_scores = score_chunks(queries, valid, routing_keys, scoring.tokens)
        scores = reduce_chunks(chunk_scores, offsets.to(chunk_scores.device), scoring.chunks)
        return scores.masked_fill(~valid.any(1, keepdim=True), NO_SCORE)


def route_documents(
    queries: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    offsets: Tensor,
    k: int,
    *,
    alive: Tensor | None = None,
    similarity: str = "cosine",
) -> tuple[Tensor, Tensor]:
    """`select_documents` of `score_documents` with the default reductions, among the documents that are `alive` ([N]
    bool, None for all); no gradient."""
    with torch.no_grad():
        scores = score_documents(queries, routing_mask, routing_keys, offsets, Scoring(similarity))
        return select_documents(scores if alive is None else scores.masked_fill(~alive, NO_SCORE), k)


def pack_routing_tokens(queries: Tensor, routing_mask: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
    """Drop the tokens that do not route: [B, T, H, D] -> [B, t, H, D] and [B, t] bool, t the most of any sample."""
    positions = routing_mask.long().cumsum(1) - 1
    counts = routing_mask.sum(1)
    if last_only:
        routing_mask = routing_mask & (positions == (counts - 1)[:, None])
        positions, counts = torch.zeros_like(positions), counts.clamp(max=1)
    width = max(int(counts.max()), 1)
    sample, token = routing_mask.nonzero(as_tuple=True)
    packed = queries.new_zeros(queries.shape[0], width, *queries.shape[2:])
    packed = packed.index_put((sample, positions[sample, token]), queries[sample, token])
    return packed, torch.arange(width, device=queries.device) < counts[:, None]


def last_routing_tokens(routing_mask: Tensor) -> Tensor:
    """[B, T] bool -> the last routing token of each sample alone, which `"last"` and `"max"` treat alike."""
    later = routing_mask.flip(1).long().cumsum(1).flip(1)
    return routing_mask & (later == 1)


def tile_elements(device: torch.device) -> int:
    """Scores that may be held at once on a device."""
    return TILE_ELEMENTS * _tiles_on(device)


def _tiles_on(device: torch.device) -> int:
    """How many times the tiles of a CPU a device's are."""
    return 1 if device.type == "cpu" else ACCELERATOR_TILES


def score_chunks(queries: Tensor, valid: Tensor, routing_keys: KeyRows, query_reduction: str = "max") -> Tensor:
    """Scores of chunks, tokens reduced, in tiles.

    Args:
        queries: [B, t, G, D] float32 with the heads reduced, or [B, t, H, D].
        valid: [B, t] bool, tokens that are there.
        routing_keys: [C, G * D].
        query_reduction: `"max"` or `"mean"`.

    Returns:
        [B, C] float32; of no meaning for samples without a token.
    """
    return torch.cat(
        [
            torch.cat([_score_chunks(queries[rows], valid[rows], keys, query_reduction) for rows in rows_of(keys)])
            for keys, rows_of in _tiles(routing_keys, queries)
        ],
        dim=1,
    )


def _tiles(routing_keys: KeyRows, queries: Tensor) -> Iterator[tuple[Tensor, Callable[[Tensor], list[slice]]]]:
    """Tiles of chunks, and for each the tiles of samples whose scores fit in `tile_elements`."""
    batch, width = queries.shape[:2]

    def rows_of(keys: Tensor) -> list[slice]:
        step = max(tile_elements(queries.device) // max(keys.shape[0] * width, 1), 1)  # a bank may be empty
        return [slice(start, start + step) for start in range(0, batch, step)]

    for keys in routing_keys.split(TILE_CHUNKS * _tiles_on(queries.device)):
        yield keys.float(), rows_of


def _score_chunks(queries: Tensor, valid: Tensor, keys: Tensor, query_reduction: str) -> Tensor:
    """[b, t, G or H, D] queries against [c, G * D] keys -> [b, c]: heads and tokens reduced, tokens in tiles."""
    step = max(tile_elements(queries.device) // max(keys.shape[0] * queries.shape[0], 1), 1)
    total: Tensor | None = None
    for part, real in zip(queries.split(step, dim=1), valid.split(step, dim=1), strict=True):
        scores = _token_scores(part, keys)
        if query_reduction == "mean":
            scores = scores.masked_fill(~real[..., None], 0.0).sum(1)
            total = scores if total is None else total + scores
        else:
            scores = scores.masked_fill(~real[..., None], NO_SCORE).amax(1)
            total = scores if total is None else torch.maximum(total, scores)
    assert total is not None
    return total / valid.sum(1, keepdim=True).clamp(min=1) if query_reduction == "mean" else total


def _token_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """[b, t, G, D] (heads averaged) or [b, t, H, D] queries against [c, G * D] keys -> [b, t, c]."""
    if queries.shape[2] * queries.shape[3] == keys.shape[1]:
        return queries.flatten(2) @ keys.T
    grouped = keys.unflatten(1, (-1, queries.shape[3]))
    heads_per_group = queries.shape[2] // grouped.shape[1]
    best: Tensor | None = None
    for head in range(queries.shape[2]):
        scores = queries[:, :, head] @ grouped[:, head // heads_per_group].T
        best = scores if best is None else torch.maximum(best, scores)
    assert best is not None
    return best


def reduce_chunks(chunk_scores: Tensor, offsets: Tensor, chunk_reduction: str) -> Tensor:
    """[B, C] scores of chunks -> [B, N] of documents; `offsets` [N + 1] int64 on the same device."""
    if offsets.numel() - 1 == chunk_scores.shape[1]:
        return chunk_scores  # every document is one chunk
    reduced = torch.segment_reduce(chunk_scores.T.contiguous(), chunk_reduction, offsets=offsets, axis=0)
    return reduced.T


def select_of_rankings(documents: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best documents of what was selected from parts of a bank that follow each other.

    Args:
        documents, scores: [B, n] of the parts one after the other, each as `select_documents` gives them; n >= k.

    Returns:
        As `select_documents` of the whole: among equal scores, which stay in their order, documents ascend already.
    """
    best = scores.sort(dim=1, descending=True, stable=True)
    return documents.gather(1, best.indices[:, :k]), best.values[:, :k]


def select_documents(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best documents of each sample; equal scores go to the lower index, so the choice is deterministic.

    Args:
        scores: [B, N] float32; documents at or below `NO_SCORE` are not chosen, nor those that are NaN.
        k: how many.

    Returns:
        documents [B, k] int64, best first, -1 where fewer were there; their scores [B, k] float32, -inf beside -1.
    """
    with torch.no_grad():
        scores = scores.detach().float()
        scores = scores.masked_fill(scores.isnan(), NO_SCORE)
        batch, count = scores.shape
        # float32 as an order-preserving int32, above the reversed index: one top-k over unique int64 keys. Adding zero
        # makes -0.0 equal to 0.0.
        bits = (scores + 0.0).view(torch.int32).long()
        rank = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        keys = (rank << 32) | (0xFFFFFFFF - torch.arange(count, device=scores.device))
        documents = keys.topk(min(k, count), dim=1).indices
        chosen = scores.gather(1, documents)
        absent = ~(chosen > NO_SCORE)
        documents = documents.masked_fill(absent, -1)
        chosen = chosen.masked_fill(absent, float("-inf"))
        if count < k:
            documents = torch.nn.functional.pad(documents, (0, k - count), value=-1)
            chosen = torch.nn.functional.pad(chosen, (0, k - count), value=float("-inf"))
        return documents, chosen
