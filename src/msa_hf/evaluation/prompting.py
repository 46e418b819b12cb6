"""Having a model answer as a diagnosis does: with the memory or without, with given texts in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.padding import pad
from ..generation import DocumentIds, PromptProtocol
from ..generation.answering import Answering
from ..generation.prompting import Prompt, prompting_of
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


class Writer:
    """Has a model answer prompts, with the memory or without.

    Args:
        cut: what of a document is read: from its text and the question. Default: all of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: MemoryBank,
        protocol: PromptProtocol | None,
        max_new_tokens: int,
        cut: Callable[[str, str], str] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.protocol = model, tokenizer, bank, protocol
        self.max_new_tokens, self.cut = max_new_tokens, cut
        self.ids = DocumentIds(bank)
        self.prompting = prompting_of(tokenizer, protocol)
        self.answering = Answering(model, tokenizer, protocol)
        self.options = self.answering.options(None, {}, max_new_tokens)
        config = self.options["generation_config"]
        self.pad = config.pad_token_id
        stops = config.eos_token_id
        self.stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        positions = position_limit(model.config)
        self.room = None if positions is None else positions - model.config.first_position - max_new_tokens

    def prompt(self, question: str, rounds: Sequence[Sequence[int]]) -> tuple[Prompt, int]:
        """The tokens that an answer follows, which of them route, and how many texts were left out for lack of room."""
        left, dropped = [list(group) for group in rounds if group], 0
        while True:
            prompt = self._prompt(question, left)
            if self.room is None or len(prompt.input_ids) <= self.room:
                return prompt, dropped
            if not left:
                raise ValueError(
                    f"The question {question[:60]!r} has {len(prompt.input_ids)} tokens with its prompt, but "
                    f"{self.room} fit beside an answer of {self.max_new_tokens}."
                )
            left[-1].pop()
            left = left if left[-1] else left[:-1]
            dropped += 1

    def _prompt(self, question: str, rounds: Sequence[Sequence[int]]) -> Prompt:
        pairs = [[(self.ids.id_of(position), self._text(position, question)) for position in group] for group in rounds]
        return self.prompting.prompt(question, pairs, closed=True)

    def _text(self, position: int, question: str) -> str:
        text = text_of(self.bank, position)
        return text if self.cut is None else self.cut(text, question)

    def write(
        self,
        prompts: Sequence[Prompt],
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
        return [self.answering.cut(row, self.stops).text for row in output[:, ids.shape[1] :].tolist()]
