"""Second answers: the same question, with other documents attended to and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...data.padding import pad
from ...evaluation.metrics import exact_match
from ...evaluation.prompting import Writer
from ...generation import PromptProtocol
from ...model.memory_msa import MemoryBank
from ...model.modeling_msa import MSAForCausalLM
from ...model.modes_msa import evaluating
from ...model.positions_msa import in_positions_of
from ...model.tokenizing_msa import tokenize
from .passages import passage_of


@dataclass(frozen=True)
class Evidence:
    """The documents of a second answer, as positions in the bank.

    Attributes:
        rounds: whose texts are read, round by round.
        attended: that memory layers attend to; None: no memory, and of long texts the passage for the question.
    """

    rounds: Sequence[Sequence[int]]
    attended: Sequence[int] | None = None


@dataclass(frozen=True)
class Reading:
    """A second answer: its text, the tokens processed for it, and how many nats more likely it is, given the evidence,
    than the first answer (0 where the two are the same)."""

    text: str
    tokens: int
    advantage: float


class SecondReader:
    """Answers questions again.

    Args:
        model: `MSAForCausalLM`.
        tokenizer: of the model.
        bank: with the texts.
        protocol: as of the first answer.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        bank: MemoryBank,
        protocol: PromptProtocol | None,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.protocol = model, tokenizer, bank, protocol
        self.writer = Writer(model, tokenizer, bank, protocol, max_new_tokens)
        self.of_passages = Writer(model, tokenizer, bank, protocol, max_new_tokens, passage_of)

    def read(self, questions: Sequence[str], evidence: Sequence[Evidence], first: Sequence[str]) -> list[Reading]:
        """Answer a batch.

        Args:
            questions: B texts.
            evidence: of each; all with a memory, or all without.
            first: their first answers.

        Raises:
            ValueError: for a document without text, and a question that is too long.
        """
        memory = evidence[0].attended is not None
        forced = [list(item.attended or ()) for item in evidence] if memory else None
        writer = self.writer if memory else self.of_passages
        prompts = [writer.prompt(question, item.rounds)[0] for question, item in zip(questions, evidence, strict=True)]
        with torch.no_grad(), evaluating(self.model):
            texts = self.writer.write(prompts, memory, forced)
            readings = []
            for place, (prompt, text, answer) in enumerate(zip(prompts, texts, first, strict=True)):
                tokens, advantage = len(prompt[0]) + len(self._answer_ids(text)), 0.0
                if not same_answer(text, answer):
                    both = [self._answer_ids(text), self._answer_ids(answer)]
                    ours, theirs = self._log_likelihoods(prompt, both, None if forced is None else forced[place])
                    advantage = max(ours - theirs, 0.0)
                    tokens += sum(len(prompt[0]) + len(ids) for ids in both)
                readings.append(Reading(text, tokens, advantage))
        return readings

    def _answer_ids(self, answer: str) -> list[int]:
        if self.protocol is not None:
            return list(self.protocol.answer_segment(self.tokenizer, answer).input_ids)
        return [*tokenize(self.tokenizer, answer), *self.writer.stops[:1]]

    def _log_likelihoods(
        self, prompt: tuple[list[int], list[bool]], answers: Sequence[list[int]], forced: list[int] | None
    ) -> list[float]:
        """The log-likelihood of each answer behind a prompt, in nats."""
        prefix = list(self.model.config.prefix_token_ids) if forced is None else []
        ids, routes = prompt
        rows = [prefix + ids + answer for answer in answers]
        device = self.model.device
        inputs: dict[str, Tensor | MemoryBank] = {
            "input_ids": pad(rows, self.writer.pad).to(device),
            "attention_mask": pad([[1] * len(row) for row in rows], 0).to(device),
        }
        if forced is not None:
            routing = pad([[int(item) for item in routes] + [0] * len(answer) for answer in answers], 0)
            inputs |= {"memory": self.bank, "routing_mask": routing.bool().to(device)}
            inputs["force_documents"] = torch.tensor([forced] * len(rows), dtype=torch.int64, device=device)
        longest = max(map(len, answers))
        with in_positions_of(self.model.config):
            output = self.model(**inputs, use_cache=False, logits_to_keep=longest + 1)
        logs = output.logits[:, -longest - 1 : -1].float().log_softmax(-1)
        return [
            float(row[: len(answer)].gather(1, torch.tensor(answer, device=row.device)[:, None]).sum())
            for row, answer in zip(logs, answers, strict=True)
        ]


def standing(first: str, seconds: Mapping[str, str]) -> set[str]:
    """The checks whose answers may stand against the first one: none where more of them give it again than do not; and
    of several checks only those whose answer another one gives as well, because a wrong reading seldom comes twice.

    Args:
        first: the answer, not empty.
        seconds: check -> its answer.
    """
    same = sum(same_answer(text, first) for text in seconds.values())
    if same > len(seconds) - same:
        return set()
    return {
        check
        for check, text in seconds.items()
        if len(seconds) == 1 or any(same_answer(text, seconds[other]) for other in seconds if other != check)
    }


def same_answer(one: str, other: str) -> bool:
    """Tell whether two answers are the same, up to case, articles, punctuation and white space."""
    return exact_match(one, other) or one.strip() == other.strip()
