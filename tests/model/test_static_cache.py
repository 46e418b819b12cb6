"""A memory with a static cache: the tokens of the growing cache, in shapes that stay, compiled or not."""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from setups import FEW, PREFIX, Setup, assert_same, batch_of, setup, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig
from transformers.cache_utils import StaticSlidingWindowLayer

from msa_hf.bank import place_bank
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.model import compiled_msa, document_rows_msa, spare_caches_msa
from msa_hf.model.attending_layers_msa import options_of_tokens
from msa_hf.model.cache_msa import LEAST_BUCKET, MSACache, MSAStaticCache
from msa_hf.model.compat_msa import CACHE, cache_of
from msa_hf.model.ops_msa import OPERATIONS

LONG = (1, 3, 4, 7, 230, 250)  # documents, of which some two have more rows than the smallest bucket
SMALL: dict[str, Any] = {"base": {"num_hidden_layers": 2}, "memory_layers": [1]}  # compiling takes time by the layer
EXACTLY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
DETAILS: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
QUESTIONS = {"one": batch_of(tokens(9, seed=3)), "padded": batch_of(tokens(9, 5, seed=3)), "short": batch_of([[9]])}


@pytest.fixture
def compiling() -> Any:
    """Options that make transformers compile on the CPU, in Python: what is tested is what is traced."""
    torch.compiler.reset()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    yield {"cache_implementation": "static", "compile_config": config}
    torch.compiler.reset()


def graphs() -> int:
    """How often something has been compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def same(made: Setup, batch: dict[str, Tensor], **options: Any) -> MSAStaticCache:
    """Generate with a growing cache, and with `options`: the same tokens and logits. Returns the static cache."""
    memory = options.pop("memory", made.bank)
    given = {**EXACTLY, **DETAILS, **{name: options.pop(name) for name in list(options) if name not in STATIC_OPTIONS}}
    expected = made.model.generate(**batch, memory=made.bank, **given)
    found = made.model.generate(**batch, memory=memory, **given, **{"cache_implementation": "static", **options})
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert_same(ours, theirs)
    ours, theirs = (cache_of(answer).contexts for answer in (found, expected))
    for layer in made.model.config.memory_layers:
        assert torch.equal(ours[layer].documents, theirs[layer].documents)
        assert torch.equal(ours[layer].rows_per_sample, theirs[layer].rows_per_sample)
    return cache_of(found)


STATIC_OPTIONS = ("cache_implementation", "compile_config")


@pytest.mark.parametrize("questions", QUESTIONS)
@pytest.mark.parametrize(("family", "attention"), FEW)
def test_the_same_as_with_a_growing_cache(family: str, attention: str, questions: str) -> None:
    """Windows, softcap and sinks included; contexts have a bucket's rows, whatever was chosen."""
    made = setup(family, attention)
    cache = same(made, QUESTIONS[questions])
    assert isinstance(cache, MSAStaticCache)
    chosen = [cache.contexts[layer] for layer in made.model.config.memory_layers]
    assert {item.keys.shape[2] for item in chosen} == {LEAST_BUCKET}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"force_documents": torch.tensor([[4, -1]])},
        {"prompt_lookup_num_tokens": 3},
        {"memory": "tiered"},
        {"memory": "open"},
    ],
    ids=["beams", "forced", "drafts", "tiered", "open"],
)
def test_what_else_a_call_may_ask_for(options: dict[str, Any]) -> None:
    made = setup("qwen3", "sdpa")
    if options.get("memory") == "tiered":
        options = {"memory": place_bank(made.bank, tiers=Tiers(*[10**12] * 3))}
    elif options.get("memory") == "open":
        store = made.model.open_memory()
        store.add([{"key": str(place), "input_ids": item} for place, item in enumerate(made.documents)])
        options = {"memory": store}
    same(made, QUESTIONS["one"], **options)


@pytest.mark.parametrize("window", [4, 512])
def test_drafts_that_a_window_cannot_take_back_are_refused(window: int) -> None:
    """Before anything is computed; newer transformers can where the window has all the room."""
    made = setup("gemma2", "eager", base={"sliding_window": window})
    if window == 512 and hasattr(StaticSlidingWindowLayer, "crop"):
        same(made, QUESTIONS["one"], prompt_lookup_num_tokens=3)
        return
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": made.base}):
        with pytest.raises(ValueError, match=r"drafts tokens .* layers with a window.*Leave `cache_implementation"):
            same(made, QUESTIONS["one"], **options)


def test_turns_in_one_cache() -> None:
    """A second question, which chooses anew, and an answer to it, in the places behind the first."""
    made, answers = setup("qwen3", "sdpa"), []
    for make in (MSACache, lambda config: MSAStaticCache(config=config, max_cache_len=40)):
        cache, ids = make(config=made.model.config), torch.empty(1, 0, dtype=torch.long)
        for question in tokens(7, 5, seed=8):
            ids = torch.cat([ids, torch.tensor([question])], 1)
            ids = made.model.generate(ids, memory=made.bank, **{CACHE: cache}, **EXACTLY)
        answers.append(ids)
    assert torch.equal(*answers)


def test_a_cache_without_room_is_refused() -> None:
    made = setup("qwen3", "sdpa")
    cache = MSAStaticCache(config=made.model.config, max_cache_len=12)
    with pytest.raises(ValueError, match=r"room for 12 tokens, but this call may come to 13\. Make it greater"):
        made.model.generate(**QUESTIONS["one"], memory=made.bank, **{CACHE: cache}, **EXACTLY)
    made.model.generate(**QUESTIONS["one"], memory=made.bank, **{CACHE: cache}, max_new_tokens=3)


# Compiled -------------------------------------------------------------------------------------------------------------


def test_compiled_once_for_a_bucket(compiling: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """By `warmup`, without a break in the graph, for all layers alike; other questions, other banks, a commit: nothing
    is compiled again."""
    made, before = setup("qwen3", "sdpa", documents=tokens(*LONG, seed=1), memory_layers=[1, 3]), graphs()
    config = compiling["compile_config"]
    seconds = made.model.warmup(made.bank, [9], max_new_tokens=4, compile_config=config)
    assert list(seconds) == [(1, 9)] and seconds[1, 9] > 0
    assert "warming up" in capsys.readouterr().err
    assert graphs() == before + 4  # a layer with a memory and one without, of the prompt and of a token
    same(made, QUESTIONS["one"], **compiling)
    same(made, batch_of(tokens(12, seed=4)), **compiling)
    store = made.model.open_memory()
    store.add([{"key": str(place), "input_ids": item} for place, item in enumerate(made.documents)])
    same(made, QUESTIONS["one"], memory=store, **compiling)
    store.add([{"key": "more", "input_ids": [9, 9, 9]}])
    store.delete("more")
    same(made, QUESTIONS["one"], memory=store, **compiling)
    assert graphs() == before + 4


def test_layers_of_a_token_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products have one row. Who asks for something else gets it, and other compilers are told nothing."""
    tuned = {"coordinate_descent_tuning": True}
    for mode, also in ((None, {}), ("default", {}), ("max-autotune-no-cudagraphs", {"max_autotune": True})):
        assert options_of_tokens({"mode": mode, "dynamic": None}) == {
            "mode": None,
            "backend": OPERATIONS["token_backend"](),
            "dynamic": None,
            "options": {**tuned, **also},
        }
    given = {"options": {"coordinate_descent_tuning": False, "shape_padding": True}}
    assert options_of_tokens(given)["options"] == given["options"]
    assert options_of_tokens({"backend": "eager", "mode": None}) == {"backend": "eager", "mode": None}
    monkeypatch.setitem(OPERATIONS, "token_backend", lambda: "another")
    assert options_of_tokens({"backend": "inductor", "mode": None})["backend"] == "another"
    assert options_of_tokens({"backend": "eager"})["backend"] == "eager"


def test_warmup_without_a_compiler() -> None:
    made = setup("qwen3", "sdpa", **SMALL)
    plain = made.model.warmup(made.bank, [5, 6], [1, 2], show_progress=False)
    assert list(plain) == [(1, 5), (1, 6), (2, 5), (2, 6)]


@pytest.mark.parametrize(
    "given, kind, said",
    [
        ({"memory": None}, TypeError, "pass a bank"),
        ({"prompt_tokens": 16}, TypeError, "`prompt_tokens` takes whole numbers, as in .16, 32., got 16"),
        ({"prompt_tokens": [8, 0]}, ValueError, "`prompt_tokens` takes numbers from 1, got .8, 0."),
        ({"prompt_tokens": []}, ValueError, "`prompt_tokens` takes numbers from 1"),
        ({"batch_sizes": [1.5]}, TypeError, "`batch_sizes` takes whole numbers"),
        ({"batch_sizes": (-1,)}, ValueError, "`batch_sizes` takes numbers from 1"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` takes numbers from 1"),
    ],
)
def test_warmup_refuses(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    made = setup("qwen3", "sdpa", **SMALL)
    with pytest.raises(kind, match=said):
        made.model.warmup(**{"memory": made.bank, **given})


def test_compiled_batches_and_turns(compiling: dict[str, Any]) -> None:
    """Padded questions, and a cache that is handed on from turn to turn, in which padding left no trace."""
    made, before = setup("qwen3", "sdpa", **SMALL), graphs()
    compiled = {"compile_config": compiling["compile_config"]}
    answers = []
    for options in ({}, compiled):
        kind: Any = MSAStaticCache if options else MSACache
        cache = kind(config=made.model.config, **({"max_cache_len": 64} if options else {}))
        ids, mask = QUESTIONS["padded"].values()
        for more in (torch.empty(2, 0, dtype=torch.long), torch.tensor(tokens(5, 5, seed=9))):
            ids = torch.cat([ids, more], 1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            given = {"input_ids": ids, "attention_mask": mask, "memory": made.bank, CACHE: cache}
            found = made.model.generate(**given, **EXACTLY, **DETAILS, **options)
            ids = found.sequences
            answers.append((ids, torch.stack(found.logits)))
        assert int(cache.get_seq_length()) == ids.shape[1] - 1
    assert graphs() >= before + 4
    for (tokens_, logits), (expected, theirs) in zip(answers[2:], answers[:2], strict=True):
        assert torch.equal(tokens_, expected)
        assert_same(logits, theirs)


def test_more_rows_than_there_is_room_for(compiling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The question runs again as it is, with all rows, and the cache knows nothing of the first run."""
    made = setup("qwen3", "sdpa", documents=tokens(230, 250, seed=1), **SMALL)
    contexts = same(made, QUESTIONS["one"]).contexts
    assert {int(contexts[layer].rows_per_sample) for layer in made.model.config.memory_layers} == {161}
    monkeypatch.setattr(compiled_msa, "MOST_ROWS", LEAST_BUCKET)
    cache = same(made, QUESTIONS["one"], **compiling)
    assert int(cache.get_seq_length()) == 9 + EXACTLY["max_new_tokens"] - 1


def test_a_prefix_that_takes_all_the_room(compiling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup("qwen3", "sdpa", **SMALL)
    monkeypatch.setattr(compiled_msa, "MOST_ROWS", len(PREFIX) - 1)
    same(made, QUESTIONS["one"], **compiling)
    empty = made.model.open_memory()
    compiled, plain = (
        made.model.generate(**QUESTIONS["one"], memory=empty, **EXACTLY, **more) for more in (compiling, {})
    )
    assert torch.equal(compiled, plain)


@pytest.mark.parametrize("how", ["forward", "model"])
def test_a_model_that_its_owner_compiles(how: str) -> None:
    """Whole, as transformers' own examples do: the static cache takes part in the trace."""
    torch.compiler.reset()
    made = setup("qwen3", "sdpa", **SMALL)
    expected = made.model.generate(**QUESTIONS["one"], memory=made.bank, **EXACTLY)
    if how == "forward":
        made.model.forward = torch.compile(made.model.forward, backend="eager")
    else:
        made.model.compile(backend="eager")
    found = made.model.generate(**QUESTIONS["one"], memory=made.bank, cache_implementation="static", **EXACTLY)
    assert torch.equal(found, expected)
    torch.compiler.reset()


def test_compiled_under_autocast(compiling: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Which keeps keys and values in dtypes of its own: not in a cache that was left without it, nor the other way."""
    made = setup("qwen3", "sdpa", **SMALL)
    compiled_msa.logger.parent.propagate = True
    compiled_msa.logger.warning_once.cache_clear()  # another test may have been told
    exact = made.model.generate(**QUESTIONS["one"], memory=made.bank, **EXACTLY)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            expected = made.model.generate(**QUESTIONS["one"], memory=made.bank, **EXACTLY, **DETAILS)
            found = made.model.generate(**QUESTIONS["one"], memory=made.bank, **compiling, **EXACTLY, **DETAILS)
            made.model.generate(**QUESTIONS["one"], memory=made.bank, **compiling, **EXACTLY)  # leaves a cache
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert_same(ours, theirs, 8 * torch.finfo(torch.bfloat16).eps)
        assert torch.equal(made.model.generate(**QUESTIONS["one"], memory=made.bank, **compiling, **EXACTLY), exact)
    assert "Under autocast the first prompt of a cache is not compiled" in caplog.text


def test_what_is_not_compiled_says_so(compiling: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Layers with a window: the answer is the same, and a warning names the reason."""
    made, before = setup("gemma2", "eager"), graphs()
    compiled_msa.logger.parent.propagate = True
    compiled_msa.logger.warning_once.cache_clear()  # another test may have been told
    same(made, QUESTIONS["one"], **compiling)
    assert graphs() == before
    assert "not compiled: its layers with a window" in caplog.text


def test_caches_that_nobody_has_are_used_again(compiling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA graphs look for tensors, there they are; what a caller was given stays the caller's. No other is made
    beside them."""
    made = setup("qwen3", "sdpa", **SMALL)
    answers, spare = [], []
    plain = {"cache_implementation": "static"}  # one size of batch is enough to compile for
    for question in (*QUESTIONS.values(), *QUESTIONS.values()):
        options = compiling if len(question["input_ids"]) == 1 else plain
        answers.append(made.model.generate(**question, memory=made.bank, **options, **EXACTLY))
        spare.append(list(spare_caches_msa._spare[made.model].values())[-1])
    # Other batches; "short" and "one" are alike.
    assert spare[0] is not spare[1] and spare[1] is spare[4] and spare[0] is spare[2] is spare[3]
    for ours, question in zip(answers, (*QUESTIONS.values(), *QUESTIONS.values()), strict=True):
        assert torch.equal(ours, made.model.generate(**question, memory=made.bank, **EXACTLY))
    mine = made.model.generate(**QUESTIONS["one"], memory=made.bank, **compiling, **EXACTLY, **DETAILS)
    kept = cache_of(mine).layers[0].keys.clone()
    monkeypatch.delattr(spare_caches_msa, "static_cache")
    made.model.generate(**QUESTIONS["short"], memory=made.bank, **compiling, **EXACTLY)
    assert torch.equal(cache_of(mine).layers[0].keys, kept)


def test_spare_caches_are_freed_where_a_model_moves() -> None:
    """What a call left before `model.to` is not written to behind it, and keeps no memory."""

    def left() -> list[weakref.ref[MSAStaticCache]]:
        return [weakref.ref(cache) for cache in spare_caches_msa._spare.get(made.model, {}).values()]

    made, options = setup("qwen3", "sdpa", **SMALL), {**EXACTLY, "cache_implementation": "static"}
    made.model.generate(**QUESTIONS["one"], memory=made.bank, **options)
    (first,) = left()
    made.model.to(torch.float32)
    assert left() == [first]
    made.model.to(torch.float64)
    assert not left() and first() is None
    bank = made.model.encode_documents(made.documents, show_progress=False)
    expected = made.model.generate(**QUESTIONS["one"], memory=bank, **EXACTLY)
    assert torch.equal(made.model.generate(**QUESTIONS["one"], memory=bank, **options), expected)
    (second,) = left()
    made.model.model.to("meta")  # not the whole: seen at the next look
    assert not spare_caches_msa.spare_cache(made.model, 1, 16).is_initialized
    assert not left() and second() is None


def test_threads_leave_spare_caches_at_once() -> None:
    """More kinds of them than are kept."""
    model, failed = setup("qwen3", "sdpa", **SMALL).model, list[BaseException]()
    caches = [MSAStaticCache(config=model.config, max_cache_len=16) for _ in range(9)]

    def leave() -> None:
        try:
            for turn in range(4000):
                spare_caches_msa.keep_spare(model, turn % 9, caches[turn % 9])
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=leave) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and len(spare_caches_msa._spare[model]) == spare_caches_msa.MOST_SPARE


# Waiting for the device -----------------------------------------------------------------------------------------------

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class Waits(TorchDispatchMode):
    """Counts what would wait for a device, were the tensors on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["bank", "tiered"])
@torch.no_grad()
def test_no_layer_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many layers wait no more often, where the layout says how many rows are enough."""

    def width_for(layout: Any, chosen: Tensor) -> int:
        return layout.most_rows(chosen.shape[1])

    monkeypatch.setattr(document_rows_msa.ChunkLayout, "width_for", width_for)
    counts = []
    for layers in (2, 4):
        made = setup("qwen3", "sdpa", base={"num_hidden_layers": layers}, memory_layers=list(range(layers)))
        memory = made.bank if kind == "bank" else place_bank(made.bank, tiers=Tiers(*[10**12] * 3))
        expected = made.model(**QUESTIONS["one"], memory=memory)
        with Waits() as waits:
            found = made.model(**QUESTIONS["one"], memory=memory)
        assert_same(found.logits, expected.logits)
        counts.append(sum(waits.found.values()))
    assert counts[0] == counts[1] <= 2  # padding, and transformers' mask: both before the first layer
