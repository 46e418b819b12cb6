"""The training forward: two forms with one mathematics, which is that of inference, and what each loss trains."""

import gc
import itertools
import math
import random
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from setups import PREFIX, Setup, assert_same, differ, setup, tokens
from steps import DOCUMENTS, Question, Step, assert_same_gradients, assert_same_scores, four, gradients, pad, step
from torch import Tensor
from transformers import BatchEncoding

from msa_hf.model import dense_layer_msa
from msa_hf.model.attention_msa import AttendingPass, EncodingPass, PrefixPass
from msa_hf.model.losses_msa import auxiliary_loss, router_loss
from msa_hf.model.routing_msa import Scoring, score_documents

FAMILIES = [
    ("qwen3", "sdpa"),
    ("gpt_neox", "sdpa"),
    ("phi3", "eager"),
    ("gemma2", "eager"),
    ("gpt_oss", "eager"),
    ("qwen3_moe", "sdpa"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"score_bias": True},
    "shared": {"shared_router": True},
    "shared-bias": {"shared_router": True, "score_bias": True},
}
FORMS = ("pool", "packed")


def spread(options: Sequence[str]) -> list[Any]:
    """Parameters `family, attention, options, form`: all of them for one family; two, on both forms, for the others."""
    return [
        pytest.param(*family, option, form, id="-".join((*family, option, form)))
        for place, family in enumerate(FAMILIES)
        for number, option in enumerate(options)
        for which, form in enumerate(FORMS)
        if place == 0 or (number - place) % len(options) == which
    ]


LOSSES = ("loss", "lm_loss", "aux_loss", "answer_loss")
AUX_LOSSES = ("infonce_decoupled", "infonce", "infonce_decoupled_focal", "infonce_focal")


def trainable(family: str = "qwen3", attention: str = "sdpa", **fields: Any) -> Any:
    """A tiny model in training mode, which weighs every loss."""
    fields = {"answer_loss_weight": 0.5, "aux_loss_weight": 0.7, **fields}
    return setup(family, attention, **fields).model.train()


def active_logits(output: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The logits of every row's active tokens."""
    mask = batch["attention_mask"].bool()
    if "doc_ids" in batch:
        mask &= (batch["doc_ids"] == 0) | (batch["doc_ids"] == -1)
    return [logits[real] for logits, real in zip(output.logits, mask, strict=True)]


# Two forms ------------------------------------------------------------------------------------------------------------


def assert_forms_agree(model: Any, made: Step) -> None:
    batches = [made.form(form) for form in FORMS]
    pool, packed = (model(**batch) for batch in batches)
    for name in LOSSES:
        assert_same(getattr(packed, name), getattr(pool, name))
    assert_same_scores(packed.routing, pool.routing)
    for ours, theirs in zip(active_logits(packed, batches[1]), active_logits(pool, batches[0]), strict=True):
        assert_same(ours, theirs)
    assert_same_gradients(gradients(model, packed.loss), gradients(model, pool.loss))


@pytest.mark.parametrize("options", ["plain", "shared-bias"])
@pytest.mark.parametrize("family, attention", FAMILIES)
def test_packed_rows_equal_a_pool_of_the_same_documents(family, attention, options) -> None:
    """Losses, document scores, choices, logits of the active tokens and every gradient."""
    model = trainable(family, attention, **OPTIONS[options])
    if family == "gpt_oss":
        # The gradient of a sink is a sum of terms that cancel, of which float32 loses 4e-5 on some processors.
        model.set_experts_implementation("eager")  # the grouped product knows no float64
        model = model.double()
    assert_forms_agree(model, step())


@pytest.mark.parametrize(
    "fields",
    [
        *({"aux_loss": form} for form in AUX_LOSSES),
        {"similarity": "dot"},
        {"training_similarity": "dot"},
        {"similarity": "dot", "training_similarity": "cosine"},
        {"head_reduction": "max", "query_reduction": "mean", "chunk_reduction": "mean"},
        {"query_reduction": "last"},
        {"prefix_token_ids": [], "top_k": 9},
        {"chunk_size": 1},
        {"memory_layers": [0, 3], "aux_layers": [0]},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_packed_rows_equal_a_pool_for_every_option(fields) -> None:
    """The same agreement for all forms of the auxiliary loss, similarities, reductions and shapes of the memory."""
    model = trainable(**fields)
    made = step()
    if fields.get("prefix_token_ids") == []:
        made.packed = lambda: Step.packed(made, prefix=())  # type: ignore[method-assign]
    assert_forms_agree(model, made)


@pytest.mark.parametrize("force", [False, True], ids=["routed", "forced"])
def test_rows_may_hold_documents_of_their_own(force) -> None:
    """Rows with different documents, gaps in their numbers and padding between the parts compute what each one's pool
    computes; documents that a row lacks score -inf and lend nothing."""
    model = trainable(score_bias=True)
    documents = tokens(*DOCUMENTS, 2, 5, seed=5)
    parts = [documents[:3], documents[3:], documents[4:5]]
    numbers = [[1, 2, 3], [1, 3, 4, 6, 7], [2]]
    questions = [Question(text, [7, 8], [11, 12], []) for text in tokens(5, 3, 4, seed=6)]
    rows, masks, owners, labels = [], [], [], []
    for question, part, names in zip(questions, parts, numbers, strict=True):
        row, mask, owner = list(PREFIX), [1] * len(PREFIX), [-2] * len(PREFIX)
        for document, name in zip(part, names, strict=True):
            row += [0, *document]
            mask += [0] + [1] * len(document)
            owner += [-1] + [name] * len(document)
        rows.append(row + question.ids)
        masks.append(mask + [1] * len(question.ids))
        owners.append(owner + [0] * len(question.text) + [-1] * 4)
        labels.append([-100] * len(row) + question.labels)
    batch = {"input_ids": pad(rows, 0), "attention_mask": pad(masks, 0), "doc_ids": pad(owners, -1)}
    positives = torch.tensor([[names[-1] - 1] for names in numbers])
    forced = {"force_documents": positives} if force else {}
    packed = model(**batch, labels=pad(labels, -100), positive_docs=positives, **forced)
    logits = active_logits(packed, batch)
    losses = []
    for sample, (question, part, names) in enumerate(zip(questions, parts, numbers, strict=True)):
        question.positives = [len(part) - 1]
        forced = {"force_documents": torch.tensor([question.positives])} if force else {}
        pool = model(**Step(part, [question]).pool(), **forced)
        losses.append(torch.stack([pool.lm_loss, pool.aux_loss]))
        for layer, found in pool.routing.items():
            scores = packed.routing[layer].document_scores[sample]
            there = torch.tensor([name - 1 for name in names])
            assert_same(scores[there], found.document_scores[0])
            absent = torch.ones(len(scores), dtype=torch.bool).index_fill(0, there, False)
            assert bool((scores[absent] == float("-inf")).all())
            chosen = found.documents[0]
            expected = torch.where(chosen >= 0, there[chosen.clamp(min=0)], -1)
            assert torch.equal(packed.routing[layer].documents[sample], expected)
        assert_same(logits[sample], pool.logits[0])
    means = torch.stack(losses).mean(0)  # every row has as many labels
    assert_same(torch.stack([packed.lm_loss, packed.aux_loss]), means)


@pytest.mark.parametrize("form", FORMS)
def test_given_positions_are_used_and_the_defaults_are_their_rule(form) -> None:
    """Documents and prefix from 0, active tokens from prefix + top_k: given explicitly they change nothing, and others
    change the result."""
    model, batch = trainable(), step().form(form)
    first = model.config.first_position
    if form == "pool":
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + first
    else:
        positions = torch.zeros_like(batch["input_ids"])
        for row, owner in enumerate(batch["doc_ids"].tolist()):
            following = {-1: first, -2: 0}
            for column, name in enumerate(owner):
                name = -1 if name == 0 else name
                positions[row, column] = following.get(name, 0)
                following[name] = following.get(name, 0) + 1
    default = model(**batch)
    given = model(**batch, position_ids=positions)
    assert torch.equal(given.loss, default.loss)
    moved = model(**batch, position_ids=positions + torch.arange(positions.shape[1]) % 2)
    assert differ(moved.logits.detach(), default.logits.detach()) > 1e-3


# Inference ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True], ids=["routed", "forced"])
@pytest.mark.parametrize("options", ["bias", "shared-bias"])
@pytest.mark.parametrize("family, attention", FAMILIES)
def test_the_training_forward_is_inference(family, attention, options, force) -> None:
    """In eval mode the pool's logits, scores and choices are those of the same model with the pool as a bank."""
    made = step()
    found: Setup = setup(family, attention, documents=made.documents, **OPTIONS[options])
    model = found.model.eval()
    batch = made.pool()
    forced = {"force_documents": torch.tensor([[3, 0], [1, -1], [5, 2]])} if force else {}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "routing_mask")}
    with torch.no_grad():
        trained = model(**batch, **forced)
        asked = model(**inputs, **forced, memory=found.bank, output_document_scores=True)
    assert_same_scores(trained.routing, asked.routing)
    for ours, theirs in zip(active_logits(trained, batch), active_logits(asked, batch), strict=True):
        assert_same(ours, theirs)
    if force:
        for item in trained.routing.values():
            assert torch.equal(item.documents, forced["force_documents"])


def test_training_similarity_is_for_training_alone() -> None:
    """`training_similarity` decides in the training forward, `similarity` with a bank."""
    made = step()
    scores = {}
    for name, fields in {
        "cosine": {"similarity": "cosine"},
        "dot": {"similarity": "dot"},
        "mixed": {"similarity": "dot", "training_similarity": "cosine"},
    }.items():
        found = setup(documents=made.documents, **fields)
        batch = made.pool()
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "routing_mask")}
        with torch.no_grad():
            trained = found.model(**batch).routing[2].document_scores
            asked = found.model(**inputs, memory=found.bank, output_document_scores=True).routing[2].document_scores
        scores[name] = (trained, asked)
    assert torch.equal(scores["mixed"][0], scores["cosine"][0])
    assert torch.equal(scores["mixed"][1], scores["dot"][1])
    assert differ(scores["dot"][0], scores["cosine"][0]) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_forced_documents_are_attended_to(form) -> None:
    """Forcing what was routed changes nothing, forcing other documents does, and the reader's gradient reaches them."""
    model, batch = trainable(), step().form(form)
    routed = model(**batch)
    # Layers choose for themselves, so with a single memory layer its choice can be forced whole.
    single = trainable(memory_layers=[3])
    chosen = single(**batch).routing[3].documents
    assert torch.equal(single(**batch, force_documents=chosen).loss, single(**batch).loss)
    last = torch.tensor([[5], [5], [5]])
    forced = model(**batch, force_documents=last)
    assert all(torch.equal(item.documents, last) for item in forced.routing.values())
    assert differ(forced.logits.detach(), routed.logits.detach()) > 1e-3
    assert_same(forced.routing[2].document_scores, routed.routing[2].document_scores)
    made = step()
    others = {token for ids in [*made.documents[:5], *(item.ids for item in made.questions), PREFIX] for token in ids}
    own = sorted(set(made.documents[5]) - others)
    for document, reached in ((5, True), (4, False)):
        loss = model(**batch, force_documents=torch.full((3, 1), document)).lm_loss
        rows = gradients(model, loss)["model.embed_tokens.weight"][own].abs().amax(1)
        assert bool((rows > 0).all()) if reached else bool((rows == 0).all())


def test_the_balance_of_experts() -> None:
    """A mixture that reports its router logits does so with a memory, its balancing loss a part of the loss; a training
    step, which would leave that loss out, refuses."""
    made = step()
    found = setup("qwen3_moe", documents=made.documents)
    batch = {name: made.pool()[name] for name in ("input_ids", "attention_mask", "routing_mask", "labels")}
    with torch.no_grad():
        plain = found.model(**batch, memory=found.bank)
        output = found.model(**batch, memory=found.bank, output_router_logits=True)
    assert len(output.router_logits) == 4 and output.aux_loss is None
    assert torch.equal(output.logits, plain.logits) and float(output.loss) > float(plain.loss)
    with pytest.raises(ValueError, match="output_router_logits"):
        found.model(**made.pool(), output_router_logits=True)
    found.model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        found.model(**made.packed())


# A pool's arguments ---------------------------------------------------------------------------------------------------


def test_left_and_right_padding_agree() -> None:
    """Padded on either side the losses, scores and gradients are the same."""
    model, made = trainable(score_bias=True), step()
    right, left = model(**made.pool("right")), model(**made.pool("left"))
    for name in LOSSES:
        assert_same(getattr(left, name), getattr(right, name))
    assert_same_scores(left.routing, right.routing)
    assert_same_gradients(gradients(model, left.loss), gradients(model, right.loss))


def document_forms() -> dict[str, Any]:
    """The documents of `step` in every form that is taken."""
    documents = step().documents
    width = max(map(len, documents))
    right = {
        "input_ids": pad(documents, 99),
        "attention_mask": pad([[1] * len(document) for document in documents], 0),
    }
    left = {
        "input_ids": pad(documents, 99, "left"),
        "attention_mask": pad([[1] * len(document) for document in documents], 0, "left"),
    }
    generator = random.Random(0)
    holes = []
    for document in documents:
        places = sorted(generator.sample(range(width), len(document)))
        row, mask = [99] * width, [0] * width
        for place, token in zip(places, document, strict=True):
            row[place], mask[place] = token, 1
        holes.append((row, mask))
    return {
        "tuples": tuple(map(tuple, documents)),
        "tensors": [torch.tensor(document) for document in documents],
        "int32": [torch.tensor(document, dtype=torch.int32) for document in documents],
        "arrays": [torch.tensor(document).numpy() for document in documents],
        "right-padded": right,
        "left-padded": BatchEncoding(left),
        "holes": {
            "input_ids": torch.tensor([row for row, _ in holes]),
            "attention_mask": torch.tensor([m for _, m in holes]),
        },
        "unpadded lists": {"input_ids": documents, "attention_mask": [[1] * len(document) for document in documents]},
        "padded lists": {name: values.tolist() for name, values in left.items()},
        "ids alone": {"input_ids": documents},
    }


@pytest.mark.parametrize("form", document_forms())
def test_documents_may_come_in_any_form(form) -> None:
    """What a tokenizer returns, padded or not, and lists of anything give the same step, to the bit."""
    model, batch = trainable(), step().pool()
    expected, ours = model(**batch), model(**{**batch, "documents": document_forms()[form]})
    for name in LOSSES:
        assert torch.equal(getattr(ours, name), getattr(expected, name))


def test_one_tensor_of_documents() -> None:
    """Documents of one length as one tensor [N, L]."""
    model, batch = trainable(), step().pool()
    documents = tokens(7, 7, 7, 7, 7, 7, seed=3)
    expected = model(**{**batch, "documents": documents})
    assert torch.equal(model(**{**batch, "documents": torch.tensor(documents)}).loss, expected.loss)


def test_tokens_before_the_first_label_route_by_default() -> None:
    """Without a routing mask the question and its tail route, the answer does not; without labels all tokens do."""
    model, made = trainable(), step()
    batch = made.pool()
    given = batch.pop("routing_mask")
    before = torch.zeros_like(given)
    for row, question in enumerate(made.questions):
        before[row, : len(question.text) + len(question.tail)] = True
    assert torch.equal(model(**batch).loss, model(**batch, routing_mask=before).loss)
    changed = model(**batch, routing_mask=given).logits.detach()
    assert differ(model(**batch).logits.detach(), changed) > 1e-3
    for name in ("labels", "answer_mask"):
        del batch[name]
    everything = batch["attention_mask"].bool()
    assert torch.equal(model(**batch).logits, model(**batch, routing_mask=everything).logits)


def test_a_document_is_scored_alone() -> None:
    """In the first memory layer its score depends neither on its companions in the pool nor on their lengths, up to the
    model's last position."""
    made = step()
    made.documents.append(tokens(256, seed=9)[0])
    model = setup().model
    with torch.no_grad():
        together = model(**made.pool()).routing
        for number, document in enumerate(made.documents):
            batch = {**made.pool(), "documents": [document], "positive_docs": torch.full((3, 1), -1)}
            alone = model(**batch).routing[2]
            assert_same(alone.document_scores[:, 0], together[2].document_scores[:, number])


# Losses ---------------------------------------------------------------------------------------------------------------


def naive_router_loss(scores: list[float], positives: list[int], form: str, tau: float, gamma: float) -> float:
    """The contrastive loss of one sample, term by term from its definition (paper, Eq. 5)."""
    terms = []
    for positive in (number for number in positives if scores[number] > float("-inf")):
        rivals = [
            number
            for number in range(len(scores))
            if number == positive or not form.startswith("infonce_decoupled") or number not in positives
        ]
        weights = {number: math.exp(scores[number] / tau) for number in rivals if scores[number] > float("-inf")}
        probability = weights[positive] / sum(weights.values())
        focus = (1 - probability) ** gamma if form.endswith("focal") else 1.0
        terms.append(-math.log(probability) * focus)
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("tau, gamma", [(0.1, 2.0), (0.5, 1.0)])
@pytest.mark.parametrize("form", AUX_LOSSES)
def test_router_loss_is_its_definition(form, tau, gamma) -> None:
    """Value and slope, for samples with one, some, all and no positives, and with documents, even positive ones, that
    they do not see."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 6, generator=generator) - 0.5
    scores[4, [1, 3]], scores[5] = float("-inf"), float("-inf")
    positives = [[2], [0, 1, 5], list(range(6)), [], [0, 2, 3], [1]]
    mask = torch.tensor([[number in row for number in range(6)] for row in positives])
    scores.requires_grad_()
    ours = router_loss(scores, mask, tau, form, gamma)
    (slopes,) = torch.autograd.grad(ours.sum(), scores)
    for sample, chosen in enumerate(positives):
        row = scores[sample].detach().double().tolist()
        loss = naive_router_loss(row, chosen, form, tau, gamma)
        assert float(ours[sample].detach()) == pytest.approx(loss, rel=1e-5, abs=1e-6)
        for place in range(6):
            sides = [[*row[:place], row[place] + size, *row[place + 1 :]] for size in (1e-5, -1e-5)]
            more, less = (naive_router_loss(side, chosen, form, tau, gamma) for side in sides)
            assert float(slopes[sample, place]) == pytest.approx((more - less) / 2e-5, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("form", AUX_LOSSES)
def test_router_loss_has_finite_gradients(form) -> None:
    """Also without a rival, without a positive, with unseen documents, and where the softmax is saturated."""
    scores = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.5], [0.3, float("-inf"), 0.2]])
    scores.requires_grad_()
    positives = torch.tensor([[True, True, True], [False] * 3, [True, False, False], [True, False, False]])
    loss = router_loss(scores, positives, 0.01, form)
    assert bool(loss.isfinite().all()) and float(loss.detach()[1]) == 0.0
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert bool(gradient.isfinite().all()) and bool((gradient[1] == 0).all()) and float(gradient[3, 1]) == 0.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aux_loss", AUX_LOSSES)
def test_losses_are_what_they_say(aux_loss, form) -> None:
    """From the output's own logits and scores: cross-entropies over labels and answers, the contrastive loss over
    (layer, sample with positives), and their weighted sum."""
    model = trainable(aux_loss=aux_loss, memory_layers=[0, 2, 3], aux_layers=[0, 3], lm_loss_weight=0.3)
    batch = step().form(form)
    batch["answer_mask"][0] = False
    output = model(**batch)
    predictions, labels = output.logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
    terms = -predictions.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    assert_same(output.lm_loss, terms[labels != -100].mean())
    assert_same(output.answer_loss, terms[(labels != -100) & batch["answer_mask"][:, 1:]].mean())
    expected = [
        naive_router_loss(scores.double().tolist(), question.positives, aux_loss, 0.1, 2.0)
        for layer in (0, 3)
        for scores, question in zip(output.routing[layer].document_scores.detach(), step().questions, strict=True)
        if question.positives
    ]
    assert_same(output.aux_loss, torch.tensor(expected).mean())
    assert_same(output.loss, 0.3 * output.lm_loss + 0.7 * output.aux_loss + 0.5 * output.answer_loss)
    assert list(output.routing) == [0, 2, 3]


def test_each_loss_comes_with_its_argument() -> None:
    """No labels: no language loss; no positives: no auxiliary loss; neither: no loss at all. As tuples too."""
    model, batch = trainable(), step().pool()
    labels = {name: batch.pop(name) for name in ("labels", "answer_mask")}
    positives = {"positive_docs": batch.pop("positive_docs")}
    neither = model(**batch)
    assert neither.loss is None and neither.lm_loss is None and neither.aux_loss is None
    assert neither.routing[2].document_scores is not None
    aux = model(**batch, **positives)
    assert aux.lm_loss is None and torch.equal(aux.loss, 0.7 * aux.aux_loss)
    language = model(**batch, labels=labels["labels"])
    assert language.aux_loss is None and language.answer_loss is None
    assert torch.equal(language.loss, language.lm_loss)
    assert torch.equal(model(**batch, labels=labels["labels"], return_dict=False)[0], language.loss)


def test_nothing_labeled_is_no_loss() -> None:
    """A micro-batch without a label or without an answer lends 0, not NaN."""
    model, batch = trainable(), step().pool()
    batch["answer_mask"][:] = False
    output = model(**batch)
    assert float(output.answer_loss.detach()) == 0.0 and bool(output.loss.isfinite())
    batch["labels"][:] = -100
    for items in (None, torch.tensor(0)):
        output = model(**batch, num_items_in_batch=items)
        assert float(output.lm_loss.detach()) == 0.0 and bool(output.loss.isfinite())


@pytest.mark.parametrize("form", FORMS)
def test_samples_without_positives_lend_nothing(form) -> None:
    """The auxiliary loss and its gradients are those of the samples with positives alone; without any it is 0."""
    model, made = trainable(), step()
    together, alone = model(**made.form(form)), model(**made.only(0, 2).form(form))
    assert_same(together.aux_loss, alone.aux_loss)
    assert_same_gradients(gradients(model, together.aux_loss), gradients(model, alone.aux_loss))
    none = model(**made.only(1).form(form) | {"positive_docs": torch.tensor([[-1]])})
    assert float(none.aux_loss.detach()) == 0.0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(model, none.aux_loss).values())


def test_a_sample_without_routing_tokens_lends_nothing() -> None:
    """It attends to the prefix alone, scores -inf, and neither adds to the auxiliary loss nor thins it."""
    model, made = trainable(), step()
    batch = made.pool()
    batch["routing_mask"][2] = False
    output = model(**batch)
    assert bool((output.routing[2].document_scores[2] == float("-inf")).all())
    assert output.routing[2].documents[2].tolist() == [-1, -1]
    assert_same(output.aux_loss, model(**made.only(0).pool()).aux_loss)
    assert all(bool(item.isfinite().all()) for item in gradients(model, output.loss).values())


# What trains what -----------------------------------------------------------------------------------------------------


def router_gradients(found: dict[str, Tensor], model: Any) -> dict[str, float]:
    names = [name for name, _ in model.named_parameters() if "router_" in name]
    return {name: float(found[name].abs().max()) if name in found else 0.0 for name in names}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family, attention", FAMILIES)
def test_the_language_loss_reaches_routers_only_through_the_score_bias(family, attention, form) -> None:
    """Exactly zero without it; with it every router projection and beta learn from the language loss."""
    batch = step().form(form)
    plain = trainable(family, attention)
    found = router_gradients(gradients(plain, plain(**batch).lm_loss), plain)
    assert found and all(size == 0.0 for size in found.values())
    biased = trainable(family, attention, score_bias=True)
    found = router_gradients(gradients(biased, biased(**batch).lm_loss), biased)
    assert sum("score_bias" in name for name in found) == len(biased.config.memory_layers)
    assert all(size > 1e-6 for size in found.values()), found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aux_loss", AUX_LOSSES)
def test_the_auxiliary_loss_trains_routers_and_backbone(aux_loss, form) -> None:
    """Both projections of every layer it averages over, and every layer below them down to the embedding."""
    model = trainable(aux_loss=aux_loss)
    found = gradients(model, model(**step().form(form)).aux_loss)
    assert all(size > 1e-6 for size in router_gradients(found, model).values())
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ):
        assert float(found[name].abs().max()) > 1e-6
    assert not any(name.startswith("model.layers.3.mlp") and bool((item != 0).any()) for name, item in found.items())


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_the_slope_of_the_loss(shared) -> None:
    """For every kind of parameter the gradient predicts how the loss changes along it: no path is cut off.

    The model is in float64, but scores and losses are float32, which leaves the slope three digits.
    """
    model = trainable(score_bias=True, shared_router=shared).double()
    batch = step().pool()
    found = gradients(model, model(**batch).loss)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    kinds = ("embed_tokens", "layers.2.self_attn.k_proj", "layers.1.self_attn.v_proj", "router_")
    names = [name for name in parameters if any(kind in name for kind in kinds)]
    assert len(names) == (5 if shared else 9)
    for name in names:
        direction = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
        size = 5e-2 if "score_bias" in name else 2e-4
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name] += sign * size * direction
                sides.append(float(model(**batch).loss))
                parameters[name] -= sign * size * direction
        slope = (sides[0] - sides[1]) / (2 * size)
        torch.testing.assert_close(float((found[name] * direction).sum()), slope, rtol=1e-2, atol=2e-6 / size)


# Gradient accumulation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[1], [0, 2, 3]]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_add_up(form, parts) -> None:
    """With `num_items_in_batch` the losses of micro-batches of any size add up to the whole batch's, gradients too."""
    model, made = trainable(score_bias=True), four()
    whole = made.form(form)
    items = (whole["labels"] != -100).sum()
    expected = model(**whole, num_items_in_batch=items)
    losses = {name: 0.0 for name in LOSSES}
    summed: dict[str, Tensor] = {}
    for part in parts:
        output = model(**made.only(*part).form(form), num_items_in_batch=int(items) if len(part) > 1 else items)
        for name in LOSSES:
            losses[name] += getattr(output, name).item()
        for name, gradient in gradients(model, output.loss).items():
            summed[name] = summed.get(name, 0) + gradient
    for name in LOSSES:
        torch.testing.assert_close(losses[name], getattr(expected, name).item(), rtol=1e-5, atol=0.0)
    assert_same_gradients(summed, gradients(model, expected.loss))


def test_the_language_loss_of_a_whole_batch_is_its_mean() -> None:
    """Counted over all labels at once, `num_items_in_batch` is the mean that the loss is without it."""
    model, batch = trainable(), four().pool()
    items = (batch["labels"] != -100).sum()
    given, default = model(**batch, num_items_in_batch=items), model(**batch)
    assert_same(given.lm_loss, default.lm_loss)
    assert_same(given.answer_loss, default.answer_loss)


def test_the_auxiliary_loss_weighs_samples_by_their_labels() -> None:
    """With `num_items_in_batch` each sample counts by its share of the labeled tokens that have a prediction."""
    generator = torch.Generator().manual_seed(0)
    config = trainable().config
    scores = {layer: torch.rand(3, 4, generator=generator) for layer in config.aux_layers}
    positives = torch.tensor([[True, False, False, False], [False] * 4, [False, True, True, False]])
    labels = torch.tensor([[9, 9, 9, -100], [-100, 9, 9, 9], [-100, -100, -100, 9]])  # 2, 3 and 1 that are predicted
    each = torch.stack([router_loss(item, positives) for item in scores.values()]).mean(0)
    total = auxiliary_loss(scores, positives, config, labels, num_items_in_batch=10)
    torch.testing.assert_close(total, (2 * each[0] + 1 * each[2]) / 10)


# Gradient checkpointing -----------------------------------------------------------------------------------------------


def checkpoint(model: Any, **kwargs: Any) -> None:
    """Turn gradient checkpointing on; the older transformers has no other name for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None)


@pytest.mark.parametrize("family, attention, options, form", spread([*OPTIONS]))
def test_gradient_checkpointing_changes_no_gradient(family, attention, options, form) -> None:
    """Every gradient, those of routers and score bias too, as without it."""
    model, batch = trainable(family, attention, **OPTIONS[options]), step().form(form)
    plain = gradients(model, model(**batch).loss)
    checkpoint(model)
    assert_same_gradients(gradients(model, model(**batch).loss), plain, tolerance=1e-6)


def test_gradient_checkpointing_repeats_dropout() -> None:
    """Attention dropout falls the same way when a layer runs again."""
    model, batch = trainable(attention="eager"), step().pool()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    torch.manual_seed(0)
    plain = model(**batch)
    torch.manual_seed(1)
    assert float(model(**batch).loss.detach()) != float(plain.loss.detach())
    expected = gradients(model, plain.loss)
    checkpoint(model)
    torch.manual_seed(0)
    assert_same_gradients(gradients(model, model(**batch).loss), expected, tolerance=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS)
def test_reentrant_checkpointing_is_refused(form, options) -> None:
    """It would lose the documents' gradients, routers or not; without gradients it does no harm."""
    model, batch = trainable(**OPTIONS[options]), step().form(form)
    checkpoint(model, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        model(**batch)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PyTorch, that there will be no gradients
        assert bool(model(**batch).loss.isfinite())


@pytest.mark.parametrize("what", ["loss", None])
@pytest.mark.parametrize("form", [*FORMS, "bank"])
def test_gradient_checkpointing_keeps_nothing_alive(form, what, monkeypatch) -> None:
    """Whether all, some or none of a step is differentiated, its tensors go away with its output."""
    made = step()
    found = setup(documents=made.documents, score_bias=True)
    model = found.model.train()
    checkpoint(model)
    passes: list[weakref.ref] = []
    for kind in (PrefixPass, EncodingPass, AttendingPass):

        def remember(self: Any, *args: Any, old: Any = kind.__init__, **kwargs: Any) -> None:
            old(self, *args, **kwargs)
            passes.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", remember)
    if form == "bank":
        batch = {name: made.pool()[name] for name in ("input_ids", "attention_mask", "routing_mask", "labels")}
        output = model(**batch, memory=found.bank)
    else:
        output = model(**made.form(form))
    if what is not None:
        getattr(output, what).backward()
    assert passes
    del output
    gc.collect()
    assert not any(reference() is not None for reference in passes)


def test_a_bank_can_be_trained_against_under_gradient_checkpointing() -> None:
    """The reader's gradients with a frozen bank, too, are those without checkpointing."""
    made = step()
    found = setup(documents=made.documents, score_bias=True)
    model = found.model.train()
    batch = {name: made.pool()[name] for name in ("input_ids", "attention_mask", "routing_mask", "labels")}
    plain = gradients(model, model(**batch, memory=found.bank).loss)
    assert any("router_q_proj" in name for name in plain)
    checkpoint(model)
    assert_same_gradients(gradients(model, model(**batch, memory=found.bank).loss), plain, tolerance=1e-6)


# Autocast -------------------------------------------------------------------------------------------------------------


# Near-ties may fall otherwise in bf16, so documents are given; the experts of a mixture, which may too, cannot be.
FORCED = torch.tensor([[0, 4], [3, -1], [5, 2]])
DENSE = [(family, attention) for family, attention in FAMILIES if family not in ("gpt_oss", "qwen3_moe")]


def error(rough: Tensor, exact: Tensor) -> float:
    """Root of the mean squared error, relative to the numbers' own."""
    return float((rough - exact).norm() / exact.norm())


@torch.no_grad()
def own_error(model: Any, batch: dict[str, Any]) -> float:
    """The error of bf16 autocast in the logits of the questions alone, without a memory."""
    inputs, real = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()
    exact = model(**inputs).logits[real]
    with torch.autocast("cpu", torch.bfloat16):
        return error(model(**inputs).logits[real], exact)


@pytest.mark.parametrize("options", ["shared-bias"])
@pytest.mark.parametrize("family, attention", DENSE)
def test_autocast_stays_near_float32(family, attention, options) -> None:
    """Under bf16 autocast logits are as near those in float32 as the base's are, losses and scores are float32 and off
    by a few roundings of bf16."""
    model, batch = trainable(family, attention, **OPTIONS[options]), step().pool()
    with torch.no_grad():
        exact = model(**batch, force_documents=FORCED)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**batch, force_documents=FORCED)
    real = batch["attention_mask"].bool()
    assert rough.logits.dtype == torch.bfloat16
    assert 0 < error(rough.logits[real], exact.logits[real]) <= 2 * own_error(model, batch)
    for name in LOSSES:
        assert getattr(rough, name).dtype == torch.float32
        torch.testing.assert_close(getattr(rough, name), getattr(exact, name), rtol=2**-5, atol=0.0)
    for layer, item in rough.routing.items():
        assert item.document_scores.dtype == torch.float32
        torch.testing.assert_close(item.document_scores, exact.routing[layer].document_scores, rtol=0.0, atol=2**-5)


@pytest.mark.parametrize("family, attention, options, form", spread(["bias", "shared-bias"]))
def test_autocast_has_finite_gradients(family, attention, options, form) -> None:
    """For every parameter that has one in float32."""
    model, batch = trainable(family, attention, **OPTIONS[options]), step().form(form)
    exact = gradients(model, model(**batch, force_documents=FORCED).loss)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch, force_documents=FORCED)
    found = gradients(model, rough.loss)
    assert found.keys() == exact.keys()
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


@pytest.mark.parametrize(
    "fields", [{}, {"head_reduction": "max"}, {"similarity": "dot"}, {"chunk_reduction": "mean"}], ids=str
)
def test_autocast_does_not_score_in_bf16(fields, monkeypatch) -> None:
    """Given the router's queries and keys, the scores are those computed in float64, to float32's accuracy."""
    made = step()
    model = trainable(**fields)
    seen = []

    def spy(queries: Tensor, mask: Tensor, keys: Tensor, offsets: Tensor, scoring: Scoring) -> Tensor:
        scores = score_documents(queries, mask, keys, offsets, scoring)
        seen.append((queries.detach(), mask, keys.detach(), offsets, scoring, scores.detach()))
        return scores

    monkeypatch.setattr(dense_layer_msa, "score_documents", spy)
    with torch.autocast("cpu", torch.bfloat16):
        model(**made.pool())
    assert len(seen) == 2
    for queries, mask, keys, offsets, scoring, scores in seen:
        assert queries.dtype == torch.bfloat16
        queries, keys = queries.double(), keys.double().unflatten(1, (-1, queries.shape[-1]))
        keys = keys.repeat_interleave(queries.shape[2] // keys.shape[1], dim=1)
        if scoring.similarity == "cosine":
            queries = queries / queries.norm(dim=-1, keepdim=True)
        else:
            queries = queries * queries.shape[-1] ** -0.5
        heads = torch.einsum("bthd,chd->btch", queries, keys)
        tokens_scored = heads.amax(-1) if scoring.heads == "max" else heads.mean(-1)
        chunks = tokens_scored.masked_fill(~mask[..., None], float("-inf")).amax(1)
        parts = [chunks[:, start:end] for start, end in itertools.pairwise(offsets)]
        expected = torch.stack([p.amax(1) if scoring.chunks == "max" else p.mean(1) for p in parts], dim=1)
        assert scores.dtype == torch.float32
        assert_same(scores, expected, tolerance=1e-6)


def test_checkpointing_under_autocast() -> None:
    """A layer that runs again under autocast gives the same gradients."""
    model, batch = trainable(score_bias=True), step().pool()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**batch).loss
    expected = gradients(model, plain)
    checkpoint(model)
    with torch.autocast("cpu", torch.bfloat16):
        again = model(**batch).loss
    assert_same_gradients(gradients(model, again), expected, tolerance=1e-6)


@pytest.mark.parametrize("options", ["bias"])
@pytest.mark.parametrize("family, attention", DENSE)
def test_a_float32_model_asks_its_memory_under_autocast(family, attention, options) -> None:
    """With a bank made outside autocast and one made inside, prefill and a decoded token are as near those in float32
    as the base's are."""
    made = step()
    found = setup(family, attention, documents=made.documents, **OPTIONS[options])
    batch = {name: made.pool("left")[name] for name in ("input_ids", "attention_mask", "routing_mask")}
    following = torch.tensor([[9], [10], [11]])
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)

    def ask(bank: Any) -> list[Tensor]:
        output = found.model(**batch, memory=bank, force_documents=FORCED)
        later = found.model(input_ids=following, attention_mask=mask, past_key_values=output.past_key_values)
        return [output.logits[batch["attention_mask"].bool()], later.logits]

    with torch.no_grad():
        exact, allowed = ask(found.bank), 2 * own_error(found.model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            inside = found.model.encode_documents(made.documents, show_progress=False)
            for bank in (found.bank, inside):
                for rough, logits in zip(ask(bank), exact, strict=True):
                    assert 0 < error(rough, logits) <= allowed


# Bad input ------------------------------------------------------------------------------------------------------------


def change(**changes: Any) -> Any:
    """A change of a batch's arguments; functions are given the batch."""
    return lambda batch: {
        **batch,
        **{name: value(batch) if callable(value) else value for name, value in changes.items()},
    }


def filled(name: str, row: int, value: int, first: int = 0) -> Any:
    """A row of an argument, filled from a column on."""

    def fill(batch: dict[str, Any]) -> Tensor:
        tensor = batch[name].clone()
        tensor[row, first:] = value
        return tensor

    return fill


LONG = tokens(257, seed=1)[0]
BOTH = [
    ("a positive out of range", change(positive_docs=torch.tensor([[6], [0], [0]])), "document 6.*0 to 5"),
    ("a positive below -1", change(positive_docs=torch.tensor([[0], [-2], [0]])), "sample 1 names document -2"),
    ("positives of another batch", change(positive_docs=torch.tensor([[0]])), r"must be \[3, n\]"),
    ("positives in floats", change(positive_docs=torch.zeros(3, 1)), "document numbers.*float32"),
    ("flat positives", change(positive_docs=torch.tensor([0, 0, 0])), r"must be \[3, n\]"),
    ("a memory", change(memory=object()), "leave `memory` out"),
    ("a cache", change(past_key_values=object()), "no cache"),
    ("no input_ids", change(input_ids=None), "takes `input_ids`"),
    ("both forms", change(doc_ids=torch.zeros(3, 4).long(), documents=[[3]]), "not both"),
    ("only padding", change(attention_mask=filled("attention_mask", 1, 0)), "Question 1 of the batch is only padding"),
    ("other labels", change(labels=torch.zeros(3, 2).long()), "`labels` must be"),
    ("other mask", change(attention_mask=torch.ones(2, 5).long()), "`attention_mask` must be"),
    ("answers without labels", change(labels=None), "`answer_mask`"),
    ("a forced document out of range", change(force_documents=torch.tensor([[6], [0], [0]])), "document 6"),
    ("a document forced twice", change(force_documents=torch.tensor([[1, 1], [0, 1], [0, 1]])), "twice"),
]
POOL = [
    ("no documents", change(documents=[]), "`documents` is empty"),
    ("an empty document", change(documents=[[3], []]), "Document 1 of `documents` has no tokens"),
    (
        "only padding in a document",
        change(
            documents={"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}
        ),
        "Document 1 of `documents` has no tokens",
    ),
    (
        "a document too long",
        change(documents=[[3], LONG, [4]]),
        "Document 1 of `documents` has 257 tokens.*256 positions",
    ),
    ("one document", change(documents=[3, 4, 5]), "Document 0 of `documents` must be a list of token ids, got int"),
    ("texts", change(documents=["text"]), "Document 0 .* got str"),
    ("one text", change(documents="text"), "got str"),
    ("a mapping of something else", change(documents={"ids": [[3]]}), "no `input_ids`, only"),
    ("an iterator", change(documents=lambda batch: iter([[3]])), "`documents` must be"),
    ("nothing before the labels", change(routing_mask=None, labels=filled("labels", 2, 5)), "Question 2.*first label"),
    ("other routing mask", change(routing_mask=torch.ones(3, 2).bool()), "`routing_mask` must be"),
]
PACKED = [
    ("an unknown token class", change(doc_ids=filled("doc_ids", 0, -3, 34)), "`doc_ids` holds -3"),
    ("unequal prefixes", change(doc_ids=filled("doc_ids", 1, 0, 2)), "equally many template tokens"),
    ("no documents", change(doc_ids=lambda batch: torch.zeros_like(batch["doc_ids"])), "at least one document"),
    ("no active tokens", change(attention_mask=lambda batch: (batch["doc_ids"] > 0).long()), "tokens that route"),
    ("a routing mask", change(routing_mask=lambda batch: batch["doc_ids"] == 0), "leave `routing_mask` out"),
    ("a positive of another row", change(doc_ids=lambda batch: without(batch, 0, 5)), "sample 0 names document 4"),
    (
        "a forced document of another row",
        change(doc_ids=lambda batch: without(batch, 2, 2), force_documents=torch.tensor([[1], [1], [1]])),
        "sample 2 names document 1",
    ),
]


def without(batch: dict[str, Any], row: int, name: int) -> Tensor:
    """`doc_ids` with a document of a row made part of the question."""
    doc_ids = batch["doc_ids"].clone()
    doc_ids[row, doc_ids[row] == name] = -1
    return doc_ids


def refused(form: str, change_batch: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trainable()(**change_batch(step().form(form)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change_batch, message", [case[1:] for case in BOTH], ids=[case[0] for case in BOTH])
def test_bad_steps_are_refused(change_batch, message, form) -> None:
    """On either form, naming the cause."""
    refused(form, change_batch, message)


@pytest.mark.parametrize("change_batch, message", [case[1:] for case in POOL], ids=[case[0] for case in POOL])
def test_bad_pools_are_refused(change_batch, message) -> None:
    """Naming the cause, and the document where one is at fault."""
    refused("pool", change_batch, message)


@pytest.mark.parametrize("change_batch, message", [case[1:] for case in PACKED], ids=[case[0] for case in PACKED])
def test_bad_rows_are_refused(change_batch, message) -> None:
    """Naming the cause, and document and row where one is at fault."""
    refused("packed", change_batch, message)


def test_a_packed_document_beyond_the_positions_is_refused() -> None:
    """Naming document and row; at the limit it is taken."""
    model = trainable()
    for length, message in ((256, None), (257, "Document 1 of row 1 has 257 tokens, but the model has 256 positions")):
        rows = [[*PREFIX, *[9] * 4, *[9] * other, 8] for other in (2, length)]
        owners = [[-2] * 3 + [1] * 4 + [2] * other + [0] for other in (2, length)]
        batch = {"input_ids": pad(rows, 0), "doc_ids": pad(owners, -1)}
        batch["attention_mask"] = pad([[1] * len(row) for row in rows], 0)
        if message is None:
            assert model(**batch).routing[2].document_scores.shape == (2, 2)
        else:
            with pytest.raises(ValueError, match=message):
                model(**batch)


@pytest.mark.parametrize("name", ["positive_docs", "answer_mask"])
@pytest.mark.parametrize("memory", [False, True])
def test_training_arguments_without_documents_are_refused(name, memory) -> None:
    """Rather than dropped, with a bank and without."""
    made = step()
    found = setup(documents=made.documents)
    batch = made.pool()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels", name)}
    with pytest.raises(ValueError, match=f"`{name}` belongs to a training step"):
        found.model(**inputs, **({"memory": found.bank} if memory else {}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["router_q_proj", "router_k_proj"])
def test_scores_that_are_not_numbers_are_refused(name, form) -> None:
    """A NaN in either projection stops the step and names its layer, instead of dropping out of the loss."""
    model = trainable()
    with torch.no_grad():
        getattr(model.model.layers[3].self_attn, name).weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="router scores of layer 3 are NaN"):
        model(**step().form(form))
