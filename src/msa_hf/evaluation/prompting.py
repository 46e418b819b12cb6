"""Putting questions to a model as a diagnosis does: with the memory or without, with given texts in the prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.padding import pad
from ..data.questions import SEPARATOR, question_ids
from ..generation import DocumentIds, MemoryInterleave, PromptProtocol
from ..generation.answering import Answering
from ..model.memory_msa import MemoryBank
from ..model.positions_msa import in_positions_of, position_limit


def text_of(bank: MemoryBank, position: int) -> str:
    """The text of a document.

    Raises:
        ValueError: where it was not stored, naming the document.
    """
    document = bank.documents[position]
    if document.text is None:
        raise ValueError(f"Document {document.key!r} was stored without its text, which is to be read.")
    return document.text


def prompt_of(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    protocol: PromptProtocol | None,
    rounds: Sequence[Sequence[tuple[int, str]]] = (),
) -> tuple[list[int], list[bool]]:
    """A question as it is put, behind rounds of (id, text) pairs that were read, and which of its tokens route: as the
    protocol says, or as `QuestionCollator`."""
    if protocol is not None:
        return PromptProtocol.join(protocol.transcript(tokenizer, question, rounds))
    ids = question_ids(tokenizer, question)
    return ids, [True] * len(ids)


class Writer:
    """Has a model answer prompts, with the memory or without."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: MemoryBank,
        protocol: PromptProtocol | None,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.protocol = model, tokenizer, bank, protocol
        self.max_new_tokens = max_new_tokens
        self.ids = DocumentIds(bank)
        self.answering: Answering | None = None
        if protocol is not None:  # the answer stage, so that the conditions differ in nothing else
            self.answering = MemoryInterleave(model, tokenizer, bank, protocol).answering
            self.options = self.answering.options(None, {}, max_new_tokens)
        else:
            config = copy.deepcopy(model.generation_config)
            config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
            config.max_length, config.max_new_tokens, config.return_dict_in_generate = None, max_new_tokens, False
            if config.eos_token_id is None:
                config.eos_token_id = tokenizer.eos_token_id
            pads = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
            config.pad_token_id = next(pad for pad in pads if pad is not None)
            self.options = {"generation_config": config}
        config = self.options["generation_config"]
        self.pad = config.pad_token_id
        stops = config.eos_token_id
        self.stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        positions = position_limit(model.config)
        self.room = None if positions is None else positions - model.config.first_position - max_new_tokens

    def prompt(self, question: str, rounds: Sequence[Sequence[int]]) -> tuple[tuple[list[int], list[bool]], int]:
        """The tokens that an answer follows, which of them route, and how many texts were left out for lack of room."""
        left, dropped = [list(group) for group in rounds if group], 0
        while True:
            ids, routes = self._prompt(question, left)
            if self.room is None or len(ids) <= self.room:
                return (ids, routes), dropped
            if not left:
                raise ValueError(
                    f"The question {question[:60]!r} has {len(ids)} tokens with its prompt, but {self.room} fit beside "
                    f"an answer of {self.max_new_tokens}."
                )
            left[-1].pop()
            left = left if left[-1] else left[:-1]
            dropped += 1

    def _prompt(self, question: str, rounds: Sequence[Sequence[int]]) -> tuple[list[int], list[bool]]:
        if self.protocol is None:
            texts = [text_of(self.bank, position) for group in rounds for position in group]
            return prompt_of(self.tokenizer, SEPARATOR.join([*texts, question]), None)
        pairs = [[(self.ids.id_of(position), text_of(self.bank, position)) for position in group] for group in rounds]
        return PromptProtocol.join(self.protocol.transcript(self.tokenizer, question, pairs, closed=True))

    def write(
        self,
        prompts: Sequence[tuple[list[int], list[bool]]],
        memory: bool = False,
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[str]:
        """Answers to prompts; with the memory, which the forced documents replace where they are given."""
        device = self.model.device
        prefix = [] if memory else list(self.model.config.prefix_token_ids)
        rows = [prefix + ids for ids, _ in prompts]
        ids = pad(rows, self.pad, left=True).to(device)
        inputs: dict[str, Tensor | MemoryBank] = {
            "input_ids": ids,
            "attention_mask": pad([[1] * len(row) for row in rows], 0, left=True).to(device),
        }
        if memory:
            routes = pad([[int(item) for item in routes] for _, routes in prompts], 0, left=True)
            inputs |= {"memory": self.bank, "routing_mask": routes.bool().to(device)}
        if forced is not None:
            inputs["force_documents"] = pad([list(row) for row in forced], -1).to(device)
        with in_positions_of(self.model.config):  # also without the memory, so that no answer depends on its batch
            output = self.model.generate(**inputs, **self.options)
        return [self._answer(row) for row in output[:, ids.shape[1] :].tolist()]

    def _answer(self, tokens: list[int]) -> str:
        if self.answering is not None:
            return self.answering.cut(tokens, self.stops).text
        stop = next((place for place, token in enumerate(tokens) if token in self.stops), len(tokens))
        return self.tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
