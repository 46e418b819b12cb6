"""A bank in tiers answers as one that lies in one place, to the bit where it keeps the bank's own numbers."""

import copy
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import COMPACT, bank_of, byte_tokenizer, memory_model
from setups import PREFIX, Setup, assert_same, batch_of, setup, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from msa_hf import MemoryBank
from msa_hf.bank import place_bank
from msa_hf.bank.tiered import bank as tiers
from msa_hf.bank.tiered import layer as tier_layers
from msa_hf.bank.tiered import rows
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.bank.tiered.lru_cache import DocumentLRU
from msa_hf.bank.tiered.plan import DoesNotFit, PlacementOptions, Reserves
from msa_hf.bank.tiered.rows import Rows, Staging, pinned, placed_rows
from msa_hf.bank.tiered.shapes import BankShape
from msa_hf.bank.tiered.sources import source_of
from msa_hf.generation import MemoryInterleave
from msa_hf.model.memory_msa import DenseLayer
from msa_hf.model.routing_msa import Scoring
from msa_hf.ops import quantize_keys, route_documents

AMPLE = Tiers(10**12, 10**12, 10**12)  # with a device of the CPU: host memory plays the device
NONE = Reserves(0, 0, 0, 0, 0)
GONE = (0, 3, 9)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


@cache
def made(device: str = "cpu", dtype: torch.dtype = torch.float32, **fields: Any) -> Setup:
    """A model and a bank in host memory: documents of 1 to 20 tokens in chunks of 3, of which it takes 3."""
    pick = random.Random(7)
    found = setup(
        documents=tokens(*(pick.randint(1, 20) for _ in range(14)), seed=3),
        **{"top_k": 3, "similarity": "cosine", **fields},
    )
    model = copy.deepcopy(found.model).to(device, dtype)
    return replace(found, model=model, bank=model.encode_documents(found.documents, bank_device="cpu"))


def questions(device: str = "cpu", seed: int = 5) -> dict[str, torch.Tensor]:
    return {name: part.to(device) for name, part in batch_of(tokens(6, 3, 9, seed=seed)).items()}


@torch.no_grad()
def answer(made_: Setup, memory: Any, seed: int = 5, **inputs: Any) -> Any:
    return made_.model(**questions(made_.model.device, seed), memory=memory, **inputs)


def assert_equal(ours: Any, theirs: Any) -> None:
    """The same bits: documents, scores, logits."""
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.routing.keys() == theirs.routing.keys()
    for layer, expected in theirs.routing.items():
        found = ours.routing[layer]
        assert torch.equal(found.documents, expected.documents) and torch.equal(found.scores, expected.scores)
        assert (found.document_scores is None) == (expected.document_scores is None)
        if expected.document_scores is not None:
            assert torch.equal(found.document_scores, expected.document_scores)


def assert_close(ours: Any, theirs: Any) -> None:
    """The same documents; scores and logits up to float32's error."""
    assert_same(ours.logits, theirs.logits)
    for layer, expected in theirs.routing.items():
        assert torch.equal(ours.routing[layer].documents, expected.documents)
        torch.testing.assert_close(ours.routing[layer].scores, expected.scores, atol=1e-5, rtol=1e-5)


# Where banks come from: each gives a bank that is to be placed, and one that lies in one place.


def in_memory(made_: Setup, directory: Path) -> tuple[Any, Any]:
    return made_.bank, made_.bank


def in_one_file(made_: Setup, directory: Path) -> tuple[Any, Any]:
    made_.bank.save_pretrained(directory)
    return directory, made_.bank


def in_many_files(made_: Setup, directory: Path) -> tuple[Any, Any]:
    made_.bank.save_pretrained(directory, max_shard_size=1500)
    assert len(list(directory.glob("layer-*"))) > 4
    return directory, made_.bank


def loaded(made_: Setup, directory: Path) -> tuple[Any, Any]:
    made_.bank.save_pretrained(directory)
    return MemoryBank.from_pretrained(directory), made_.bank


def changed(made_: Setup, directory: Path | None) -> Any:
    """An open bank of several commits, with deleted documents."""
    bank = made_.model.open_memory(directory, device="cpu")
    ids = list(enumerate(made_.documents))
    for first in range(0, len(ids), 5):
        bank.add([{"key": str(place), "input_ids": row} for place, row in ids[first : first + 5]])
    for place in GONE:
        bank.delete(str(place))
    return bank


def opened(made_: Setup, directory: Path) -> tuple[Any, Any]:
    bank = changed(made_, directory)
    return bank, bank.snapshot()


def opened_in_memory(made_: Setup, directory: Path) -> tuple[Any, Any]:
    bank = changed(made_, None)
    return bank, bank.snapshot()


def with_deletions(made_: Setup, directory: Path) -> tuple[Any, Any]:
    changed(made_, directory).close()
    return directory, MemoryBank.from_pretrained(directory)


Origin = Callable[[Setup, Path], tuple[Any, Any]]
ORIGINS: list[Origin] = [in_memory, in_one_file, in_many_files, loaded, opened, opened_in_memory, with_deletions]
each_origin = pytest.mark.parametrize("origin", ORIGINS, ids=lambda origin: origin.__name__)
CONTENTS: dict[str, Any] = {
    f"{tier}{budget}": PlacementOptions(content_on=tier, cache=budget)
    for tier in ("device", "host", "disk")
    for budget in (0, 1 << 12)
}
CONTENTS["auto"] = "auto"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "origin, choice, dtype",
    [
        pytest.param(origin, choice, dtype, id=f"{origin.__name__}-{name}-{dtype}".replace("torch.", ""))
        for origin in ORIGINS
        for number, (name, choice) in enumerate(CONTENTS.items())
        # Every choice from memory and from files; of the other places they are the same parts, in another order.
        for dtype in (torch.float32, torch.bfloat16)
        if (origin in (in_memory, in_many_files) and dtype == torch.float32)
        or (number + ORIGINS.index(origin)) % 3 == int(dtype == torch.bfloat16)
    ],
)
def test_own_numbers_from_any_tier_give_the_same_bits(
    origin: Origin, choice: Any, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    """A ragged batch, twice, so that a cache is used; also with forced documents and with the scores of all."""
    made_ = made(device, dtype)
    bank, whole = origin(made_, tmp_path)
    whole = whole.to(device)
    memory = place_bank(bank, device, choice, model=made_.model, tiers=AMPLE)
    forced = torch.tensor([[4, -1], [1, 0], [-1, -1]])
    options: list[dict[str, Any]] = [{}, {"output_document_scores": True}, {"force_documents": forced}]
    for inputs in options:
        expected = answer(made_, whole, **inputs)
        for _ in range(2):
            assert_equal(answer(made_, memory, **inputs), expected)
    assert len(memory) == len(whole) and memory.documents[2].key == whole.documents[2].key


@pytest.mark.parametrize("device", DEVICES)
@each_origin
def test_what_is_free_is_measured(origin: Origin, device: str, tmp_path: Path) -> None:
    """Nothing is said but what to leave alone: no tiers, no placement."""
    made_ = made(device)
    bank, whole = origin(made_, tmp_path)
    memory = place_bank(bank, device, reserves=NONE)
    assert memory.plan.keys == memory.plan.content == "fp32"
    assert (memory.plan.tiers.device is None) == (device == "cpu")
    assert_equal(answer(made_, memory), answer(made_, whole.to(device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "origin, at_once",
    [
        pytest.param(origin, at_once, id=f"{origin.__name__}-{name}")
        for origin in ORIGINS
        for name, at_once in {"a document": 1, "some": 1000, "all": 1 << 28}.items()
        if name == "some" or origin in (in_many_files, opened)
    ],
)
def test_streamed_keys_find_the_same_documents(
    origin: Origin, at_once: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed: list[torch.Tensor] = []

    def noted(queries: Any, mask: Any, keys: torch.Tensor, *args: Any, **options: Any) -> Any:
        routed.append(keys)
        return route_documents(queries, mask, keys, *args, **options)

    monkeypatch.setattr(tier_layers, "STREAMED_BYTES", at_once)
    monkeypatch.setattr(tier_layers, "route_documents", noted)
    made_ = made(device)
    bank, whole = origin(made_, tmp_path)
    whole = whole.to(device)
    longest = int(whole.offsets.diff().max())
    for keys in ("fp32", "fp8", "int8"):
        routed.clear()
        memory = place_bank(bank, device, PlacementOptions(keys=keys, keys_on="host"), tiers=AMPLE, model=made_.model)
        assert_close(answer(made_, memory), answer(made_, whole))
        assert sum(map(len, routed)) == 2 * int(whole.offsets[-1]), "every layer's keys, once"
        assert all(part.nbytes <= at_once or len(part) <= longest for part in routed)
        ours, theirs = (answer(made_, item, output_document_scores=True) for item in (memory, whole))
        assert_equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "origin, resident, keys",
    [
        pytest.param(origin, resident, keys, id=f"{origin.__name__}-{resident}-{keys}")
        for origin in ORIGINS
        for resident in (0, 1, 2, None)
        for keys in ("fp32", "fp8", "int8")
        # What stays is decided per layer, whatever the layers were made of.
        if origin is in_many_files or (resident, keys) == (1, "fp8")
    ],
)
def test_layers_that_stay_on_the_device_are_not_streamed(
    origin: Origin, resident: int | None, keys: str, device: str, tmp_path: Path
) -> None:
    made_ = made(device)
    bank, whole = origin(made_, tmp_path)
    choice = PlacementOptions(keys=keys, keys_on="host", resident=resident)
    memory = place_bank(bank, device, choice, tiers=AMPLE, model=made_.model)
    streamed = [layer.routing_keys.streamed for layer in memory.layers.values()]
    assert memory.plan.resident == (2 if resident is None else resident)
    assert streamed == [number >= memory.plan.resident for number in range(2)]
    for layer in memory.layers.values():
        on_device = layer.routing_keys.rows.whole is not None and layer.routing_keys.rows.whole.device.type == device
        assert device == "cpu" or on_device != layer.routing_keys.streamed
    assert_close(answer(made_, memory), answer(made_, whole.to(device)))


@pytest.mark.parametrize("keys", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("on", ["device", "host"])
def test_exact_scores_are_of_queries_that_were_not_rounded(
    keys: str, on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow keys meet narrow queries on a GPU; what decides among their candidates is in the bank's own dtype."""
    monkeypatch.setattr(sys.modules["msa_hf.ops.route_documents"], "NARROWING", ("cpu",))
    made_ = made()
    memory = place_bank(made_.bank, placement=PlacementOptions(keys=keys, keys_on=on), tiers=AMPLE, model=made_.model)
    assert_close(answer(made_, memory), answer(made_, made_.bank))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", ["fp8", "int8"])
def test_the_host_does_not_look_up_candidates_that_the_device_reads_itself(
    keys: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact keys in one tensor, pinned where there is a GPU: the operation gets them whole."""

    def refused(*_: Any) -> Any:
        raise AssertionError("the host looked at what the device chose")

    made_ = made(device)
    bank = copy.copy(made_.bank)
    if device == "cuda":
        bank.layers = {
            layer: DenseLayer(memory.routing_keys.pin_memory(), memory.pooled_kv)
            for layer, memory in bank.layers.items()
        }
    memory = place_bank(bank, device, PlacementOptions(keys=keys, content_on="device"), tiers=AMPLE, model=made_.model)
    expected = answer(made_, made_.bank.to(device))
    monkeypatch.setattr(tier_layers, "DocumentRows", refused)
    assert_close(answer(made_, memory), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys, on", [("fp8", "device"), ("int8", "host")])
def test_exact_keys_are_put_where_the_device_reads_them(
    keys: str, on: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From however many files, which may then go; the plan counts them."""

    def refused(*_: Any) -> Any:
        raise AssertionError("the host looked at what the device chose")

    made_ = made(device)
    bank = copy.copy(made_.bank)
    bank.save_pretrained(tmp_path, max_shard_size=1)
    source = source_of(tmp_path)
    assert len(source.parts(2)) > 2
    choice = PlacementOptions(keys=keys, keys_on=on, content_on="device", exact_on="host")
    memory = place_bank(source, device, choice, tiers=AMPLE, model=made_.model)
    shape = BankShape.of(bank)
    assert ("exact keys", "fp32", "host", shape.key_bytes("fp32")) in memory.plan.parts
    for layer, item in memory.layers.items():
        exact: Any = item.routing_keys.exact
        assert torch.equal(exact.whole, bank.layers[layer].routing_keys)
        assert device == "cpu" or exact.whole.is_pinned()
    expected = answer(made_, bank.to(device))
    monkeypatch.setattr(tier_layers, "DocumentRows", refused)
    assert_close(answer(made_, memory), expected)
    wide = place_bank(source, device, replace(choice, keys="fp32"), tiers=AMPLE, model=made_.model)
    assert all(item.routing_keys.exact is None for item in wide.layers.values())


def test_exact_keys_that_are_there_are_not_copied() -> None:
    bank = made().bank
    kept = place_bank(bank, placement=PlacementOptions(keys="fp8", exact_on="host"), tiers=AMPLE)
    for layer, memory in bank.layers.items():
        assert kept.layers[layer].routing_keys.exact.whole.data_ptr() == memory.routing_keys.data_ptr()


@pytest.mark.parametrize("top_k", [1, 50])
def test_more_documents_than_there_are(top_k: int, tmp_path: Path) -> None:
    """Also of a bank whose documents were deleted, some or all, and of an empty one."""
    made_ = made(top_k=top_k)
    bank = changed(made_, tmp_path)
    empty = made_.model.open_memory(tmp_path / "empty")
    gone = changed(made_, tmp_path / "gone")
    for place in range(len(made_.documents)):
        gone.delete(str(place))
    for item in (bank, empty, gone):
        theirs = answer(made_, item.snapshot())
        for choice in (
            PlacementOptions(),
            PlacementOptions(keys="fp8"),
            PlacementOptions(keys_on="host"),
            PlacementOptions(content_on="disk"),
        ):
            memory = place_bank(item, placement=replace(choice, cache=100), tiers=AMPLE)
            assert_close(answer(made_, memory), theirs)
        missing = (theirs.routing[2].documents < 0).any() or top_k != 50
        assert missing, "a top_k of 50 exceeds every bank"


FIELDS: list[dict[str, Any]] = [
    {"score_bias": True},
    {"head_reduction": "max"},
    {"query_reduction": "mean"},
    {"query_reduction": "last", "chunk_reduction": "mean"},
    {"similarity": "dot"},
    {"shared_router": True},
    {"prefix_token_ids": ()},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_other_configurations(fields: dict[str, Any], tmp_path: Path) -> None:
    """Scores that are not the default's are exact, whatever the keys are."""
    made_ = made(**fields)
    made_.bank.save_pretrained(tmp_path, max_shard_size=1500)
    expected = answer(made_, made_.bank)
    for choice in (
        PlacementOptions(content_on="disk"),
        PlacementOptions(keys="fp8"),
        PlacementOptions(keys="int8", keys_on="host"),
    ):
        for bank in (made_.bank, tmp_path):
            assert_close(answer(made_, place_bank(bank, placement=choice, tiers=AMPLE)), expected)


def test_scores_of_all_documents_carry_their_gradient() -> None:
    made_ = made(score_bias=True)
    gradients = []
    for memory in (made_.bank, place_bank(made_.bank, placement=PlacementOptions(keys="fp8"), tiers=AMPLE)):
        made_.model.zero_grad()
        made_.model(**questions(), memory=memory).logits.float().logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in made_.model.named_parameters() if "router_q" in name})
    assert all(torch.equal(gradients[1][name], grad) and grad.abs().max() > 0 for name, grad in gradients[0].items())


# Fewer bits -----------------------------------------------------------------------------------------------------------


def narrowed(content: torch.Tensor, kind: str) -> torch.Tensor:
    """Every key and value as it is when it comes back from fewer bits."""
    numbers, scales = quantize_keys(content.flatten(0, 1).flatten(1), kind)
    return (numbers.float() * scales[:, None]).view(content.shape).to(content.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on", ["device", "host"])
@pytest.mark.parametrize("budget", [0, 1 << 10])
def test_content_in_eight_bits(dtype: torch.dtype, on: str, budget: int, tmp_path: Path) -> None:
    """As a bank whose content went through 8 bits; rows are within e4m3's error of what they were."""
    made_ = made(dtype=dtype)
    layers = {
        layer: DenseLayer(memory.routing_keys, narrowed(memory.pooled_kv, "fp8"))
        for layer, memory in made_.bank.layers.items()
    }
    bank = made_.bank
    counts = bank.num_chunks, bank.num_tokens
    oracle = MemoryBank(layers, bank.offsets, bank.prefix, bank.documents, bank.origin, counts)
    bank.save_pretrained(tmp_path, max_shard_size=1500)
    expected = answer(made_, oracle)
    assert not torch.equal(expected.logits, answer(made_, bank).logits)
    for item in (bank, tmp_path):
        memory = place_bank(item, placement=PlacementOptions(content="fp8", content_on=on, cache=budget), tiers=AMPLE)
        for _ in range(2):
            assert_equal(answer(made_, memory), expected)
    for tier_layer in memory.layers.values():
        rows_ = tier_layer.pooled_kv.gather(torch.tensor([[0]]), memory.layout)
        assert rows_.keys.dtype == rows_.values.dtype == dtype
    for layer, memory in layers.items():
        exact, found = bank.layers[layer].pooled_kv.double(), memory.pooled_kv.double()
        largest = exact.flatten(2).abs().amax(2)[..., None, None]
        # 3 bits behind the leading one, and 2 ** -10 of the scale below its smallest normal number; bfloat16's own.
        allowed = exact.abs() * (2**-4 + torch.finfo(dtype).eps) + largest / 448 * 2**-10
        assert bool(((found - exact).abs() <= allowed).all())


def large_bank(count: int = 400, seed: int = 0) -> MemoryBank:
    """Random keys and content of many documents, in the shape of `made().bank`."""
    made_, draw = made(), torch.Generator().manual_seed(seed)
    lengths = [random.Random(seed + place).randint(1, 12) for place in range(count)]
    like = made_.model.encode_documents(tokens(*lengths, seed=seed), bank_device="cpu")
    layers = {}
    for layer, memory in like.layers.items():
        keys = torch.randn(memory.routing_keys.shape, generator=draw).unflatten(1, (memory.pooled_kv.shape[2], -1))
        keys = torch.nn.functional.normalize(keys, dim=2).flatten(1)
        layers[layer] = DenseLayer(keys, torch.randn(memory.pooled_kv.shape, generator=draw))
    counts = like.num_chunks, like.num_tokens
    return MemoryBank(layers, like.offsets, like.prefix, like.documents, like.origin, counts)


@pytest.mark.parametrize("keys", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize("on", ["device", "host"])
def test_narrow_keys_choose_the_same_documents(keys: str, on: str, tmp_path: Path) -> None:
    """With the default number of candidates, and their scores are exact; without any, scores are the narrow keys'."""
    made_, bank = made(), large_bank()
    bank.save_pretrained(tmp_path, max_shard_size=20_000)
    layer = min(bank.layers)  # of later ones the queries differ, if only in their last bits
    for item in (bank, tmp_path):
        exact = place_bank(item, placement=PlacementOptions(keys=keys, keys_on=on), tiers=AMPLE)
        narrow = place_bank(item, placement=PlacementOptions(keys=keys, keys_on=on), tiers=AMPLE, candidates=0)
        differences = 0.0
        for seed in range(4):
            expected = answer(made_, bank, seed)
            assert_close(answer(made_, exact, seed), expected)
            found = answer(made_, narrow, seed).routing[layer].scores
            differences = max(differences, float((found - expected.routing[layer].scores).abs().max()))
        assert differences > 1e-4


def test_candidates_are_counted() -> None:
    """As many as are asked for are scored again: what the narrow keys find beyond them cannot be chosen."""
    made_, bank = made(), large_bank()
    layer = min(bank.layers)
    keys = bank.layers[layer].routing_keys
    numbers, scales = quantize_keys(keys, "int8")
    draw = torch.Generator().manual_seed(1)
    heads, dim = made_.model.config.num_attention_heads, bank.layers[layer].pooled_kv.shape[3]
    queries = torch.randn(5, 4, heads, dim, generator=draw)
    mask = torch.rand(5, 4, generator=draw) < 0.7
    mask[0] = False  # chooses nothing
    for wanted in (3, 4, 9, 500):
        memory = place_bank(bank, placement=PlacementOptions(keys="int8"), tiers=AMPLE, candidates=wanted)
        found = memory.layers[layer].route(queries, mask, 3, Scoring())
        options: dict[str, Any] = {"scales": scales, "exact_keys": keys, "candidates": wanted}
        expected = route_documents(queries, mask, numbers, bank.offsets, 3, **options)
        assert torch.equal(found.documents, expected[0])
        torch.testing.assert_close(found.scores, expected[1], atol=1e-6, rtol=1e-6)
    memory = place_bank(bank, placement=PlacementOptions(keys="int8"), tiers=AMPLE, candidates=2)
    with pytest.raises(ValueError, match="at least the 3 documents of `top_k`, or 0, got 2"):
        answer(made_, memory)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        place_bank(bank, placement=PlacementOptions(keys="int8"), tiers=AMPLE, candidates=-1)


# The cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_what_was_used_last() -> None:
    """Against a list of documents in the order of their use."""
    draw, order, sizes = random.Random(4), [], [2, 1, 4, 3, 6, 7, 2]
    hot = DocumentLRU(budget=6 * 4)
    hits = misses = 0
    for _ in range(300):
        asked = draw.sample(range(len(sizes)), draw.randint(0, 3))
        missing = [document for document in asked if document not in order]
        hits, misses = hits + len(asked) - len(missing), misses + len(missing)

        def fetch(documents: list[int], missing: list[int] = missing) -> list[tuple[torch.Tensor, ...]]:
            assert documents == missing
            return [(torch.full((sizes[document],), float(document)),) for document in documents]

        found = hot.take(asked, fetch)
        assert [part[0].tolist() for part in found] == [[float(document)] * sizes[document] for document in asked]
        order = [document for document in order if document not in asked] + [
            document for document in asked if document in order
        ]
        for document in missing:
            if sizes[document] <= 6:
                while sum(sizes[item] for item in order) + sizes[document] > 6:
                    order.pop(0)
                order.append(document)
        assert (hot.hits, hot.misses, hot.bytes) == (hits, misses, 4 * sum(sizes[item] for item in order))


def test_use_of_the_cache_can_be_read() -> None:
    made_ = made()
    memory = place_bank(made_.bank, placement=PlacementOptions(content_on="host", cache=1 << 20), tiers=AMPLE)
    assert memory.cache == tiers.CacheUse(0, 0, 0, 1 << 20)
    routing = answer(made_, memory).routing
    distinct = {layer: found.documents[found.documents >= 0].unique() for layer, found in routing.items()}
    row = sum(2 * memory.numel() for memory in [made_.bank.layers[2].pooled_kv[0, 0]]) * 4
    used = sum(row * int(made_.bank.offsets.diff()[documents].sum()) for documents in distinct.values())
    count = sum(map(len, distinct.values()))
    assert memory.cache == tiers.CacheUse(0, count, used, 1 << 20)
    answer(made_, memory)
    assert memory.cache == tiers.CacheUse(count, count, used, 1 << 20)
    assert place_bank(made_.bank, placement=PlacementOptions(content_on="host"), tiers=AMPLE).cache is None
    on_device = place_bank(made_.bank, placement=PlacementOptions(cache=1 << 20), tiers=AMPLE)
    assert on_device.plan.content_on == "device" and on_device.cache is None, "content there needs no cache"


# The plan -------------------------------------------------------------------------------------------------------------


def untouchable(bank: MemoryBank) -> Any:
    """A source of which nothing may be read."""

    def parts(layer: int) -> Any:
        raise AssertionError("read before the plan was made")

    return replace(source_of(bank), parts=parts)


def test_a_bank_that_cannot_fit_is_refused_before_it_is_read() -> None:
    bank = made().bank
    shape = BankShape.of(bank)
    keys, content = shape.key_bytes("fp32"), shape.content_bytes("fp32")
    small = Tiers(shape.key_bytes("fp8") + shape.index_bytes - 1, content, content)
    with pytest.raises(DoesNotFit, match=f"Routing keys need {keys:,} bytes as fp32.*It would fit with: .*less in"):
        place_bank(untouchable(bank), "cpu", tiers=replace(small, device=small.device + 10), reserves=Reserves(10**6))
    with pytest.raises(DoesNotFit, match="no cache"):
        choice = PlacementOptions(content_on="host", cache=10**6)
        place_bank(untouchable(bank), "cpu", choice, tiers=Tiers(10**6, 10**6, 0), reserves=NONE)


@pytest.mark.parametrize("logged", [False, True])
def test_auto_takes_the_widest_that_fits(logged: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Keys in 8 bits, content on disk; and what it answers is right all the same."""
    made_ = made()
    shape = BankShape.of(made_.bank)
    made_.bank.save_pretrained(tmp_path)
    free = Tiers(shape.key_bytes("fp8") + shape.index_bytes, 0, 10**9)
    with caplog.at_level("INFO" if logged else "WARNING", "msa_hf.bank.tiered.bank"):
        memory = place_bank(tmp_path, tiers=free, reserves=NONE, verify=False)
    plan = memory.plan
    assert (plan.keys, plan.keys_on, plan.content, plan.content_on) == ("fp8", "device", "fp32", "disk")
    assert logged == ("content       fp32    disk" in caplog.text) == ("routing 32 tokens" in caplog.text)
    assert_close(answer(made_, memory), answer(made_, made_.bank))
    used = sum(part.rows.nbytes for part in (memory.layers[layer].routing_keys for layer in (2, 3)))
    assert used == plan.used("device") - shape.index_bytes


def test_the_bytes_are_those_of_the_plan(tmp_path: Path) -> None:
    made_ = made()
    made_.bank.save_pretrained(tmp_path, max_shard_size=1500)
    for keys in ("fp32", "bf16", "fp8", "int8"):
        for content in ("fp32", "bf16", "fp16", "fp8"):
            memory = place_bank(tmp_path, placement=PlacementOptions(keys, "device", content, "host"), tiers=AMPLE)
            sizes = dict(zip(("routing keys", "content"), (part[3] for part in memory.plan.parts), strict=False))
            layers: Any = memory.layers.values()
            assert sum(layer.routing_keys.rows.nbytes for layer in layers) == sizes["routing keys"]
            assert sum(layer.pooled_kv.rows.nbytes for layer in layers) == sizes["content"]


def test_a_choice_is_json() -> None:
    choice = PlacementOptions("fp8", "host", "fp8", "disk", 10**9)
    assert PlacementOptions(**json.loads(json.dumps(asdict(choice)))) == choice


@pytest.mark.parametrize(
    "choice, options, message",
    [
        (PlacementOptions(keys="int4"), {}, "int4 routing keys.*cannot score.*choose fp8 or int8"),
        (PlacementOptions(content="fp8", content_on="disk"), {}, "the bank's files hold fp32: choose fp32"),
        (PlacementOptions(cache=10), {"tiers": Tiers(None, 10**9, 0)}, "bytes on a device, got 10; device: None"),
        (PlacementOptions(cache=-1), {}, "bytes on a device, got -1"),
        (PlacementOptions(keys="fp64"), {}, "fp64"),
        ("device", {}, "'auto' or a PlacementOptions"),
        ("auto", {"device": "meta", "tiers": Tiers(None, 10**12, 0)}, "pass `tiers="),
    ],
)
def test_what_cannot_be_is_refused(choice: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_bank(untouchable(made().bank), **{"placement": choice, "tiers": AMPLE, **options})


def test_what_can_not_be_placed(tmp_path: Path) -> None:
    made_ = made()
    memory = place_bank(made_.bank, tiers=AMPLE)
    with pytest.raises(ValueError, match="TieredBank is shared or placed already"):
        place_bank(memory, tiers=AMPLE)
    with pytest.raises(TypeError, match="must be a MemoryBank, a BankStore or a directory, got list"):
        place_bank([made_.bank], tiers=AMPLE)
    with pytest.raises(ValueError, match=r'place `bank.to\("cpu"\)`'):
        place_bank(made_.bank.to("meta"), tiers=AMPLE)
    with pytest.raises(ValueError, match="call `place_bank`"):
        memory.to("cpu")
    with pytest.raises(ValueError, match="save that one"):
        memory.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not made with this model:\n"):
        made_.bank.save_pretrained(tmp_path)
        place_bank(tmp_path, model=made(top_k=1, chunk_size=4).model, tiers=AMPLE)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    made_ = made()
    made_.bank.save_pretrained(tmp_path)
    file = next(tmp_path.glob("layer-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=file.name):
        place_bank(tmp_path, tiers=AMPLE)
    place_bank(tmp_path, tiers=AMPLE, verify=False)


# Disk and host memory -------------------------------------------------------------------------------------------------


def resident(directory: Path) -> int:
    """Bytes of mapped files of a directory that this process has looked at."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(
        rf"^[0-9a-f-]+ .*{re.escape(str(directory))}.*\n(?:Size.*\n|KernelP.*\n|MMUP.*\n)*Rss: *(\d+)", maps, re.M
    )
    assert found
    return sum(map(int, found)) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells what was read from a file on Linux alone")
@pytest.mark.parametrize("opened", [False, True])
def test_placing_content_on_disk_reads_none_of_it(opened: bool, tmp_path: Path) -> None:
    bank = large_bank(40)
    groups, dim = bank.layers[2].pooled_kv.shape[2:]
    chunks = bank.num_chunks
    times = 4096 // dim  # wide heads: content of megabytes
    layers = {
        layer: DenseLayer(torch.ones(chunks, groups * dim * times), torch.ones(chunks, 2, groups, dim * times))
        for layer in bank.layers
    }
    prefix = {layer: (torch.zeros(groups, len(PREFIX), dim * times),) * 2 for layer in layers}
    wide = MemoryBank(layers, bank.offsets, prefix, bank.documents, bank.origin)
    wide.save_pretrained(tmp_path)
    size = BankShape.of(wide).saved_bytes
    item: Any = tmp_path
    if opened:
        item = made().model.open_memory(tmp_path, read_only=True)
    assert resident(tmp_path) < size / 20 if opened else size > 10**7
    memory = place_bank(item, placement=PlacementOptions(content_on="disk"), tiers=AMPLE, verify=False)
    assert size / 5 < resident(tmp_path) < size / 2, "keys, a third, were read, and content was not"
    content: Any = memory.layers[2].pooled_kv
    content.gather(torch.tensor([[0]]), memory.layout)
    assert resident(tmp_path) < size / 2


def test_a_placed_bank_is_a_snapshot(tmp_path: Path) -> None:
    """Later commits, compaction and the end of the directory do not change it."""
    made_ = made()
    bank = changed(made_, tmp_path)
    expected = answer(made_, bank.snapshot())
    placed = [place_bank(bank, placement=PlacementOptions(keys="fp8", content_on="disk"), tiers=AMPLE)]
    placed += [place_bank(tmp_path, placement=PlacementOptions(content_on="disk"), tiers=AMPLE)]
    bank.delete("5")
    bank.add([{"key": "new", "input_ids": tokens(5, seed=8)[0]}])
    bank.compact()
    bank.close()
    for path in tmp_path.iterdir():
        path.unlink()
    for memory in placed:
        assert_close(answer(made_, memory), expected)
        assert memory.documents.position("5") >= 0


@pytest.mark.parametrize("part, number", [("chunks", 1), ("documents", 0)])
def test_documents_of_damaged_files_are_left_out(tmp_path: Path, part: str, number: int) -> None:
    made_ = made()
    changed(made_, tmp_path).close()
    victim = sorted(tmp_path.glob(f"{part}-*"))[number]
    victim.write_bytes(b"\xff" * victim.stat().st_size)
    bank = made_.model.open_memory(tmp_path, read_only=True)
    whole = bank.snapshot()
    assert 0 < len(whole) < len(made_.documents) - len(GONE)
    for choice in (
        PlacementOptions(content_on="disk"),
        PlacementOptions(keys="fp8", content_on="host"),
        PlacementOptions(keys_on="host"),
    ):
        assert_close(answer(made_, place_bank(bank, placement=choice, tiers=AMPLE)), answer(made_, whole))


@pytest.mark.parametrize("at_once", [1, 100, 1 << 24])
@pytest.mark.parametrize("form", ["fp32", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 5)])
def test_rows_are_moved_in_pieces(
    at_once: int, form: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parts of any length, none too; read back in any selection and in runs."""
    monkeypatch.setattr(rows, "MOVED_ELEMENTS", at_once)
    draw = torch.Generator().manual_seed(3)
    parts = [torch.randn(count, *shape, generator=draw) for count in (3, 1, 0, 12)]
    whole = torch.cat(parts)
    cpu = torch.device("cpu")
    for found in [placed_rows(parts, form, cpu, on_device=True), *([Rows(parts, cpu)] if form == "fp32" else [])]:
        assert found.shape == whole.shape
        values = found.between(0, 16)[0].float()
        expected = whole.to(torch.bfloat16 if form == "bf16" else torch.float32).float()
        if found.scales is not None:
            assert found.scales.shape == (16, *shape[:-2])
            values = values * found.scales.view(16, *shape[:-2], *(1,) * (2 if len(shape) > 1 else 1))
            flat = expected.reshape(16 * (shape[0] if len(shape) > 1 else 1), -1)
            numbers, scales = quantize_keys(flat, form)
            expected = (numbers.float() * scales[:, None]).view(whole.shape)
        assert torch.equal(values, expected)
        for chosen in ([], [0], [15], [0, 2, 3, 4, 15], list(range(16))):
            numbers, *scales = found.select(torch.tensor(chosen, dtype=torch.int64))
            assert torch.equal(numbers.float(), found.between(0, 16)[0].float()[chosen])
            assert [part.tolist() for part in scales] == (
                [] if found.scales is None else [found.scales[chosen].tolist()]
            )
        for first, end in ((0, 0), (2, 4), (3, 5), (4, 16), (1, 15)):
            assert torch.equal(found.between(first, end)[0].float(), found.between(0, 16)[0][first:end].float())
        for size in (1, 5, 16, 99):
            pieces = list(found.split(size))
            assert [len(piece) for piece in pieces] == [len(piece) for piece in whole.split(size)]
            assert torch.equal(torch.cat([piece.float() for piece in pieces]), found.between(0, 16)[0].float())


class Made(TorchDispatchMode):
    """Notes how many numbers the results of operations have."""

    def __init__(self) -> None:
        super().__init__()
        self.finals: list[int] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format:
            self.finals.append(result.numel())
        elif isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_little_is_made_beside_the_final_place(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is converted is so piece by piece."""
    monkeypatch.setattr(rows, "MOVED_ELEMENTS", 400)
    bank = large_bank(40)
    groups, dim = bank.layers[2].pooled_kv.shape[2:]
    with Made() as noted:
        memory = place_bank(bank, placement=PlacementOptions(form, "device", form, "host"), tiers=AMPLE)
    parts = [part for layer in memory.layers.values() for part in (layer.routing_keys.rows, layer.pooled_kv.rows)]
    assert all(part.whole.numel() in noted.finals and part.whole.numel() > 1000 for part in parts)
    # What the documents and the prefix have is the same for any placement.
    others = max(len(bank.offsets), *(keys.numel() for keys, _ in bank.prefix.values()))
    assert noted.largest <= max(400, 2 * groups * dim, others)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("form", ["fp32", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_gpu_gets_what_the_cpu_gets(on_device: bool, form: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, through buffers, and back to host memory."""
    pick = torch.Generator().manual_seed(0)
    parts = [torch.randn(count, 2, 2, 8, generator=pick) for count in (3, 700, 1, 90)]
    expected = placed_rows(parts, form, torch.device("cpu"), on_device=True)
    monkeypatch.setattr(rows, "MOVED_ELEMENTS", 400)
    found = placed_rows(parts, form, torch.device(device), on_device=on_device)
    for ours, theirs in ((found.whole, expected.whole), (found.scales, expected.scales)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.device.type == (device if on_device else "cpu") and (on_device or ours.is_pinned())
            assert torch.equal(ours.cpu().float(), theirs.float())


def test_a_buffer_is_filled_again_when_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a piece is its buffer: it must be what it was until the event behind it has been waited for."""
    recorded: list[Any] = []

    class Event:
        held: tuple[torch.Tensor, torch.Tensor] | None = None

        def synchronize(self) -> None:
            assert self.held is None or torch.equal(*self.held), "filled while it was read"
            self.held = None

        def record(self, stream: str) -> None:
            assert stream == "the stream of cpu" and self.held is None, "filled while it was read"
            recorded.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(rows, "_buffer", lambda size, dtype: torch.empty(size, dtype=dtype))
    staging = Staging(torch.device("cpu"), 24, torch.float32)
    for size in (4, 3, 4, 1, 2, 4):
        piece = torch.randn(size, 2, 3)
        moved = staging.moved(piece)
        assert torch.equal(moved, piece)
        recorded[-1].held = (piece, moved)
    assert len(recorded) == 6 and len(set(recorded)) == 2


class Driver:
    """Stands for the CUDA runtime, which locks memory."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.locked = status, {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.locked.update({} if self.status else {address: size})
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_memory_is_locked_as_long_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly its bytes, and not longer than the last view of it lives."""
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    tensor = pinned((5, 2, 3), torch.bfloat16)
    assert tensor.shape == (5, 2, 3) and driver.locked == {tensor.data_ptr(): 60}
    tensor.fill_(2.0)
    view = tensor[3:]
    del tensor
    assert len(driver.locked) == 1 and view.sum() == 24.0
    del view
    assert driver.locked == {}
    assert pinned((0, 4), torch.float8_e4m3fn).shape == (0, 4) and driver.locked == {}
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(2))
    with pytest.raises(MemoryError, match=r"does not lock 28 bytes.*ulimit -l"):
        pinned((7,), torch.float32)


# Generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice", [PlacementOptions(content_on="disk"), PlacementOptions(keys="fp8", content_on="host", cache=1 << 12)]
)
def test_generation_and_memory_interleave(choice: PlacementOptions, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT, "qwen3")
    bank = bank_of(model, tokenizer, COMPACT)
    bank.save_pretrained(tmp_path)
    memory = place_bank(tmp_path, placement=choice, model=model, tokenizer=tokenizer, tiers=AMPLE)
    asked = ["Where is the amber?", "How far off is the reef, in miles?", "Which one is it?"]
    found = []
    for item in (bank, memory):
        asker = MemoryInterleave(model, tokenizer, item, COMPACT, max_new_tokens=6, select="router")
        found.append([(answer.text, [source.position for source in answer.documents]) for answer in asker.ask(asked)])
    assert found[0] == found[1] and any(sources for _, sources in found[0])
    inputs = tokenizer(asked, return_tensors="pt", padding=True, return_token_type_ids=False)
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, memory=memory, **options), model.generate(**inputs, memory=bank, **options)
    )
