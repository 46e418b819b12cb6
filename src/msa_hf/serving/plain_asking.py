"""Answering behind a prompt alone, with a memory: for checkpoints without a protocol."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.padding import pad
from ..generation import DocumentIds, RoutedDocument
from ..generation.combining import combine_layers
from ..generation.prompting import Prompt, prompting_of
from ..generation.trace import Round, Stage, Trace
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..model.outputs_msa import MSACausalLMOutput
from ..model.positions_msa import position_limit
from ..model.tokenizing_msa import tokenize
from .passages import passage_of
from .row_control import RowControl
from .waiting import Answered, Question

SHOWN = 16  # documents of an answer


class PlainAsker:
    """Answers with what a model writes behind a prompt, the documents that its routers chose in its context.

    A chat is put as everywhere (`prompting_of`); a text to be gone on with as it is.
    """

    def __init__(self, model: MSAForCausalLM, tokenizer: PreTrainedTokenizerBase, bank: MemoryBank) -> None:
        self.model, self.tokenizer, self.bank = model, tokenizer, bank
        self.prompting = prompting_of(tokenizer)

    def _prompt(self, question: Question) -> Prompt:
        if not question.raw:
            return self.prompting.prompt([dict(turn) for turn in question.turns])
        ids = tokenize(self.tokenizer, question.turns[-1]["content"], add_special_tokens=True)
        return Prompt(ids, [True] * len(ids))

    def check(self, question: Question) -> None:
        """Make sure that a question can be asked."""
        (ids, _), longest = self._prompt(question), question.options.new_tokens
        if not ids or not question.turns[-1]["content"].strip():
            raise ValueError("The question is empty; a question is a text that is not empty.")
        positions = position_limit(self.model.config)
        if positions is not None and (over := self.model.config.first_position + len(ids) + longest - positions) > 0:
            raise ValueError(
                f"The question has {len(ids)} tokens; with {longest} of an answer that is {over} more than the "
                f"model's {positions} positions hold. Ask for fewer (`max_tokens`), or a shorter question."
            )

    def answer(self, questions: Sequence[Question]) -> list[Answered]:
        """Answer questions together."""
        config = self._config(questions[0])
        rows = [self._prompt(question) for question in questions]
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        control = RowControl(questions, self._text_of, [end for end in ends if end is not None])
        start = time.perf_counter()
        routing, seconds = self._generate(rows, config, control)
        answers = []
        for row, question in enumerate(questions):
            text, reason = control.written(row)
            asked, count = question.turns[-1]["content"], len(control.tokens[row])
            found = Round({layer: documents[row] for layer, documents in routing.items()}, [])
            found.combined = combine_layers(found.chosen, "mean") if found.chosen else []
            found.stages["prefill"] = Stage(len(rows[row].input_ids), seconds)
            spent = Stage(count, time.perf_counter() - start - seconds)
            trace = Trace(asked, "router", [found], text, {"answer": spent})
            sources = [
                {
                    "key": item.key,
                    "id": item.id,
                    "score": item.score,
                    "round": 0,
                    "passage": passage_of(self.bank.documents[item.position].text or "", f"{asked} {text}"),
                }
                for item in found.combined[:SHOWN]
            ]
            answers.append(
                Answered(text, reason, len(rows[row].input_ids), count, sources, json.loads(trace.to_json()))
            )
        return answers

    def _text_of(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _config(self, question: Question) -> Any:
        options, config = question.options, copy.deepcopy(self.model.generation_config)
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        if options.temperature > 0:
            config.update(do_sample=True, temperature=options.temperature, top_p=options.top_p, top_k=0)
        config.max_length, config.max_new_tokens, config.return_dict_in_generate = None, options.new_tokens, False
        given = config.eos_token_id
        stops = {*(given if isinstance(given, list) else [] if given is None else [given]), *self.prompting.ends}
        config.eos_token_id = sorted(stops) or None
        pads = (config.pad_token_id, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        config.pad_token_id = next(item for item in pads if item is not None)
        return config

    def _generate(
        self, rows: list[Prompt], config: Any, control: RowControl
    ) -> tuple[dict[int, list[list[RoutedDocument]]], float]:
        """Generate behind prompts; the documents of each layer and row, and the seconds until they were chosen."""
        routing: dict[int, list[list[RoutedDocument]]] = {}
        start = time.perf_counter()
        routed = start

        def keep_routing(module: object, arguments: object, output: MSACausalLMOutput) -> None:
            nonlocal routed
            if output.routing:  # decoded tokens do not route
                for layer, found in output.routing.items():
                    pairs = zip(found.documents.tolist(), found.scores.tolist(), strict=True)
                    routing[layer] = [self._named(documents, scores) for documents, scores in pairs]
                routed = time.perf_counter()

        device = self.model.device
        hook = self.model.register_forward_hook(keep_routing)
        try:
            self.model.generate(
                pad([ids for ids, _ in rows], config.pad_token_id, left=True).to(device),
                attention_mask=pad([[1] * len(ids) for ids, _ in rows], 0, left=True).to(device),
                routing_mask=pad([[int(item) for item in routes] for _, routes in rows], 0, left=True)
                .bool()
                .to(device),
                memory=self.bank,
                generation_config=config,
                stopping_criteria=[control],
            )
        finally:
            hook.remove()
        return routing, routed - start

    def _named(self, documents: list[int], scores: list[float]) -> list[RoutedDocument]:
        found = []
        for position, score in zip(documents, scores, strict=True):
            if position >= 0:
                document = self.bank.documents[position]
                found.append(RoutedDocument(position, DocumentIds.of(position, document), document.key, score))
        return found
