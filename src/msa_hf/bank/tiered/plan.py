"""Plans for the parts of a bank: on the device, in host memory, on disk. Arithmetic on shapes and free memory alone.

    shape = BankShape.for_tokens(100_000_000, layers=[(8, 128)] * 18)
    print(plan_placement(shape, Tiers(device=141 * GB, host=137 * GB, disk=64 * GB, rates=RATES["H200"])))

Bytes are exact. Times are what the stated rates allow at best: a routing layer reads its keys once or is bound by its
products, whichever takes longer. Launches, the choice of the best documents and exchanges between GPUs are not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...moved import renamed
from ...ops import formats
from ...ops.formats import FORMATS, why_not_routed
from ...tables import table_lines
from .hardware import TIERS, Tiers, measured_tiers
from .shapes import GB, BankShape, require_known

MAX_GPUS = 2**20


@dataclass(frozen=True)
class Reserves:
    """Bytes that the bank must leave free. Without a device all but `disk` are reserved in host memory.

    Attributes:
        weights: 0 where they are loaded already and the free memory was measured after that.
        activations: encoding 16,384 tokens at a time took 2.4 GB in the 4B shape.
        kv_cache: of generation; the 4B shape takes 147 kB a token, and three static caches of 256 tokens with what was
            recorded for them took 0.54 GB.
        host, disk: for everything else.
    """

    weights: int = 0
    activations: int = 3 * GB
    kv_cache: int = 2 * GB
    host: int = 4 * GB
    disk: int = 1 * GB

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0:
            raise ValueError(f"Reserves cannot be negative: {self}.")

    def on(self, tier: str, has_device: bool) -> int:
        """The bytes that are reserved on a tier."""
        model = self.weights + self.activations + self.kv_cache
        if tier == "device":
            return model if has_device else 0
        return self.disk if tier == "disk" else self.host + (0 if has_device else model)


@dataclass(frozen=True)
class PlacementOptions:
    """An explicit placement; None leaves that part to the planner. Formats that are named here count as allowed.

    Attributes:
        keys, keys_on, content, content_on: format and tier of routing keys and of content.
        cache: bytes on the device for the content of documents that were used last; taken only where content does not
            lie there itself.
        exact_on: where the bank's own routing keys lie beside narrower ones, to decide among the candidates that these
            found: "host" for host memory, where kernels read them; None for wherever the bank has them now.
        resident: with `keys_on="host"`, of how many layers (the first ones) the routing keys lie on the device all the
            same, so that only the others go over the bus for every question; None for as many as fit.
    """

    keys: str | None = None
    keys_on: str | None = None
    content: str | None = None
    content_on: str | None = None
    cache: int = 0
    exact_on: str | None = None
    resident: int | None = 0


class DoesNotFit(ValueError):
    """The bank does not fit; the message holds the arithmetic and what would make it fit."""


@dataclass(frozen=True)
class Placement:
    """The places of one GPU's share of a bank.

    Attributes:
        bank: the whole bank.
        gpus: how many share it evenly.
        tiers, reserves: what was planned with.
        keys, keys_on, content, content_on: format and tier of routing keys and of content.
        cache: bytes on the device for content that lies elsewhere.
        exact_on: "host" where the bank's own routing keys lie in host memory beside narrower ones.
        resident: layers, the first ones, whose routing keys lie on the device where `keys_on` is "host".
    """

    bank: BankShape
    tiers: Tiers
    reserves: Reserves
    gpus: int
    keys: str
    keys_on: str
    content_on: str
    content: str
    cache: int = 0
    exact_on: str | None = None
    resident: int = 0

    @property
    def shape(self) -> BankShape:
        """One GPU's share."""
        return self.bank.share(self.gpus)

    @property
    def parts(self) -> list[tuple[str, str, str, int]]:
        """(part, format, tier, bytes) of everything that is placed."""
        shape, own = self.shape, self.bank.dtype
        return [
            ("routing keys", self.keys, self.keys_on, shape.key_bytes(self.keys, slice(self.resident, None))),
            *(
                [("resident keys", self.keys, "device", shape.key_bytes(self.keys, slice(self.resident)))]
                if self.resident
                else []
            ),
            *([("exact keys", own, self.exact_on, shape.key_bytes(own))] if self.exact_on else []),
            ("content", self.content, self.content_on, shape.content_bytes(self.content)),
            ("index", "", "host" if self.tiers.device is None else "device", shape.index_bytes),
            ("texts", "", "disk", shape.text_bytes),
            *([("cached content", self.content, "device", self.cache)] if self.cache else []),
        ]

    def keys_tier(self, layer: int) -> str:
        """The tier of the routing keys of a layer, counted from 0."""
        return "device" if layer < self.resident else self.keys_on

    def used(self, tier: str) -> int:
        """Bytes of the bank on a tier."""
        return sum(size for _, _, place, size in self.parts if place == tier)

    def reserved(self, tier: str) -> int:
        """Bytes reserved on a tier; no more than it has where the bank leaves it alone."""
        reserved = self.reserves.on(tier, self.tiers.device is not None)
        return reserved if self.used(tier) else min(reserved, self.tiers.capacity(tier))

    def free(self, tier: str) -> int:
        """Bytes left on a tier; negative where the placement does not fit."""
        return self.tiers.capacity(tier) - self.reserved(tier) - self.used(tier)

    @property
    def fits(self) -> bool:
        return all(self.free(tier) >= 0 for tier in TIERS)

    def routing_seconds(self, tokens: int) -> float | None:
        """Time to route `tokens` tokens in all layers, keys read once or products; None where no rate is known."""
        rates = self.tiers.rates
        if rates is None or self.tiers.device is None:
            return None
        chunks, seconds = self.shape.chunks, 0.0
        narrow = FORMATS[self.keys].bits <= 8 and rates.narrow_matmul is not None
        rate = rates.narrow_matmul if narrow else rates.matmul
        for layer, (groups, dim) in enumerate(self.shape.layers):
            speed = rates.copy if self.keys_tier(layer) == "device" else rates.host_link
            if speed is None or rate is None:
                return None
            read = chunks * FORMATS[self.keys].vector_bytes(groups * dim) / speed
            seconds += max(read, 2 * tokens * chunks * groups * dim / rate)
        return seconds

    def fetch_seconds(self, documents: int) -> float | None:
        """Time to fetch the content of `documents` documents of mean length in all layers, at worst all from one GPU's
        share; None where no rate is known."""
        rates, shape = self.tiers.rates, self.shape
        if rates is None or self.tiers.device is None:
            return None
        # On the device every byte is read and written, and `copy` counts both.
        speeds = {"device": rates.copy and rates.copy / 2, "host": rates.host_fetch, "disk": rates.disk}
        speed = speeds[self.content_on]
        share = min(documents, shape.documents) / max(shape.documents, 1)
        return None if speed is None else share * shape.content_bytes(self.content) / speed

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON values."""
        return {
            "gpus": self.gpus,
            "documents": self.shape.documents,
            "chunks": self.shape.chunks,
            "layers": [list(layer) for layer in self.shape.layers],
            "parts": [dict(zip(("part", "format", "tier", "bytes"), part, strict=True)) for part in self.parts],
            "tiers": {
                tier: {
                    "capacity": self.tiers.capacity(tier),
                    "reserved": self.reserved(tier),
                    "used": self.used(tier),
                    "free": self.free(tier),
                }
                for tier in TIERS
            },
            "routing_seconds": {str(tokens): self.routing_seconds(tokens) for tokens in (32, 256)},
            "fetch_seconds": {"16": self.fetch_seconds(16)},
            "rates": None if self.tiers.rates is None else vars(self.tiers.rates),
            "saved_bytes": self.bank.saved_bytes,
        }

    def __str__(self) -> str:
        shape, reserves, rates = self.shape, self.reserves, self.tiers.rates
        rows: list[tuple[str, ...]] = [("part", "format", "lies on", "bytes", "GB")]
        rows += [(part, form, tier, f"{size:,}", f"{size / GB:.1f}") for part, form, tier, size in self.parts]
        lines = [
            f"{shape.documents:,} documents, {shape.chunks:,} chunks, {len(shape.layers)} layers"
            + (f": one of {self.gpus} GPUs' shares" if self.gpus > 1 else ""),
            "",
            *table_lines(rows, left=3),
            "",
        ]
        rows = [("tier", "capacity", "reserved", "bank", "free")]
        for tier in TIERS:
            if tier != "device" or self.tiers.device is not None:
                numbers = (self.tiers.capacity(tier), self.reserved(tier), self.used(tier), self.free(tier))
                rows.append((tier, *(f"{number:,}" for number in numbers)))
        lines += [
            *table_lines(rows, left=1),
            "",
            f"reserved for the model: weights {reserves.weights:,}, activations {reserves.activations:,}, KV cache "
            f"{reserves.kv_cache:,}",
            f"saved as {self.bank.dtype}: {self.bank.saved_bytes:,} bytes",
        ]
        times = [(f"routing {tokens} tokens", self.routing_seconds(tokens)) for tokens in (32, 256)]
        times.append(("fetching 16 documents", self.fetch_seconds(16)))
        for what, seconds in times:
            lines.append(
                f"{what}, all layers: " + ("not known" if seconds is None else f"{1e3 * seconds:.3g} ms, computed")
            )
        lines.append("rates: none known" if rates is None else f"rates of {rates.name}: {rates.source}")
        if remark := why_not_routed(self.keys):
            lines.append(f"note: {self.keys} routing keys{remark}")
        return "\n".join(lines)


def plan_placement(
    shape: BankShape,
    tiers: Tiers | None = None,
    *,
    placement: str | PlacementOptions = "auto",
    key_formats: Sequence[str] | None = None,
    content_formats: Sequence[str] | None = None,
    reserves: Reserves | None = None,
    gpus: int = 1,
) -> Placement:
    """Decide where routing keys and content (keys and values) lie.

    `"auto"` puts routing keys on the device in the widest format that fits, then content on the device, else in host
    memory, else on disk, on each in the widest format that fits. Wide routing keys come before the tier of content.
    Without a device all of it lies in host memory, content else on disk.

    Args:
        shape: of the whole bank.
        tiers: what is free for one GPU's share (default: measured here).
        placement: `"auto"`, or what is chosen already.
        key_formats: that routing keys may have (default: the bank's own, and narrower ones that are scored as they
            lie).
        content_formats: that content may have (default: the bank's own). Allow `"fp8"` to halve them.
        reserves: what to leave free.
        gpus: how many share the bank; `tiers` is what each of them has.

    Raises:
        DoesNotFit: with the arithmetic, and what would make it fit.
        ValueError: for a choice that cannot be: unknown or wider formats, keys on disk, a device that is not there.
    """
    if not 1 <= gpus <= MAX_GPUS:
        raise ValueError(f"`gpus` must be from 1 to {MAX_GPUS}, got {gpus}.")
    if isinstance(placement, str) and placement != "auto":
        raise ValueError(f"`placement` must be 'auto' or a PlacementOptions, got {placement!r}.")
    choice = placement if isinstance(placement, PlacementOptions) else PlacementOptions()
    tiers = measured_tiers() if tiers is None else tiers
    has_device = tiers.device is not None
    keys_on = ("device" if has_device else "host",) if choice.keys_on is None else (choice.keys_on,)
    content_on = (TIERS if has_device else TIERS[1:]) if choice.content_on is None else (choice.content_on,)
    if "disk" in keys_on:
        raise ValueError("Routing keys cannot lie on disk: every question reads all of them.")
    if choice.exact_on not in (None, "host"):
        raise ValueError(f"`exact_on` must be 'host' or None, got {choice.exact_on!r}.")
    count = len(shape.layers)
    if choice.resident is not None and not 0 <= choice.resident <= count:
        raise ValueError(f"`resident` must be from 0 to the {count} layers, or None, got {choice.resident}.")
    if choice.resident != 0 and (keys_on != ("host",) or not has_device):
        raise ValueError("`resident` layers are those beside others whose keys lie in host memory: keys_on='host'.")
    if choice.cache < 0 or (choice.cache and not has_device):
        raise ValueError(f"`cache` must be bytes on a device, got {choice.cache}; device: {tiers.device}.")
    for name, places in (("keys_on", keys_on), ("content_on", content_on)):
        require_known(name, places, TIERS)
        if "device" in places and not has_device:
            raise ValueError(f"`{name}` is 'device', but there is no device.")
    request = _Request(
        shape,
        tiers,
        Reserves() if reserves is None else reserves,
        gpus,
        _formats("key_formats", shape, choice.keys, key_formats, formats.routed_formats(), formats.key_formats()),
        keys_on,
        content_on,
        _formats("content_formats", shape, choice.content, content_formats, (shape.dtype,), formats.content_formats()),
        choice.cache,
        choice.exact_on,
        (choice.resident,) if choice.resident is not None else tuple(range(count, -1, -1)),
    )
    found = request.first_fit()
    if found is None:
        raise DoesNotFit(request.arithmetic())
    return found


def _formats(
    name: str,
    shape: BankShape,
    chosen: str | None,
    given: Sequence[str] | None,
    default: Sequence[str],
    known: Sequence[str],
) -> tuple[str, ...]:
    """The formats that come into question, widest first."""
    asked = [chosen] if chosen is not None else given
    require_known(name, asked or (), known)
    possible = [item for item in known if _is_kept_in(shape.dtype, item)]
    if asked is None:
        return tuple(item for item in possible if item in default)
    if wider := [item for item in asked if item not in possible]:
        raise ValueError(f"`{name}`: the bank is kept as {shape.dtype}; {wider[0]} would add bytes and no information.")
    if not asked:
        raise ValueError(f"`{name}` must name at least one format.")
    return tuple(item for item in possible if item in asked)


def _is_kept_in(own: str, format: str) -> bool:
    return format == own or FORMATS[format].bits < FORMATS[own].bits


@dataclass(frozen=True)
class _Request:
    """A question to the planner: what there is, and what comes into question, preferred first."""

    shape: BankShape
    tiers: Tiers
    reserves: Reserves
    gpus: int
    keys: tuple[str, ...]
    keys_on: tuple[str, ...]
    content_on: tuple[str, ...]
    content: tuple[str, ...]
    cache: int = 0
    exact_on: str | None = None
    resident: tuple[int, ...] = (0,)  # layers; the most first

    def placements(self) -> Iterator[Placement]:
        chosen = itertools.product(self.keys, self.keys_on, self.content_on, self.content)
        for (keys, keys_on, content_on, content), resident in itertools.product(chosen, self.resident):
            yield Placement(
                self.shape,
                self.tiers,
                self.reserves,
                self.gpus,
                keys,
                keys_on,
                content_on,
                content,
                cache=0 if content_on == "device" else self.cache,
                exact_on=None if keys == self.shape.dtype else self.exact_on,
                resident=resident,
            )

    def first_fit(self) -> Placement | None:
        return next((placement for placement in self.placements() if placement.fits), None)

    def holds(self, **changes: Any) -> bool:
        return replace(self, **changes).first_fit() is not None

    def arithmetic(self) -> str:
        """The bytes that are needed, those that are there, and what would make it fit."""
        share, has_device = self.shape.share(self.gpus), self.tiers.device is not None

        def sizes(formats: Sequence[str], size: Callable[[str], int]) -> str:
            return ", ".join(f"{size(item):,} bytes as {item}" for item in formats)

        there = []
        for tier in TIERS if has_device else TIERS[1:]:
            capacity, reserved = self.tiers.capacity(tier), self.reserves.on(tier, has_device)
            there.append(f"{tier} {capacity:,} - {reserved:,} reserved = {max(capacity - reserved, 0):,} bytes")
        share_of = f" (one of {self.gpus} GPUs' shares)" if self.gpus > 1 else ""
        index = f"the index {share.index_bytes:,}" + (f", texts {share.text_bytes:,}" if share.text_bytes else "")
        index += f", the cache {self.cache:,}" if self.cache else ""
        index += f", exact keys {share.key_bytes(share.dtype):,} (host)" if self.exact_on else ""
        return (
            f"{share.chunks:,} chunks in {len(share.layers)} layers{share_of} do not fit. Routing keys need "
            f"{sizes(self.keys, share.key_bytes)} ({' or '.join(self.keys_on)}); content "
            f"{sizes(self.content, share.content_bytes)} ({' or '.join(self.content_on)}); {index}. "
            f"There is: {'; '.join(there)}. "
            f"It would fit with: {'; '.join(self.remedies()) or 'nothing that changes one thing alone'}."
        )

    def remedies(self) -> list[str]:
        """Changes of one thing each, every one tried."""
        found = []
        if self.cache and self.holds(cache=0):
            found.append("no cache")
        if self.exact_on and self.holds(exact_on=None):
            found.append("exact keys where the bank has them")
        if self.resident != (0,) and self.holds(resident=(0,)):
            found.append("no resident layers")
        keys, content = (
            self.narrower(self.keys, formats.key_formats()),
            self.narrower(self.content, formats.content_formats()),
        )
        key = next((item for item in keys if self.holds(keys=(item,))), None)
        value = next((item for item in content if self.holds(content=(item,))), None)
        if key:
            found.append(f"{key} routing keys" + why_not_routed(key))
        if value:
            found.append(f"{value} content")
        both = ((a, b) for a in keys for b in content if self.holds(keys=(a,), content=(b,)))
        if not key and not value and (pair := next(both, None)):
            found.append(f"{pair[1]} content with {pair[0]} routing keys" + why_not_routed(pair[0]))
        places = TIERS if self.tiers.device is not None else TIERS[1:]
        if self.content_on != places and self.holds(content_on=places):
            found.append("content wherever it fits")
        if self.keys_on == ("device",) and self.holds(keys_on=("host",)):
            found.append("routing keys in host memory, to be read for every question")
        count = len(self.shape.layers)
        for kept in range(count - 1, 0, -1):
            if self.holds(shape=replace(self.shape, layers=self.shape.layers[-kept:])):
                found.append(f"the last {kept} of the {count} layers")
                break
        if self.holds(reserves=Reserves(0, 0, 0, 0, 0)):
            found.append("less in reserve")
        if self.tiers.device is not None and (gpus := self.least_gpus()):
            found.append(f"{gpus} GPUs with as much device, host and disk memory each")
        for tier in places:
            if needed := self.least_capacity(tier):
                found.append(f"{needed:,} bytes free on the {tier}")
        return found

    @staticmethod
    def narrower(allowed: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
        least = min(FORMATS[item].bits for item in allowed)
        return [item for item in known if FORMATS[item].bits < least]

    def least_gpus(self) -> int | None:
        """The smallest number of GPUs, each with these tiers, that holds the bank."""
        low, high = self.gpus, self.gpus
        while not self.holds(gpus=high):
            if high >= MAX_GPUS:
                return None
            low, high = high, min(2 * high, MAX_GPUS)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(gpus=middle) else (middle, high)
        return high

    def least_capacity(self, tier: str) -> int | None:
        """The smallest capacity of one tier that holds the bank, the others as they are."""
        free = {name: vars(self.tiers)[name] for name in TIERS}
        huge = Tiers(**{**free, tier: 2**62})
        needs = [item.used(tier) + item.reserved(tier) for item in replace(self, tiers=huge).placements() if item.fits]
        return min(needs, default=None)


__getattr__ = renamed(__name__, {"Choice": "PlacementOptions"})
