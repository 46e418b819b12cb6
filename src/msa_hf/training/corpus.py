"""Routers trained against every document of a corpus, the layers below them as they are.

Pools of thousands of documents show a router few of those that it will take for others among hundreds of thousands. A
router key is a linear map of the mean of a chunk's hidden states, and a router query one of the token that routes. So
where nothing but routers is trained, a corpus is encoded once, and every step scores its questions against all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..model.chunks_msa import pool_chunks
from ..model.configuration_msa import MSAConfig
from ..model.dense_layer_msa import DenseLayer, layers_over
from ..model.modeling_msa import MSAForCausalLM
from ..model.modes_msa import evaluating
from ..model.retrofit_msa import attention_layers
from ..model.routing_msa import SIMILARITIES, Scoring, normalize_heads, reduce_queries, routing_request, scoring_of
from ..model.tokenizing_msa import tokenize
from .centering import batches_by_length
from .contrastive import RoutingPass, Temperatures, TokenRows, encode_rows, run_rows, training_similarity
from .router_inputs import router_inputs

TILE = 200_000  # chunks projected at a time
WARMUP = 20  # steps
TEMPERATURE_RATE = 0.01

NumberedRows: TypeAlias = tuple[Tensor, TokenRows]  # numbers [n] int64 of texts, and their rows


@dataclass(frozen=True)
class CorpusStates:
    """The hidden states that the routing keys of a corpus are linear maps of.

    The documents stand in an order of their own, those of most chunks first, and their chunks in layers: all first
    chunks, then the second ones of the documents that have two, and so on. So the best chunk of every document is a
    maximum of prefixes.

    Attributes:
        order: [N] int64, the documents in this order. `rows`: [N] int64, the place of every document in it.
        counts: documents that have a first chunk, a second one, and so on.
        states: memory layer -> [C, hidden], means of the chunks' hidden states.
    """

    order: Tensor
    rows: Tensor
    counts: tuple[int, ...]
    states: dict[int, Tensor]

    def best(self, chunks: Tensor) -> Tensor:
        """The scores of chunks [..., C] as the best one of every document, [..., N]."""
        first, *further = chunks.split(self.counts, dim=-1)
        found = first.clone()
        for part in further:
            there = found[..., : part.shape[-1]]
            torch.maximum(there, part, out=there)
        return found


@torch.no_grad()
def corpus_states(model: MSAForCausalLM, parts: Iterable[NumberedRows]) -> CorpusStates:
    """The states of a corpus that is encoded part by part.

    Args:
        model: with a memory; its own dtype is kept.
        parts: numbers of documents [n] int64 with their rows. Every document from 0 on is in one of them.

    Raises:
        ValueError: for no documents.
    """
    size = model.config.chunk_size
    found: dict[int, list[Tensor]] = {layer: [] for layer in model.config.memory_layers}
    numbers, lengths = [], []
    for places, rows in parts:
        pooled = router_inputs(model, rows, partial(_pooled, rows.lengths, size))
        for layer, states in pooled.items():
            found[layer].append(states)
        numbers.append(places)
        lengths.append(rows.lengths)
    if not numbers:
        raise ValueError("A corpus needs documents; there are none.")
    number, chunks = torch.cat(numbers), -(-torch.cat(lengths) // size)
    order = chunks.argsort(descending=True, stable=True)
    first = (chunks.cumsum(0) - chunks)[order]
    counts = tuple(int((chunks > further).sum()) for further in range(int(chunks.max())))
    places = torch.cat([first[:count] + further for further, count in enumerate(counts)])
    rows_of = torch.empty_like(number)
    rows_of[number[order]] = torch.arange(len(number), device=number.device)
    return CorpusStates(
        number[order], rows_of, counts, {layer: torch.cat(found.pop(layer))[places] for layer in [*found]}
    )


def _pooled(lengths: Tensor, size: int, states: Tensor) -> Tensor:
    return pool_chunks(states, lengths, size).to(states.dtype)


class _QuestionPass(RoutingPass):
    """Keeps what the routers read of the token that routes, and ends at the last memory layer."""

    inputs: dict[int, Tensor]
    last: Tensor

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        super().enter(module, hidden_states)
        layer = self.place(module)
        self.inputs[layer] = hidden_states[torch.arange(len(self.last), device=self.last.device), self.last]


@torch.no_grad()
def question_states(
    model: MSAForCausalLM, questions: TokenRows, pool: Mapping[int, DenseLayer], lengths: Tensor
) -> dict[int, Tensor]:
    """Memory layer -> [Q, hidden], what its router reads of the tokens that route.

    Args:
        questions: whose last tokens route.
        pool: layer -> what the memory layers hold of some documents, in order, to which the questions attend.
        lengths: [N] int64, tokens of these documents.

    Raises:
        ValueError: for a model whose questions are not routed by their last token.
    """
    config = model.config
    scoring = _scoring(config)
    routing = _QuestionPass(
        config=config,
        layers=layers_over(pool, lengths, config.chunk_size),
        prefix={},
        request=routing_request(config, scoring, questions.routes, len(lengths)),
    )
    routing.inputs, routing.last = {}, questions.lengths - 1
    positions = torch.arange(questions.ids.shape[1], device=questions.ids.device) + config.first_position
    run_rows(model, questions, positions, routing)
    routing.finish()
    return routing.inputs


def _scoring(config: MSAConfig) -> Scoring:
    """The scoring of a model by which a corpus can be scored: one vector per question, the best chunk of a document."""
    scoring = scoring_of(config, training_similarity(config))
    wanted = Scoring(scoring.similarity, heads="mean", tokens="last", chunks="max")
    if scoring != wanted:
        raise ValueError(
            "Routers are trained against a corpus where the last token of a question routes, by the mean over its "
            "heads and the best chunk of a document (`query_reduction='last'`, `head_reduction='mean'`, "
            f"`chunk_reduction='max'`); this model has {config.query_reduction!r}, {config.head_reduction!r} and "
            f"{config.chunk_reduction!r}."
        )
    return scoring


class CorpusRouters(nn.Module):
    """The router projections of a model as float32 masters that are trained by themselves.

    Args:
        model: with router projections.

    Raises:
        ValueError: for a model without them, and for one that does not score as `question_states` wants it.
    """

    def __init__(self, model: MSAForCausalLM) -> None:
        super().__init__()
        config = model.config
        if config.shared_router:
            raise ValueError("A model with `shared_router` has no router projections to train.")
        layers = attention_layers(model)
        self.similarity = _scoring(config).similarity
        self.layers = tuple(config.memory_layers)
        modules = [layers[layer] for layer in self.layers]
        self.width = int(modules[0].head_dim)
        self.queries = nn.ParameterList([module.router_q_proj.weight.detach().float().clone() for module in modules])
        self.keys = nn.ParameterList([module.router_k_proj.weight.detach().float().clone() for module in modules])

    @torch.no_grad()
    def write(self, model: MSAForCausalLM) -> None:
        """Put the projections as they are now into a model."""
        layers = attention_layers(model)
        for layer, query, key in zip(self.layers, self.queries, self.keys, strict=True):
            layers[layer].router_q_proj.weight.copy_(query)
            layers[layer].router_k_proj.weight.copy_(key)

    def query_of(self, place: int, states: Tensor) -> Tensor:
        """States [Q, hidden] of a layer as vectors [Q, G * D] float32 whose products with keys are the scores."""
        heads = nn.functional.linear(states.float(), self.queries[place]).unflatten(-1, (-1, self.width))
        groups = self.keys[place].shape[0] // self.width
        return reduce_queries(heads[:, None], groups, self.similarity)[:, 0].flatten(1)

    def key_of(self, place: int, states: Tensor) -> Tensor:
        """States [..., hidden] of a layer's chunks as routing keys [..., G * D] float32."""
        keys = nn.functional.linear(states.float(), self.keys[place])
        if not SIMILARITIES[self.similarity].normalized_keys:
            return keys
        return normalize_heads(keys.unflatten(-1, (-1, self.width))).flatten(-2)

    @torch.no_grad()
    def scores(self, corpus: CorpusStates, questions: Mapping[int, Tensor]) -> list[Tensor]:
        """The scores [Q, N] float32 of all documents by every memory layer, in the order of the corpus."""
        return [
            corpus.best(
                torch.cat([query @ self.key_of(place, part).T for part in corpus.states[layer].split(TILE)], dim=1)
            )
            for place, (layer, query) in enumerate(self._queries(questions))
        ]

    def scores_at(self, corpus: CorpusStates, questions: Mapping[int, Tensor], rows: Tensor) -> list[Tensor]:
        """The same of the documents that stand at `rows`, with gradients: [Q, C] of every layer.

        Args:
            rows: [Q, C] int64, or [C] for the same documents of all questions.
        """
        counts = torch.tensor(corpus.counts, device=rows.device)
        there = rows[..., None] < counts  # [..., C, R]
        chunks = (rows[..., None] + (counts.cumsum(0) - counts))[there]
        found = []
        for place, (layer, query) in enumerate(self._queries(questions)):
            keys = self.key_of(place, corpus.states[layer][chunks])
            if rows.dim() == 1:
                products = query @ keys.T
                mask = there.expand(len(query), *there.shape)
            else:
                products = (keys * query[there.nonzero()[:, 0]]).sum(1)
                mask = there
            scores = products.new_full(mask.shape, float("-inf")).masked_scatter(mask, products)
            found.append(scores.amax(-1))
        return found

    def _queries(self, questions: Mapping[int, Tensor]) -> list[tuple[int, Tensor]]:
        return [(layer, self.query_of(place, questions[layer])) for place, layer in enumerate(self.layers)]


def corpus_loss(
    routers: CorpusRouters,
    corpus: CorpusStates,
    questions: Mapping[int, Tensor],
    gold: Tensor,
    temperatures: Tensor,
    teacher: Callable[[Tensor], Tensor] | None = None,
    share: Tensor | float = 0.0,
    near: Tensor | None = None,
    excluded: Tensor | None = None,
    candidates: int = 128,
    sampled: int = 8192,
    layer_weight: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Cross entropy over all documents of a corpus, of the layers' sum and of each layer alone.

    The documents that score highest, the gold ones and those named have their own part of the denominator; all others
    together that of a sample of them, in expectation. Both have gradients: where only the highest had, scores would
    rise everywhere.

    Args:
        questions: memory layer -> [Q, hidden], of `question_states`.
        gold: [Q, m] int64, rows of the documents that answer, -1 behind them; at least one for every question.
        temperatures: [1 + layers], of `Temperatures`.
        teacher: gives its logits [Q, C] of the documents at rows [Q, C].
        share: of the teacher in the target, per question ([Q]) or of all.
        near: [Q, n] int64, rows of further documents such as the teacher's best.
        excluded: [N] bool, documents that no question is compared with.
        candidates: documents that score highest.
        sampled: documents, the same for all questions.

    Returns:
        The loss, scalar float32, and the share of the questions whose best document is a gold one.

    Raises:
        ValueError: for a sample in which the candidates of one question could be all there is.
    """
    total = torch.stack(routers.scores(corpus, questions)).sum(0)
    allowed = torch.ones_like(total[0], dtype=torch.bool) if excluded is None else ~excluded
    gold = torch.where(gold < 0, gold[:, :1], gold)
    best = total.masked_fill_(~allowed, float("-inf")).topk(min(candidates, total.shape[1]), dim=1).indices
    rows = torch.cat([gold, best, *([] if near is None else [near])], dim=1).sort(dim=1).values
    again = ~allowed[rows]
    again[:, 1:] |= rows[:, 1:] == rows[:, :-1]
    is_gold = (rows[:, :, None] == gold[:, None, :]).any(2) & ~again
    targets = is_gold / is_gold.sum(1, keepdim=True).clamp(min=1)
    if teacher is not None:
        weight = torch.as_tensor(share, device=rows.device, dtype=targets.dtype).reshape(-1, 1)
        soft = teacher(rows).float().masked_fill(again, float("-inf")).softmax(1)
        targets = (1 - weight) * targets + weight * soft
    found = routers.scores_at(corpus, questions, rows)

    sample = allowed.nonzero().squeeze(1)
    if sampled <= rows.shape[1] and sampled < len(sample):
        raise ValueError(f"`sampled` must be more than the {rows.shape[1]} candidates of a question, got {sampled}.")
    sample = sample[torch.randperm(len(sample), device=rows.device)[:sampled]]
    listed = torch.zeros_like(total, dtype=torch.bool).scatter_(1, rows, True)[:, sample]
    others = routers.scores_at(corpus, questions, sample)
    beside = allowed.sum() - (~again).sum(1, keepdim=True)  # documents that are no candidates
    stand_for = (beside / (~listed).sum(1, keepdim=True)).log()
    stand_for = stand_for.masked_fill(beside == 0, float("-inf"))

    def cross_entropy(scores: Tensor, others: Tensor, temperature: Tensor) -> Tensor:
        logits = (scores / temperature).masked_fill(again, float("-inf"))
        # A large number below all scores: infinite ones have no gradient.
        rest = (others / temperature).masked_fill(listed, -1e4).logsumexp(1, keepdim=True) + stand_for
        log_shares = torch.cat([logits, rest], dim=1).log_softmax(1)[:, :-1].masked_fill(again, 0.0)
        return -(targets * log_shares).sum(1).mean()

    summed = torch.stack(found).sum(0)
    loss = cross_entropy(summed, torch.stack(others).sum(0), temperatures[0])
    if layer_weight and len(found) > 1:
        single = [cross_entropy(*item) for item in zip(found, others, temperatures[1:], strict=True)]
        loss = loss + layer_weight * torch.stack(single).mean()
    first = summed.masked_fill(again, float("-inf")).argmax(1, keepdim=True)
    return loss, is_gold.gather(1, first).float().mean()


def numbered_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_tokens: int = 512, batch_tokens: int = 16_384
) -> list[NumberedRows]:
    """Texts as rows with their numbers, shortest first, in parts.

    Args:
        max_tokens: of a text, cut behind them.
        batch_tokens: per part, padding included.

    Raises:
        ValueError: for a text without a token.
    """
    rows = [tokenize(tokenizer, text)[:max_tokens] for text in texts]
    for number, ids in enumerate(rows):
        if not ids:
            raise ValueError(f"Text {number} has no tokens; leave it out.")
    return batches_by_length(rows, batch_tokens)


def train_on_corpus(
    model: MSAForCausalLM,
    documents: Sequence[NumberedRows],
    questions: Sequence[NumberedRows],
    gold: Sequence[Sequence[int]],
    steps: int = 400,
    batch_size: int = 512,
    learning_rate: float = 3e-4,
    among: int = 50_000,
    after_step: Callable[[int, float, float], None] | None = None,
    show_progress: bool = True,
) -> None:
    """Train a model's routers against all documents of a corpus; nothing else of it changes.

    For routers that pools have trained (`contrastive_step`, `msa-hf train`). Encode banks anew afterwards.

    Args:
        model: with a memory and router projections, whose questions route by their last token.
        documents, questions: of `numbered_rows`.
        gold: of each question the numbers of the documents that answer it, at least one.
        steps: of the optimizer, the rate falling as a cosine.
        batch_size: questions of a step.
        learning_rate: of the projections.
        among: documents to which questions attend while what their routers read is taken down.
        after_step: gets the number of steps done, the loss, and the share of questions whose best document answers.
        show_progress: show a bar.

    Raises:
        ValueError: for numbers out of range, no questions, a question without a document, or with one that there is
            not; for routers that training made no numbers; and as the functions used do. The model is then as it was.
    """
    device = model.device
    documents, questions = ([_on(device, part) for part in parts] for parts in (documents, questions))
    routers = CorpusRouters(model)
    for name, count in (("steps", steps), ("batch_size", batch_size), ("among", among)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"`learning_rate` must be above 0 and finite, got {learning_rate}.")
    there, asked_for = (sum(len(numbers) for numbers, _ in parts) for parts in (documents, questions))
    if len(gold) != asked_for:
        raise ValueError(f"`gold` has {len(gold)} entries for {asked_for} questions.")
    if not gold:
        raise ValueError("There are no questions to train on.")
    for number, places in enumerate(gold):
        if there and (not places or min(places) < 0 or max(places) >= there):
            raise ValueError(f"Question {number} is answered by documents {list(places)} of {there}.")
    with evaluating(model):
        corpus = corpus_states(model, documents)
    widest = max(map(len, gold))
    wanted = torch.tensor([[*places, *[-1] * (widest - len(places))] for places in gold], device=device)
    wanted = corpus.rows[wanted.clamp(min=0)].masked_fill(wanted < 0, -1)
    with evaluating(model):
        states = _states_of(model, questions, documents, among)
    temperatures = Temperatures(len(model.config.memory_layers)).to(device)
    groups = [
        {"params": list(routers.parameters()), "lr": learning_rate},
        {"params": list(temperatures.parameters()), "lr": TEMPERATURE_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_shape, steps))
    for step in tqdm(range(steps), "training routers", disable=not show_progress):
        chosen = torch.randint(len(gold), (batch_size,), device=device)
        asked = {layer: rows[chosen] for layer, rows in states.items()}
        loss, hits = corpus_loss(routers, corpus, asked, wanted[chosen], temperatures(), layer_weight=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(routers.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if after_step is not None:
            after_step(step + 1, float(loss.detach()), float(hits))
    if not all(bool(weight.isfinite().all()) for weight in routers.parameters()):
        raise ValueError(
            "Training made routers that are no numbers; the model is as it was. Lower `learning_rate`, which was "
            f"{learning_rate}."
        )
    routers.write(model)
    model.config.routers_trained = True


def _on(device: torch.device, part: NumberedRows) -> NumberedRows:
    numbers, rows = part
    return numbers.to(device), TokenRows(rows.ids.to(device), rows.lengths.to(device), rows.skipped)


def _states_of(
    model: MSAForCausalLM, questions: Sequence[NumberedRows], documents: Sequence[NumberedRows], among: int
) -> dict[int, Tensor]:
    """The states that routers read of the questions, in the order of their numbers, among some of the documents."""
    found: list[dict[int, DenseLayer]] = []
    lengths: list[Tensor] = []
    pick = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        for place in pick:
            if sum(map(len, lengths)) < among:
                found.append(encode_rows(model, documents[place][1]))
                lengths.append(documents[place][1].lengths)
    pool = {
        layer: DenseLayer(
            torch.cat([part[layer].routing_keys for part in found]),
            torch.cat([part[layer].pooled_kv for part in found]),
        )
        for layer in found[0]
    }
    parts = [question_states(model, rows, pool, torch.cat(lengths)) for _, rows in questions]
    back = torch.cat([numbers for numbers, _ in questions]).argsort()
    return {layer: torch.cat([part[layer] for part in parts])[back] for layer in parts[0]}


def _shape(steps: int, step: int) -> float:
    """A warm-up, and then half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))) * min((step + 1) / WARMUP, 1.0)
