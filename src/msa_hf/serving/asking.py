"""Answering the questions of a batch from a bank as it is now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ..bank import BankStore
from ..generation import MemoryInterleave, PromptProtocol
from ..json_object import JsonObject
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from .errors import ApiError
from .passages import passage_of
from .plain_asking import PlainAsker
from .row_control import RowControl
from .waiting import Answered, Options, Question

EARLIER = "Only the last user message was asked: this checkpoint's protocol puts single questions."


class Asker(Protocol):
    """Answers questions from one state of a bank."""

    def check(self, question: Question) -> None:
        """Make sure that a question can be asked.

        Raises:
            ValueError: saying why it cannot.
        """

    def answer(self, questions: Sequence[Question]) -> list[Answered]:
        """Answer questions together, handing out pieces of the answers meanwhile."""


class InterleaveAsker:
    """Answers by Memory Interleave, which a checkpoint with a protocol was trained for."""

    def __init__(self, interleave: MemoryInterleave) -> None:
        self.interleave = interleave

    def check(self, question: Question) -> None:
        """Make sure that a question can be asked."""
        self.interleave.check(question.turns[-1]["content"], **_sampling(question.options))

    def answer(self, questions: Sequence[Question]) -> list[Answered]:
        """Answer questions together."""
        asker, options = self.interleave, _sampling(questions[0].options)
        config = asker.answering.options(None, dict(options), asker.max_new_tokens)["generation_config"]
        ends = config.eos_token_id or []
        protocol = asker.protocol
        control = RowControl(
            questions,
            lambda tokens: asker.answering.cut(tokens, ends).text,
            ends,
            protocol.answer_opening,
            protocol.answer_end,
        )
        texts = [question.turns[-1]["content"] for question in questions]
        found = asker.ask(texts, batch_size=len(texts), stopping_criteria=[control], **options)
        answers = []
        for row, (question, answer) in enumerate(zip(questions, found, strict=True)):
            text, reason = control.written(row)
            trace = json.loads(answer.trace.to_json())
            trace["answer"] = text
            sources = [
                source_of(asker.bank, item.position, item.id, item.score, item.round, f"{texts[row]} {text}")
                for item in answer.documents
            ]
            notices = (EARLIER,) if len(question.turns) > 1 else ()
            count = len(control.tokens[row])
            answers.append(Answered(text, reason, answer.prompt_tokens, count, sources, trace, notices))
        return answers


def _sampling(options: Options) -> dict[str, Any]:
    """Options of `generate`."""
    given: dict[str, Any] = {"max_new_tokens": options.new_tokens}
    if options.temperature > 0:
        given |= {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return given


def source_of(bank: Any, position: int, id: int, score: float | None, round: int, words: str) -> JsonObject:
    """A document that an answer comes from, as JSON values, with the passage that has most of these words."""
    document = bank.documents[position]
    return {
        "key": document.key,
        "id": id,
        "score": score,
        "round": round,
        "passage": passage_of(document.text or "", words),
    }


class BankAsker:
    """Answers from the last commit of a bank that changes; one state for each batch.

    Args:
        store: the bank.
        model, tokenizer: that made it.
        protocol: of the checkpoint; None: the model goes on behind its chat template or the plain question.
        options: of `MemoryInterleave`.
    """

    def __init__(
        self,
        store: BankStore,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.store, self.model, self.tokenizer, self.protocol = store, model, tokenizer, protocol
        self.options = dict(options or {})
        self._made: tuple[MemoryBank, Asker] | None = None

    def asker(self) -> Asker:
        """For the state of now."""
        if self.store.read_only:
            self.store.refresh()
        bank = self.store.snapshot()
        if self._made is None or self._made[0] is not bank:
            self._made = bank, self._new(bank)
        return self._made[1]

    def _new(self, bank: MemoryBank) -> Asker:
        if self.protocol is None:
            return PlainAsker(self.model, self.tokenizer, bank)
        return InterleaveAsker(MemoryInterleave(self.model, self.tokenizer, bank, self.protocol, **self.options))

    def answer(self, questions: Sequence[Question]) -> None:
        """Answer questions, and hand out their events; one that cannot be asked fails alone."""
        asker = self.asker()
        asked = []
        for question in questions:
            try:
                asker.check(question)
            except ValueError as error:
                code = "context_length_exceeded" if "too long" in str(error) else "invalid_question"
                question.fail(ApiError(400, str(error), code, "prompt" if question.raw else "messages"))
            else:
                asked.append(question)
        if not asked:
            return
        options = asked[0].options
        if options.temperature > 0:
            torch.manual_seed(torch.seed() if options.seed is None else options.seed)
        for question, answered in zip(asked, asker.answer(asked), strict=True):
            question.finish(answered)
