"""generate() with a memory, and the cache it leaves: equal to recomputation, to each sample alone, and to the
definition, over turns, beams and pieces, without copying the memory at every token."""

import copy
from typing import Any

import pytest
import torch
from reference import Reference
from setups import (
    BACKENDS,
    FAMILIES_ONCE,
    FEW,
    Setup,
    assert_same,
    batch_of,
    covered,
    differ,
    samples_of,
    setup,
    tokens,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, TextStreamer

from msa_hf import MSACache, MSAForCausalLM

QUESTIONS = tokens(9, 2, 5, seed=12)
ROUTES = [[False] + [True] * 6 + [False] * 2, [True, False], [False, True, True, False, False]]
STEPS = 5
EXACTLY = {"min_new_tokens": STEPS, "max_new_tokens": STEPS, "do_sample": False}

backends = pytest.mark.parametrize("family, attention", BACKENDS)
families = pytest.mark.parametrize("family, attention", FAMILIES_ONCE)
few = pytest.mark.parametrize("family, attention", FEW)


def batch() -> dict[str, Tensor]:
    return batch_of(QUESTIONS, ROUTES)


def generate(made: Setup, inputs: dict[str, Tensor], **options: Any) -> Any:
    return made.model.generate(**inputs, **{"memory": made.bank, **EXACTLY, **options})


def extend(mask: Tensor, width: int, value: int = 1) -> Tensor:
    return torch.nn.functional.pad(mask, (0, width), value=value)


@torch.no_grad()
def recomputed(made: Setup, inputs: dict[str, Tensor], steps: int = STEPS) -> Tensor:
    """Greedy tokens by running the model anew on the growing input at every step; only the prompt routes."""
    inputs = dict(inputs)
    for _ in range(steps):
        logits = made.model(**inputs, memory=made.bank, use_cache=False).logits[:, -1]
        logits[:, made.model.config.eos_token_id] = float("-inf")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1)[:, None]], 1)
        inputs["attention_mask"] = extend(inputs["attention_mask"], 1)
        inputs["routing_mask"] = extend(inputs["routing_mask"], 1, 0)
    return inputs["input_ids"]


# Greedy ---------------------------------------------------------------------------------------------------------------


@backends
def test_greedy_equals_recomputation(family, attention) -> None:
    """A left-padded batch: with a cache, without one, a loop over the growing input, and each sample alone agree."""
    made, inputs = setup(family, attention), batch()
    found = generate(made, inputs)
    assert torch.equal(found, generate(made, inputs, use_cache=False))
    assert torch.equal(found, recomputed(made, inputs))
    for sample, (question, routes) in enumerate(zip(QUESTIONS, ROUTES, strict=True)):
        alone = generate(made, batch_of([question], [routes]))
        assert torch.equal(alone[0, -STEPS:], found[sample, -STEPS:])
    assert len({tuple(row) for row in found[:, -STEPS:].tolist()}) > 1


@few
def test_logits_of_every_step_follow_the_definition(family, attention) -> None:
    """The scores that generate() returns are those of a conversation computed naively."""
    made, inputs = setup(family, attention), batch()
    found = generate(made, inputs, return_dict_in_generate=True, output_logits=True, output_scores=True)
    assert len(found.scores) == len(found.logits) == STEPS and found.scores[0].shape == (3, 128)
    assert isinstance(found.past_key_values, MSACache)
    for sample, (question, routes) in enumerate(zip(QUESTIONS, ROUTES, strict=True)):
        made.reference.start()
        turn = made.reference.turn(question, routes)
        for step in range(STEPS):
            assert_same(found.logits[step][sample], turn.logits[-1])
            turn = made.reference.turn(found.sequences[sample, inputs["input_ids"].shape[1] + step][None].tolist())


@few
def test_the_memory_matters_for_what_is_generated(family, attention) -> None:
    """Other documents give other logits at the last step: they are still attended to there."""
    made, inputs = setup(family, attention), batch()
    options = {"return_dict_in_generate": True, "output_logits": True}
    found = generate(made, inputs, **options)
    other = generate(made, inputs, **options, force_documents=torch.full((3, 1), -1))
    assert differ(found.logits[0], other.logits[0]) > 1e-3
    # Over the same generated tokens, so that only the memory can tell the last steps apart.
    ids = found.sequences
    with torch.no_grad():
        full = {"input_ids": ids, "attention_mask": extend(inputs["attention_mask"], STEPS), "memory": made.bank}
        mask = extend(inputs["routing_mask"], STEPS, 0)
        last = made.model(**full, routing_mask=mask).logits[:, -1]
        assert differ(last, made.model(**full, routing_mask=torch.zeros_like(mask)).logits[:, -1]) > 1e-3


def test_stopping_at_the_end_token() -> None:
    """Samples stop at their own end and are padded; the others go on as they would alone."""
    made, inputs = setup(), batch()
    free = generate(made, inputs)
    end = int(free[0, inputs["input_ids"].shape[1] + 1])
    options = {"min_new_tokens": None, "eos_token_id": end, "pad_token_id": 0}
    found = generate(made, inputs, **options)
    for sample, (question, routes) in enumerate(zip(QUESTIONS, ROUTES, strict=True)):
        alone = generate(made, batch_of([question], [routes]), **options)[0, len(question) :].tolist()
        row = found[sample, inputs["input_ids"].shape[1] :].tolist()
        assert row[: len(alone)] == alone and not any(row[len(alone) :])
    assert (found[0, inputs["input_ids"].shape[1] + 2 :] == 0).all()


def test_the_default_masks() -> None:
    """Without masks, padding is told by its id, and all other tokens of the prompt route."""
    made, inputs = setup(), batch_of(QUESTIONS)
    everything = {**inputs, "routing_mask": inputs["attention_mask"].bool()}
    expected = generate(made, everything)
    assert torch.equal(generate(made, inputs), expected)
    assert torch.equal(generate(made, {"input_ids": inputs["input_ids"]}), expected)
    assert torch.equal(made.model.generate(inputs["input_ids"], memory=made.bank, **EXACTLY), expected)


@few
def test_prompts_given_as_embeddings(family, attention) -> None:
    """`inputs_embeds` of the prompt generate the same tokens."""
    made, inputs = setup(family, attention), batch()
    embeds = made.model.get_input_embeddings()(inputs["input_ids"]).detach()
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    found = generate(made, others, inputs_embeds=embeds)
    assert torch.equal(found, generate(made, inputs)[:, -STEPS:])
    plain = {**EXACTLY, "inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(made.model.generate(**plain), made.base.generate(**plain))


@few
def test_forced_documents_are_kept_while_generating(family, attention) -> None:
    """Forcing the routed documents of a one-layer memory generates the same; others generate something else."""
    made, inputs = setup(family, attention, memory_layers=[3]), batch()
    with torch.no_grad():
        routed = made.model(**inputs, memory=made.bank).routing[3].documents
    options = {"return_dict_in_generate": True, "output_logits": True}
    found = generate(made, inputs, **options)
    forced = generate(made, inputs, **options, force_documents=routed)
    assert torch.equal(forced.sequences, found.sequences)
    others = torch.tensor([[item for item in range(5) if item not in row][:2] for row in routed.tolist()])
    other = generate(made, inputs, **options, force_documents=others)
    assert differ(other.logits[0], found.logits[0]) > 1e-4
    cached = generate(made, inputs, **options, force_documents=others, use_cache=False)
    assert torch.equal(other.sequences, cached.sequences)


@few
def test_several_tokens_at_once_equal_one_by_one(family, attention) -> None:
    """Decoding is causal in blocks of any size, in a left-padded batch."""
    made, inputs = setup(family, attention), batch()
    new = torch.tensor(tokens(6, 6, 6, seed=5))
    logits = {}
    with torch.no_grad():
        for width in (1, 2, 6):
            cache, mask = made.model(**inputs, memory=made.bank).past_key_values, inputs["attention_mask"]
            parts = []
            for part in new.split(width, 1):
                mask = extend(mask, width)
                parts.append(made.model(part, attention_mask=mask, past_key_values=cache).logits)
            logits[width] = torch.cat(parts, 1)
    assert_same(logits[2], logits[1])
    assert_same(logits[6], logits[1])


# Beams and sampling ---------------------------------------------------------------------------------------------------


@few
def test_beams_equal_recomputation(family, attention) -> None:
    """Three beams with a cache and without one; in a batch and alone; the best beam is no worse than greedy."""
    made, inputs = setup(family, attention), batch()
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2}
    found, other = (generate(made, inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert found.sequences.shape[0] == 6
    assert torch.equal(found.sequences, other.sequences)
    assert_same(found.sequences_scores, other.sequences_scores)
    for sample, (question, routes) in enumerate(zip(QUESTIONS, ROUTES, strict=True)):
        alone = generate(made, batch_of([question], [routes]), **options)
        assert torch.equal(alone.sequences[:, -STEPS:], found.sequences[2 * sample : 2 * sample + 2, -STEPS:])


@few
def test_beams_change_places(family, attention) -> None:
    """The beams of this test do cross, and those of one sample never take another's documents."""
    made, inputs = setup(family, attention), batch()
    seen: list[list[int]] = []

    class Watched(MSACache):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            seen.append(beam_idx.tolist())
            super().reorder_cache(beam_idx)

    cache = Watched(config=made.model.config)
    found = generate(made, inputs, num_beams=3, past_key_values=cache)
    assert any(order != list(range(9)) for order in seen)
    assert torch.equal(found, generate(made, inputs, num_beams=3))
    for layer, context in cache.contexts.items():
        with torch.no_grad():
            routed = made.model(**inputs, memory=made.bank).past_key_values.contexts[layer]
        for name in ("keys", "values", "row_mask"):
            assert torch.equal(getattr(context, name), getattr(routed, name).repeat_interleave(3, 0))


@few
def test_sampling(family, attention) -> None:
    """Two sampled sequences per prompt under a seed: reproducible, different, and the same without a cache."""
    made, inputs = setup(family, attention), batch()
    found = []
    for use_cache in (True, True, False):
        torch.manual_seed(7)
        options = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "use_cache": use_cache}
        found.append(generate(made, inputs, **options))
    assert found[0].shape[0] == 6
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0][::2], found[0][1::2])


# Streaming ------------------------------------------------------------------------------------------------------------


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 128 words."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left")


def test_text_streamer(capsys) -> None:
    """What a TextStreamer prints is the text of the returned tokens."""
    made, tokenizer = setup(), word_tokenizer()
    text = " ".join(f"w{token}" for token in QUESTIONS[0])
    inputs = {name: value for name, value in tokenizer(text, return_tensors="pt").items() if name != "token_type_ids"}
    assert inputs["input_ids"].tolist() == [QUESTIONS[0]]
    capsys.readouterr()
    found = generate(made, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(found[0, len(QUESTIONS[0]) :])
    assert torch.equal(found, generate(made, inputs))


# Prefill in pieces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, attention, piece", covered([7, 8, 20], [8]))
def test_prefill_in_pieces(family, attention, piece) -> None:
    """Where all routing tokens lie in the first piece, a prompt in pieces gives the same scores as in one."""
    made, prompt = setup(family, attention), tokens(17, seed=8)
    inputs = batch_of(prompt, [[place in (1, 2, 6) for place in range(17)]])
    options = {"return_dict_in_generate": True, "output_logits": True}
    whole = generate(made, inputs, **options)
    parts = generate(made, inputs, **options, prefill_chunk_size=piece)
    assert torch.equal(parts.sequences, whole.sequences)
    assert_same(torch.stack(parts.logits), torch.stack(whole.logits))


@few
def test_a_padded_batch_in_pieces(family, attention) -> None:
    """Left padding shares the first piece; every sample's routing tokens lie in it."""
    made, prompts = setup(family, attention), tokens(17, 12, seed=8)
    inputs = batch_of(prompts, [[place < 8 - 17 + len(prompt) for place in range(len(prompt))] for prompt in prompts])
    assert inputs["routing_mask"].any(1).all()
    assert torch.equal(generate(made, inputs, prefill_chunk_size=8), generate(made, inputs))


@few
def test_pieces_that_cut_the_routing_tokens(family, attention) -> None:
    """A routing token behind the first piece is an error that says what to do, also by default."""
    made, prompt = setup(family, attention), tokens(17, seed=8)
    for inputs in (batch_of(prompt, [[place in (1, 8) for place in range(17)]]), batch_of(prompt)):
        with pytest.raises(ValueError, match="`prefill_chunk_size=8` cuts the prompt before its last routing token"):
            generate(made, inputs, prefill_chunk_size=8)


# Turns ----------------------------------------------------------------------------------------------------------------

SECOND = tokens(4, 4, 4, seed=30)
SECOND_ROUTES = [[True, True, True, False], [True] * 4, [False, True, True, True]]


@torch.no_grad()
def first_turn(made: Setup) -> tuple[dict[str, Tensor], Any]:
    inputs = batch()
    return inputs, made.model(**inputs, memory=made.bank)


def keys_of(cache: MSACache, length: int) -> list[Tensor]:
    return [layer.keys[:, :, :length].clone() for layer in cache.layers]


@few
@pytest.mark.parametrize(
    "speaks", [SECOND_ROUTES, [SECOND_ROUTES[0], [False] * 4, SECOND_ROUTES[2]]], ids=["all", "some"]
)
def test_a_turn_with_routing_tokens_routes_anew(family, attention, speaks) -> None:
    """Later turns choose documents of their own and keep the tokens' keys; samples that do not route keep theirs."""
    made = setup(family, attention, score_bias=True)
    inputs, first = first_turn(made)
    documents = {layer: found.documents for layer, found in first.routing.items()}
    before = [layer.keys[:, :, :9].clone() for layer in first.past_key_values.layers if not layer.is_sliding]
    second = {"input_ids": torch.tensor(SECOND), "attention_mask": extend(inputs["attention_mask"], 4)}
    with torch.no_grad():
        output = made.model(
            **second, routing_mask=torch.tensor(speaks), memory=made.bank, past_key_values=first.past_key_values
        )
    after = [layer.keys[:, :, :9] for layer in output.past_key_values.layers if not layer.is_sliding]
    assert before and all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    for sample in range(3):
        made.reference.start()
        made.reference.turn(QUESTIONS[sample], ROUTES[sample])
        turn = made.reference.turn(SECOND[sample], speaks[sample])
        assert_same(output.logits[sample], turn.logits)
        for layer, found in output.routing.items():
            assert found.documents[sample].tolist() == turn.documents.get(layer, [-1, -1])
            kept = output.past_key_values.contexts[layer].documents[sample].tolist()
            assert kept == turn.documents.get(layer, documents[layer][sample].tolist())
    assert any(not torch.equal(documents[layer], found.documents) for layer, found in output.routing.items())


@few
@pytest.mark.parametrize("how", ["all false", "default", "no memory"])
def test_a_turn_without_routing_tokens_keeps_its_documents(family, attention, how) -> None:
    """An all-false routing mask, none, or no memory at all: the contexts stay, and the turn reports no routing."""
    made = setup(family, attention)
    inputs, first = first_turn(made)
    contexts = dict(first.past_key_values.contexts)
    options: dict[str, Any] = {
        "all false": {"memory": made.bank, "routing_mask": torch.zeros(3, 4, dtype=torch.bool)},
        "default": {"memory": made.bank},
        "no memory": {},
    }[how]
    with torch.no_grad():
        output = made.model(
            torch.tensor(SECOND),
            attention_mask=extend(inputs["attention_mask"], 4),
            past_key_values=first.past_key_values,
            **options,
        )
    assert output.routing == {}
    assert all(output.past_key_values.contexts[layer] is context for layer, context in contexts.items())
    for sample in range(3):
        made.reference.start()
        made.reference.turn(QUESTIONS[sample], ROUTES[sample])
        assert_same(output.logits[sample], made.reference.turn(SECOND[sample]).logits)


def test_a_turn_that_routes_needs_the_memory() -> None:
    made = setup()
    inputs, first = first_turn(made)
    with pytest.raises(ValueError, match="routing tokens but no `memory`"):
        made.model(
            torch.tensor(SECOND),
            attention_mask=extend(inputs["attention_mask"], 4),
            routing_mask=torch.tensor(SECOND_ROUTES),
            past_key_values=first.past_key_values,
        )


def test_forced_documents_need_a_turn_that_routes() -> None:
    """Forcing documents in a turn that keeps its own would do nothing, so it is refused."""
    made = setup()
    inputs, first = first_turn(made)
    with pytest.raises(ValueError, match="`force_documents`"):
        made.model(
            torch.tensor(SECOND),
            attention_mask=extend(inputs["attention_mask"], 4),
            memory=made.bank,
            force_documents=torch.zeros(3, 1, dtype=torch.long),
            past_key_values=first.past_key_values,
        )


def test_bad_later_turns_of_generate() -> None:
    """New tokens without the mask of the whole history, and forced documents where nothing routes, are refused."""
    made, inputs = setup(), batch()
    cache = MSACache(config=made.model.config)
    first = generate(made, inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="attention mask of the whole history"):
        generate(made, {"input_ids": torch.tensor(SECOND)}, past_key_values=cache)
    later = {
        "input_ids": torch.cat([first, torch.tensor(SECOND)], 1),
        "attention_mask": extend(inputs["attention_mask"], STEPS + 4),
    }
    silent = torch.zeros_like(later["attention_mask"], dtype=torch.bool)
    earlier = silent.clone()
    earlier[:, :3] = True  # tokens that have been seen route no more
    forced = torch.zeros(3, 1, dtype=torch.long)
    for routes in (silent, earlier):
        with pytest.raises(ValueError, match="`force_documents` in a turn without routing tokens"):
            generate(made, later, past_key_values=cache, routing_mask=routes, force_documents=forced)
    with pytest.raises(ValueError, match="routing tokens but no `memory`"):
        generate(made, later, past_key_values=cache, routing_mask=~silent, memory=None)


def naive_second_turn(made: Setup, found: Any, answers: Tensor, routes: Any) -> None:
    """Compare what generate() `found` for `SECOND` after a first turn that ended in `answers` [B, STEPS]."""
    for sample in range(3):
        made.reference.start()
        made.reference.turn(QUESTIONS[sample], ROUTES[sample])
        # The last generated token has not been seen when generate() returns; it opens the next turn.
        made.reference.turn(answers[sample, :-1].tolist())
        routing = None if routes is None else [False, *routes[sample]]
        turn = made.reference.turn([int(answers[sample, -1]), *SECOND[sample]], routing)
        for step, token in enumerate(found.sequences[sample, -STEPS:].tolist()):
            assert_same(found.logits[step][sample], turn.logits[-1])
            turn = made.reference.turn([token])


LATER = [f"{how}, {history}" for how in ("routes", "keeps", "no memory") for history in ("full history", "new tokens")]


@pytest.mark.parametrize("family, attention, later", covered(LATER, ["keeps, new tokens"]))
def test_turns_through_generate(family, attention, later) -> None:
    """A second generate() with the cache of the first: whole history or new tokens only, routing anew or not."""
    how, history = later.split(", ")
    made, inputs = setup(family, attention), batch()
    cache = MSACache(config=made.model.config)
    first = generate(made, inputs, past_key_values=cache)
    mask = extend(inputs["attention_mask"], STEPS + 4)
    routes = extend(torch.zeros(3, 9 + STEPS, dtype=torch.bool), 4)
    routes[:, -4:] = torch.tensor(SECOND_ROUTES)
    ids = torch.cat([first, torch.tensor(SECOND)], 1)
    options: dict[str, Any] = {
        "routes": {"routing_mask": routes},
        "keeps": {"routing_mask": torch.zeros_like(routes)},
        "no memory": {"memory": None},
    }[how]
    if history == "new tokens":  # all but the last generated token are in the cache
        ids = ids[:, cache.get_seq_length() :]
        if "routing_mask" in options:
            options["routing_mask"] = options["routing_mask"][:, -ids.shape[1] :]
    options |= {"past_key_values": cache, "return_dict_in_generate": True, "output_logits": True}
    found = generate(made, {"input_ids": ids, "attention_mask": mask}, **options)
    naive_second_turn(made, found, first[:, -STEPS:], SECOND_ROUTES if how == "routes" else None)


def test_all_new_tokens_route_by_default_in_a_later_turn() -> None:
    """generate() with a cache and a memory but no routing mask: the new tokens route, those seen do not."""
    made, inputs = setup(), batch_of(QUESTIONS[:1], ROUTES[:1])
    answers = []
    for explicit in (True, False):
        cache = MSACache(config=made.model.config)
        first = generate(made, inputs, past_key_values=cache)
        ids = torch.cat([first, torch.tensor(SECOND[:1])], 1)
        routes = torch.zeros(ids.shape, dtype=torch.bool)
        routes[:, cache.get_seq_length() :] = True
        options = {"routing_mask": routes} if explicit else {}
        found = generate(
            made, {"input_ids": ids}, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
        )
        answers.append(torch.stack(found.logits))
    assert torch.equal(*answers)


# The cache ------------------------------------------------------------------------------------------------------------


def filled_cache(made: Setup) -> MSACache:
    return first_turn(made)[1].past_key_values


def assert_in_step(cache: MSACache, before: MSACache, samples: list[int]) -> None:
    """Keys and contexts of `cache` are those of `before` at `samples`."""
    pick = torch.tensor(samples)
    for ours, theirs in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[pick])
    assert cache.contexts.keys() == before.contexts.keys() and cache.contexts
    for layer, context in cache.contexts.items():
        other = before.contexts[layer]
        assert context.prefix_length == other.prefix_length
        for name in ("keys", "values", "row_mask", "bias", "documents"):
            ours, theirs = getattr(context, name), getattr(other, name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs[pick])


CHANGES: dict[str, tuple[Any, list[int]]] = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "batch_select_indices by mask": (
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        [0, 2],
    ),
}


@few
@pytest.mark.parametrize("change, samples", CHANGES.values(), ids=CHANGES)
def test_contexts_follow_the_cache(family, attention, change, samples) -> None:
    """Whatever happens to the samples of a cache happens to their contexts; decoding goes on as it would have."""
    made = setup(family, attention, score_bias=True)
    cache, before = filled_cache(made), filled_cache(made)
    change(cache)
    assert_in_step(cache, before, samples)
    mask = extend(batch()["attention_mask"], 1)
    with torch.no_grad():
        expected = made.model(torch.tensor([[4], [5], [6]]), attention_mask=mask, past_key_values=before).logits[
            samples
        ]
        ids = torch.tensor([[4], [5], [6]])[samples]
        found = made.model(ids, attention_mask=mask[samples], past_key_values=cache).logits
    assert_same(found, expected)


def test_a_reset_cache_has_no_contexts() -> None:
    """reset() forgets the documents together with the tokens."""
    cache = filled_cache(setup())
    assert cache.contexts
    cache.reset()
    assert cache.contexts == {}
    assert all(layer.keys is None or not layer.keys.any() for layer in cache.layers)


def test_a_copied_cache_is_independent() -> None:
    """`copy.deepcopy` of a cache, as for a prompt that is used again, keeps its contexts."""
    made, cache = setup(), filled_cache(setup())
    twin = copy.deepcopy(cache)
    mask = extend(batch()["attention_mask"], 1)
    with torch.no_grad():
        logits = [
            made.model(torch.full((3, 1), 8), attention_mask=mask, past_key_values=item).logits
            for item in (cache, twin)
        ]
    assert torch.equal(*logits)


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {item.untyped_storage().data_ptr() for item in args if isinstance(item, Tensor)}
        for item in output if isinstance(output, tuple | list) else [output]:
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, item.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("family, attention, batch_size", covered([1, 3], [3]))
def test_a_decoding_step_does_not_copy_the_memory(family, attention, batch_size) -> None:
    """The rows of a context stay where they are, and no tensor made in a step is as large as they are."""
    prefix = [5, 6, 7] if batch_size == 3 else []
    documents = tokens(*[200] * 12, seed=40)
    made = setup(family, attention, documents, chunk_size=1, top_k=12, prefix_token_ids=prefix)
    inputs = batch_of(QUESTIONS[:batch_size], ROUTES[:batch_size])
    with torch.no_grad():
        cache = made.model(**inputs, memory=made.bank).past_key_values
        places = {
            layer: (context.keys.data_ptr(), context.values.data_ptr()) for layer, context in cache.contexts.items()
        }
        smallest = min(cache.contexts[layer].keys.nbytes for layer in made.model.config.memory_layers)
        mask = inputs["attention_mask"]
        for _ in range(2):
            mask = extend(mask, 1)
            with LargestTensor() as largest:
                made.model(torch.full((batch_size, 1), 9), attention_mask=mask, past_key_values=cache)
            assert largest.bytes < smallest
    for layer, context in cache.contexts.items():
        assert (context.keys.data_ptr(), context.values.data_ptr()) == places[layer]


@few
def test_a_bank_in_another_dtype(family, attention) -> None:
    """A bank in float32 serves the same model in bfloat16: as well as its own bank, and without copies in a step."""
    documents = tokens(*[200] * 4, seed=41)
    made = setup(family, attention, documents, chunk_size=1, top_k=4, base={"scale": 0.1})
    inputs = batch()
    forced = {"force_documents": torch.arange(4).expand(3, 4)}  # so that rounding does not choose others
    with torch.no_grad():
        exact = made.model(**inputs, memory=made.bank, **forced).logits
        made.model.bfloat16()
        own = made.model.encode_documents(documents, show_progress=False)
        outputs = {bank.dtype: made.model(**inputs, memory=bank, **forced) for bank in (made.bank, own)}
        errors = {
            dtype: max(
                differ(ours.float(), theirs)
                for ours, theirs in zip(samples_of(output.logits, inputs), samples_of(exact, inputs), strict=True)
            )
            for dtype, output in outputs.items()
        }
        assert outputs[torch.float32].logits.dtype == torch.bfloat16
        assert errors[torch.float32] < 2 * errors[torch.bfloat16] < 0.2
        cache = outputs[torch.float32].past_key_values
        with LargestTensor() as largest:
            mask = extend(inputs["attention_mask"], 1)
            made.model(torch.full((3, 1), 9), attention_mask=mask, past_key_values=cache)
        assert largest.bytes < min(cache.contexts[layer].keys.nbytes for layer in made.model.config.memory_layers)


# Generation options ---------------------------------------------------------------------------------------------------


def test_top_k_counts_documents(tmp_path) -> None:
    """The memory's `top_k` never becomes the sampler's: retrofitted, saved, or loaded with or without options."""
    made = setup(top_k=2)
    default = made.base.generation_config.top_k
    assert made.model.generation_config.top_k == default != 2
    made.model.save_pretrained(tmp_path)
    loaded = MSAForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.top_k == default and loaded.config.top_k == 2
    (tmp_path / "generation_config.json").unlink()
    loaded = MSAForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.top_k != 2 and loaded.config.top_k == 2
    assert loaded.generation_config.eos_token_id == made.base.generation_config.eos_token_id
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 50.0, "num_return_sequences": 64, "max_new_tokens": 1}
    bank = loaded.encode_documents(made.documents, show_progress=False)
    found = loaded.generate(torch.tensor(QUESTIONS[:1]), memory=bank, **options)
    assert len(found[:, -1].unique()) > 2
    config = copy.deepcopy(loaded.config)
    assert MSAForCausalLM(config).generation_config.top_k != 2


def test_the_reference_tells_turns_apart() -> None:
    """The definition's own conversation depends on its first turn and on its documents."""
    made = setup()
    answers = []
    for documents, question in ((made.documents, QUESTIONS[0]), (made.documents, QUESTIONS[1]), ([[9]], QUESTIONS[0])):
        reference = Reference(made.base, made.model, documents)
        reference.turn(question, [True] * len(question))
        answers.append(reference.turn(SECOND[0]).logits)
    assert differ(answers[1], answers[0]) > 1e-3 and differ(answers[2], answers[0]) > 1e-3


def test_samples_of() -> None:
    """The helper that the tests compare by drops padding on either side."""
    for side in ("left", "right"):
        inputs = batch_of(QUESTIONS, side=side)
        assert [row.tolist() for row in samples_of(inputs["input_ids"], inputs)] == QUESTIONS
