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

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...model.interface_msa import check_interface
from ...model.memory_msa import MemoryBank
from ...moved import renamed
from ...ops.formats import FORMATS, own_format, routed_formats, why_not_routed
from ..store.store import BankStore
from .hardware import Tiers, measured_tiers
from .layer import PooledKV, RoutingKeys, TieredLayer
from .lru_cache import DocumentLRU
from .parts import Part
from .plan import Placement, PlacementOptions, Reserves, plan_placement
from .rows import Rows, placed_rows
from .shapes import BankShape
from .sources import BankSource, source_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheUse:
    """The use of a placed bank's cache so far.

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
    changes: place it again to see later commits. Its `layers` are `TieredLayer`s.

    Attributes:
        plan: the `Placement`; `print(bank.plan)`.
        device, dtype: where questions are routed, and of the tensors before they were placed.
    """

    layers: dict[int, TieredLayer]  # type: ignore[assignment]  # whoever asks for tensors asks for a `DenseLayer`
    is_whole = False

    def __init__(
        self,
        layers: Mapping[int, tuple[RoutingKeys, PooledKV]],
        source: BankSource,
        plan: Placement,
        device: torch.device,
    ) -> None:
        prefix = {layer: (keys.to(device), values.to(device)) for layer, (keys, values) in source.prefix.items()}
        super().__init__({}, source.offsets, prefix, source.documents, source.origin, source.counts, source.next_id)
        self.plan = plan
        self.home, self.indexes = source.home, dict(source.indexes)
        self._device, self._dtype = device, source.dtype
        self.layers = {layer: TieredLayer(*parts, self.layout) for layer, parts in sorted(layers.items())}

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def cache(self) -> CacheUse | None:
        """The use of the cache; None if there is none."""
        hot = [memory.pooled_kv.hot for memory in self.layers.values()]
        used = [item for item in hot if item is not None]
        if not used:
            return None
        hits, misses = sum(item.hits for item in used), sum(item.misses for item in used)
        return CacheUse(hits, misses, sum(item.bytes for item in used), sum(item.budget for item in used))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryBank:
        """Not of a placed bank."""
        raise ValueError("This bank has its places; call `place_bank` with the bank that it was made from.")

    def save_pretrained(
        self, directory: str | Path, max_shard_size: int | str = "4GB", sole_writer: bool = False
    ) -> None:
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
    bank: str | Path | MemoryBank | BankStore | BankSource,
    device: torch.device | str | None = None,
    placement: str | PlacementOptions = "auto",
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    candidates: int | None = None,
    tiers: Tiers | None = None,
    reserves: Reserves | None = None,
    verify: bool = True,
) -> TieredBank:
    """Put routing keys and content where they fit: on the device, in host memory, on disk.

    The bank is read layer by layer and piece by piece, and converted on the way, so that little is needed beside its
    final place. Content on disk stays where the bank has it: memory mapped, if that is a directory; it is not read.
    Of many files a bounded number stays open; where a writer has removed one that was let go, asking for its documents
    raises `BankFormatError`: place the bank again.

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
    check_interface(model)
    source = bank if isinstance(bank, BankSource) else source_of(bank, model, tokenizer, verify)
    model = source.model if model is None else model
    if device is None:
        device = "cpu" if model is None else model.device
    target = torch.empty(0, device=device).device  # with its index
    if candidates is not None and candidates < 0:
        raise ValueError(f"`candidates` must be at least 0, got {candidates}.")
    plan = _planned(source, target, placement, tiers, reserves)
    logger.info("%s", plan)
    layers = {
        layer: _placed(source, layer, plan, plan.keys_tier(number), target, candidates)
        for number, layer in enumerate(source.shapes)
    }
    return TieredBank(layers, source, plan, target)


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
        if source.directory is None and (device.type == "cpu" or _is_locked(source)):  # what stays as it is, is there
            kept = shape.key_bytes(own) if choice.keys in (None, own) and device.type == "cpu" else 0
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


def _is_locked(source: BankSource) -> bool:
    """Tell whether a bank in memory is locked there for GPUs, such as a `host_bank`."""
    return all(
        isinstance(part.pooled_kv, Tensor) and part.pooled_kv.is_pinned() for part in source.parts(min(source.shapes))
    )


def _placed(
    source: BankSource, layer: int, plan: Placement, keys_on: str, device: torch.device, candidates: int | None
) -> tuple[RoutingKeys, PooledKV]:
    """A layer's keys and content in their places; its keys lie on the tier `keys_on`."""
    (groups, dim), dtype = source.shapes[layer], source.dtype
    own = own_format(dtype).name
    parts = source.parts(layer)
    keys: list[Part] = [part.routing_keys for part in parts] or [torch.empty(0, groups * dim, dtype=dtype)]
    content: list[Part] = [part.pooled_kv for part in parts] or [torch.empty(0, 2, groups, dim, dtype=dtype)]
    has_device = plan.tiers.device is not None

    def rows(parts: list[Part], form: str, tier: str) -> Rows:
        # In host memory as it is wanted, locked where there is a GPU: no copy.
        locked = tier == "host" and isinstance(parts[0], Tensor) and parts[0].is_pinned()
        there = source.directory is None if device.type == "cpu" else locked
        as_it_is = there and form == own and len(parts) == 1
        if tier == "disk" or as_it_is:
            return Rows(parts, device)
        return placed_rows(parts, form, device, on_device=tier == "device")

    exact = None
    if plan.keys != own:
        exact = rows(keys, own, plan.exact_on) if plan.exact_on else Rows(keys, device)
    found = RoutingKeys(
        rows(keys, plan.keys, keys_on),
        exact,
        streamed=has_device and keys_on == "host",
        candidates=candidates,
        usual=FORMATS[plan.keys].candidates,
    )
    hot = DocumentLRU(plan.cache // len(source.shapes)) if plan.cache else None
    return found, PooledKV(rows(content, plan.content, plan.content_on), dtype, hot)


def placed_vectors(vectors: Sequence[Tensor], bank: TieredBank) -> RoutingKeys:
    """Vectors of a bank's documents as one more layer of routing keys, where those of its last layer are.

    In fewer bits only where the plan has routing keys so; exact ones decide then, as among routing keys. They come on
    top of what the plan counts.

    Args:
        vectors: [c, D] that follow each other, on the CPU, at least one.
    """
    plan, device = bank.plan, bank.device
    own = own_format(vectors[0].dtype).name
    narrow, tier = FORMATS[plan.keys].scaled, plan.keys_tier(len(bank.layers) - 1)
    form = plan.keys if narrow else own
    return RoutingKeys(
        placed_rows(vectors, form, device, on_device=tier == "device"),
        Rows(vectors, device) if narrow else None,
        streamed=plan.tiers.device is not None and tier == "host",
        candidates=None,
        usual=FORMATS[form].candidates,
    )


__getattr__ = renamed(__name__, {"Choice": "PlacementOptions", "Content": "PooledKV"})
