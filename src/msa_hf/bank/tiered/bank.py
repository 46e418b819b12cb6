"""A bank in tiers: routing keys and content where a plan puts them (plan.py), used as any bank is.

    memory = place_bank("my-bank", "cuda", model=model)
    print(memory.plan)
    model.generate(**inputs, memory=memory)

What is kept in fewer bits finds candidates, and exact routing keys decide among these; they stay where the bank has
them unless the plan puts them in host memory. Rows that the layer's device cannot read where they lie are chosen by the
host, which waits for the device once per layer for that: exact routing keys that are in several files or not pinned,
content that is mapped from disk, and the cache. So does every bank to learn how many rows were chosen.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...model import routing_msa
from ...model.bank_format_msa import chunk_ranges
from ...model.chosen_msa import DocumentRows, score_rows
from ...model.memory_msa import LayerMemory, MemoryBank
from ...model.routing_msa import Scoring, select_documents
from ...moved import renamed
from ...ops import gather_documents, rescore_documents, route_documents
from ...ops.formats import FORMATS, join_rows, own_format, routed_formats, why_not_routed
from ...ops.gather_documents import most_rows
from ...ops.route_documents import narrowed, reduced
from .hardware import Tiers, measured_tiers
from .lru_cache import DocumentLRU
from .plan import Placement, PlacementOptions, Reserves, plan_placement
from .rows import Rows, placed_rows
from .shapes import BankShape
from .sources import BankSource, source_of

logger = logging.getLogger(__name__)
# Bytes of routing keys that are on the device at once where they are read from host memory for every question.
STREAMED_BYTES = 1 << 28


@dataclass(frozen=True)
class RoutingKeys:
    """The routing keys of a layer, in the place of `LayerMemory.routing_keys`.

    Attributes:
        rows: what questions are scored with.
        exact: the bank's own keys, where `rows` are others.
        offsets: [R + 1] int64 on the CPU.
        streamed: `rows` lie in host memory and go through the device for every question.
        candidates: documents whose scores are taken again from `exact`; 0 for none, None for `usual` times `k`.
        usual: `Format.candidates` of `rows`.
    """

    rows: Rows
    exact: Rows | None
    offsets: Tensor
    streamed: bool
    candidates: int | None
    usual: int

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def route(
        self, queries: Tensor, routing_mask: Tensor, offsets: Tensor, k: int, alive: Tensor | None, similarity: str
    ) -> tuple[Tensor, Tensor]:
        """`ops.route_documents`."""
        wanted = k
        if again := self.exact is not None and self.candidates != 0:
            usual = max(min(self.usual * k, offsets.shape[0] - 1), k)
            wanted = usual if self.candidates is None else self.candidates
            if wanted < k:
                raise ValueError(f"`candidates` must be at least the {k} documents of `top_k`, or 0, got {wanted}.")
        whole = reduced(queries, self.rows.parts[0].shape[1], similarity)
        queries = narrowed(whole, self.rows.dtype)
        if self.streamed:
            documents, scores = self._streamed(queries, routing_mask, offsets, wanted, alive)
        else:
            assert self.rows.whole is not None
            documents, scores = route_documents(
                queries, routing_mask, self.rows.whole, offsets, wanted, scales=self.rows.scales, alive=alive
            )
        if not again:
            return documents, scores
        assert self.exact is not None
        # Of their own, not rounded for the narrow keys.
        exact = queries if queries.dtype == self.exact.dtype else narrowed(whole, self.exact.dtype)
        keys = self.exact.whole
        if keys is not None and (keys.device == queries.device or keys.is_pinned()):
            return rescore_documents(exact, routing_mask, keys, offsets, documents, k)
        chosen = DocumentRows(documents, self.offsets)
        (keys,) = self.exact.select(chosen.rows)
        places, scores = rescore_documents(exact, routing_mask, keys, chosen.offsets, chosen.documents, k)
        return _named(places, chosen), scores

    def _streamed(
        self, queries: Tensor, routing_mask: Tensor, offsets: Tensor, k: int, alive: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The best of all from the best of every block of documents."""
        starts = self.offsets.numpy()
        row_bytes = self.rows.dtype.itemsize * self.rows.shape[1]
        found: list[tuple[Tensor, Tensor]] = []
        for first, end in chunk_ranges(starts, max(STREAMED_BYTES // row_bytes, 1)) or [(0, 0)]:
            low, high = (int(np.searchsorted(starts, edge)) for edge in (first, end))
            keys, scales = self.rows.between(first, end)
            documents, scores = route_documents(
                queries,
                routing_mask,
                keys,
                offsets[low : high + 1] - offsets[low],
                k,
                scales=scales,
                alive=None if alive is None else alive[low:high],
            )
            found.append((torch.where(documents < 0, documents, documents + low), scores))
        # Among equal scores documents ascend, so the lower place is the lower document.
        documents, scores = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
        places, scores = select_documents(scores, k)
        return documents.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1), scores


def _named(places: Tensor, chosen: DocumentRows) -> Tensor:
    """Documents [B, k] from places among the distinct ones."""
    known = torch.tensor([*chosen.distinct, -1], device=places.device)  # -1 counts from the end
    return known[places]


@dataclass(frozen=True)
class Content:
    """The content of a layer, in the place of `LayerMemory.content`.

    Attributes:
        rows: keys and values.
        offsets: [R + 1] int64 on the CPU.
        dtype: of the rows that are given out.
        hot: the documents used last; None without a cache.
    """

    rows: Rows
    offsets: Tensor
    dtype: torch.dtype
    hot: DocumentLRU | None = None
    requires_grad = False

    def gather(self, documents: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`chunks_msa.gather_documents`."""
        if self.rows.whole is not None and self.hot is None:
            width = most_rows(documents, offsets)
            return gather_documents(
                documents, offsets, self.rows.whole, width, scales=self.rows.scales, dtype=self.dtype
            )
        chosen = DocumentRows(documents, self.offsets)
        numbers, *scales = self.rows.select(chosen.rows) if self.hot is None else self._through(self.hot, chosen)
        return gather_documents(
            chosen.documents,
            chosen.offsets,
            numbers,
            chosen.width,
            scales=scales[0] if scales else None,
            dtype=self.dtype,
        )

    def _through(self, hot: DocumentLRU, chosen: DocumentRows) -> tuple[Tensor, ...]:
        """The rows of the documents chosen, from the cache where they are there."""

        def fetch(documents: list[int]) -> list[tuple[Tensor, ...]]:
            missing = DocumentRows(torch.tensor(documents)[None], self.offsets)
            columns = (tensor.split(missing.counts) for tensor in self.rows.select(missing.rows))
            return list(zip(*columns, strict=True))

        parts = hot.take(chosen.distinct, fetch)
        return tuple(map(join_rows, zip(*parts, strict=True))) or self.rows.select(chosen.rows)


# What a forward asks of its memory (`AttendingPass.operations`) -------------------------------------------------------


def _route(
    queries: Tensor,
    routing_mask: Tensor,
    routing_keys: RoutingKeys,
    offsets: Tensor,
    k: int,
    *,
    alive: Tensor | None = None,
    similarity: str = "cosine",
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return routing_keys.route(queries, routing_mask, offsets, k, alive, similarity)


def _score(
    queries: Tensor, routing_mask: Tensor, routing_keys: RoutingKeys, offsets: Tensor, scoring: Scoring
) -> Tensor:
    """The scores of all documents are always exact: exact keys go through the device, tile by tile."""
    rows = cast(Tensor, routing_keys.exact or routing_keys.rows)  # has what is asked of a tensor: `shape`, `split`
    return routing_msa.score_documents(queries, routing_mask, rows, offsets, scoring)


def _score_chosen(
    queries: Tensor, routing_mask: Tensor, routing_keys: RoutingKeys, chosen: DocumentRows, scoring: Scoring
) -> Tensor:
    """The same from the exact keys of those documents alone, which may lie in host memory or on disk."""
    keys, *_ = (routing_keys.exact or routing_keys.rows).select(chosen.rows)
    return score_rows(queries, routing_mask, keys, chosen, scoring)


def _gather(documents: Tensor, offsets: Tensor, content: Content) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return content.gather(documents, offsets)


class Turn(contextlib.nullcontext):
    """A forward that routes."""

    operations: Mapping[str, Callable[..., Any]] = {
        "route_documents": _route,
        "score_documents": _score,
        "score_chosen": _score_chosen,
        "gather_documents": _gather,
    }


# The bank -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheUse:
    """How the cache of a placed bank has been used so far.

    Attributes:
        hits, misses: documents found there, and not, counted per layer and forward.
        bytes: in use now, in all layers.
        budget: bytes that may be.
    """

    hits: int
    misses: int
    bytes: int
    budget: int


class TieredBank(MemoryBank):
    """A bank whose parts lie where a plan put them; `place_bank` makes one.

    `model.forward`, `generate` and `MemoryInterleave` take it as they take any bank. It is one state of a bank that
    changes: place it again to see later commits. In place of tensors, `layers` hold `RoutingKeys` and `Content`.

    Attributes:
        plan: the `Placement`; `print(bank.plan)`.
        device, dtype: where questions are routed, and of the tensors before they were placed.
    """

    def __init__(self, layers: Mapping[int, LayerMemory], source: BankSource, plan: Placement, device: Any) -> None:
        prefix = {layer: (keys.to(device), values.to(device)) for layer, (keys, values) in source.prefix.items()}
        super().__init__(layers, source.offsets, prefix, source.documents, source.origin, source.counts, source.next_id)
        self.plan = plan
        self._device, self._dtype = device, source.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def cache(self) -> CacheUse | None:
        """How the cache was used; None where there is none."""
        hot = [cast(Content, memory.content).hot for memory in self.layers.values()]
        used = [item for item in hot if item is not None]
        if not used:
            return None
        return CacheUse(*(sum(getattr(item, name) for item in used) for name in ("hits", "misses", "bytes", "budget")))

    def turn(self, *_: Any) -> Turn:
        """The operations of a forward that routes; `MSAForCausalLM` asks for them."""
        return Turn()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryBank:
        """Not of a placed bank."""
        raise ValueError("This bank has its places; call `place_bank` with the bank that it was made from.")

    def save_pretrained(self, directory: Any, max_shard_size: int | str = "4GB") -> None:
        """Not of a placed bank."""
        raise ValueError("A placed bank may hold fewer bits than the one that it was made from; save that one.")

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"TieredBank(documents={len(self)}, tokens={self.num_tokens}, chunks={self.num_chunks}, "
            f"layers={list(self.layers)}, device={self.device}, routing_keys={plan.keys}@{plan.keys_on}, "
            f"content={plan.content}@{plan.content_on}, cache={plan.cache})"
        )


def place_bank(
    bank: Any,
    device: torch.device | str | None = None,
    placement: str | PlacementOptions = "auto",
    *,
    model: Any = None,
    tokenizer: Any = None,
    candidates: int | None = None,
    tiers: Tiers | None = None,
    reserves: Reserves | None = None,
    verify: bool = True,
) -> TieredBank:
    """Put routing keys and content where they fit: on the device, in host memory, on disk.

    The bank is read layer by layer and piece by piece, and converted on the way, so that little is needed beside its
    final place. Content on disk stays where the bank has it: memory mapped, if that is a directory; it is not read.

    Args:
        bank: a directory; a `BankStore`, as it is now; or a `MemoryBank` in host memory, of which is used without a
            copy what is to lie there as it is.
        device: where questions are routed (default: the model's, else the CPU).
        placement: `"auto"`, or a `PlacementOptions`: formats, tiers, and the bytes of a cache on the device.
        model, tokenizer: as `MemoryBank.from_pretrained`, for a directory.
        candidates: with routing keys in fewer bits than the bank's, documents whose scores are taken again from the
            bank's own keys, which stay in host memory or mapped from disk unless `PlacementOptions.exact_on` says
            otherwise (default: four times `top_k`). 0: none, and the scores are those of the narrow keys.
        tiers: what is free (default: measured now). With a device of the CPU and `Tiers` that have one, host memory
            plays the device: a rehearsal.
        reserves: what to leave free (default: `Reserves()`); 0 for weights, which are loaded by now.
        verify: for a directory, compare the SHA-256 of every file, which reads all of them, as
            `MemoryBank.from_pretrained`.

    Returns:
        A bank for `model(..., memory=...)`, `generate` and `MemoryInterleave`; its `plan` says what lies where.

    Raises:
        DoesNotFit: with the arithmetic, before anything is allocated.
        ValueError: for a placement that cannot be, naming it; and what `MemoryBank.from_pretrained` raises.
        MemoryError: where host memory cannot be locked for the device.
    """
    source = bank if isinstance(bank, BankSource) else source_of(bank, model, tokenizer, verify)
    model = source.model if model is None else model
    if device is None:
        device = getattr(model, "device", "cpu")
    target = torch.empty(0, device=device).device  # with its index
    if candidates is not None and candidates < 0:
        raise ValueError(f"`candidates` must be at least 0, got {candidates}.")
    plan = _planned(source, target, placement, tiers, reserves)
    logger.info("%s", plan)
    layers = {
        layer: _placed(source, layer, plan, plan.keys_tier(number), target, candidates)
        for number, layer in enumerate(source.shapes)
    }
    return TieredBank(cast(Any, layers), source, plan, target)


def _planned(
    source: BankSource,
    device: torch.device,
    placement: str | PlacementOptions,
    tiers: Tiers | None,
    reserves: Reserves | None,
) -> Placement:
    own = own_format(source.dtype).name
    shape = BankShape(source.documents.num_rows, source.chunks, tuple(source.shapes.values()), own)
    choice = placement if isinstance(placement, PlacementOptions) else PlacementOptions()
    if choice.keys in FORMATS and (remark := why_not_routed(choice.keys)):
        others = " or ".join(name for name in routed_formats() if FORMATS[name].scaled)
        raise ValueError(f"{choice.keys} routing keys{remark}; choose {others}.")
    if tiers is None:
        tiers = measured_tiers(device, source.directory or ".", source.bytes)
        if source.directory is None and device.type == "cpu":  # what stays as it is, is there already
            kept = shape.key_bytes(own) if choice.keys in (None, own) else 0
            kept += shape.content_bytes(own) if choice.content in (None, own) else 0
            kept += shape.key_bytes(own) if choice.keys not in (None, own) and choice.exact_on else 0
            tiers = Tiers(tiers.device, tiers.host + kept, tiers.disk, tiers.rates)
    if tiers.device is None and device.type != "cpu":
        raise ValueError(f"What is free on {device} is not known: pass `tiers=Tiers(device=..., host=..., disk=...)`.")
    plan = plan_placement(shape, tiers, placement=placement, reserves=reserves)
    if plan.content_on == "disk" and plan.content != own:
        raise ValueError(
            f"{plan.content} content would have to be read from disk, but the bank's files hold {own}: choose {own} "
            "content there, or make room in host memory."
        )
    return plan


def _placed(
    source: BankSource, layer: int, plan: Placement, keys_on: str, device: torch.device, candidates: int | None
) -> LayerMemory:
    """A layer's keys and content in their places; its keys lie on the tier `keys_on`."""
    (groups, dim), dtype = source.shapes[layer], source.dtype
    own = own_format(dtype).name
    parts = source.parts(layer)
    keys = [part.routing_keys for part in parts] or [torch.empty(0, groups * dim, dtype=dtype)]
    content = [part.content for part in parts] or [torch.empty(0, 2, groups, dim, dtype=dtype)]
    has_device = plan.tiers.device is not None

    def rows(tensors: list[Tensor], form: str, tier: str) -> Rows:
        # In host memory as it is wanted, locked where there is a GPU: no copy.
        there = source.directory is None if device.type == "cpu" else tier == "host" and tensors[0].is_pinned()
        as_it_is = there and form == own and len(tensors) == 1
        if tier == "disk" or as_it_is:
            return Rows(tensors, device)
        return placed_rows(tensors, form, device, on_device=tier == "device")

    exact = None
    if plan.keys != own:
        exact = rows(keys, own, plan.exact_on) if plan.exact_on else Rows(keys, device)
    found = RoutingKeys(
        rows(keys, plan.keys, keys_on),
        exact,
        source.offsets,
        streamed=has_device and keys_on == "host",
        candidates=candidates,
        usual=FORMATS[plan.keys].candidates,
    )
    hot = DocumentLRU(plan.cache // len(source.shapes)) if plan.cache else None
    return cast(Any, _Layer(found, Content(rows(content, plan.content, plan.content_on), source.offsets, dtype, hot)))


@dataclass(frozen=True)
class _Layer:
    """In the place of `LayerMemory`."""

    routing_keys: RoutingKeys
    content: Content


__getattr__ = renamed(__name__, {"Choice": "PlacementOptions"})
