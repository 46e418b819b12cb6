"""What a forward with a memory must equal: the base without one, plain attention where nothing is left out or pooled,
the definition computed naively, and itself however samples are batched, padded and ordered."""

import copy
import itertools
from typing import Any

import pytest
import torch
from reference import NEVER
from setups import (
    BACKENDS,
    CHUNK,
    FEW,
    LENGTHS,
    PREFIX,
    Setup,
    assert_same,
    batch_of,
    differ,
    samples_of,
    setup,
    tokens,
)
from torch import Tensor
from transformers import DynamicCache

from msa_hf import MSAModel
from msa_hf.model.routing_msa import NO_SCORE

QUESTIONS = tokens(9, 1, 5, seed=2)
ROUTES = [[False] * 2 + [True] * 5 + [False] * 2, [True], [True, False, True, True, False]]

backends = pytest.mark.parametrize("family, attention", BACKENDS)
few = pytest.mark.parametrize("family, attention", FEW)


@torch.no_grad()
def ask(made: Setup, batch: dict[str, Tensor], **kwargs: Any) -> Any:
    """The model's output for a batch, with all documents' scores."""
    return made.model(**{"memory": made.bank, "output_document_scores": True, **batch, **kwargs})


def assert_same_scores(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to float32's error in the largest score."""
    finite = theirs[theirs.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5 * max(largest, 1.0), rtol=0.0)


def assert_same_routing(ours: Any, theirs: Any, rows: list[int] | None = None) -> None:
    """The same documents with the same scores; sample i of `ours` is sample rows[i] of `theirs`."""
    assert ours.routing.keys() == theirs.routing.keys()
    for layer, found in ours.routing.items():
        other = theirs.routing[layer]
        pick = slice(None) if rows is None else rows
        assert torch.equal(found.documents, other.documents[pick])
        for name in ("scores", "document_scores"):
            assert_same_scores(getattr(found, name), getattr(other, name)[pick])


# Without a memory -----------------------------------------------------------------------------------------------------


@backends
def test_without_a_memory_it_is_the_base(family, attention) -> None:
    """Logits, losses, gradients and cached steps are those of the unpatched base to the bit, padded or not."""
    made = setup(family, attention)
    for inputs in (
        {"input_ids": torch.tensor(QUESTIONS[:1])},
        batch_of(QUESTIONS),
        batch_of(QUESTIONS, side="right"),
        {"input_ids": torch.tensor(QUESTIONS[:1]), "labels": torch.tensor(QUESTIONS[:1])},
    ):
        ours, theirs = made.model(**inputs), made.base(**inputs)
        assert torch.equal(ours.logits, theirs.logits)
        assert (ours.loss is None) == (theirs.loss is None)
        if ours.loss is not None:
            assert torch.equal(ours.loss, theirs.loss)
            ours.loss.backward()
            theirs.loss.backward()
            gradients = {name: weight.grad for name, weight in made.model.named_parameters()}
            for name, weight in made.base.named_parameters():
                assert (weight.grad is None and gradients[name] is None) or torch.equal(weight.grad, gradients[name])


@backends
@torch.no_grad()
def test_without_a_memory_cached_steps_are_the_base(family, attention) -> None:
    """A cache, left padding and steps of one and two tokens: the base's logits to the bit; its generate() too."""
    made, batch = setup(family, attention), batch_of(QUESTIONS)
    outputs = [made.model(**batch, use_cache=True), made.base(**batch, use_cache=True)]
    mask = batch["attention_mask"]
    for width in (1, 1, 2):
        mask = torch.nn.functional.pad(mask, (0, width), value=1)
        step = {"input_ids": torch.full((3, width), 11), "attention_mask": mask}
        outputs = [
            model(**step, past_key_values=output.past_key_values)
            for model, output in zip((made.model, made.base), outputs, strict=True)
        ]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
    generated = [model.generate(**batch, max_new_tokens=4, do_sample=False) for model in (made.model, made.base)]
    assert torch.equal(*generated)


def test_the_headless_model_without_a_memory_is_the_base() -> None:
    made, batch = setup(), batch_of(QUESTIONS)
    headless = MSAModel.from_base(copy.deepcopy(made.base.model), chunk_size=CHUNK, top_k=2)
    assert torch.equal(headless(**batch).last_hidden_state, made.base.model(**batch).last_hidden_state)


# All documents, nothing pooled ----------------------------------------------------------------------------------------


def plain_attention(made: Setup, question: list[int], documents: list[list[int]], window: int | None) -> Tensor:
    """The unpatched base, once, over [prefix; documents; question] with a mask and positions of its own.

    Every memory layer is a full-attention layer and the other way round, so two masks say it all: in windowed layers
    the question sees no documents.
    """
    parts = [list(PREFIX), *documents, question]
    part = torch.tensor([number for number, ids in enumerate(parts) for _ in ids])
    first = made.model.config.first_position
    starts = [0] * (len(parts) - 1) + [first]
    place = torch.cat([torch.arange(len(ids)) for ids in parts])
    positions = torch.cat([torch.arange(len(ids)) + start for ids, start in zip(parts, starts, strict=True)])
    within = (part[:, None] == part) & (place[:, None] >= place)
    asks = part == len(parts) - 1
    full = within | (asks[:, None] & ~asks)
    narrow = within if window is None else within & (place[:, None] - place < window)
    narrow = narrow | (asks[:, None] & (part == 0))
    smallest = torch.finfo(torch.float32).min
    masks = {
        name: torch.where(visible, 0.0, smallest)[None, None]
        for name, visible in (("full_attention", full), ("sliding_attention", narrow))
    }
    ids = torch.tensor([[token for ids in parts for token in ids]])
    with torch.no_grad():
        output = made.base(
            input_ids=ids,
            position_ids=positions[None],
            attention_mask=masks["full_attention"] if window is None else masks,
            use_cache=False,
        )
    return output.logits[0, asks]


def full_attention_layers(config: Any) -> list[int]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]


@backends
@pytest.mark.parametrize("spare", [3], ids=["k>N"])
def test_all_documents_unpooled_is_plain_attention(family, attention, spare) -> None:
    """k >= N and chunks of one token: attention over [prefix; documents as isolated segments; question]."""
    window = 6 if family in ("gemma2", "gemma3_text", "gpt_oss") else None
    layers = [1, 3] if window else [0, 1, 2, 3]
    made = setup(family, attention, chunk_size=1, top_k=len(LENGTHS) + spare, memory_layers=layers)
    assert full_attention_layers(made.base.config) == layers
    batch = batch_of(QUESTIONS)
    for ours, question in zip(samples_of(ask(made, batch).logits, batch), QUESTIONS, strict=True):
        assert_same(ours, plain_attention(made, question, made.documents, window))


@few
def test_forced_documents_unpooled_are_plain_attention_over_those(family, attention) -> None:
    """Forcing documents with chunks of one token: plain attention over exactly those, per sample."""
    window = 6 if family != "qwen3" else None
    layers = [1, 3] if window else [0, 1, 2, 3]
    made = setup(family, attention, chunk_size=1, memory_layers=layers)
    batch, forced = batch_of(QUESTIONS), [[4, 1], [-1, 2], [-1, -1]]
    output = ask(made, batch, force_documents=torch.tensor(forced))
    for ours, question, chosen in zip(samples_of(output.logits, batch), QUESTIONS, forced, strict=True):
        documents = [made.documents[document] for document in chosen if document >= 0]
        assert_same(ours, plain_attention(made, question, documents, window))


# The definition -------------------------------------------------------------------------------------------------------


def assert_reference(made: Setup, batch: dict[str, Tensor], questions: Any = QUESTIONS, routes: Any = ROUTES) -> None:
    """Documents, scores and logits of every sample are those of the naive computation."""
    output = ask(made, batch)
    logits = samples_of(output.logits, batch)
    assert list(output.routing) == made.model.config.memory_layers
    for sample, (question, routing) in enumerate(zip(questions, routes, strict=True)):
        made.reference.start()
        turn = made.reference.turn(question, routing)
        assert_same(logits[sample], turn.logits)
        for layer, documents in turn.documents.items():
            found, scores = output.routing[layer], torch.tensor(turn.scores[layer])
            chosen = found.documents[sample].tolist()
            # Documents of equal text tie only where a row's place in a matrix does not change its last bits, which
            # differs between processors: there any of them may stand for another, and nothing else may.
            assert len(set(chosen)) == len(chosen) or -1 in chosen
            for ours, theirs in zip(chosen, documents, strict=True):
                tie = min(ours, theirs) >= 0 and turn.scores[layer][ours] == turn.scores[layer][theirs]
                assert ours == theirs or tie
            assert_same_scores(found.document_scores[sample], scores)
            best = [turn.scores[layer][document] if document >= 0 else NEVER for document in documents]
            assert_same_scores(found.scores[sample], torch.tensor(best))


@backends
def test_the_definition(family, attention) -> None:
    """A left-padded batch with k < N and pooled chunks: every family computes what the definition says."""
    assert_reference(setup(family, attention), batch_of(QUESTIONS, ROUTES))


FORM = ("similarity", "head_reduction", "query_reduction", "chunk_reduction")
OPTIONS: dict[str, dict[str, Any]] = {
    "no prefix": {"prefix_token_ids": []},
    "one prefix token": {"prefix_token_ids": [9]},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 64": {"chunk_size": 64},
    "k = 1": {"top_k": 1},
    "k = N": {"top_k": 5},
    "k > N": {"top_k": 9},
    "first layer": {"memory_layers": [1]},
    "shared router": {"shared_router": True},
    "shared router, dot": {"shared_router": True, "similarity": "dot"},
    "score bias": {"score_bias": True, "top_k": 3},
    "score bias, no prefix": {"score_bias": True, "prefix_token_ids": []},
    **{
        "-".join(form): dict(zip(FORM, form, strict=True))
        for form in itertools.product(("cosine", "dot"), ("mean", "max"), ("max", "mean", "last"), ("max", "mean"))
    },
}


# How scores are made is the same in every family: those with a softcap and with sinks take one form in seven.
FORMS = [option for option in OPTIONS if option.startswith(("cosine-", "dot-"))]


@pytest.mark.parametrize(
    "family, attention, option",
    [
        (*param.values, option)
        for param in FEW
        for option in OPTIONS
        if (option in FORMS[::2] if param.values[0] == "qwen3" else option in FORMS[::7]) or option not in FORMS
    ],
)
def test_the_definition_in_every_form(family, attention, option) -> None:
    """Prefixes, chunk sizes, k, layers, routers, reductions and the score bias follow the definition."""
    assert_reference(setup(family, attention, **OPTIONS[option]), batch_of(QUESTIONS, ROUTES))


@pytest.mark.parametrize("heads, groups", [(1, 1), (2, 2), (4, 1), (6, 3)])
def test_the_definition_for_any_sharing_of_heads(heads, groups) -> None:
    """One head, as many key/value heads as query heads, one for all, and a share of two."""
    made = setup(base={"num_attention_heads": heads, "num_key_value_heads": groups}, top_k=3)
    assert_reference(made, batch_of(QUESTIONS, ROUTES))


def test_the_definition_for_tied_embeddings() -> None:
    assert_reference(setup(base={"tie_word_embeddings": True}), batch_of(QUESTIONS, ROUTES))


@few
def test_routing_defaults_to_all_real_tokens(family, attention) -> None:
    """Without a routing mask all tokens but padding route."""
    made = setup(family, attention)
    everything = [[True] * len(question) for question in QUESTIONS]
    assert_reference(made, batch_of(QUESTIONS), routes=everything)


@few
def test_the_headless_model_follows_the_definition(family, attention) -> None:
    """`MSAModel` reads the same bank and gives the hidden states behind the same logits."""
    made, batch = setup(family, attention), batch_of(QUESTIONS, ROUTES)
    headless = MSAModel.from_base(
        copy.deepcopy(made.base.model), chunk_size=CHUNK, top_k=2, prefix_token_ids=list(PREFIX)
    )
    weights = {name.removeprefix("model."): value for name, value in made.model.state_dict().items()}
    headless.load_state_dict({name: weights[name] for name in headless.state_dict()})
    bank = headless.encode_documents(made.documents, show_progress=False)
    with torch.no_grad():
        output = headless(**batch, memory=bank, output_document_scores=True)
        ours = ask(made, batch, output_hidden_states=True)
    assert_same_routing(output, ours)
    assert torch.equal(output.last_hidden_state, ours.hidden_states[-1])


@few
def test_a_loss_with_a_memory(family, attention) -> None:
    """`labels` beside a memory: the mean cross-entropy of the logits over the labeled tokens, also as `lm_loss`."""
    made, batch = setup(family, attention), batch_of(QUESTIONS, ROUTES)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = ask(made, batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.lm_loss, output.loss)
    assert torch.equal(output.logits, ask(made, batch).logits)
    values = ask(made, batch, labels=labels, return_dict=False)
    assert isinstance(values, tuple) and torch.equal(values[0], output.loss) and torch.equal(values[1], output.logits)


@few
def test_only_the_last_logits(family, attention) -> None:
    """`logits_to_keep` gives the last of the same logits."""
    made, batch = setup(family, attention), batch_of(QUESTIONS, ROUTES)
    assert_same(ask(made, batch, logits_to_keep=1).logits, ask(made, batch).logits[:, -1:])


# What must differ -----------------------------------------------------------------------------------------------------


@few
def test_the_memory_matters(family, attention) -> None:
    """Fewer documents, larger chunks and other documents give other logits, at the same positions."""
    made, batch = setup(family, attention, chunk_size=1), batch_of(QUESTIONS)
    everything = torch.arange(len(LENGTHS)).expand(3, -1)
    full = ask(made, batch, force_documents=everything).logits
    few_documents = ask(made, batch).logits
    assert differ(few_documents, full) > 1e-3
    pooled = setup(family, attention, chunk_size=4)
    assert differ(ask(pooled, batch, force_documents=everything).logits, full) > 1e-3
    assert differ(ask(made, batch, force_documents=torch.full((3, 1), -1)).logits, full) > 1e-3


@few
def test_the_prefix_matters(family, attention) -> None:
    """Another prefix of the same length gives other logits, in every layer's own way."""
    batch, nothing = batch_of(QUESTIONS), torch.full((3, 1), -1)
    made, other = setup(family, attention), setup(family, attention, prefix_token_ids=[8, 9, 10])
    outputs = [ask(item, batch, force_documents=nothing).logits for item in (made, other)]
    assert differ(*outputs) > 1e-3


# Batches --------------------------------------------------------------------------------------------------------------

RAGGED = {
    "one": [[7]],
    "two": [[4], [11]],
    "three": [[1], [8], [3]],
    "five": [[2], [1], [9], [9], [5]],
}


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("side", ["left", "right"])
@few
def test_padded_equals_alone(family, attention, side, lengths) -> None:
    """A sample's documents, scores and logits do not depend on what shares its batch, nor on where padding stands."""
    made = setup(family, attention, score_bias=True)
    questions = tokens(*itertools.chain(*lengths), seed=3)
    routes = [[place % 3 != 1 for place in range(len(question))] for question in questions]
    batch = batch_of(questions, routes, side)
    output = ask(made, batch)
    for sample, (question, routing) in enumerate(zip(questions, routes, strict=True)):
        alone = ask(made, batch_of([question], [routing]))
        assert_same(samples_of(output.logits, batch)[sample], alone.logits[0])
        assert_same_routing(alone, output, [sample])


@few
def test_left_equals_right(family, attention) -> None:
    """Padding left or right, more or less of it: the same documents, scores and logits in every family."""
    made = setup(family, attention)
    left, right = batch_of(QUESTIONS, ROUTES), batch_of(QUESTIONS, ROUTES, "right")
    wide = {name: torch.nn.functional.pad(value, (4, 0)) for name, value in left.items()}
    outputs = [ask(made, batch) for batch in (left, right, wide)]
    for batch, output in ((right, outputs[1]), (wide, outputs[2])):
        assert_same_routing(output, outputs[0])
        for ours, theirs in zip(samples_of(output.logits, batch), samples_of(outputs[0].logits, left), strict=True):
            assert_same(ours, theirs)


@few
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_at_padding_is_irrelevant(family, attention, side) -> None:
    """Other tokens at the padding, also ones that the routing mask names, change nothing."""
    made, batch = setup(family, attention), batch_of(QUESTIONS, ROUTES, side)
    padding = batch["attention_mask"] == 0
    junk = {
        "input_ids": batch["input_ids"].masked_fill(padding, 77),
        "attention_mask": batch["attention_mask"],
        "routing_mask": batch["routing_mask"] | padding,
    }
    output, other = ask(made, batch), ask(made, junk)
    assert_same_routing(other, output)
    for ours, theirs in zip(samples_of(other.logits, junk), samples_of(output.logits, batch), strict=True):
        assert_same(ours, theirs)


@few
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2], [0, 0, 2]], ids=str)
def test_batch_order_is_irrelevant(family, attention, order) -> None:
    """Samples in another order, or twice: the same documents, scores and logits."""
    made, batch = setup(family, attention), batch_of(QUESTIONS, ROUTES)
    output = ask(made, batch)
    other = ask(made, {name: value[order] for name, value in batch.items()})
    assert_same_routing(other, output, order)
    assert_same(other.logits, output.logits[order])


@few
def test_a_sample_without_routing_tokens(family, attention) -> None:
    """In a batch where others route it attends to the prefix alone, and reports -1."""
    made, silent = setup(family, attention), [[*ROUTES[0]], [False], [*ROUTES[2]]]
    batch = batch_of(QUESTIONS, silent)
    output = ask(made, batch)
    for found in output.routing.values():
        assert found.documents[1].tolist() == [-1, -1]
        assert found.scores[1].tolist() == [NEVER, NEVER]
        assert found.document_scores[1].tolist() == [NEVER] * len(LENGTHS)
        assert (found.documents[[0, 2]] >= 0).all()
    for sample, question in enumerate(QUESTIONS):
        made.reference.start()
        assert_same(samples_of(output.logits, batch)[sample], made.reference.turn(question, silent[sample]).logits)
    assert_same(ask(made, batch_of([QUESTIONS[1]], [[False]])).logits[0], samples_of(output.logits, batch)[1])


@pytest.mark.parametrize("prefix", [list(PREFIX), []], ids=["prefix", "no prefix"])
@few
def test_nobody_routes(family, attention, prefix) -> None:
    """A batch without any routing token: no documents, and without a prefix the base's logits at these positions."""
    made = setup(family, attention, prefix_token_ids=prefix)
    batch = batch_of(QUESTIONS, [[False] * len(question) for question in QUESTIONS])
    output = ask(made, batch)
    for sample, question in enumerate(QUESTIONS):
        made.reference.start()
        assert_same(samples_of(output.logits, batch)[sample], made.reference.turn(question).logits)
    for found in output.routing.values():
        assert (found.documents == -1).all() and (found.scores == NEVER).all()
    if not prefix:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + made.model.config.first_position
        plain = {name: value for name, value in batch.items() if name != "routing_mask"}
        base = made.base(**plain, position_ids=positions).logits
        for ours, theirs in zip(samples_of(output.logits, batch), samples_of(base, batch), strict=True):
            assert_same(ours, theirs)


# Documents ------------------------------------------------------------------------------------------------------------

CORPORA = {
    "one document": tokens(8, seed=4),
    "one token": tokens(1, seed=4),
    "one-token documents": tokens(1, 1, 1, 1, 1, seed=4),
    "exact chunks": tokens(3, 6, 9, seed=4),
    "equal documents": [[9, 9, 9, 9], [9, 9, 9, 9], [9, 9, 9, 9], [4, 5]],
}


@few
@pytest.mark.parametrize("documents", CORPORA.values(), ids=CORPORA)
def test_documents_of_odd_sizes(family, attention, documents) -> None:
    """One document, documents of one token, of whole chunks, and equal ones."""
    assert_reference(setup(family, attention, documents=documents), batch_of(QUESTIONS, ROUTES))


@few
def test_the_order_of_documents_is_irrelevant(family, attention) -> None:
    """A bank in another order: the same documents by name, the same scores, the same logits."""
    made, order = setup(family, attention), [3, 0, 4, 2, 1]
    batch = batch_of(QUESTIONS, ROUTES)
    shuffled = made.model.encode_documents([made.documents[item] for item in order], show_progress=False)
    output, other = ask(made, batch), ask(made, batch, memory=shuffled)
    for layer, found in output.routing.items():
        assert torch.equal(torch.tensor(order)[other.routing[layer].documents], found.documents)
        assert_same_scores(other.routing[layer].document_scores, found.document_scores[:, order])
    assert_same(other.logits, output.logits)


# Forced documents -----------------------------------------------------------------------------------------------------


@few
def test_forcing_the_routed_documents_changes_nothing(family, attention) -> None:
    """Forcing what the one layer chose, in any order and padded by -1, gives the same logits; others do not."""
    made = setup(family, attention, memory_layers=[3], score_bias=True)
    batch = batch_of(QUESTIONS, ROUTES)
    output = ask(made, batch)
    routed = output.routing[3].documents
    for forced in (routed, routed.flip(1), torch.nn.functional.pad(routed, (1, 2), value=-1)):
        other = ask(made, batch, force_documents=forced)
        assert torch.equal(other.routing[3].documents, forced)
        assert torch.equal(other.routing[3].document_scores, output.routing[3].document_scores)
        there = other.routing[3].scores[forced >= 0]
        assert torch.equal(there, output.routing[3].document_scores.gather(1, forced.clamp(min=0))[forced >= 0])
        assert (other.routing[3].scores[forced < 0] == NEVER).all()
        assert_same(other.logits, output.logits)
    others = torch.tensor([[item for item in range(5) if item not in row][:2] for row in routed.tolist()])
    other = ask(made, batch, force_documents=others)
    for ours, theirs in zip(samples_of(other.logits, batch), samples_of(output.logits, batch), strict=True):
        assert differ(ours, theirs) > 1e-4


@few
def test_forced_documents_follow_the_definition(family, attention) -> None:
    """More documents than k, fewer, and none: rows, positions and score bias of exactly those, in all memory layers."""
    made = setup(family, attention, score_bias=True)
    batch, forced = batch_of(QUESTIONS, ROUTES), [[4, 0, 2, 1], [-1, 3, -1, -1], [-1, -1, -1, -1]]
    output = ask(made, batch, force_documents=torch.tensor(forced))
    for sample, question in enumerate(QUESTIONS):
        made.reference.start()
        turn = made.reference.turn(question, ROUTES[sample], force=forced[sample])
        assert_same(samples_of(output.logits, batch)[sample], turn.logits)
        for found in output.routing.values():
            assert found.documents[sample].tolist() == forced[sample]


def test_forced_documents_without_a_score_report_none() -> None:
    """A sample that does not route may be forced too; it has no scores, neither finite nor a sentinel."""
    made = setup(score_bias=True)
    output = ask(made, batch_of(QUESTIONS[:2], [ROUTES[0], [False]]), force_documents=torch.tensor([[0, 1], [2, 3]]))
    for found in output.routing.values():
        assert found.documents.tolist() == [[0, 1], [2, 3]]
        assert found.scores[0].min() > NO_SCORE and found.scores[1].tolist() == [NEVER, NEVER]
    made.reference.start()
    alone = ask(made, batch_of([QUESTIONS[1]], [[False]]), force_documents=torch.tensor([[2, 3]]))
    assert_same(output.logits[1, -1], alone.logits[0, -1])


BAD_FORCE = {
    "beyond the bank": ([[0, 5]], r"names document 5, but there are 5"),
    "below -1": ([[0, -2]], r"names document -2"),
    "twice": ([[3, 3]], "twice"),
    "another batch": ([[0], [1]], r"must be \[1, n\]"),
    "one dimension": ([0, 1], r"must be \[1, n\]"),
    "not integers": ([[0.0, 1.0]], r"must be \[1, n\]"),
}


@pytest.mark.parametrize("forced, message", BAD_FORCE.values(), ids=BAD_FORCE)
def test_bad_forced_documents(forced, message) -> None:
    with pytest.raises(ValueError, match=message):
        ask(setup(), batch_of(QUESTIONS[:1]), force_documents=torch.tensor(forced))


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_question_of_only_padding() -> None:
    """It is named, in forward and in generate()."""
    made, batch = setup(), batch_of(QUESTIONS)
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="Question 1 of the batch is only padding"):
        ask(made, batch)
    with pytest.raises(ValueError, match="Question 1 of the batch is only padding"):
        made.model.generate(**batch, memory=made.bank, max_new_tokens=2)


def test_a_routing_mask_of_the_wrong_shape() -> None:
    made, batch = setup(), batch_of(QUESTIONS)
    for shape in ((3, 8), (2, 9), (9,), (3, 9, 1)):
        with pytest.raises(ValueError, match="`routing_mask` must be"):
            ask(made, batch, routing_mask=torch.ones(shape, dtype=torch.bool))
        with pytest.raises(ValueError, match="`routing_mask` must be"):
            made.model.generate(**batch, memory=made.bank, routing_mask=torch.ones(3, 10), max_new_tokens=2)


def test_an_attention_mask_of_the_wrong_shape() -> None:
    made, batch = setup(), batch_of(QUESTIONS)
    with pytest.raises(ValueError, match=r"covers 8 tokens, but 9"):
        ask(made, {**batch, "attention_mask": batch["attention_mask"][:, 1:]})
    with pytest.raises(ValueError, match=r"must be \[batch, tokens\]"):
        ask(made, {**batch, "attention_mask": torch.zeros(3, 1, 9, 9)})


@pytest.mark.parametrize("memory", ["a path", [torch.zeros(2)], {}, 3])
def test_a_memory_of_the_wrong_type(memory) -> None:
    made, batch = setup(), batch_of(QUESTIONS)
    for call in (made.model, made.model.generate):
        with pytest.raises(TypeError, match=f"must be a MemoryBank.* got {type(memory).__name__}"):
            call(**batch, memory=memory)


def test_no_input() -> None:
    made = setup()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        made.model(memory=made.bank)
    with pytest.raises(ValueError, match="needs a prompt"):
        made.model.generate(memory=made.bank)
    with pytest.raises(ValueError, match="prompt has no tokens"):
        made.model.generate(torch.empty(1, 0, dtype=torch.long), memory=made.bank)
    with pytest.raises(ValueError, match=r"must be \[batch, tokens\], got \(3,\)"):
        made.model.generate(torch.tensor([5, 6, 7]), memory=made.bank)


@pytest.mark.parametrize("name", ["routing_mask", "force_documents"])
def test_routing_without_a_memory(name) -> None:
    """A question that is to route, but over nothing, is an error, in forward and in generate()."""
    made = setup()
    wrong = {"routing_mask": torch.ones(1, 9, dtype=torch.bool), "force_documents": torch.tensor([[0]])}[name]
    with pytest.raises(ValueError, match="need a `memory`"):
        made.model(torch.tensor(QUESTIONS[:1]), **{name: wrong})
    with pytest.raises(ValueError, match="need a `memory`"):
        made.model.generate(torch.tensor(QUESTIONS[:1]), **{name: wrong}, max_new_tokens=2)


def test_a_bank_of_another_model() -> None:
    """The differences are listed, one a line; a bank of the same model made elsewhere is taken."""
    made, batch = setup(), batch_of(QUESTIONS)
    other = setup(chunk_size=4, memory_layers=[1, 3], prefix_token_ids=[5], similarity="dot", base={"rope_theta": 5.0})
    with pytest.raises(ValueError) as error:
        ask(made, batch, memory=other.bank)
    for line in (
        "chunk_size: the bank has 4, the model 3",
        "memory_layers: the bank has [1, 3], the model [2, 3]",
        "prefix_token_ids: the bank has [5], the model [5, 6, 7]",
        "similarity: the bank has dot, the model cosine",
    ):
        assert f"\n  - {line}\n" in str(error.value)
    with pytest.raises(ValueError, match="chunk_size: the bank has 4"):
        made.model.generate(**batch, memory=other.bank, max_new_tokens=2)
    twin = setup()
    assert torch.equal(ask(made, batch, memory=twin.bank).logits, ask(made, batch).logits)


def test_a_bank_of_other_weights() -> None:
    """The same configuration with one weight matrix changed makes another bank."""
    made, other = setup(), setup()
    with torch.no_grad():
        other.model.model.layers[1].self_attn.v_proj.weight.mul_(1.1)
    bank = other.model.encode_documents(other.documents, show_progress=False)
    with pytest.raises(ValueError, match="model_fingerprint: the bank has"):
        ask(made, batch_of(QUESTIONS), memory=bank)


def test_a_plain_cache_with_a_memory() -> None:
    """A cache that cannot keep contexts is refused by type, empty or not."""
    made, batch = setup(), batch_of(QUESTIONS)
    for call in (made.model, made.model.generate):
        with pytest.raises(TypeError, match=r"needs an MSACache.* got DynamicCache"):
            options = {} if call == made.model else {"max_new_tokens": 2}
            call(**batch, memory=made.bank, past_key_values=DynamicCache(), **options)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_nan_weights_when_encoding(layer) -> None:
    """Encoding names the document and the layer where it showed, instead of writing a bank of NaN."""
    made = setup()
    with torch.no_grad():
        made.model.model.layers[layer].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"Document 'a' has NaN or infinite states in layer {max(layer, 2)}"):
        made.model.encode_documents([{"key": "a", "input_ids": [4, 5]}], show_progress=False)


def test_nan_for_one_document_when_encoding() -> None:
    """A token whose embedding is NaN: the document that holds it is named, wherever it stands in its batch."""
    made = setup()
    with torch.no_grad():
        made.model.get_input_embeddings().weight[100] = float("nan")
    documents = [[4, 5, 6, 7], [8], [9] * 7 + [100], [10, 11]]
    with pytest.raises(ValueError, match="Document '2' has NaN"):
        made.model.encode_documents(documents, show_progress=False)


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("options", [{}, {"head_reduction": "max"}, {"query_reduction": "mean"}, {"similarity": "dot"}])
def test_nan_router_weights_when_asking(layer, options) -> None:
    """Scores that are not numbers choose no documents in silence: the layer is named."""
    made, batch = setup(**options), batch_of(QUESTIONS, ROUTES)
    ask(made, batch)
    with torch.no_grad():
        made.model.model.layers[layer].self_attn.router_q_proj.weight[3, 3] = float("nan")
    for call in (made.model, made.model.generate):
        with pytest.raises(ValueError, match=rf"[Ll]ayer {layer}.*NaN"):
            call(**batch, memory=made.bank, **({} if call == made.model else {"max_new_tokens": 2}))


def test_nan_in_the_backbone_when_asking() -> None:
    """NaN from below reaches the first memory layer's scores, which is named."""
    made, batch = setup(), batch_of(QUESTIONS, ROUTES)
    ask(made, batch)
    with torch.no_grad():
        made.model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    made.model.accept_bank(made.bank)  # else other weights than the bank was made with are refused
    with pytest.raises(ValueError, match=r"[Ll]ayer 2.*NaN"):
        ask(made, batch)


def test_nan_at_padding_is_no_error() -> None:
    """What does not route is not scored: a NaN embedding at a padding token leaves the routing alone."""
    made, batch = setup(), batch_of(QUESTIONS, ROUTES)
    output = ask(made, batch)
    embeds = made.model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {name: value for name, value in batch.items() if name != "input_ids"}
    assert_same_routing(ask(made, inputs, inputs_embeds=embeds), output)


def test_models_are_independent() -> None:
    """Two retrofits of one base share no state: routing one leaves the other as it was."""
    first, second = setup(), setup()
    batch = batch_of(QUESTIONS, ROUTES)
    before = ask(second, batch).logits
    with torch.no_grad():
        first.model.model.layers[2].self_attn.router_q_proj.weight.zero_()
    ask(first, batch)
    assert torch.equal(ask(second, batch).logits, before)
