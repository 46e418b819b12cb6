"""Memory Interleave: rounds of choosing documents and reading their texts, then the answer (paper, 3.5)."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from ..model.compat_msa import CACHE, CACHE_NAMES
from ..model.configuration_msa import full_attention_layers
from ..model.modes_msa import evaluating
from ..model.positions_msa import position_limit
from .constrained import IdAutomaton, TokenTexts
from .protocol import PUBLISHED, DocumentIds, PromptProtocol, Segment
from .streaming import AnswerStreamer
from .trace import Dropped, Round, RoutedDocument, Stage, Trace
from .transcript_feeder import TranscriptFeeder

SELECTIONS = ("generate", "constrained", "router")
LAYER_SCORES = ("mean", "max")
# What the router appends in a round where the caller does not say how many: what measured best (docs/experiments.md).
ROUTER_DOCUMENTS = 1


@dataclass(frozen=True)
class Source(RoutedDocument):
    """A document that was read for an answer; `score` is the routers' of the round it was read in, None where no layer
    had chosen it."""

    round: int = 0


@dataclass
class Answer:
    """An answer and where it comes from.

    Attributes:
        text: without opening and end marker.
        documents: those that were read, in reading order.
        trace: how it came about.
        token_ids: what the model wrote in the answer stage, opening and end included.
    """

    text: str
    documents: list[Source]
    trace: Trace
    token_ids: list[int]


@dataclass
class _Sample:
    """One question on its way."""

    question: str
    segments: list[Segment]
    closing: list[Segment]
    trace: Trace
    documents: list[Source] = field(default_factory=list)
    fed: int = 0
    ended: bool = False

    @property
    def read(self) -> set[int]:
        return {source.position for source in self.documents}


class MemoryInterleave:
    """Asks a model questions of a bank.

    A question takes up to `max_rounds` rounds. In each the transcript so far is prefilled and routed (routing tokens:
    the question and the last block of texts), documents are selected and their texts appended. A round that brings no
    new document ends retrieval, and so may the model. Then the answer is generated. Every question of a batch goes its
    own way through the rounds, so that an answer does not depend on what else is asked.

    Transcripts are canonical: whatever tokens the model chose to name documents with, the transcript goes on with the
    protocol's own spelling of those that were read. Hence all three selections, and training with
    `PromptProtocol.transcript`, make the same sequences.

    **Reuse of keys and values.** Every round routes anew, and behind the first memory layer the states of all tokens
    depend on the documents chosen. So the published procedure, which is the default here, prefills the longer
    transcript again: the question's tokens see the documents of the new round, and both the question and the last block
    choose them. What the cache holds is used where that changes nothing: while the model names documents, and for the
    answer where no block was added since (and all questions of the batch are at that point). `reuse_cache=True` is the
    fast way, and computes something else: a block is appended to the cache as a new turn, earlier tokens keep what they
    saw when they were prefilled, and only tokens of that turn, the block, choose documents. The first round is the same
    both ways.

    Args:
        model: `MSAForCausalLM`.
        tokenizer: of the model.
        bank: documents that `protocol` wrapped (`protocol.encode_corpus`), with their texts.
        protocol: what the model was trained with.
        max_rounds: at most so many; 0 answers from the pooled memory alone.
        select: `"generate"`: the model names documents freely, decoded greedily. `"constrained"`: it can only spell ids
            of documents that some layer chose in this round, and names one at least in the first. `"router"`: the best
            documents by router score, without generating.
        documents_per_round: at most so many are read in a round. Default: 1 for `"router"`, else the model's choice.
        max_id_tokens: at most so many tokens to name documents with, per round.
        max_new_tokens: of the answer, unless `ask` is told otherwise.
        exclude_read: documents that were read are no candidates any more of `"constrained"` and `"router"`. No document
            is read twice either way; without this a round may select nothing new, which ends retrieval.
        layer_scores: over the layers, a document's score is the `"mean"` (a layer that did not choose it counts with
            the lowest score it reported) or the `"max"`.
        router_may_end: with `"router"`, the model ends retrieval where, from the second round on, it would rather begin
            the end marker than the id of any document the router would choose.
        reuse_cache: the fast way, see above.
        max_context_tokens: of a whole transcript with its answer; texts that would not fit are not read. Default: what
            the model has positions for.

    Raises:
        ValueError: for an option out of range, a tokenizer without the protocol's special tokens, or `reuse_cache` on a
            model with windowed layers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Any,
        protocol: PromptProtocol = PUBLISHED,
        max_rounds: int = 3,
        select: str = "router",
        documents_per_round: int | None = None,
        max_id_tokens: int = 128,
        max_new_tokens: int = 128,
        exclude_read: bool = True,
        layer_scores: str = "mean",
        router_may_end: bool = True,
        reuse_cache: bool = False,
        max_context_tokens: int | None = None,
    ) -> None:
        if select not in SELECTIONS:
            raise ValueError(f"`select` must be one of {SELECTIONS}, got {select!r}.")
        if layer_scores not in LAYER_SCORES:
            raise ValueError(f"`layer_scores` must be one of {LAYER_SCORES}, got {layer_scores!r}.")
        least = {"max_rounds": 0, "documents_per_round": 1, "max_id_tokens": 1, "max_new_tokens": 1}
        for name, lowest in least.items():
            value = locals()[name]
            if value is not None and (type(value) is not int or value < lowest):
                raise ValueError(f"`{name}` must be an integer of at least {lowest}, got {value!r}.")
        if reuse_cache and len(full_attention_layers(model.config)) < model.config.num_hidden_layers:
            raise ValueError(
                "`reuse_cache` needs full attention in every layer: a windowed cache cannot be rolled back."
            )
        protocol.check_tokenizer(tokenizer)
        wanted, found = protocol.prefix_token_ids(tokenizer), list(model.config.prefix_token_ids)
        if wanted != found:
            warnings.warn(
                f"The model's `prefix_token_ids` are {found}, the protocol's {wanted}; was it made for another?",
                stacklevel=2,
            )
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank = bank.snapshot() if hasattr(bank, "snapshot") else bank
        self.ids = DocumentIds(bank)
        self.protocol = protocol
        self.max_rounds = max_rounds
        self.select = select
        self.documents_per_round = documents_per_round
        self.max_id_tokens = max_id_tokens
        self.max_new_tokens = max_new_tokens
        self.exclude_read = exclude_read
        self.layer_scores = layer_scores
        self.router_may_end = router_may_end
        self.reuse_cache = reuse_cache
        positions = position_limit(model.config)
        fits = None if positions is None else positions - model.config.first_position
        limits = [limit for limit in (fits, max_context_tokens) if limit is not None]
        self.max_context_tokens = min(limits) if limits else None
        self._texts: TokenTexts | None = None
        end = protocol.encode(tokenizer, protocol.answer_end.replace("{", "{{").replace("}", "}}"))
        self._answer_end: int | None = end[0] if len(end) == 1 else None

    def ask(
        self,
        questions: str | Sequence[str],
        streamer: BaseStreamer | None = None,
        generation_config: Any = None,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Any:
        """Answer a question, or many.

        Args:
            questions: one text, or several.
            streamer: gets the tokens of the answer and nothing else; takes a single question.
            generation_config: of the answer stage. Default: the model's, but greedy unless `do_sample` is passed.
            batch_size: questions at once. The answers do not depend on it.
            generate_kwargs: further options of `generate` for the answer stage: sampling, beams, `max_new_tokens`, ...

        Returns:
            `Answer`, or a list of them.

        Raises:
            ValueError: for an empty question, one that is too long, or options that make no sense here.
        """
        try:
            texts = [questions] if isinstance(questions, str) else list(questions)
            if streamer is not None and len(texts) != 1:
                raise ValueError(f"A streamer takes one question at a time, got {len(texts)}.")
            if batch_size < 1:
                raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
            options = self._answer_options(generation_config, generate_kwargs)
            samples = [self._sample(number, text, options) for number, text in enumerate(texts)]
            answers: list[Answer] = []
            with evaluating(self.model):
                for start in range(0, len(samples), batch_size):
                    answers += self._ask(samples[start : start + batch_size], streamer, options)
        except BaseException:
            if streamer is not None:
                streamer.end()  # or whoever reads the stream would wait for ever
            raise
        return answers[0] if isinstance(questions, str) else answers

    # Rounds -----------------------------------------------------------------------------------------------------------

    def _sample(self, number: int, question: str, options: dict[str, Any]) -> _Sample:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"Question {number} is {question!r}; a question is a text that is not empty.")
        sample = _Sample(
            question,
            self.protocol.prompt_segments(self.tokenizer, question),
            self.protocol.closing_segments(self.tokenizer, question),
            Trace(question, self.select),
        )
        longest = options["generation_config"].max_new_tokens
        if (missing := -self._room(sample, options)) > 0:
            raise ValueError(
                f"Question {number} is too long: with an answer of {longest} tokens its transcript "
                f"is {missing} tokens longer than the {self.max_context_tokens} that fit."
            )
        return sample

    def _room(self, sample: _Sample, options: dict[str, Any]) -> int:
        """Tokens that can still be added to a transcript; counts the answer."""
        if self.max_context_tokens is None:
            return torch.iinfo(torch.int64).max
        taken = sum(len(segment.input_ids) for segment in (*sample.segments, *sample.closing))
        return self.max_context_tokens - taken - options["generation_config"].max_new_tokens

    def _ask(self, samples: list[_Sample], streamer: Any, options: dict[str, Any]) -> list[Answer]:
        feed = TranscriptFeeder(self.model, self.bank, self._pad_id, samples, self.reuse_cache)
        for number in range(self.max_rounds):
            active = [sample for sample in samples if not sample.ended]
            if not active:
                break
            self._round(feed, active, number, options)
        for sample in samples:
            sample.segments += sample.closing
        return self._answer(feed, samples, streamer, options)

    def _round(self, feed: TranscriptFeeder, samples: list[_Sample], number: int, options: dict[str, Any]) -> None:
        start = time.perf_counter()
        logits, routing, fed = feed.prefill(samples)
        chosen = {
            layer: list(zip(found.documents.tolist(), found.scores.tolist(), strict=True))
            for layer, found in routing.items()
        }
        seconds = time.perf_counter() - start
        rounds: list[Round] = []
        names: dict[int, tuple[int, str]] = {}
        for row, sample in enumerate(samples):
            found = {layer: self._choices(*rows[feed.row(sample)], names) for layer, rows in chosen.items()}
            item = Round(found, self._combined(found), stages={"prefill": Stage(fed[row], seconds)})
            sample.trace.rounds.append(item)
            rounds.append(item)

        start = time.perf_counter()
        if self.select == "router":
            written: list[list[int]] = [[] for _ in samples]
            selected = [
                self._routed(sample, item, scores, number)
                for sample, item, scores in zip(samples, rounds, logits, strict=True)
            ]
        else:
            written = self._write(feed, logits, samples, rounds)
            selected = []
            for item, tokens in zip(rounds, written, strict=True):
                item.generated = self._decode(tokens)
                selected.append(self.protocol.named_ids(item.generated))
        for sample, item, (ids, marker) in zip(samples, rounds, selected, strict=True):
            self._read(sample, item, ids, number, options)
            if not item.read:
                item.ended = "no new document" if marker != self.protocol.retrieval_end else "the model said so"
            elif marker == self.protocol.retrieval_end:
                item.ended = "the model said so"
            elif number + 1 == self.max_rounds:
                item.ended = f"max_rounds={self.max_rounds}"
            sample.ended = bool(item.ended)
        seconds = time.perf_counter() - start
        for item, tokens in zip(rounds, written, strict=True):
            item.stages["select"] = Stage(len(tokens), seconds)

    def _choices(
        self, documents: list[int], scores: list[float], names: dict[int, tuple[int, str]]
    ) -> list[RoutedDocument]:
        """What a layer chose; `names` keeps ids and keys that were looked up, as the layers choose much the same."""
        chosen = []
        for position, score in zip(documents, scores, strict=True):
            if position >= 0:
                if position not in names:
                    document = self.bank.documents[position]
                    names[position] = (DocumentIds.of(position, document), document.key)
                chosen.append(RoutedDocument(position, *names[position], score))
        return chosen

    def _combined(self, chosen: dict[int, list[RoutedDocument]]) -> list[RoutedDocument]:
        """The union of what the layers chose, best first; equal scores by position."""
        names: dict[int, RoutedDocument] = {}
        by_layer: list[dict[int, float]] = []
        for documents in chosen.values():
            names |= {choice.position: choice for choice in documents}
            by_layer.append({choice.position: choice.score for choice in documents if choice.score is not None})
        lowest = [min(scores.values(), default=0.0) for scores in by_layer]

        def score(position: int) -> float:
            if self.layer_scores == "max":
                return max(scores[position] for scores in by_layer if position in scores)
            return sum(scores.get(position, low) for scores, low in zip(by_layer, lowest, strict=True)) / len(by_layer)

        union = [RoutedDocument(item.position, item.id, item.key, score(position)) for position, item in names.items()]
        return sorted(union, key=lambda item: (-(item.score or 0.0), item.position))

    def _candidates(self, sample: _Sample, item: Round) -> list[RoutedDocument]:
        return [choice for choice in item.combined if not (self.exclude_read and choice.position in sample.read)]

    def _routed(self, sample: _Sample, item: Round, logits: Tensor, number: int) -> tuple[list[int], str | None]:
        """The router's ids, and the end marker instead where the model would rather say that."""
        ids = [choice.id for choice in self._candidates(sample, item)[: self.documents_per_round or ROUTER_DOCUMENTS]]
        if number and ids and self.router_may_end:
            end = sample.closing[0].input_ids[0]
            begins = {self.protocol.ids_segment(self.tokenizer, [id]).input_ids[0] for id in ids}
            if end not in begins and bool(logits[end] > logits[list(begins)].max()):
                return [], self.protocol.retrieval_end
        return ids, None

    def _read(self, sample: _Sample, item: Round, ids: list[int], number: int, options: dict[str, Any]) -> None:
        """Append the texts of the documents named; note those that cannot be."""
        item.named = ids
        limit = self.documents_per_round or (ROUTER_DOCUMENTS if self.select == "router" else len(ids))
        scores = {choice.position: choice.score for choice in item.combined}
        found: list[tuple[Source, str]] = []
        taken = sample.read
        for id in ids:
            position = self.ids.position_of(id)
            if position is None:
                item.dropped.append(Dropped(id, "unknown"))
            elif position in taken:
                item.dropped.append(Dropped(id, "duplicate"))
            elif len(found) == limit:
                item.dropped.append(Dropped(id, "above documents_per_round"))
            elif (text := self.bank.documents[position].text) is None:
                item.dropped.append(Dropped(id, "without text"))
            else:
                taken.add(position)
                key = self.bank.documents[position].key
                found.append((Source(position, id, key, scores.get(position), number), text))
        room = self._room(sample, options)
        if found and _tokens(self._appended(found)) > room:
            fitting: list[tuple[Source, str]] = []
            for document in found:
                if _tokens(self._appended([*fitting, document])) <= room:
                    fitting.append(document)
                else:
                    item.dropped.append(Dropped(document[0].id, "no room"))
            found = fitting
        if not found:
            return
        sample.segments += self._appended(found)
        sample.documents += [source for source, _ in found]
        item.read = [RoutedDocument(source.position, source.id, source.key, source.score) for source, _ in found]
        item.text = self.protocol.block_text((source.id, text) for source, text in found)

    def _appended(self, documents: list[tuple[Source, str]]) -> list[Segment]:
        pairs = [(source.id, text) for source, text in documents]
        return [
            self.protocol.ids_segment(self.tokenizer, [id for id, _ in pairs]),
            self.protocol.block_segment(self.tokenizer, pairs),
        ]

    # Naming -----------------------------------------------------------------------------------------------------------

    def _write(
        self, feed: TranscriptFeeder, logits: Tensor, samples: list[_Sample], rounds: list[Round]
    ) -> list[list[int]]:
        """What the model writes to name documents, greedily: per sample the tokens up to and with the marker."""
        markers = (self.protocol.ids_end, self.protocol.retrieval_end)
        stops = self._stop_ids(None)
        automata: list[IdAutomaton] = []
        if self.select == "constrained":
            self._texts = self._texts or TokenTexts(self.protocol, self.tokenizer)
            for sample, item in zip(samples, rounds, strict=True):
                ids = [choice.id for choice in self._candidates(sample, item)]
                # How alike documents are grows with the bank: that none fits is to be said of texts that were read.
                first = len(sample.trace.rounds) == 1
                automata.append(IdAutomaton(self.protocol, ids, self.documents_per_round or len(ids), not first))
        states = [automaton.start() for automaton in automata]
        written: list[list[int]] = [[] for _ in samples]
        writing = set(range(len(samples)))
        for step in range(self.max_id_tokens):
            if step:
                logits = feed.step([tokens[-1] if tokens else self._pad_id for tokens in written], samples)
            best = logits.argmax(-1).tolist()
            for row in sorted(writing):
                token = best[row]
                if automata:
                    assert self._texts is not None
                    following = automata[row].allowed(states[row], self._texts)
                    if not following:  # the vocabulary cannot spell any candidate
                        writing.discard(row)
                        continue
                    numbers = list(following)
                    token = numbers[int(logits[row, numbers].argmax())]
                    states[row] = following[token]
                written[row].append(token)
                if any(marker in self._decode(written[row]) for marker in markers):
                    writing.discard(row)
                elif token in stops:
                    written[row].pop()
                    writing.discard(row)
            if not writing:
                break
        feed.rewind()
        return written

    def _decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        known = pad is not None and 0 <= pad < self.model.config.vocab_size  # else it has no row in the embedding
        return pad if known else next(iter(sorted(self._stop_ids(None))), 0)

    def _stop_ids(self, given: Any) -> set[int]:
        """Tokens that end a text: those given or the model's, and the protocol's end of the answer."""
        given = self.model.generation_config.eos_token_id if given is None else given
        stops = set(given if isinstance(given, list | tuple) else [] if given is None else [given])
        return stops | ({self._answer_end} if self._answer_end is not None else set())

    def _end_of(self, tokens: list[int], stops: Sequence[int]) -> int:
        """Where an answer's end marker stands, or the number of its tokens."""
        for place, token in enumerate(tokens):
            by_text = self._answer_end is None and self.protocol.answer_end in self._decode(tokens[: place + 1])
            if token in stops or by_text:
                return place
        return len(tokens)

    # Answering --------------------------------------------------------------------------------------------------------

    def _answer_options(self, generation_config: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate` for the answer stage."""
        for name in ("memory", "routing_mask", "force_documents", "input_ids", "attention_mask", *CACHE_NAMES):
            if given.get(name) is not None:
                raise ValueError(f"`{name}` is set by the rounds; it cannot be passed to ask().")
        if given.get("max_length") is not None:
            raise ValueError("`max_length` would count the transcript; pass `max_new_tokens`.")
        config = copy.deepcopy(self.model.generation_config if generation_config is None else generation_config)
        if generation_config is None and "do_sample" not in given:
            config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        if generation_config is None:
            config.max_new_tokens = None  # the model's own knows nothing of answers
        config.max_length = None
        options = config.update(**given)
        config.use_cache = True  # the rounds hand theirs on; Trainer saves models that say False
        config.max_new_tokens = config.max_new_tokens or self.max_new_tokens
        if (config.num_return_sequences or 1) > 1:
            raise ValueError("`num_return_sequences` must be 1: a question has one answer; ask it several times.")
        config.return_dict_in_generate = False
        config.eos_token_id = sorted(self._stop_ids(config.eos_token_id)) or None
        config.pad_token_id = self._pad_id if config.pad_token_id is None else config.pad_token_id
        if self._answer_end is None:
            stops = config.stop_strings or []
            config.stop_strings = [*([stops] if isinstance(stops, str) else stops), self.protocol.answer_end]
        if config.stop_strings:
            options["tokenizer"] = self.tokenizer
        return {**options, "generation_config": config}

    def _answer(
        self, feed: TranscriptFeeder, samples: list[_Sample], streamer: Any, options: dict[str, Any]
    ) -> list[Answer]:
        start = time.perf_counter()
        config = options["generation_config"]
        stops = config.eos_token_id or []
        inputs, fed = feed.turn(samples)
        if streamer is not None:
            streamer = AnswerStreamer(streamer, self.tokenizer, self.protocol, stops)
        width = inputs["input_ids"].shape[1]
        if CACHE in inputs and (beams := config.num_beams or 1) > 1:
            inputs[CACHE].batch_repeat_interleave(beams)  # generate() expands all inputs but a cache
        output = self.model.generate(**inputs, memory=self.bank, streamer=streamer, **options)
        rows = output[:, width:].tolist()
        seconds = time.perf_counter() - start
        answers = []
        for sample, row, count in zip(samples, rows, fed, strict=True):
            stop = self._end_of(row, stops)
            shown = row[:stop] if self._answer_end is not None else row[: stop + 1]
            text = self.protocol.answer_text(self._decode(shown, skip_special_tokens=True))
            sample.trace.answer = text
            sample.trace.stages["answer"] = Stage(count + len(row[: stop + 1]), seconds)
            answers.append(Answer(text, sample.documents, sample.trace, row[: stop + 1]))
        return answers


def _tokens(segments: list[Segment]) -> int:
    return sum(len(segment.input_ids) for segment in segments)
