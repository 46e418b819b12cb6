"""The planner: bytes against real tensors, every edge with invented capacities, and figures that add up."""

import json
import random
import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from fake_model import FakeModel

from msa_hf.bank.tiered.hardware import RATES, TIERS, Rates, Tiers
from msa_hf.bank.tiered.plan import DoesNotFit, Placement, PlacementOptions, Reserves, plan_placement
from msa_hf.bank.tiered.shapes import GB, BankShape
from msa_hf.ops.formats import FORMATS
from msa_hf.ops.quantize import quantize_keys

SHAPE = BankShape.for_tokens(100_000_000, [(8, 128)] * 18)  # the 4B shape
NONE = Reserves(0, 0, 0, 0, 0)
WIDTHS = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def placed(placement: Placement) -> tuple[str, str, str, str]:
    return placement.keys, placement.keys_on, placement.content, placement.content_on


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, dim", [(1, 1), (3, 5), (8, 128)])
def test_bytes_are_those_of_tensors(groups: int, dim: int) -> None:
    """Also for an odd number of 4-bit numbers; content in 8 bits has a scale for each key and value."""
    keys, shape = torch.randn(7, groups * dim), BankShape(3, 7, ((groups, dim),))
    for kind in ("fp8", "int8", "int4"):
        assert shape.key_bytes(kind) == bytes_of(*quantize_keys(keys, kind))
    content = torch.empty(7, 2, groups, dim, dtype=torch.float8_e4m3fn), torch.empty(7, 2)
    assert shape.content_bytes("fp8") == bytes_of(*content)


@pytest.mark.parametrize("dtype, own", [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_shape_of_a_bank_has_its_bytes(dtype: torch.dtype, own: str) -> None:
    bank = FakeModel(dtype).encode_documents([[5, 6, 7], [8] * 9, [9]])
    shape = BankShape.of(bank)
    assert (shape.documents, shape.chunks, shape.dtype) == (3, 5, own)
    assert shape.key_bytes(own) == bytes_of(*(memory.routing_keys for memory in bank.layers.values()))
    assert shape.content_bytes(own) == bytes_of(*(memory.pooled_kv for memory in bank.layers.values()))


def test_hundred_million_tokens_of_the_4b_shape() -> None:
    """The figures of the paper's setting: 1,562,500 chunks, 57.6 GB of keys, 115.2 GB of content."""
    assert SHAPE.chunks == 1_562_500 and SHAPE.saved_bytes == 172_800_000_000
    assert (SHAPE.key_bytes("bf16"), SHAPE.content_bytes("bf16")) == (57_600_000_000, 115_200_000_000)


@pytest.mark.parametrize("tokens, length, size", [(0, 10, 4), (10, 10, 4), (11, 10, 4), (997, 31, 8)])
def test_chunks_are_those_of_documents(tokens: int, length: int, size: int) -> None:
    documents = [min(length, tokens - start) for start in range(0, tokens, length)]
    shape = BankShape.for_tokens(tokens, [(1, 1)], document_tokens=length, chunk_size=size)
    assert (shape.documents, shape.chunks) == (len(documents), sum(-(-document // size) for document in documents))


@pytest.mark.parametrize("gpus", [1, 3, 50])
def test_shares_hold_the_whole_and_no_more_than_a_rest(gpus: int) -> None:
    shape = BankShape(23, 41, ((1, 8),), text_bytes=17)
    for name in ("documents", "chunks", "text_bytes"):
        share, whole = getattr(shape.share(gpus), name), getattr(shape, name)
        assert share * gpus >= whole > (share - 1) * gpus


# Edges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(300))
def test_every_choice_is_the_first_that_fits(seed: int) -> None:
    """Against a search that shares no line with the planner; capacities lie around the edges, to the byte.

    Empty banks, no device, reserves, and formats that are allowed beyond the default, in any order, are among them.
    """
    rng = random.Random(seed)
    documents = rng.randint(0, 9)
    layers = tuple((rng.randint(1, 3), rng.randint(1, 9)) for _ in range(rng.randint(1, 3)))
    own = rng.choice(["fp32", "bf16", "fp16", "fp8"])
    shape = BankShape(documents, documents + rng.randint(0, 9) * bool(documents), layers, own, rng.choice([0, 7]))
    has_device = rng.random() < 0.8
    reserves = rng.choice([NONE, Reserves(*(rng.choice([0, 0, 3]) for _ in range(5)))])
    left = {"device": reserves.weights + reserves.activations + reserves.kv_cache, "disk": reserves.disk}
    left["host"] = reserves.host + (0 if has_device else left["device"])

    def size(name: str, vectors: int) -> int:
        scale = 4 if name in ("fp8", "int8", "int4") else 0
        return sum(vectors * shape.chunks * (int(g * d * WIDTHS[name] + 0.5) + scale) for g, d in layers)

    def allowed(names: str) -> list[str]:
        return [name for name in names.split() if name == own or WIDTHS[name] < WIDTHS[own]]

    options: dict[str, Any] = {}
    keys, content = allowed("fp32 bf16 fp16 fp8 int8"), [own]
    if rng.random() < 0.5:
        keys = [name for name in allowed("fp32 bf16 fp16 fp8 int8 int4") if rng.random() < 0.6] or [own]
        options["key_formats"] = rng.sample(keys, len(keys))
    if rng.random() < 0.5:
        content = allowed("fp32 bf16 fp16 fp8")
        options["content_formats"] = rng.sample(content, len(content))
    index = 8 * (documents + 1) + documents
    home = "device" if has_device else "host"
    edges = {tier: [0, *(size(b, 2) for b in content)] for tier in TIERS}
    edges["disk"] = [shape.text_bytes + size for size in edges["disk"]]
    edges[home] = [size(a, 1) + index + more for a in keys for more in edges[home]]
    room = {tier: max(rng.choice(edges[tier]) + left[tier] + rng.choice([-2, -1, 0, 0, 1]), 0) for tier in TIERS}
    expected = None
    for a, tier, b in product(keys, TIERS if has_device else TIERS[1:], content):
        used = {"device": 0, "host": 0, "disk": shape.text_bytes}
        used[home] += size(a, 1) + index
        used[tier] += size(b, 2)
        # A tier that is not used may be smaller than its reserve.
        if all(used[name] + left[name] <= room[name] for name in TIERS if used[name]):
            expected = (a, home, b, tier)
            break
    tiers = Tiers(room["device"] if has_device else None, room["host"], room["disk"])
    try:
        found = placed(plan_placement(shape, tiers, reserves=reserves, **options))
    except DoesNotFit:
        found = None
    assert found == expected


# What does not fit ----------------------------------------------------------------------------------------------------


def refused(shape: BankShape, tiers: Tiers, **options: Any) -> str:
    with pytest.raises(DoesNotFit) as caught:
        plan_placement(shape, tiers, **options)
    return str(caught.value)


def number(pattern: str, message: str) -> int:
    found = re.search(pattern, message)
    assert found, message
    return int(found[1].replace(",", ""))


TOO_SMALL = Tiers(24 * GB, 300 * GB, 64 * GB)


def test_every_remedy_is_enough_and_one_less_is_not() -> None:
    message = refused(SHAPE, TOO_SMALL)
    for figure in (57_600_000_000, 28_912_500_000, 115_200_000_000, 24 * GB, 5 * GB, 19 * GB, 296 * GB, 63 * GB):
        assert f"{figure:,}" in message
    gpus = number(r"(\d+) GPUs with", message)
    assert plan_placement(SHAPE, TOO_SMALL, gpus=gpus).gpus == gpus
    refused(SHAPE, TOO_SMALL, gpus=gpus - 1)
    layers = number(r"the last (\d+) of the 18 layers", message)
    plan_placement(replace(SHAPE, layers=SHAPE.layers[:layers]), TOO_SMALL)
    refused(replace(SHAPE, layers=SHAPE.layers[: layers + 1]), TOO_SMALL)
    device = number(r"([\d,]+) bytes free on the device", message)
    plan_placement(SHAPE, replace(TOO_SMALL, device=device))
    refused(SHAPE, replace(TOO_SMALL, device=device - 1))
    assert "int4 routing keys" in message and "routing keys in host memory" in message
    plan_placement(SHAPE, TOO_SMALL, key_formats=["int4"])
    plan_placement(SHAPE, TOO_SMALL, placement=PlacementOptions(keys_on="host"))


def test_narrower_content_or_more_room_on_any_tier_is_enough_too() -> None:
    tiers = Tiers(70 * GB, 64 * GB, 90 * GB)
    message = refused(SHAPE, tiers)
    assert "fp8 content" in message
    assert plan_placement(SHAPE, tiers, content_formats=["bf16", "fp8"]).content == "fp8"
    for name in TIERS:
        needed = number(rf"([\d,]+) bytes free on the {name}", message)
        plan_placement(SHAPE, replace(tiers, **{name: needed}))
        refused(SHAPE, replace(tiers, **{name: needed - 1}))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_as_many_layers_as_fit_are_kept(layers: int) -> None:
    """All but one, for the last: the layers below that one are left out."""
    shape = BankShape(1, 100, ((1, 1000), (1, 10), (1, 20), (1, 30)), "fp8")
    device = BankShape(1, 100, shape.layers[-layers:], "fp8").key_bytes("fp8") + shape.index_bytes
    assert f"the last {layers} of the 4 layers" in refused(shape, Tiers(device, GB, 0), reserves=NONE)


def test_no_remedy_is_named_that_does_not_help() -> None:
    """Weights that fill the device: no number of such GPUs, no format and no layer helps, only a larger one."""
    message = refused(SHAPE, TOO_SMALL, reserves=Reserves(weights=24 * GB))
    assert "GPUs" not in message and "layers" not in message.split("fit with")[1] and "int4" not in message
    assert "bytes free on the device" in message


# What was chosen ------------------------------------------------------------------------------------------------------


def test_an_explicit_choice_is_kept_or_refused() -> None:
    tiers = Tiers(141 * GB, 137 * GB, 64 * GB)
    chosen = PlacementOptions(keys="fp8", content="fp8", content_on="host")
    assert placed(plan_placement(SHAPE, tiers, placement=chosen)) == ("fp8", "device", "fp8", "host")
    assert "content wherever it fits" in refused(SHAPE, tiers, placement=PlacementOptions(content_on="disk"))


def test_exact_keys_beside_narrow_ones_take_room() -> None:
    """Of the bank's own width, in host memory; none beside keys of that width themselves."""
    own = SHAPE.key_bytes("bf16")
    chosen = PlacementOptions(keys="fp8", content="fp8", content_on="host", exact_on="host")
    room = SHAPE.content_bytes("fp8") + Reserves().host
    found = plan_placement(SHAPE, Tiers(141 * GB, room + own, 0), placement=chosen)
    assert found.free("host") == 0 and ("exact keys", "bf16", "host", own) in found.parts
    message = refused(SHAPE, Tiers(141 * GB, room + own - 1, 0), placement=chosen)
    assert f"exact keys {own:,} (host)" in message and "exact keys where the bank has them" in message
    wide = plan_placement(SHAPE, Tiers(141 * GB, room, 0), placement=replace(chosen, keys="bf16"))
    assert wide.exact_on is None and wide.free("host") == 0


def test_keys_of_some_layers_stay_on_the_device_beside_streamed_ones() -> None:
    """As many as were asked for, or as fit to the byte; their time is the device's, the others' that of the bus."""
    layer, layers = SHAPE.key_bytes("fp8", slice(1)), len(SHAPE.layers)
    assert layer * layers == SHAPE.key_bytes("fp8")
    chosen = PlacementOptions(keys="fp8", keys_on="host", content="fp8", content_on="host", resident=None)
    for fit in (0, 1, 7, layers):
        room = SHAPE.index_bytes + fit * layer
        for device, expected in ((room, fit), (room + layer - 1, fit), (room - 1, fit - 1)):
            tiers = Tiers(device, 500 * GB, 0, RATES["H200"])
            if expected < 0:
                refused(SHAPE, tiers, placement=chosen, reserves=NONE)
                continue
            found = plan_placement(SHAPE, tiers, placement=chosen, reserves=NONE)
            assert found.resident == min(expected, layers) and found.fits
            parts = {part: (tier, size) for part, _, tier, size in found.parts}
            assert parts["routing keys"] == ("host", (layers - found.resident) * layer)
            assert parts.get("resident keys", ("device", 0)) == ("device", found.resident * layer)
            assert [found.keys_tier(number) for number in range(layers)] == ["device"] * found.resident + ["host"] * (
                layers - found.resident
            )
    tiers = Tiers(141 * GB, 500 * GB, 0, RATES["H200"])
    some = [plan_placement(SHAPE, tiers, placement=replace(chosen, resident=n), reserves=NONE) for n in (0, 6, layers)]
    times = [found.routing_seconds(32) for found in some]
    assert times[1] == pytest.approx((12 * times[0] + 6 * times[2]) / 18) and times[2] < times[0] / 50
    on_device = plan_placement(SHAPE, tiers, placement=replace(chosen, keys_on="device", resident=0), reserves=NONE)
    assert times[2] == on_device.routing_seconds(32)
    assert "resident keys" in str(some[1]) and "resident keys" not in str(some[0])
    tight = Tiers(SHAPE.index_bytes + 6 * layer - 1, 500 * GB, 0)
    message = refused(SHAPE, tight, placement=replace(chosen, resident=6), reserves=NONE)
    assert "do not fit" in message and "no resident layers" in message


@pytest.mark.parametrize(
    "options, said",
    [
        ({"placement": PlacementOptions(keys_on="disk")}, "every question reads all"),
        ({"placement": PlacementOptions(keys_on="host", resident=19)}, "from 0 to the 18 layers"),
        ({"placement": PlacementOptions(keys_on="host", resident=-1)}, "from 0 to the 18 layers"),
        ({"placement": PlacementOptions(resident=2)}, "keys_on='host'"),
        ({"placement": PlacementOptions(keys_on="device", resident=None)}, "keys_on='host'"),
        ({"placement": PlacementOptions(keys="fp32")}, "bf16; fp32 would add bytes"),
        ({"placement": PlacementOptions(keys="fp16")}, "bf16; fp16 would add bytes"),
        ({"placement": PlacementOptions(content="int4")}, "int4"),
        ({"placement": PlacementOptions(content="int8")}, "int8"),
        ({"placement": PlacementOptions(content_on="gpu")}, "gpu"),
        ({"placement": PlacementOptions(exact_on="disk")}, "exact_on.*disk"),
        ({"placement": "host"}, "'auto' or a PlacementOptions"),
        ({"key_formats": []}, "at least one"),
        ({"key_formats": ["bf16", "q8"]}, "q8"),
        ({"content_formats": ["fp32"]}, "fp32"),
        ({"gpus": 0}, "gpus"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        plan_placement(SHAPE, Tiers(10**15, 10**15, 10**15), **options)
    assert not isinstance(caught.value, DoesNotFit)


def test_a_device_that_is_not_there_is_refused() -> None:
    for choice in (PlacementOptions(keys_on="device"), PlacementOptions(content_on="device")):
        with pytest.raises(ValueError, match="there is no device"):
            plan_placement(SHAPE, Tiers(None, 10**15, 10**15), placement=choice)


@pytest.mark.parametrize("fields", [(2, 1), (-1, 1), (0, 3), (1, 1, ()), (1, 1, ((0, 4),)), (1, 1, ((1, 4),), "int4")])
def test_shapes_that_cannot_be(fields: tuple) -> None:
    with pytest.raises(ValueError):
        BankShape(*fields, *([((1, 4),)] if len(fields) == 2 else []))


# Figures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [141 * GB, None])
@pytest.mark.parametrize("gpus", [1, 3])
def test_printed_figures_add_up(device: int | None, gpus: int) -> None:
    tiers = Tiers(device, 300 * GB, 64 * GB, RATES["H200"])
    shape = BankShape.for_tokens(100_000_001, [(8, 128)] * 18, text_bytes=40 * GB)
    text = str(plan_placement(shape, tiers, gpus=gpus))
    parts, room = text.split("\n\n")[1:3]
    used = dict.fromkeys(TIERS, 0)
    for line in parts.splitlines()[1:]:
        tier, size, gigabytes = line.split()[-3:]
        used[tier] += int(size.replace(",", ""))
        assert float(gigabytes) == pytest.approx(int(size.replace(",", "")) / GB, abs=0.05)
    assert sum(used.values()) > shape.saved_bytes // gpus
    seen = []
    for line in room.splitlines()[1:]:
        tier, *columns = line.split()
        capacity, reserved, bank, free = (int(column.replace(",", "")) for column in columns)
        assert capacity == tiers.capacity(tier) == reserved + bank + free
        assert bank == used[tier] and free >= 0
        seen.append(tier)
    assert seen == list(TIERS if device else TIERS[1:])


def test_dictionary_says_what_is_printed() -> None:
    found = plan_placement(SHAPE, Tiers(141 * GB, 137 * GB, 64 * GB, RATES["H200"]))
    record = json.loads(json.dumps(found.to_dict()))
    assert [part["bytes"] for part in record["parts"]] == [size for *_, size in found.parts]
    assert record["tiers"]["device"]["free"] == found.free("device")
    assert record["routing_seconds"]["32"] == found.routing_seconds(32)


RATES_BY_HAND = Rates("x", copy=1e12, matmul=1e14, host_fetch=1e9, disk=1e8)  # no real device's


@pytest.mark.parametrize(
    "keys, width, narrow", [("bf16", 2, 4e14), ("fp16", 2, 4e14), ("fp8", 1, None), ("int8", 1, 4e14)]
)
def test_routing_is_bound_by_bytes_or_by_products(keys: str, width: int, narrow: float | None) -> None:
    """Products of keys in 8 bits have a rate of their own where it is known; wider keys never have it."""
    shape = replace(SHAPE, dtype="fp16") if keys == "fp16" else SHAPE
    tiers = Tiers(10**12, 10**12, 10**12, replace(RATES_BY_HAND, narrow_matmul=narrow))
    found = plan_placement(shape, tiers, placement=PlacementOptions(keys=keys))
    by_bytes = 18 * 1_562_500 * (1024 * width + (4 if width == 1 else 0)) / 1e12
    assert found.routing_seconds(1) == pytest.approx(by_bytes, rel=1e-12)
    rate = narrow if narrow and width == 1 else 1e14
    assert found.routing_seconds(2048) == pytest.approx(18 * 2 * 2048 * 1024 * 1_562_500 / rate, rel=1e-12)


def test_layers_are_bound_one_by_one() -> None:
    """fp8 scales weigh more in narrow layers: at the same tokens one may be bound by bytes, the other by products."""
    rates = Rates("x", copy=1.0, matmul=1.0)
    shape = BankShape(1, 1, ((1, 1), (1, 8)), "fp8")
    found = plan_placement(shape, Tiers(10**6, 0, 0, rates), reserves=NONE)
    assert found.routing_seconds(2) == pytest.approx(max(5, 4) + max(12, 32))


def test_known_routing_figures_of_an_h200() -> None:
    """18 layers of 100M tokens: floors of 13.4 ms for 32 tokens (6.7 ms with fp8 keys), 18 x 1.04 ms for 256."""
    tiers = Tiers(141 * GB, 137 * GB, 64 * GB, RATES["H200"])
    wide, narrow = (plan_placement(SHAPE, tiers, placement=PlacementOptions(keys=keys)) for keys in ("bf16", "fp8"))
    assert 1e3 * wide.routing_seconds(32) == pytest.approx(13.4, rel=0.02)
    assert 1e3 * narrow.routing_seconds(32) == pytest.approx(6.7, rel=0.02)
    assert 1e3 * wide.routing_seconds(256) == pytest.approx(18 * 1.04, rel=0.02)


def test_fetching_follows_the_tier_and_streamed_keys_the_link() -> None:
    """One document of 16 chunks of 2 x 1 kB numbers in 18 layers; on the device rows are read and written."""
    shape = BankShape(1000, 16_000, ((8, 128),) * 18)
    for tier, speed in (("device", 5e11), ("host", 1e9), ("disk", 1e8)):
        tiers = Tiers(10**12, 10**12, 10**12, RATES_BY_HAND)
        found = plan_placement(shape, tiers, placement=PlacementOptions(content_on=tier))
        assert found.fetch_seconds(16) == pytest.approx(16 * 16 * 2 * 2048 * 18 / speed, rel=1e-12)
        assert found.fetch_seconds(2000) == pytest.approx(shape.content_bytes("bf16") / speed, rel=1e-12)
    streamed = plan_placement(SHAPE, replace(tiers, rates=RATES["H200"]), placement=PlacementOptions(keys_on="host"))
    assert streamed.routing_seconds(32) == pytest.approx(57.6e9 / 55.5e9)
    empty = plan_placement(BankShape(0, 0, ((1, 2),)), Tiers(8, 0, 0, RATES["H200"]), reserves=NONE)
    assert empty.used("device") == 8 and empty.routing_seconds(32) == 0 and empty.fetch_seconds(16) == 0


@pytest.mark.parametrize("rates", [None, Rates("x"), Rates("x", copy=1e12), Rates("x", matmul=1e12)])
def test_times_are_not_stated_where_rates_are_not_known(rates: Rates | None) -> None:
    found = plan_placement(SHAPE, Tiers(141 * GB, 137 * GB, 64 * GB, rates))
    assert found.routing_seconds(32) is None
    assert "routing 32 tokens, all layers: not known" in str(found)


def test_formats_are_ordered_from_wide_to_narrow() -> None:
    bits = [item.bits for item in FORMATS.values()]
    assert bits == sorted(bits, reverse=True)


def test_planning_with_given_tiers_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plan.measured_tiers", "hardware.measured_tiers", "hardware.free_host_memory"):
        monkeypatch.setattr(f"msa_hf.bank.tiered.{name}", None)
    plan_placement(SHAPE, Tiers(141 * GB, 137 * GB, 64 * GB))
