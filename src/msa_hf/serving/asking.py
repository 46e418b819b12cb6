"""Answering the questions of a batch from a bank as it is now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..bank import BankStore
from ..generation import Answer, PromptProtocol
from ..generation.asking import Asker, asker_of
from ..generation.prompting import messages_of
from ..json_object import JsonObject
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from .errors import ApiError
from .passages import passage_of
from .row_control import RowControl
from .waiting import Answered, Options, Question

SHOWN = 16  # documents of an answer
NO_PLACE = "The system's messages were left out: this checkpoint's protocol has no place for them."
NO_ROOM = "Documents were found and not read, since they do not fit the model's positions beside the question: ids {}."


class BankAsker:
    """Answers from the last commit of a bank that changes; one state for each batch.

    Args:
        store: the bank.
        model, tokenizer: that made it.
        protocol: of the checkpoint; with one answers come by Memory Interleave, without one in one run.
        options: of `asker_of`.
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
            self._made = bank, asker_of(self.model, self.tokenizer, bank, self.protocol, **self.options)
        return self._made[1]

    def answer(self, questions: Sequence[Question]) -> None:
        """Answer questions, and hand out their events; one that cannot be asked fails alone."""
        asker = self.asker()
        asked = []
        for question in questions:
            try:
                check(asker, question)
            except ApiError as error:
                question.fail(error)
            else:
                asked.append(question)
        if not asked:
            return
        options = asked[0].options
        if options.temperature > 0:
            torch.manual_seed(torch.seed() if options.seed is None else options.seed)
        for question, answered in zip(asked, answers_of(asker, asked), strict=True):
            question.finish(answered)


def check(asker: Asker, question: Question) -> None:
    """Make sure that a question can be asked.

    Raises:
        ApiError: 400 where it cannot.
    """
    longest = question.options.new_tokens
    try:
        messages_of(question.turns)
        room = asker.room(question.turns, longest)
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_question", question.param) from error
    if room < 0:
        message = (
            f"The question is too long: with an answer of {longest} tokens it is {-room} tokens longer than the model "
            "has positions for. Shorten it, or ask for fewer tokens."
        )
        raise ApiError(400, message, "context_length_exceeded", question.param)


def answers_of(asker: Asker, questions: Sequence[Question]) -> list[Answered]:
    """Answer questions together, handing out pieces of the answers meanwhile."""
    options, protocol = _sampling(questions[0].options), asker.protocol
    config = asker.answering.options(None, dict(options), asker.max_new_tokens)["generation_config"]
    ends = config.eos_token_id or []
    control = RowControl(
        questions,
        lambda tokens: asker.answering.cut(tokens, ends).text,
        ends,
        "" if protocol is None else protocol.answer_opening,
        "" if protocol is None else protocol.answer_end,
    )
    said = [question.turns for question in questions]
    found = asker.ask(said, batch_size=len(said), stopping_criteria=[control], **options)
    pairs = zip(questions, found, strict=True)
    return [answered(asker, question, answer, control, row) for row, (question, answer) in enumerate(pairs)]


def answered(asker: Asker, question: Question, answer: Answer, control: RowControl, row: int) -> Answered:
    """An answer as clients get it."""
    text, reason = control.written(row)
    trace = json.loads(answer.trace.to_json())
    trace["answer"] = text
    words = f"{question.turns[-1]['content']} {text}"
    sources: list[JsonObject] = [
        {
            "key": item.key,
            "id": item.id,
            "score": item.score,
            "round": item.round,
            "passage": passage_of(asker.bank.documents[item.position].text or "", words),
        }
        for item in answer.documents[:SHOWN]
    ]
    notices = []
    if asker.protocol is not None and any(turn["role"] == "system" for turn in question.turns):
        notices.append(NO_PLACE)
    if unread := answer.trace.without_room:
        notices.append(NO_ROOM.format(", ".join(map(str, unread))))
    count = len(control.tokens[row])
    return Answered(text, reason, answer.prompt_tokens, count, sources, trace, tuple(notices))


def _sampling(options: Options) -> dict[str, Any]:
    """Options of `generate`."""
    given: dict[str, Any] = {"max_new_tokens": options.new_tokens}
    if options.temperature > 0:
        given |= {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return given
