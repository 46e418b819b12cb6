"""Memory Interleave: rounds of choosing documents and reading their texts, then the answer (paper, 3.5)."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..model.compiled_msa import compiling
from ..model.configuration_msa import full_attention_layers
from ..model.interface_msa import check_interface
from ..model.memory_msa import Memory, Snapshots
from ..model.modeling_msa import MSAForCausalLM
from ..model.modes_msa import evaluating
from ..model.options_msa import STATIC
from ..model.positions_msa import position_limit
from .answering import Answering, GenerateOptions
from .combining import LAYER_SCORES, choices_on_host, combine_layers
from .document_ids import DocumentIds
from .follow_up import standing_alone
from .prompting import Said, asked_of, messages_of, prompting_of, recent_text
from .protocol import PUBLISHED, PromptProtocol, Segment
from .routed_document import RoutedDocument
from .selectors import Asked, SelectionRound, selector_named
from .trace import NO_ROOM, Dropped, Round, Stage, Trace
from .transcript_feeder import TranscriptFeeder

if TYPE_CHECKING:
    from ..retrieval import FusionWeights


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
        prompt_tokens: of the transcript that the answer follows, texts that were read among them.
    """

    text: str
    documents: list[Source]
    trace: Trace
    token_ids: list[int]
    prompt_tokens: int = 0


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
            documents by router score, without generating. `"hybrid"`: the best by a fusion of router, lexical index and
            vectors, of those that the bank has (docs/retrieval.md).
        documents_per_round: at most so many are read in a round. Default: 1 for `"router"` and `"hybrid"`, else the
            model's choice.
        max_id_tokens: at most so many tokens to name documents with, per round.
        max_new_tokens: of the answer, unless `ask` is told otherwise.
        exclude_read: documents that were read are no candidates any more, but of `"generate"`. No document
            is read twice either way; without this a round may select nothing new, which ends retrieval.
        layer_scores: over the layers, a document's score is the `"mean"` (a layer that did not choose it counts with
            the lowest score it reported) or the `"max"`.
        router_may_end: with `"router"`, the model ends retrieval where, from the second round on, it would rather begin
            the end marker than the id of any document the router would choose.
        reuse_cache: the fast way, see above.
        max_context_tokens: of a whole transcript with its answer; texts that would not fit are not read. Default: what
            the model has positions for.
        cache_implementation: `"static"`: shapes stay, and where transformers compiles, as on CUDA devices, prompts and
            single tokens are compiled on first use, which takes a minute or so. Default: `"dynamic"`, it grows.
        compile_config: how, as of `generate`.
        fusion: of `"hybrid"`, as of `Searcher`: weights, or `"reciprocal"`. Default: `fusion.json` beside the bank, or
            beside the checkpoint where it is for what the bank has, else reciprocal ranks.

    Raises:
        ValueError: for an option out of range, a tokenizer without the protocol's special tokens, or `reuse_cache` on a
            model with windowed layers.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        bank: Memory | Snapshots,
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
        cache_implementation: str | None = None,
        compile_config: CompileConfig | None = None,
        fusion: FusionWeights | str | None = None,
    ) -> None:
        check_interface(model)
        selector = selector_named(select)
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
        if cache_implementation not in (None, "dynamic", STATIC):
            raise ValueError(f"`cache_implementation` must be 'dynamic' or 'static', got {cache_implementation!r}.")
        if reuse_cache and cache_implementation == STATIC:
            raise ValueError("`reuse_cache` lets one cache grow from round to round, which a static one cannot.")
        protocol.check_tokenizer(tokenizer)
        wanted, found = protocol.prefix_token_ids(tokenizer), list(model.config.prefix_token_ids)
        if wanted != found:
            warnings.warn(
                f"The model's `prefix_token_ids` are {found}, the protocol's {wanted}; was it made for another?",
                stacklevel=2,
            )
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank = bank.snapshot()
        self.ids = DocumentIds(bank)
        self.protocol = protocol
        self.prompting = prompting_of(tokenizer, protocol)
        self.max_rounds = max_rounds
        self.select = select
        self.documents_per_round = documents_per_round
        self.max_id_tokens = max_id_tokens
        self.max_new_tokens = max_new_tokens
        self.exclude_read = exclude_read
        self.layer_scores = layer_scores
        self.router_may_end = router_may_end
        self.reuse_cache = reuse_cache
        self.fusion = fusion
        self.cache_implementation = cache_implementation
        self.compile_config = compile_config
        positions = position_limit(model.config)
        fits = None if positions is None else positions - model.config.first_position
        limits = [limit for limit in (fits, max_context_tokens) if limit is not None]
        self.max_context_tokens = min(limits) if limits else None
        self._selector = selector(self)
        self.answering = Answering(model, tokenizer, protocol)

    def ask(
        self,
        questions: Said | Sequence[Said],
        streamer: BaseStreamer | None = None,
        generation_config: GenerationConfig | None = None,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Any:
        """Answer a question, or many.

        Args:
            questions: a text, or the messages of a conversation (mappings with `role` and `content`) that ends with a
                question; or several of either. The last messages before a question are part of it, where the routers
                find better with them (`standing_alone`) and they fit.
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
            asked, alone = asked_of(questions)
            if streamer is not None and len(asked) != 1:
                raise ValueError(f"A streamer takes one question at a time, got {len(asked)}.")
            if batch_size < 1:
                raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
            options = self.answering.options(generation_config, generate_kwargs, self.max_new_tokens)
            texts = [item if isinstance(item, str) else self._standing_alone(item, options) for item in asked]
            samples = [self._sample(number, text, options) for number, text in enumerate(texts)]
            config: GenerationConfig = options["generation_config"]
            if static := (config.cache_implementation or self.cache_implementation) == STATIC:
                config.cache_implementation = None  # the rounds make it
                config.compile_config = config.compile_config or self.compile_config
            answers: list[Answer] = []
            with evaluating(self.model):
                for start in range(0, len(samples), batch_size):
                    answers += self._ask(samples[start : start + batch_size], streamer, options, static)
        except BaseException:
            if streamer is not None:
                streamer.end()  # or whoever reads the stream would wait for ever
            raise
        return answers[0] if alone else answers

    # Rounds -----------------------------------------------------------------------------------------------------------

    def room(self, said: Said, max_new_tokens: int | None = None) -> int:
        """Tokens that the model's positions leave beside a question and its answer; below 0: it cannot be asked."""
        options = self.answering.options(None, {}, max_new_tokens or self.max_new_tokens)
        together = self._room(self._opened(recent_text(said)), options)
        return together if together >= 0 else self._room(self._opened(messages_of(said)[-1]["content"]), options)

    def _standing_alone(self, said: Said, options: GenerateOptions) -> str:
        if self._room(self._opened(recent_text(said)), options) < 0:
            return messages_of(said)[-1]["content"]
        return standing_alone(self.model, self.bank, self.prompting, said, self.layer_scores)

    def _opened(self, question: str) -> _Sample:
        return _Sample(
            question,
            self.protocol.prompt_segments(self.tokenizer, question),
            self.protocol.closing_segments(self.tokenizer, question),
            Trace(question, self.select),
        )

    def _sample(self, number: int, question: str, options: GenerateOptions) -> _Sample:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"Question {number} is {question!r}; a question is a text that is not empty.")
        sample = self._opened(question)
        longest = options["generation_config"].max_new_tokens
        if (missing := -self._room(sample, options)) > 0:
            raise ValueError(
                f"Question {number} is too long: with an answer of {longest} tokens its transcript "
                f"is {missing} tokens longer than the {self.max_context_tokens} that fit."
            )
        return sample

    def _room(self, sample: _Sample, options: GenerateOptions) -> int:
        """Tokens that can still be added to a transcript; counts the answer."""
        if self.max_context_tokens is None:
            return torch.iinfo(torch.int64).max
        taken = sum(len(segment.input_ids) for segment in (*sample.segments, *sample.closing))
        return self.max_context_tokens - taken - options["generation_config"].max_new_tokens

    def _ask(
        self, samples: list[_Sample], streamer: BaseStreamer | None, options: GenerateOptions, static: bool
    ) -> list[Answer]:
        config: GenerationConfig = options["generation_config"]
        behind = max(self.max_id_tokens, config.max_new_tokens)
        pad = self.answering.pad_id
        feed = TranscriptFeeder(self.model, self.bank, pad, samples, self.reuse_cache, static, behind)
        with compiling(self.model, config.compile_config) if static else contextlib.nullcontext():
            for number in range(self.max_rounds):
                active = [sample for sample in samples if not sample.ended]
                if not active:
                    break
                self._round(feed, active, number, options)
            for sample in samples:
                sample.segments += sample.closing
            answers = self._answer(feed, samples, streamer, options)
        feed.leave_cache()
        return answers

    def _round(self, feed: TranscriptFeeder, samples: list[_Sample], number: int, options: GenerateOptions) -> None:
        start = time.perf_counter()
        logits, routing, fed = feed.prefill(samples)
        chosen = choices_on_host(routing, self.model.device)
        seconds = time.perf_counter() - start
        rounds: list[Round] = []
        mine = [feed.row(sample) for sample in samples]
        names = self._names(rows[row][0] for rows in chosen.values() for row in mine)
        for row, sample in enumerate(samples):
            found = {layer: self._choices(*rows[feed.row(sample)], names) for layer, rows in chosen.items()}
            item = Round(found, combine_layers(found, self.layer_scores), stages={"prefill": Stage(fed[row], seconds)})
            sample.trace.rounds.append(item)
            rounds.append(item)

        start = time.perf_counter()
        asked = [
            Asked(sample.question, self._candidates(sample, item), frozenset(sample.read))
            for sample, item in zip(samples, rounds, strict=True)
        ]
        selected = self._selector.select(
            SelectionRound(
                number,
                asked,
                logits,
                step=lambda tokens: feed.step(tokens, samples),
                rewind=feed.rewind,
                pad_id=self.answering.pad_id,
                stops=frozenset(self.answering.stop_ids()),
            )
        )
        for sample, item, choice in zip(samples, rounds, selected, strict=True):
            item.generated = choice.text
            self._read(sample, item, choice.ids, number, options)
            if not item.read:
                item.ended = "the model said so" if choice.ended else "no new document"
            elif choice.ended:
                item.ended = "the model said so"
            elif number + 1 == self.max_rounds:
                item.ended = f"max_rounds={self.max_rounds}"
            sample.ended = bool(item.ended)
        seconds = time.perf_counter() - start
        for item, choice in zip(rounds, selected, strict=True):
            item.stages["select"] = Stage(len(choice.tokens), seconds)

    def _names(self, choices: Iterable[list[int]]) -> dict[int, tuple[int, str]]:
        """Ids and keys of all documents that layers chose, which choose much the same."""
        positions = sorted({position for chosen in choices for position in chosen if position >= 0})
        found = zip(positions, self.bank.documents.at(positions), strict=True)
        return {position: (DocumentIds.of(position, document), document.key) for position, document in found}

    @staticmethod
    def _choices(documents: list[int], scores: list[float], names: dict[int, tuple[int, str]]) -> list[RoutedDocument]:
        """A layer's choice."""
        return [
            RoutedDocument(position, *names[position], score)
            for position, score in zip(documents, scores, strict=True)
            if position >= 0
        ]

    def _candidates(self, sample: _Sample, item: Round) -> list[RoutedDocument]:
        return [choice for choice in item.combined if not (self.exclude_read and choice.position in sample.read)]

    def _read(self, sample: _Sample, item: Round, ids: list[int], number: int, options: GenerateOptions) -> None:
        """Append the texts of the documents named; note those that cannot be."""
        item.named = ids
        limit = self.documents_per_round or self._selector.documents_per_round or len(ids)
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
                    item.dropped.append(Dropped(document[0].id, NO_ROOM))
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

    def _answer(
        self, feed: TranscriptFeeder, samples: list[_Sample], streamer: BaseStreamer | None, options: GenerateOptions
    ) -> list[Answer]:
        start = time.perf_counter()
        inputs, fed = feed.turn(samples)
        written = self.answering.write(inputs, self.bank, streamer, options)
        seconds = time.perf_counter() - start
        answers = []
        for sample, found, count in zip(samples, written, fed, strict=True):
            sample.trace.answer = found.text
            sample.trace.stages["answer"] = Stage(count + len(found.token_ids), seconds)
            answers.append(
                Answer(found.text, sample.documents, sample.trace, found.token_ids, _tokens(sample.segments))
            )
        return answers


def _tokens(segments: list[Segment]) -> int:
    return sum(len(segment.input_ids) for segment in segments)
