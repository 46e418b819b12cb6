"""Runs that are recorded and played again: the answers of runs that are not, whatever changes between them."""

import contextlib
import copy
import gc
import random
import sys
import weakref
from typing import Any

import pytest
import torch
from plain_tape import PlainTape, recorded, use_tapes
from setups import PREFIX, Setup, assert_same, batch_of, setup, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from msa_hf.bank import place_bank
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.bank.tiered.layer import TieredLayer
from msa_hf.model import compiled_msa, inference_msa, prompt_buckets_msa, recording_msa, spare_caches_msa
from msa_hf.model.cache_msa import MSACache, MSAStaticCache
from msa_hf.model.compat_msa import CACHE
from msa_hf.model.dense_layer_msa import DenseLayer

SMALL: dict[str, Any] = {"base": {"num_hidden_layers": 3}, "memory_layers": [1, 2]}
EXACTLY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
DETAILS: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[PlainTape]:
    """The tapes in use: runs of `generate` with a static cache are recorded on the CPU."""
    return use_tapes(monkeypatch)


def ask(made: Any, question: Any, memory: Any = None, **options: Any) -> None:
    """A question whose answer, tokens and logits, is that of a growing cache."""
    memory = made.bank if memory is None else memory
    given = {**question, **EXACTLY, **DETAILS, "memory": memory}
    expected = made.model.generate(**given)
    found = made.model.generate(**given, **recorded(), **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert_same(ours, theirs)


def test_answers_are_those_of_runs_that_are_not_recorded(tapes: list[PlainTape]) -> None:
    """Other questions of a bucket, other banks, a commit, another batch: the fourth question on is played."""
    made = setup("qwen3", "sdpa", **SMALL)
    other = made.model.encode_documents(tokens(70, 9, 130, 4, 66, seed=5), show_progress=False)
    plain = [batch_of(tokens(length, seed=length)) for length in (9, 12, 5, 16)]
    for question in plain:
        expected = made.model.generate(**question, memory=made.bank, **EXACTLY)
        assert torch.equal(made.model.generate(**question, memory=made.bank, **EXACTLY, **recorded()), expected)
    tape, between = tapes
    assert tape.parts == 1 + 3 + 1  # a token; a prompt, cut at its memory layers; contexts
    assert between.parts == 2  # how the layers are asked, which is played within the prompt
    (cache,) = spare_caches_msa._spare[made.model].values()
    assert len(cache.recordings.known) == 3
    store = made.model.open_memory()
    store.add([{"key": str(place), "input_ids": item} for place, item in enumerate(made.documents)])
    for memory in (other, store):
        for question in plain[:2]:
            expected = made.model.generate(**question, memory=memory, **EXACTLY)
            assert torch.equal(made.model.generate(**question, memory=memory, **EXACTLY, **recorded()), expected)
        store.delete("0")
    assert list(spare_caches_msa._spare[made.model].values()) == [cache]


@pytest.mark.parametrize("kind", ["bank", "tiered", "store"])
def test_a_memory_that_stays_is_recorded_too(
    kind: str, tapes: list[PlainTape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third question on asks it without Python; another memory, or a commit, is asked anew."""
    made = setup("qwen3", "sdpa", **SMALL)
    memory: Any = made.bank
    other: Any = made.model.encode_documents(tokens(*map(len, made.documents), seed=6), show_progress=False)
    if kind == "tiered":
        memory, other = (place_bank(bank, tiers=Tiers(*[10**12] * 3)) for bank in (memory, other))
    elif kind == "store":
        memory = made.model.open_memory()
        memory.add([{"key": str(place), "input_ids": item} for place, item in enumerate(made.documents)])
    gathered: list[int] = []
    layer = TieredLayer if kind == "tiered" else DenseLayer
    gather = layer.gather

    def counted(self: Any, *args: Any) -> Any:
        gathered.append(1)
        return gather(self, *args)

    monkeypatch.setattr(layer, "gather", counted)

    def asks(memory: Any, seed: int) -> int:
        question = batch_of(tokens(9, seed=seed))
        expected = made.model.generate(**question, memory=memory, **EXACTLY)
        gathered.clear()
        assert torch.equal(made.model.generate(**question, memory=memory, **EXACTLY, **recorded()), expected)
        return len(gathered)

    assert [asks(memory, seed) for seed in range(5)] == [2, 2, 2, 0, 0]
    assert [asks(other, seed) for seed in range(3)] == [2, 2, 0]
    assert [asks(memory, seed) for seed in range(3)] == [2, 2, 0]
    if kind == "store":
        memory.delete("2")
        memory.add([{"key": "more", "input_ids": [9, 9, 9]}])
        assert [asks(memory, seed) for seed in range(3)] == [2, 2, 0]


def test_a_memory_is_asked_in_memory_apart(tapes: list[PlainTape]) -> None:
    """In that of the parts around it, it would overwrite what the next part is to find: what an H200 met as NaN."""
    made = setup("qwen3", "sdpa", **SMALL)
    questions = [{**batch_of(tokens(9, seed=seed)), "memory": made.bank, **EXACTLY} for seed in range(4)]
    for question in questions[:2]:
        made.model.generate(**question, **recorded())
    run, between = tapes
    assert run.blocks and not between.blocks
    between.blocks = run.blocks
    with pytest.raises(ValueError, match="are NaN"):
        for question in questions[2:]:
            made.model.generate(**question, **recorded())


def test_turns_of_one_cache(tapes: list[PlainTape]) -> None:
    """Later turns choose anew or keep what they have; every kind of run is played in the end."""
    made, answers = setup("qwen3", "sdpa", **SMALL), []
    for make, options in ((MSACache, {}), (MSAStaticCache, {"compile_config": recorded()["compile_config"]})):
        kind = {} if make is MSACache else {"max_cache_len": 128}
        cache, ids = make(config=made.model.config, **kind), torch.empty(1, 0, dtype=torch.long)
        for turn, question in enumerate(tokens(7, 5, 9, 3, 8, 6, seed=8)):
            ids = torch.cat([ids, torch.tensor([question])], 1)
            memory = None if turn == 3 else made.bank
            ids = made.model.generate(ids, memory=memory, **{CACHE: cache}, **EXACTLY, **options)
        answers.append(ids)
    assert torch.equal(*answers)
    assert [tape.parts for tape in tapes] == [5, 2]  # a token, a prompt cut twice, contexts; two memory layers
    assert not copy.deepcopy(cache).recordings.known


@pytest.mark.parametrize("samples", [1, 2])
def test_turns_that_choose_nothing(tapes: list[PlainTape], samples: int) -> None:
    """Texts behind a prompt keep its documents: one run for all of a bucket, up to the last place of the cache."""
    made, room = setup("qwen3", "sdpa", **SMALL), 256
    pick, logits = random.Random(samples), []
    lengths = [9, *(pick.choice([1, 2, 15, 16, 17, 31]) for _ in range(9)), 3]
    lengths += [room - sum(lengths)]
    for cache in (MSACache(config=made.model.config), MSAStaticCache(config=made.model.config, max_cache_len=room)):
        found, seen = [], torch.zeros(samples, 0, dtype=torch.long)
        with torch.no_grad(), compiled_msa.compiling(made.model, recorded()["compile_config"]):
            for turn, length in enumerate(lengths):
                batch = batch_of(tokens(*([length, max(length // 2, 1)][:samples]), seed=turn))
                seen = torch.cat([seen, batch["attention_mask"]], 1)
                asked = {"memory": None if turn else made.bank, "logits_to_keep": turn % 3, CACHE: cache}
                found.append(made.model(batch["input_ids"], attention_mask=seen, **asked).logits)
        assert int(cache.get_seq_length()) == room
        logits.append(found)
    for ours, theirs in zip(*logits, strict=True):
        assert_same(ours, theirs)
    assert not isinstance(cache, MSACache) and {kind[0][3] for kind in cache.recordings.known} == {"turn"}


def test_padding_and_samples(tapes: list[PlainTape]) -> None:
    """Questions of several lengths at once, which then change places."""
    made = setup("qwen3", "eager", **SMALL)
    for seed in range(4):
        ask(made, batch_of(tokens(9, 5, seed=seed)))
    question, moved = batch_of(tokens(9, 5, seed=9)), torch.tensor([1, 0])
    cache = MSAStaticCache(config=made.model.config, max_cache_len=64)
    given = {**question, "memory": made.bank, **{CACHE: cache}}
    first = made.model.generate(**given, **EXACTLY, compile_config=recorded()["compile_config"])
    cache.reorder_cache(moved)  # its tensors lie elsewhere now, and tokens go on from there
    mask = torch.cat([question["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)[moved]
    more = {"attention_mask": mask, **EXACTLY, "compile_config": recorded()["compile_config"]}
    found = made.model.generate(first[moved], **{CACHE: cache}, **more)
    expected = made.model.generate(**question, memory=made.bank, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert torch.equal(found[moved], expected)


def test_more_rows_than_there_is_room_for(tapes: list[PlainTape], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is played and then runs again as it is leaves the contexts of the turn before."""
    made = setup("qwen3", "sdpa", documents=tokens(230, 250, 9, 7, seed=1), **SMALL)
    monkeypatch.setattr(compiled_msa, "MOST_ROWS", 64)
    found = []
    for options in ({}, recorded()):
        for seed in range(4):
            question = batch_of(tokens(9, seed=seed))
            answer = made.model.generate(**question, memory=made.bank, **EXACTLY, **options)
            found.append(answer)
    for ours, theirs in zip(found[4:], found[:4], strict=True):
        assert torch.equal(ours, theirs)


def test_more_rows_than_in_the_turn_before(tapes: list[PlainTape], monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that runs again finds the contexts of before; a sample that does not route goes on with its own."""
    made, found, run = setup("qwen3", "sdpa", **SMALL), [], compiled_msa.CompiledRuns.run_prompt
    first, second = (torch.tensor(tokens(length, length, seed=length)) for length in (7, 5))
    seen, routes = torch.ones(2, 12, dtype=torch.long), torch.tensor([[True], [False]]).expand(2, 5)

    def runs_again(self: Any, model: Any, memory: Any, asked: Any, contexts: Any, cache: Any, *args: Any) -> None:
        before = copy.deepcopy(cache.contexts)
        assert run(self, model, memory, asked, contexts, cache, *args) is None
        for layer, context in before.items():
            assert torch.equal(cache.contexts[layer].keys, context.keys)

    for make in (MSACache, MSAStaticCache):
        kind = {} if make is MSACache else {"max_cache_len": 64}
        given = {"memory": made.bank, "use_cache": True, **{CACHE: make(config=made.model.config, **kind)}}
        with (
            torch.no_grad(),
            compiled_msa.compiling(made.model, recorded()["compile_config"]),
            monkeypatch.context() as few,
        ):
            made.model(first, **given)
            few.setattr(compiled_msa, "MOST_ROWS", len(PREFIX) + 1)
            few.setattr(compiled_msa.CompiledRuns, "run_prompt", runs_again)
            found.append(made.model(second, attention_mask=seen, routing_mask=routes, **given).logits)
    assert_same(*found)


def test_weights_are_looked_at_behind_all_launches(tapes: list[PlainTape], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the device works. A model that changed is refused, and its cache is as new."""
    made, events = setup("qwen3", "sdpa", **SMALL), list[str]()
    monkeypatch.setattr(inference_msa, "works_beside_the_host", lambda device: True)
    play, check = recording_msa.Recording.play, inference_msa.MemoryMixin._check_bank
    monkeypatch.setattr(recording_msa.Recording, "play", lambda self: events.append("play") or play(self))
    monkeypatch.setattr(
        inference_msa.MemoryMixin, "_check_bank", lambda self, bank: events.append("check") or check(self, bank)
    )
    question, cache = batch_of(tokens(9, seed=3)), MSAStaticCache(config=made.model.config, max_cache_len=64)
    given = {**question, "memory": made.bank, "use_cache": True, **{CACHE: cache}}
    expected = made.model(**question, memory=made.bank).logits

    def asks() -> Any:
        cache.reset()
        events.clear()
        with torch.no_grad(), compiled_msa.compiling(made.model, recorded()["compile_config"]):
            return made.model(**given).logits

    for _ in range(4):
        assert_same(asks(), expected)
    assert events == ["play", "play", "check"]  # a prompt, its contexts
    weight = made.model.model.layers[0].mlp.down_proj.weight.data  # past the counters
    weight.mul_(2.0)
    with pytest.raises(ValueError, match="parameters have other values"):
        asks()
    assert events == ["play", "play", "check"] and not cache.contexts and cache.seen() == 0
    weight.div_(2.0)
    assert_same(asks(), expected)


def test_a_prompt_is_cut_without_waiting(tapes: list[PlainTape]) -> None:
    """Behind what a static cache holds, whose length is on the device, where transformers asks for it."""
    made, waiting = setup("qwen3", "sdpa", **SMALL), list[str]()

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            frame = sys._getframe() if "_local_scalar_dense" in str(func) else None
            while frame is not None:
                waiting.append(frame.f_code.co_name)
                frame = frame.f_back
            return func(*args, **(kwargs or {}))

    cache = MSAStaticCache(config=made.model.config, max_cache_len=64)
    given = {"memory": made.bank, **{CACHE: cache}, **EXACTLY, "compile_config": recorded()["compile_config"]}
    answer = made.model.generate(**batch_of(tokens(9, seed=3)), **given)
    with Waits():
        made.model.generate(torch.cat([answer, torch.tensor(tokens(4))], 1), **given)
    assert "generate" in waiting and "prepare_inputs_for_generation" not in waiting


def test_weights_that_change(tapes: list[PlainTape]) -> None:
    """In place they are seen; in other places, or with another attention, all is recorded anew."""
    made = setup("qwen3", "sdpa", **SMALL)
    question = batch_of(tokens(9, seed=3))

    def both() -> None:
        expected = made.model.generate(**question, memory=bank, **EXACTLY)
        assert torch.equal(made.model.generate(**question, memory=bank, **EXACTLY, **recorded()), expected)

    bank = made.bank
    for _ in range(4):
        both()
    tape, weight = tapes[0], made.model.model.layers[0].mlp.down_proj
    before, parts = weight.weight.data, tape.parts
    try:
        weight.weight.data = before * -3
        bank = made.model.encode_documents(made.documents, show_progress=False)
        both()
        assert tape.parts == parts + 1  # the token, from its second on
        weight.weight.data.mul_(0.5)
        bank = made.model.encode_documents(made.documents, show_progress=False)
        both()
        made.model.set_attn_implementation("eager")
        both()
        (cache,) = spare_caches_msa._spare[made.model].values()
        assert len(cache.recordings.known) == 1  # the token
    finally:
        weight.weight.data = before


@pytest.mark.parametrize("failures", [1, 9])
def test_what_cannot_be_recorded(
    failures: int, tapes: list[PlainTape], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails while it is recorded is repeated as it is, and tried once more: it may have compiled something.
    Then it says so, and is not tried again."""
    made = setup("qwen3", "sdpa", **SMALL)
    recording_msa.logger.parent.propagate = True
    monkeypatch.setattr(recording_msa.logger, "warning_once", recording_msa.logger.warning)
    forward, calls = made.model.model.layers[2].mlp.forward, []

    def refuses(*args: Any) -> Any:
        if tapes and tapes[0].part is not None and len(calls) < failures:
            calls.append(True)
            raise RuntimeError("this waits for the device")
        return forward(*args)

    made.model.model.layers[2].mlp.forward = refuses
    try:
        for seed in range(5):
            question = batch_of(tokens(9, seed=seed))
            expected = made.model.generate(**question, memory=made.bank, **EXACTLY)
            assert torch.equal(made.model.generate(**question, memory=made.bank, **EXACTLY, **recorded()), expected)
    finally:
        del made.model.model.layers[2].mlp.forward
    (cache,) = spare_caches_msa._spare[made.model].values()
    places, known = len(cache.recordings.places), len(cache.recordings.known)
    if failures == 1:
        assert len(calls) == 1 and known >= 2 and "this waits for the device" not in caplog.text
    else:
        assert len(calls) == 4 and known == 0 and "this waits for the device" in caplog.text
        assert places == 2  # a prompt and a token, however many questions come


def test_an_error_of_the_memory_is_raised_at_once(tapes: list[PlainTape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for one of recording, whose run would be repeated; the next question is answered."""
    made, gather, asked = setup("qwen3", "sdpa", **SMALL), DenseLayer.gather, list[int]()

    def fails_once(self: Any, *args: Any) -> Any:
        asked.append(1)
        if len(asked) == 4:  # the second layer, while the second question is recorded
            raise RuntimeError("process 1 is gone")
        return gather(self, *args)

    questions = [{**batch_of(tokens(9, seed=seed)), **EXACTLY, "memory": made.bank} for seed in range(4)]
    expected = [made.model.generate(**question) for question in questions]
    monkeypatch.setattr(DenseLayer, "gather", fails_once)
    for place, question in enumerate(questions):
        if place == 1:
            with pytest.raises(RuntimeError, match="process 1 is gone"):
                made.model.generate(**question, **recorded())
            assert len(asked) == 4
        assert torch.equal(made.model.generate(**question, **recorded()), expected[place])


def test_prompts_of_any_length_leave_nothing(tapes: list[PlainTape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are padded to no bucket are not recorded, or there would be a recording for each length."""
    made = setup("qwen3", "sdpa", **SMALL)
    monkeypatch.setattr(prompt_buckets_msa, "MOST_PROMPT", 16)
    for length in (17, 18, 17, 18, 17):
        question = {**batch_of(tokens(length, seed=length)), "memory": made.bank}
        answer = made.model.generate(**question, **EXACTLY, **recorded())
        assert torch.equal(answer, made.model.generate(**question, **EXACTLY))
    (cache,) = spare_caches_msa._spare[made.model].values()
    assert len(cache.recordings.places) == len(cache.recordings.known) == 1  # a token


def test_what_is_recorded_goes_with_its_cache(tapes: list[PlainTape]) -> None:
    """At once, though a recorded run and its cache hold each other; and it does not keep the model."""
    made = setup("qwen3", "sdpa", **SMALL)

    def answers(made: Setup) -> weakref.ref[MSAStaticCache]:
        for seed in range(3):
            made.model.generate(**batch_of(tokens(9, seed=seed)), memory=made.bank, **EXACTLY, **recorded())
        (cache,) = spare_caches_msa._spare[made.model].values()
        assert cache.recordings.known
        return weakref.ref(cache)

    kept, collects = answers(made), gc.isenabled()
    gc.disable()
    try:
        made.model.free_spare_caches()
        assert kept() is None
    finally:
        if collects:
            gc.enable()
    answers(made)
    model = weakref.ref(made.model)
    del made
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "default"])
def test_runs_are_recorded_unless_a_mode_says_otherwise(tapes: list[PlainTape], mode: str | None) -> None:
    made = setup("qwen3", "sdpa", **SMALL)
    config = None if mode is None else CompileConfig(mode=mode)
    runs = compiled_msa.compiled_runs(made.model, compiled_msa.options_of(config))
    assert runs.recorded == (mode != "default")


class OneUsePools:
    """Stands for CUDA graphs in PyTorch's pools of memory: one whose last graph is gone takes no more."""

    def __init__(self) -> None:
        self.made, self.graphs, self.cleared = 0, dict[int, int](), 0

    def handle(self) -> int:
        self.made += 1
        return self.made

    def graph(self) -> Any:
        pools = self

        class Graph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                if not pools.graphs.get(pool, 1):
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                pools.graphs[pool] = pools.graphs.get(pool, 0) + 1
                weakref.finalize(self, self.leave, pool)

            @staticmethod
            def leave(pool: int) -> None:
                pools.graphs[pool] -= 1

            def capture_end(self) -> None: ...

            def replay(self) -> None: ...

        return Graph()

    def clear(self) -> None:
        self.cleared += 1


def test_a_pool_whose_graphs_are_gone_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that moved, of which nothing recorded is left, is recorded again."""
    pools, places, found = OneUsePools(), ["here"], torch.ones(2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", pools.handle)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", pools.graph)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", pools.clear, raising=False)
    tape = recording_msa.CudaTape(torch.device("cpu"))
    monkeypatch.setattr(tape, "running", contextlib.nullcontext)
    asked = recording_msa.HostCall(tape, lambda: [found], lambda: places[0])
    for place in ("here", "there"):
        places[0] = place
        for _ in range(3):
            asked()
        assert asked.step is not None and asked.step != asked._run  # played, not called
    assert pools.graphs == {2: 0, 3: 1} and pools.cleared == 4  # around each of two recordings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_of_a_gpu() -> None:
    """Compiled layers in CUDA graphs: other questions, another bank, a commit, weights that change in place."""
    made = setup("qwen3", "sdpa", **SMALL)
    model = copy.deepcopy(made.model).cuda()
    documents = tokens(70, 9, 130, 4, 66, seed=5)
    store = model.open_memory()
    store.add([{"key": str(place), "input_ids": item} for place, item in enumerate(documents)])
    other = model.encode_documents(documents[1:], show_progress=False)
    for turn, memory in enumerate((store, store, store, other, store, store)):
        if turn == 4:
            store.delete("0")
        for seed in range(2):
            question = {name: item.cuda() for name, item in batch_of(tokens(9 + turn, seed=seed)).items()}
            given = {**question, "memory": memory, **EXACTLY, **DETAILS}
            expected = model.generate(**given)
            found = model.generate(**given, **recorded())
            plain = model.generate(**{**given, "return_dict_in_generate": False}, **recorded())
            assert torch.equal(found.sequences, expected.sequences) and torch.equal(plain, expected.sequences)
            for ours, theirs in zip(found.logits, expected.logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    recordings = [cache.recordings for cache in spare_caches_msa._spare[model].values()]
    assert sum(len(item.known) for item in recordings) >= 3 and not any(item.failures for item in recordings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_failed_recording_of_a_gpu_leaves_nothing() -> None:
    """Neither random numbers nor memory are of the part that failed, and the next part is recorded."""
    tape, numbers = recording_msa.tape_for(torch.device("cuda:0")), torch.ones(8, device="cuda")
    assert tape is not None
    for fails in (True, True, False):
        recording = recording_msa.Recording(tape, tape)

        def run(fails: bool = fails) -> torch.Tensor:
            found = numbers * 2
            if fails:
                found.sum().item()  # waits, which no graph holds
            return found

        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            found = recording.record(run)
        assert torch.randint(3, 9, (100,), device="cuda").float().mean() > 3
        held = torch.cuda.memory_reserved()
        for _ in range(20):
            torch.empty(1 << 24, device="cuda")
        assert torch.cuda.memory_reserved() <= held + (1 << 27)
    numbers += 1
    recording.play()
    assert found.tolist() == [4.0] * 8


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_compiled_anew_where_a_run_is_recorded(autocast: bool, tapes: list[PlainTape]) -> None:
    """All that torch.compile guards of a process is as in the run before, which compiled: a GPU cannot record that."""
    made = setup("qwen3", "sdpa", **SMALL)
    guards: dict[torch.Size, Any] = {}  # of runs of a kind

    def guarded(layer: object, given: tuple[torch.Tensor, ...]) -> None:
        guard = guards.setdefault(given[0].shape, torch._C._dynamo.guards.GlobalStateGuard())
        assert guard.check(), guard.reason()

    hook = made.model.model.layers[0].register_forward_pre_hook(guarded)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for seed in range(4):
            given = {**batch_of(tokens(9, seed=seed)), **EXACTLY, "memory": made.bank, "max_new_tokens": 3}
            made.model.generate(**{**given, "min_new_tokens": 3}, **recorded())
    hook.remove()
    assert tapes[0].parts and len(guards) == 2 + autocast  # under which the first prompt is not padded


def test_weights_that_autocast_has_cast(tapes: list[PlainTape]) -> None:
    """A recording casts them itself: what autocast keeps of a weight is gone, or old, when it is played."""
    made = setup("qwen3", "sdpa", **SMALL)
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    for _ in range(3):
        made.bank = made.model.encode_documents(made.documents, show_progress=False)
        with torch.autocast("cpu", torch.bfloat16):
            for seed in range(5):
                given = {**batch_of(tokens(9, seed=seed)), **EXACTLY, "memory": made.bank, "max_new_tokens": 1}
                given["min_new_tokens"] = 1
                logits: list[torch.Tensor] = []
                for options in ({}, recorded()):
                    seen: list[torch.Tensor] = []
                    hook = made.model.register_forward_hook(
                        lambda _, args, output, seen=seen: seen.append(output.logits)
                    )
                    made.model.generate(**given, **options)
                    hook.remove()
                    logits += seen
                assert_same(logits[1], logits[0], tolerance)
        with torch.no_grad():
            made.model.lm_head.weight.mul_(2)
