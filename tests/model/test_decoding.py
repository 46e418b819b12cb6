"""A loop that launches the next token before it asks for the last one: what transformers' own generates."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model
from setups import PREFIX, batch_of, setup, tokens
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, LogitsProcessor
from transformers.generation import BaseStreamer, LogitsProcessorList, StoppingCriteriaList

from msa_hf.model import decoding_msa
from msa_hf.model.cache_msa import MSAStaticCache
from msa_hf.model.compat_msa import CACHE

BATCHES = {"one": batch_of(tokens(9, seed=3)), "padded": batch_of(tokens(9, 5, 7, seed=3))}
Ways = Callable[[Callable[[], Any]], tuple[Any, Any]]


class Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.pieces.append("end")


class Counted(LogitsProcessor):
    """Counts the calls, and makes the scores depend on their number."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.roll(self.calls, -1)


def noted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The calls of these methods of what asks for the end, as they come."""
    calls = list[str]()

    def note(name: str) -> None:
        method = getattr(decoding_msa.EndAsked, name)

        def call(self: decoding_msa.EndAsked, *given: Any) -> Any:
            calls.append(name)
            return method(self, *given)

        monkeypatch.setattr(decoding_msa.EndAsked, name, call)

    for name in names:
        note(name)
    return calls


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    """What a call gives with transformers' loop and with ours, of which it is known that it ran."""

    def run(call: Callable[[], Any]) -> tuple[Any, Any]:
        looks = noted(monkeypatch, "answer")
        monkeypatch.setattr(decoding_msa, "QUEUED", ())
        theirs = call()
        assert not looks
        monkeypatch.setattr(decoding_msa, "QUEUED", ("cpu",))
        ours = call()
        assert looks
        return ours, theirs

    return run


def ends_of(batch: str, at: int) -> int:
    """A token that the first sample of a batch makes as the `at`-th one, greedily."""
    made = setup("qwen3", "sdpa")
    found = made.model.generate(**BATCHES[batch], memory=made.bank, max_new_tokens=8, do_sample=False)
    return int(found[0, BATCHES[batch]["input_ids"].shape[1] + at])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 8},
        {"max_length": 14},
        {"eos_token_id": 0},
        {"eos_token_id": 4},
        {"eos_token_id": [7], "pad_token_id": None},
        {"eos_token_id": 3, "min_new_tokens": 6, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 3.0, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2, "eos_token_id": list(range(90))},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
    ],
    ids=str,
)
def test_the_same_tokens_and_random_numbers(batch: str, options: dict[str, Any], both_ways: Ways) -> None:
    """Samples end at different times, at once, or never."""
    made = setup("qwen3", "sdpa")
    options = {"max_new_tokens": 8, "pad_token_id": 1, "do_sample": False, **options}
    if "max_length" in options:
        del options["max_new_tokens"]
    if isinstance(end := options.get("eos_token_id"), int):
        options["eos_token_id"] = ends_of(batch, end)

    def call() -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        found = made.model.generate(**BATCHES[batch], memory=made.bank, cache_implementation="static", **options)
        return found, torch.rand(3)

    for ours, theirs in zip(*both_ways(call), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("end", [0, 3, None])
def test_processors_criteria_and_streamers_see_the_same(end: int | None, both_ways: Ways) -> None:
    made = setup("qwen3", "sdpa")

    def call() -> Any:
        seen, streamer, counted = list[list[int]](), Streamed(), Counted()

        def stops(input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
            seen.append(input_ids[0].tolist())
            return torch.full((1,), len(seen) - 1 == end)

        found = made.model.generate(
            **BATCHES["one"],
            memory=made.bank,
            cache_implementation="static",
            max_new_tokens=6,
            do_sample=False,
            logits_processor=LogitsProcessorList([counted]),
            stopping_criteria=StoppingCriteriaList([stops]),
            streamer=streamer,
        )
        return found.tolist(), seen, streamer.pieces, counted.calls

    ours, theirs = both_ways(call)
    assert ours == theirs and len(ours[1]) == (6 if end is None else end + 1)


@pytest.mark.parametrize("how", ["whole history", "new tokens"])
def test_turns_in_a_cache_that_is_given(how: str, both_ways: Ways) -> None:
    """Whose last forward, in vain, leaves nothing behind; no token of the answer is seen twice."""
    made, questions = setup("qwen3", "sdpa"), tokens(7, 5, 6, seed=8)

    def call() -> Any:
        cache = MSAStaticCache(config=made.model.config, max_cache_len=64)
        ids, held = torch.empty(1, 0, dtype=torch.long), []
        for question in questions:
            ids = torch.cat([ids, torch.tensor([question])], 1)
            seen = cache.seen()
            given = ids if how == "whole history" else ids[:, seen:]
            answer = made.model.generate(
                given,
                attention_mask=torch.ones_like(ids),
                memory=made.bank,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=list(range(0, 90)),
                pad_token_id=0,
                **{CACHE: cache},
            )
            ids = torch.cat([ids, answer[:, given.shape[1] :]], 1)
            held.append((cache.seen(), int(cache.get_seq_length())))
        return ids.tolist(), held

    ours, theirs = both_ways(call)
    assert ours == theirs and all(counted == real for counted, real in ours[1])


def test_compiled_runs(both_ways: Ways) -> None:
    torch.compiler.reset()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    made = setup("qwen3", "sdpa", base={"num_hidden_layers": 2}, memory_layers=[1])
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 6, "do_sample": False}
    ours, theirs = both_ways(lambda: made.model.generate(**BATCHES["padded"], memory=made.bank, **options))
    assert torch.equal(ours, theirs)
    torch.compiler.reset()


def test_the_next_forward_is_launched_before_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none behind the last token that there is room for."""
    made, order = setup("qwen3", "sdpa"), noted(monkeypatch, "ask", "answer")
    monkeypatch.setattr(decoding_msa, "QUEUED", ("cpu",))
    handle = made.model.register_forward_pre_hook(lambda *_: order.append("forward"))
    made.model.generate(**BATCHES["one"], memory=made.bank, cache_implementation="static", max_new_tokens=3)
    handle.remove()
    assert order == ["forward", "ask", "forward", "answer", "ask", "forward", "answer", "ask", "answer"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"return_dict_in_generate": True},
        {"prefill_chunk_size": 16},
        {"cache_implementation": None},
        {"custom_generate": lambda model, input_ids, **kwargs: input_ids},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_transformers_does_by_itself(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup("qwen3", "sdpa", prefix_token_ids=PREFIX)
    monkeypatch.setattr(decoding_msa, "QUEUED", ("cpu",))
    monkeypatch.delattr(decoding_msa, "EndAsked")
    given = {"cache_implementation": "static", "max_new_tokens": 3, "do_sample": False, **options}
    made.model.generate(**BATCHES["one"], memory=made.bank, **given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which works while the host goes on")
@pytest.mark.parametrize("end", [0, 3, None])
def test_recorded_on_a_gpu(end: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also streamed: the tokens of a growing cache by the loop of transformers."""
    made = setup("qwen3", "sdpa", base={"num_hidden_layers": 2}, memory_layers=[1])
    model = copy.deepcopy(made.model).cuda()
    bank = model.encode_documents(made.documents, show_progress=False)
    question = {name: item.cuda() for name, item in BATCHES["padded"].items()}
    options: dict[str, Any] = {"memory": bank, "do_sample": False, "pad_token_id": 1}
    plain = model.generate(**question, **options, max_new_tokens=12)
    if end is not None:
        options["eos_token_id"] = plain[:, question["input_ids"].shape[1] + end].tolist()
    expected = model.generate(**question, **options, max_new_tokens=12)
    looks = noted(monkeypatch, "answer")
    for _ in range(4):  # compiled, recorded, played
        streamer = Streamed()
        found = model.generate(**question, **options, max_new_tokens=12, cache_implementation="static")
        assert torch.equal(found, expected) and looks
        one = {name: item[:1] for name, item in question.items()}
        alone = model.generate(**one, **options, max_new_tokens=12, cache_implementation="static", streamer=streamer)
        pieces = [token for piece in streamer.pieces[1:-1] for token in piece]
        assert pieces == alone[0, one["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("how", ["keyword", "configuration", "the model's own", "beside another criterion"])
def test_texts_that_end_an_answer(how: str, both_ways: Ways) -> None:
    """For which transformers needs a tokenizer."""
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT).eval()
    bank = model.encode_documents(TEXTS[:4], tokenizer, show_progress=False)
    ids = tokenizer(["How far is the amber?"], return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"memory": bank, "cache_implementation": "static", "do_sample": False, "pad_token_id": 0}
    whole = model.generate(ids, **options, max_new_tokens=12)[0, ids.shape[1] :]
    stop = tokenizer.decode(whole[5:7])
    assert stop and len(whole) == 12

    def call() -> Tensor:
        if how == "configuration":
            plain = {name: value for name, value in options.items() if name != "memory"}
            config = GenerationConfig(**plain, max_new_tokens=12, stop_strings=[stop])
            return model.generate(ids, config, memory=bank, tokenizer=tokenizer)
        if how == "the model's own":
            model.generation_config.stop_strings = [stop]
            return model.generate(ids, **options, max_new_tokens=12, tokenizer=tokenizer)
        more: dict[str, Any] = {}
        if how != "keyword":
            more = {"stopping_criteria": [lambda input_ids, scores, **_: input_ids[:, -1] == whole[1]]}
        return model.generate(ids, **options, **more, max_new_tokens=12, stop_strings=stop, tokenizer=tokenizer)

    ours, theirs = both_ways(call)
    assert torch.equal(ours, theirs) and ours.shape[1] < ids.shape[1] + 12
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, **options, max_new_tokens=12, stop_strings=stop)
