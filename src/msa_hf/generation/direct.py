"""Answers from a memory as `generate(memory=bank)` gives them, for checkpoints without a protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..data.padding import pad
from ..model.interface_msa import check_interface
from ..model.memory_msa import Memory, Snapshots
from ..model.modeling_msa import MSAForCausalLM
from ..model.modes_msa import evaluating
from ..model.outputs_msa import MSACausalLMOutput
from ..model.positions_msa import position_limit
from ..model.routing_msa import LayerRouting
from .answering import Answering, GenerateOptions
from .combining import choices_on_host, combine_layers
from .document_ids import DocumentIds
from .interleave import Answer, Source
from .prompting import Prompt, Said, asked_of, messages_of, prompting_of
from .protocol import PromptProtocol
from .routed_document import RoutedDocument
from .trace import NO_TEXTS, Round, Stage, Trace


class DirectAsker:
    """Asks a model questions of a bank in one run: it attends to the documents that its routers choose and reads no
    texts.

    Questions are put by the tokenizer's chat template, else by the training prompt (`prompting_of`).

    Args:
        model: `MSAForCausalLM`.
        tokenizer: of the model.
        bank: documents as they are.
        max_new_tokens: of an answer, unless `ask` is told otherwise.
        layer_scores: over the layers, as of `MemoryInterleave`.
    """

    protocol: PromptProtocol | None = None

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        bank: Memory | Snapshots,
        max_new_tokens: int = 128,
        layer_scores: str = "mean",
    ) -> None:
        check_interface(model)
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be an integer of at least 1, got {max_new_tokens!r}.")
        self.model, self.tokenizer, self.bank = model, tokenizer, bank.snapshot()
        self.max_new_tokens, self.layer_scores = max_new_tokens, layer_scores
        self.prompting = prompting_of(tokenizer)
        self.answering = Answering(model, tokenizer, None)
        positions = position_limit(model.config)
        self.max_context_tokens = None if positions is None else positions - model.config.first_position

    def ask(
        self,
        questions: Said | Sequence[Said],
        streamer: BaseStreamer | None = None,
        generation_config: GenerationConfig | None = None,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Any:
        """Answer a question, or many; arguments and result as of `MemoryInterleave.ask`.

        The documents of an answer are those that its layers attended to, best first.

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
            prompts = [self._prompt(number, said, options) for number, said in enumerate(asked)]
            texts = [messages_of(said)[-1]["content"] for said in asked]
            answers: list[Answer] = []
            with evaluating(self.model):
                for start in range(0, len(prompts), batch_size):
                    part = slice(start, start + batch_size)
                    answers += self._ask(texts[part], prompts[part], streamer, options)
        except BaseException:
            if streamer is not None:
                streamer.end()  # or whoever reads the stream would wait for ever
            raise
        return answers[0] if alone else answers

    def room(self, said: Said, max_new_tokens: int | None = None) -> int:
        """Tokens that the model's positions leave beside a question and its answer; below 0: it cannot be asked."""
        return self._room(self.prompting.prompt(said), max_new_tokens or self.max_new_tokens)

    def _room(self, prompt: Prompt, max_new_tokens: int) -> int:
        if self.max_context_tokens is None:
            return torch.iinfo(torch.int64).max
        return self.max_context_tokens - len(prompt.input_ids) - max_new_tokens

    def _prompt(self, number: int, said: Said, options: GenerateOptions) -> Prompt:
        prompt, longest = self.prompting.prompt(said), options["generation_config"].max_new_tokens
        if (missing := -self._room(prompt, longest)) > 0:
            raise ValueError(
                f"Question {number} is too long: it has {len(prompt.input_ids)} tokens as it is put, with an answer of "
                f"{longest} tokens {missing} more than the {self.max_context_tokens} that fit."
            )
        if not any(prompt.routes):
            raise ValueError(f"Question {number} has no tokens that could choose documents.")
        return prompt

    def _ask(
        self, texts: Sequence[str], prompts: Sequence[Prompt], streamer: BaseStreamer | None, options: GenerateOptions
    ) -> list[Answer]:
        routing: dict[int, LayerRouting] = {}
        start = routed = time.perf_counter()

        def keep_routing(module: object, arguments: object, output: MSACausalLMOutput) -> None:
            nonlocal routed
            if output.routing and not routing:  # decoded tokens do not route
                routing.update(output.routing)
                routed = time.perf_counter()

        device = self.model.device
        inputs = {
            "input_ids": pad([ids for ids, _ in prompts], self.answering.pad_id, left=True).to(device),
            "attention_mask": pad([[1] * len(ids) for ids, _ in prompts], 0, left=True).to(device),
            "routing_mask": pad([[int(item) for item in routes] for _, routes in prompts], 0, left=True)
            .bool()
            .to(device),
        }
        hook = self.model.register_forward_hook(keep_routing)
        try:
            written = self.answering.write(inputs, self.bank, streamer, options)
        finally:
            hook.remove()
        end = time.perf_counter()
        beams = options["generation_config"].num_beams or 1
        found = {layer: rows[::beams] for layer, rows in choices_on_host(routing, device).items()}
        answers = []
        for row, (text, prompt, item) in enumerate(zip(texts, prompts, written, strict=True)):
            chosen = {layer: self._choices(*rows[row]) for layer, rows in found.items()}
            combined = combine_layers(chosen, self.layer_scores) if chosen else []
            trace = Trace(text, NO_TEXTS, [Round(chosen, combined)], item.text)
            trace.rounds[0].stages["prefill"] = Stage(len(prompt.input_ids), routed - start)
            trace.stages["answer"] = Stage(len(item.token_ids), end - routed)
            sources = [Source(one.position, one.id, one.key, one.score) for one in combined]
            answers.append(Answer(item.text, sources, trace, item.token_ids, len(prompt.input_ids)))
        return answers

    def _choices(self, documents: list[int], scores: list[float]) -> list[RoutedDocument]:
        chosen = [(position, score) for position, score in zip(documents, scores, strict=True) if position >= 0]
        found = self.bank.documents.at([position for position, _ in chosen])
        return [
            RoutedDocument(position, DocumentIds.of(position, document), document.key, score)
            for (position, score), document in zip(chosen, found, strict=True)
        ]
