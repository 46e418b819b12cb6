"""The planner: bytes against real tensors, every edge with invented capacities, and figures that add up."""

import json
import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model

from msa_hf import MSAForCausalLM
from msa_hf.bank.tiered import hardware as free_memory
from msa_hf.bank.tiered.hardware import RATES, TIERS, Rates, Tiers, free_host_memory, measured_tiers
from msa_hf.bank.tiered.plan import DoesNotFit, Placement, PlacementOptions, Reserves, plan_placement
from msa_hf.bank.tiered.shapes import GB, BankShape
from msa_hf.cli import command_line as cli
from msa_hf.ops.formats import FORMATS
from msa_hf.ops.quantize import quantize_keys

SHAPE = BankShape.for_tokens(100_000_000, [(8, 128)] * 18)  # the 4B shape
NONE = Reserves(0, 0, 0, 0, 0)
WIDTHS = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def placed(placement: Placement) -> tuple[str, str, str, str]:
    return placement.keys, placement.keys_on, placement.content, placement.content_on


def put(shape: BankShape, device: int | None, host: int, disk: int, **options: Any) -> tuple[str, str, str, str]:
    return placed(plan_placement(shape, Tiers(device, host, disk), reserves=options.pop("reserves", NONE), **options))


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("groups, dim", [(1, 1), (3, 5), (2, 64), (8, 128)])
def test_bytes_are_those_of_quantized_keys(kind: str, groups: int, dim: int) -> None:
    """Also for an odd number of 4-bit numbers."""
    keys = torch.randn(7, groups * dim)
    assert BankShape(3, 7, ((groups, dim),)).key_bytes(kind) == bytes_of(*quantize_keys(keys, kind))


@pytest.mark.parametrize("dtype, own", [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_shape_of_a_bank_has_its_bytes(dtype: torch.dtype, own: str) -> None:
    model = MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=4).eval()
    bank = model.encode_documents([[5, 6, 7], [8] * 9, [9]], show_progress=False).to(dtype=dtype)
    shape = BankShape.of(bank)
    assert (shape.documents, shape.chunks, shape.dtype) == (3, 5, own)
    assert shape.key_bytes(own) == bytes_of(*(memory.routing_keys for memory in bank.layers.values()))
    assert shape.content_bytes(own) == bytes_of(*(memory.pooled_kv for memory in bank.layers.values()))


def test_content_in_8_bits_has_a_scale_for_each_key_and_value() -> None:
    content, scales = torch.empty(7, 2, 3, 5, dtype=torch.float8_e4m3fn), torch.empty(7, 2)
    assert BankShape(3, 7, ((3, 5),)).content_bytes("fp8") == bytes_of(content, scales)


def test_hundred_million_tokens_of_the_4b_shape() -> None:
    """The figures of the paper's setting: 1,562,500 chunks, 57.6 GB of keys, 115.2 GB of content."""
    assert SHAPE.chunks == 1_562_500
    assert (SHAPE.key_bytes("bf16"), SHAPE.content_bytes("bf16")) == (57_600_000_000, 115_200_000_000)
    assert SHAPE.key_bytes("fp8") == 28_800_000_000 + 4 * 18 * 1_562_500
    assert SHAPE.saved_bytes == 172_800_000_000


@pytest.mark.parametrize(
    "tokens, length, size", [(0, 10, 4), (1, 10, 4), (10, 10, 4), (11, 10, 4), (64, 64, 64), (997, 31, 8)]
)
def test_chunks_are_those_of_documents(tokens: int, length: int, size: int) -> None:
    documents = [min(length, tokens - start) for start in range(0, tokens, length)]
    shape = BankShape.for_tokens(tokens, [(1, 1)], document_tokens=length, chunk_size=size)
    assert shape.documents == len(documents)
    assert shape.chunks == sum(-(-document // size) for document in documents)


@pytest.mark.parametrize("gpus", [1, 2, 3, 7, 50])
def test_shares_hold_the_whole_and_no_more_than_a_rest(gpus: int) -> None:
    shape = BankShape(23, 41, ((1, 8),), text_bytes=17)
    for name in ("documents", "chunks", "text_bytes"):
        share, whole = getattr(shape.share(gpus), name), getattr(shape, name)
        assert share * gpus >= whole > (share - 1) * gpus


# Edges ----------------------------------------------------------------------------------------------------------------

SMALL = BankShape(10, 30, ((2, 8), (3, 5)), text_bytes=11)
# Bytes of 30 keys of 16 and of 15 numbers; below 16 bits each has 4 bytes of scale.
KEYS = {"bf16": 30 * (32 + 30), "fp8": 30 * (20 + 19), "int4": 30 * (12 + 12)}
INDEX = 8 * 11 + 10


@pytest.mark.parametrize("keys, next_one", [("bf16", "fp8"), ("fp8", None)])
def test_keys_take_the_widest_format_to_the_byte(keys: str, next_one: str | None) -> None:
    device = KEYS[keys] + INDEX
    assert put(SMALL, device, 10**6, 11) == (keys, "device", "bf16", "host")
    if next_one:
        assert put(SMALL, device - 1, 10**6, 11)[0] == next_one
    else:
        with pytest.raises(DoesNotFit):
            put(SMALL, device - 1, 10**6, 11)


def test_int4_keys_only_where_they_are_allowed() -> None:
    device = KEYS["int4"] + INDEX
    allowed = {"key_formats": ["int4", "bf16"]}
    assert put(SMALL, device, 10**6, 11, **allowed)[0] == "int4"
    assert put(SMALL, KEYS["bf16"] + INDEX, 10**6, 11, **allowed)[0] == "bf16"
    with pytest.raises(DoesNotFit, match="int4 routing keys"):
        put(SMALL, device, 10**6, 11)
    with pytest.raises(DoesNotFit):
        put(SMALL, device - 1, 10**6, 11, **allowed)


@pytest.mark.parametrize("tier, below", [("device", "host"), ("host", "disk"), ("disk", None)])
def test_content_takes_the_first_tier_to_the_byte(tier: str, below: str | None) -> None:
    content = 2 * KEYS["bf16"]
    room = {"device": KEYS["bf16"] + INDEX, "host": 0, "disk": 11}
    if below:
        room[below] += content
    exact = {**room, tier: room[tier] + content}
    assert put(SMALL, **exact) == ("bf16", "device", "bf16", tier)
    short = {**exact, tier: exact[tier] - 1}
    if below:
        assert put(SMALL, **short) == ("bf16", "device", "bf16", below)
    else:
        with pytest.raises(DoesNotFit):
            put(SMALL, **short)


def test_narrower_content_in_a_faster_tier_where_it_is_allowed() -> None:
    device = KEYS["bf16"] + INDEX + 2 * KEYS["fp8"]
    assert put(SMALL, device, 10**6, 11, content_formats=["fp8", "bf16"])[2:] == ("fp8", "device")
    assert put(SMALL, device, 10**6, 11)[2:] == ("bf16", "host")
    assert put(SMALL, device - 1, 10**6, 11, content_formats=["fp8", "bf16"])[2:] == ("bf16", "host")


def test_keys_narrow_where_content_fits_nowhere_else() -> None:
    device = KEYS["fp8"] + INDEX + 2 * KEYS["bf16"]
    assert device > KEYS["bf16"] + INDEX
    assert put(SMALL, device, 0, 11) == ("fp8", "device", "bf16", "device")


@pytest.mark.parametrize("reserve", ["weights", "activations", "kv_cache", "host", "disk"])
def test_reserves_are_left_free_to_the_byte(reserve: str) -> None:
    tier = reserve if reserve in TIERS else "device"
    room = {"device": KEYS["fp8"] + INDEX, "host": 2 * KEYS["bf16"], "disk": 11}
    reserves = Reserves(**{**vars(NONE), reserve: 5})
    with pytest.raises(DoesNotFit):
        put(SMALL, **{**room, tier: room[tier] + 4}, reserves=reserves)
    assert put(SMALL, **{**room, tier: room[tier] + 5}, reserves=reserves)[0] == "fp8"


def test_without_a_device_all_lies_in_host_memory() -> None:
    reserves = Reserves(1, 2, 3, 4, 0)
    host = 10 + KEYS["bf16"] + INDEX + 2 * KEYS["bf16"]
    assert put(SMALL, None, host, 11, reserves=reserves) == ("bf16", "host", "bf16", "host")
    assert put(SMALL, None, host - 1, 10**6, reserves=reserves) == ("bf16", "host", "bf16", "disk")


def test_a_tier_that_is_not_used_may_be_smaller_than_its_reserve() -> None:
    assert put(BankShape(1, 1, ((1, 2),)), 10**6, 0, 0, reserves=Reserves(0, 0, 0)) == (
        "bf16",
        "device",
        "bf16",
        "device",
    )


def test_an_empty_bank_fits() -> None:
    found = plan_placement(BankShape(0, 0, ((1, 2),)), Tiers(8, 0, 0, RATES["H200"]), reserves=NONE)
    assert found.used("device") == 8 and found.routing_seconds(32) == 0 and found.fetch_seconds(16) == 0


@pytest.mark.parametrize("seed", range(200))
def test_every_choice_is_the_first_that_fits(seed: int) -> None:
    """Against a search that shares no line with the planner; capacities lie around the edges."""
    rng = random.Random(seed)
    documents = rng.randint(1, 9)
    layers = tuple((rng.randint(1, 3), rng.randint(1, 9)) for _ in range(rng.randint(1, 3)))
    own = rng.choice(["fp32", "bf16", "fp16", "fp8"])
    shape = BankShape(documents, documents + rng.randint(0, 9), layers, own, rng.choice([0, 7]))
    has_device = rng.random() < 0.8

    def size(name: str, vectors: int) -> int:
        scale = 4 if name in ("fp8", "int8", "int4") else 0
        return sum(vectors * shape.chunks * (int(g * d * WIDTHS[name] + 0.5) + scale) for g, d in layers)

    def allowed(names: str) -> list[str]:
        return [name for name in names.split() if name == own or WIDTHS[name] < WIDTHS[own]]

    keys, content = allowed("fp32 bf16 fp16 fp8 int8"), allowed("fp32 bf16 fp16 fp8")
    index = 8 * (documents + 1) + documents
    edges = [0, index, shape.text_bytes]
    edges += [size(a, 1) + index + size(b, 2) for a in keys for b in content]
    edges += [size(a, 1) + index for a in keys] + [size(b, 2) for b in content]
    room = {tier: max(rng.choice(edges) + rng.choice([-1, 0, 0, 1]), 0) for tier in TIERS}
    if not has_device:
        room["device"] = 0
    home = "device" if has_device else "host"
    expected = None
    for a, tier, b in product(keys, TIERS if has_device else TIERS[1:], content):
        used = {"device": 0, "host": 0, "disk": shape.text_bytes}
        used[home] += size(a, 1) + index
        used[tier] += size(b, 2)
        if all(used[name] <= room[name] for name in TIERS):
            expected = (a, home, b, tier)
            break
    device = room["device"] if has_device else None
    try:
        found = put(shape, device, room["host"], room["disk"], content_formats=content)
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


def test_refusal_holds_the_arithmetic() -> None:
    message = refused(SHAPE, TOO_SMALL)
    for figure in (57_600_000_000, 28_912_500_000, 115_200_000_000, 24 * GB, 5 * GB, 19 * GB, 296 * GB, 63 * GB):
        assert f"{figure:,}" in message


def test_every_remedy_is_enough_and_one_less_is_not() -> None:
    message = refused(SHAPE, TOO_SMALL)
    gpus = number(r"(\d+) GPUs with", message)
    assert plan_placement(SHAPE, TOO_SMALL, gpus=gpus).gpus == gpus
    refused(SHAPE, TOO_SMALL, gpus=gpus - 1)

    layers = number(r"the last (\d+) of the 18 layers", message)
    plan_placement(BankShape(SHAPE.documents, SHAPE.chunks, SHAPE.layers[:layers]), TOO_SMALL)
    refused(BankShape(SHAPE.documents, SHAPE.chunks, SHAPE.layers[: layers + 1]), TOO_SMALL)

    device = number(r"([\d,]+) bytes free on the device", message)
    plan_placement(SHAPE, Tiers(device, TOO_SMALL.host, TOO_SMALL.disk))
    refused(SHAPE, Tiers(device - 1, TOO_SMALL.host, TOO_SMALL.disk))

    assert "int4 routing keys" in message
    plan_placement(SHAPE, TOO_SMALL, key_formats=["int4"])
    assert "routing keys in host memory" in message
    plan_placement(SHAPE, TOO_SMALL, placement=PlacementOptions(keys_on="host"))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_as_many_layers_as_fit_are_kept(layers: int) -> None:
    """All but one, for the last: the layers below that one are left out."""
    shape = BankShape(1, 100, ((1, 1000), (1, 10), (1, 20), (1, 30)), "fp8")
    device = BankShape(1, 100, shape.layers[-layers:], "fp8").key_bytes("fp8") + shape.index_bytes
    assert f"the last {layers} of the 4 layers" in refused(shape, Tiers(device, GB, 0), reserves=NONE)


def test_no_remedy_is_named_that_does_not_help() -> None:
    """Weights that fill the device: no number of such GPUs, no format and no layer helps, only a larger one."""
    message = refused(SHAPE, Tiers(24 * GB, 300 * GB, 64 * GB), reserves=Reserves(weights=24 * GB))
    assert "GPUs" not in message and "layers" not in message.split("fit with")[1] and "int4" not in message
    assert "bytes free on the device" in message


def test_content_that_fits_nowhere_asks_for_narrower_content_or_more_room() -> None:
    tiers = Tiers(70 * GB, 64 * GB, 90 * GB)
    message = refused(SHAPE, tiers)
    assert "fp8 content" in message
    assert plan_placement(SHAPE, tiers, content_formats=["bf16", "fp8"]).content == "fp8"
    for name in TIERS:
        needed = number(rf"([\d,]+) bytes free on the {name}", message)
        room = {tier: getattr(tiers, tier) for tier in TIERS}
        plan_placement(SHAPE, Tiers(**{**room, name: needed}))
        refused(SHAPE, Tiers(**{**room, name: needed - 1}))


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


@pytest.mark.parametrize("keys, bytes_per_number", [("bf16", 2), ("fp8", 1)])
def test_routing_is_bound_by_bytes_or_by_products(keys: str, bytes_per_number: int) -> None:
    """By hand, with rates that are no real device's: 1e12 bytes and 1e14 operations per second."""
    tiers = Tiers(10**12, 10**12, 10**12, Rates("x", copy=1e12, matmul=1e14))
    found = plan_placement(SHAPE, tiers, placement=PlacementOptions(keys=keys))
    scales = 4 if keys == "fp8" else 0
    by_bytes = 18 * 1_562_500 * (1024 * bytes_per_number + scales) / 1e12
    assert found.routing_seconds(1) == pytest.approx(by_bytes, rel=1e-12)
    assert found.routing_seconds(1024) == pytest.approx(18 * 2 * 1024 * 1024 * 1_562_500 / 1e14, rel=1e-12)


def test_products_of_keys_in_8_bits_have_a_rate_of_their_own() -> None:
    """Where it is known; wider keys never have it."""
    for keys, wanted in (("bf16", 1e14), ("fp16", 1e14), ("fp8", 4e14), ("int8", 4e14)):
        shape = replace(SHAPE, dtype="fp16") if keys == "fp16" else SHAPE
        for narrow in (4e14, None):
            tiers = Tiers(10**12, 10**12, 10**12, Rates("x", copy=1e15, matmul=1e14, narrow_matmul=narrow))
            found = plan_placement(shape, tiers, placement=PlacementOptions(keys=keys))
            rate = wanted if narrow else 1e14
            assert found.routing_seconds(1024) == pytest.approx(18 * 2 * 1024 * 1024 * 1_562_500 / rate, rel=1e-12)


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


def test_fetching_follows_the_tier() -> None:
    """One document of 16 chunks of 2 x 1 kB numbers in 18 layers."""
    rates = Rates("x", copy=4e9, host_fetch=1e9, disk=1e8)
    tiers = Tiers(10**12, 10**12, 10**12, rates)
    size = 16 * 16 * 2 * 2048 * 18
    shape = BankShape(1000, 16_000, ((8, 128),) * 18)
    for tier, speed in (("device", 2e9), ("host", 1e9), ("disk", 1e8)):
        found = plan_placement(shape, tiers, placement=PlacementOptions(content_on=tier))
        assert found.fetch_seconds(16) == pytest.approx(size / speed, rel=1e-12)
        assert found.fetch_seconds(2000) == pytest.approx(shape.content_bytes("bf16") / speed, rel=1e-12)


@pytest.mark.parametrize("rates", [None, Rates("x"), Rates("x", copy=1e12), Rates("x", matmul=1e12)])
def test_times_are_not_stated_where_rates_are_not_known(rates: Rates | None) -> None:
    found = plan_placement(SHAPE, Tiers(141 * GB, 137 * GB, 64 * GB, rates))
    assert found.routing_seconds(32) is None
    assert "routing 32 tokens, all layers: not known" in str(found)


def test_keys_in_host_memory_travel_over_the_link() -> None:
    tiers = Tiers(10**12, 10**12, 10**12, RATES["H200"])
    found = plan_placement(SHAPE, tiers, placement=PlacementOptions(keys_on="host"))
    assert found.routing_seconds(32) == pytest.approx(57.6e9 / 55.5e9)


# This machine ---------------------------------------------------------------------------------------------------------


def test_planning_with_given_tiers_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plan.measured_tiers", "free_memory.measured_tiers", "free_memory.free_host_memory"):
        monkeypatch.setattr(f"msa_hf.bank.{name}", None)
    plan_placement(SHAPE, Tiers(141 * GB, 137 * GB, 64 * GB))


def test_measured_tiers_are_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (7, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(free_memory, "free_host_memory", lambda: 11)
    monkeypatch.setattr(
        free_memory.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 13 if path == tmp_path else 0})
    )
    assert measured_tiers(directory=tmp_path, present=2) == Tiers(7, 11, 15, RATES["H200"])
    assert measured_tiers("cpu", tmp_path) == Tiers(None, 11, 13)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200 NVL")
    assert measured_tiers(directory=tmp_path).rates is None


def system(root: Path, group: str | None, limits: dict[str, tuple[str, int, int]]) -> Path:
    """A root with /proc and control groups: (limit, current, inactive_file) by path."""
    for name in ("proc/self", "sys/fs/cgroup"):
        (root / name).mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable:   50 kB\n")
    if group is not None:
        (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    for path, (limit, current, inactive) in limits.items():
        place = root / "sys/fs/cgroup" / path
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{current}\n")
        (place / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    return root


@pytest.mark.parametrize(
    "group, limits, free",
    [
        (None, {}, 51_200),
        ("/", {}, 51_200),
        ("/", {"": ("max", 99, 0)}, 51_200),
        ("/", {"": ("40000", 30_000, 1_000)}, 11_000),
        ("/", {"": ("40000", 41_000, 0)}, 0),
        ("/a/b", {"a/b": ("max", 1, 0), "a": ("20000", 5_000, 0)}, 15_000),
        ("/a", {"a": ("900000", 5_000, 0)}, 51_200),
    ],
)
def test_free_host_memory(tmp_path: Path, group: str | None, limits: dict, free: int) -> None:
    """The kernel's estimate, or what the tightest control group above the process leaves."""
    assert free_host_memory(system(tmp_path, group, limits)) == free


def test_free_host_memory_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="pass it in `Tiers`"):
        free_host_memory(tmp_path)


# Command --------------------------------------------------------------------------------------------------------------

ROOM = ("--device-memory", "141GB", "--host-memory", "128GiB", "--disk", "64GiB")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["plan", *arguments]) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_command_plans_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--tokens", "100M", "--layers", "18", "--groups", "8", "--head-dim", "128")
    expected = plan_placement(SHAPE, Tiers(141 * GB, 2**37, 2**36, RATES["H200"]), reserves=Reserves(weights=8 * GB))
    assert run(capsys, *shape, *ROOM, "--gpu", "H200", "--weights", "8GB") == f"{expected}\n"
    record = json.loads(run(capsys, *shape, *ROOM, "--keys", "fp8", "--content", "@disk", "--gpus", "2", "--json"))
    assert [part["format"] for part in record["parts"][:2]] == ["fp8", "bf16"]
    assert record["parts"][1]["tier"] == "disk" and record["gpus"] == 2
    small = (*shape, "--device-memory", "24GB", *ROOM[2:], "--weights", "8GB", "--keys", "fp8@host", "--json")
    small = (*small, "--content", "fp8@host")
    for asked, layers in (("fit", 6), ("2", 2), ("0", None)):
        parts = {part["part"]: part["bytes"] for part in json.loads(run(capsys, *small, "--resident", asked))["parts"]}
        assert parts.get("resident keys") == (layers and SHAPE.key_bytes("fp8", slice(layers)))
    assert "a number of layers or fit" in run(capsys, *small, "--resident", "some", code=2)


@pytest.mark.parametrize("retrofitted", [True, False])
def test_command_reads_a_models_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str], retrofitted: bool) -> None:
    """The memory layers and chunks of a checkpoint with a memory, or those that a retrofit would give a plain one."""
    model = base_model("qwen3")
    config = model.config
    layers, chunk_size = config.num_hidden_layers - config.num_hidden_layers // 2, 64
    if retrofitted:
        layers, chunk_size = 1, 16
        model = MSAForCausalLM.from_base(model, memory_layers=[config.num_hidden_layers - 1], chunk_size=16)
    model.save_pretrained(tmp_path)
    record = json.loads(run(capsys, "--tokens", "1M", "--model", str(tmp_path), *ROOM, "--json"))
    assert record["layers"] == [[config.num_key_value_heads, config.head_dim]] * layers
    assert record["chunks"] == BankShape.for_tokens(10**6, [(1, 1)], chunk_size=chunk_size).chunks
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert record["tiers"]["device"]["reserved"] == weights + 5 * GB


def test_options_come_before_what_the_model_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_model("qwen3").config.save_pretrained(tmp_path)
    known = ("--tokens", "1M", "--model", str(tmp_path), *ROOM, "--json")
    [(groups, dim), *others] = json.loads(run(capsys, *known))["layers"]
    for option, value, expected in (
        ("--groups", groups + 3, [[groups + 3, dim]] * (1 + len(others))),
        ("--head-dim", dim + 3, [[groups, dim + 3]] * (1 + len(others))),
        ("--layers", len(others) + 2, [[groups, dim]] * (2 + len(others))),
    ):
        assert json.loads(run(capsys, *known, option, str(value)))["layers"] == expected


def test_command_takes_rates_of_an_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--tokens", "100M", "--layers", "18", "--groups", "8", "--head-dim", "128")
    given = json.loads(run(capsys, *shape, *ROOM, "--gpu", "H200", "--matmul", "300T", "--json"))["rates"]
    assert (given["matmul"], given["narrow_matmul"], given["copy"]) == (300e12, None, RATES["H200"].copy)
    printed = run(capsys, *shape, *ROOM, "--bandwidth", "2T", "--matmul", "300T")
    assert "routing 32 tokens, all layers: 28.8 ms" in printed and "given by the caller" in printed


@pytest.mark.parametrize(
    "text, value", [("7", 7), ("1K", 1000), ("1.5GB", 1_500_000_000), ("2GiB", 2**31), ("1TB", 10**12), ("3B", 3)]
)
def test_amounts(text: str, value: int, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--tokens", "0", "--layers", "1", "--groups", "1", "--head-dim", "1", "--disk-reserve", "0", "--json")
    found = json.loads(run(capsys, *shape, "--device-memory", "none", "--host-memory", "99GB", "--disk", text))
    assert found["tiers"]["disk"]["capacity"] == value


@pytest.mark.parametrize("text, documents", [("2K", 2000), ("1B", 10**9), ("0.5M", 500_000)])
def test_tokens_count_in_thousands_millions_and_billions(text: str, documents: int, capsys) -> None:
    shape = ("--layers", "1", "--groups", "1", "--head-dim", "1", "--document-tokens", "1", "--json", *ROOM)
    assert json.loads(run(capsys, "--tokens", text, *shape))["documents"] == documents


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tokens", "1M"], "--layers"),
        (["--layers", "1", "--groups", "1", "--head-dim", "1"], "--tokens"),
        (["--tokens", "1M", "--model", "no-such"], "no-such"),
        (["--tokens", "1.5"], "1.5"),
        (["--tokens", "-1"], "--tokens"),
        (["--tokens", "1M", "--disk", "1XB"], "1XB"),
        (["--tokens", "1B", "--layers", "18", "--groups", "8", "--head-dim", "128", *ROOM], "9 GPUs"),
        (["--tokens", "1", "--layers", "1", "--groups", "1", "--head-dim", "1", *ROOM, "--keys", "fp4"], "fp4"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = run(capsys, *arguments, code=2)
    assert message.startswith("msa-hf: error: ") and said in message and message.count("\n") == 1


def test_formats_are_ordered_from_wide_to_narrow() -> None:
    bits = [item.bits for item in FORMATS.values()]
    assert bits == sorted(bits, reverse=True)
