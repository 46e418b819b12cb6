"""Batches for the training forward: questions and answers, or a protocol's own transcripts, on pools of documents."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.padding import pad
from ..data.questions import IGNORED, Question, rounds_of
from ..generation import PromptProtocol
from ..generation.prompting import prompting_of
from ..generation.protocol import Segment
from ..model.tokenizing_msa import tokenize
from .progress import phase

DISTRACTORS = 3  # at most so many documents that a round names in vain
LEAST_IDS = 10_000  # numbers to draw ids from, so that those of small corpora are as varied as those of large ones


class PooledDocuments(TypedDict):
    """The documents of a step in tokens, [N, T] int64, and which of these are real."""

    input_ids: Tensor
    attention_mask: Tensor


class Batch(TypedDict, total=False):
    """The arguments of the training forward, as `MSAForCausalLM.forward` describes them."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    routing_mask: Tensor
    positive_docs: Tensor
    documents: PooledDocuments


def pooled(documents: Sequence[Sequence[int]]) -> PooledDocuments:
    """Documents of a pool, right-padded."""
    return {"input_ids": pad(documents, 0), "attention_mask": pad([[1] * len(ids) for ids in documents], 0)}


class QuestionCollator:
    """Batches of questions as a training step on a pool of documents that all of them share.

    Questions are put by the tokenizer's chat template, which an instruct model knows; where there is none, by their
    text and a line break. A pool holds the positives of the batch's questions and, drawn at random, other documents; in
    random order. The draws depend on the seed and on how many batches there were before, `drawn`, so a run that goes on
    after an interruption sees the pools that it would have seen.

    Args:
        tokenizer: of the model; questions are padded on its `padding_side`.
        documents: key -> text, encoded as `encode_documents` does by default.
        pool: documents per step; fewer where there are no more, more where the positives alone are.
        seed: of the draws.
        max_length: longest document, and longest question with its answer, in tokens.

    Attributes:
        lengths: key -> tokens of a document.

    Raises:
        ValueError: for no documents, an empty pool, and a document that is empty or too long, naming it; when called,
            for a positive that is no document and for a question that is too long.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Mapping[str, str],
        pool: int = 64,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        if pool < 1:
            raise ValueError(f"`pool` must be at least 1, got {pool}.")
        if not documents:
            raise ValueError("`documents` is empty: a training step needs at least one document.")
        self.tokenizer, self.pool, self.max_length = tokenizer, pool, max_length
        self.prompting = prompting_of(tokenizer)
        self.seed, self.drawn = seed, 0
        self.keys = list(documents)
        self.tokens: dict[str, list[int]] = {}
        with phase("tokenizing documents", len(documents), "documents") as done:
            for key, text in documents.items():
                self.tokens[key] = tokenize(tokenizer, text)
                if not self.tokens[key]:
                    raise ValueError(f"Document {key!r} has no tokens; leave it out.")
                done(1)
        self.lengths = {key: len(ids) for key, ids in self.tokens.items()}
        _refuse_long(self.lengths, max_length)

    def row(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids of a question with its answer, closed by the token that ends it, and their labels."""
        ids, labels, _ = self._row(question)
        return ids, labels

    def _row(self, question: Question) -> tuple[list[int], list[int], list[bool]]:
        asked, routes = self.prompting.prompt(question["question"])
        answer = self.prompting.answer_ids(question["answer"])
        if self.max_length is not None and len(asked) + len(answer) > self.max_length:
            raise ValueError(
                f"Question {question['question'][:60]!r} has {len(asked) + len(answer)} tokens with its answer, above "
                f"the limit of {self.max_length}; shorten these."
            )
        return asked + answer, [IGNORED] * len(asked) + answer, routes + [False] * len(answer)

    def draw(self, questions: Sequence[Question]) -> list[str]:
        """The keys of the documents of a step, in their order."""
        pick = random.Random(f"{self.seed}, batch {self.drawn}")
        self.drawn += 1
        return draw_pool(self.tokens, self.keys, questions, self.pool, pick)

    def __call__(self, questions: Sequence[Question]) -> Batch:
        """The arguments of the training forward."""
        rows = [self._row(question) for question in questions]
        keys = self.draw(questions)
        place = {key: number for number, key in enumerate(keys)}
        left = self.tokenizer.padding_side == "left"
        documents = [self.tokens[key] for key in keys]
        positives = [[place[key] for key in dict.fromkeys(question["positives"])] for question in questions]
        return {
            "input_ids": pad([ids for ids, _, _ in rows], 0, left),
            "attention_mask": pad([[1] * len(ids) for ids, _, _ in rows], 0, left),
            "labels": pad([labels for _, labels, _ in rows], IGNORED, left),
            "routing_mask": pad([[int(item) for item in routes] for _, _, routes in rows], 0, left).bool(),
            "positive_docs": pad(positives, -1),
            "documents": pooled(documents),
        }


class TranscriptCollator:
    """Batches of a protocol's transcripts as training steps on a pool of documents that all of them share.

    Half of the rows end with the answer: all rounds of the question have been read, among documents that do not answer.
    The others end where a round names its documents, any round of the question. A question without positives is
    answered at once, or after documents that do not answer. Labeled is what the model writes last; what routes is what
    routes at that point: the prompt, and the last block of texts.

    Documents get new ids in every step, so that ids must be read from the memory; those of a bank are stable.

    Args:
        tokenizer: of the model, with the protocol's special tokens; rows are padded on its `padding_side`.
        documents: key -> text.
        protocol: wraps documents and puts questions.
        pool, seed: as `QuestionCollator` takes them.
        max_length: longest wrapped document, and longest row, in tokens.

    Attributes:
        lengths: key -> tokens of a wrapped document, of a long id.

    Raises:
        ValueError: for what `QuestionCollator` refuses, and a tokenizer without the protocol's tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Mapping[str, str],
        protocol: PromptProtocol,
        pool: int = 64,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        if pool < 1:
            raise ValueError(f"`pool` must be at least 1, got {pool}.")
        if not documents:
            raise ValueError("`documents` is empty: a training step needs at least one document.")
        protocol.check_tokenizer(tokenizer)
        self.tokenizer, self.protocol, self.max_length = tokenizer, protocol, max_length
        self.pool, self.seed, self.drawn = pool, seed, 0
        self.documents, self.keys = documents, list(documents)
        self.ids = max(LEAST_IDS, 10 * len(documents))
        self.lengths: dict[str, int] = {}
        with phase("tokenizing documents", len(documents), "documents") as done:
            for key in self.keys:
                self.lengths[key] = len(self._wrapped(self.ids - 1, key))
                done(1)
        _refuse_long(self.lengths, max_length)

    def _wrapped(self, number: int, key: str) -> list[int]:
        return self.protocol.encode(self.tokenizer, self.protocol.document, id=number, text=self.documents[key])

    def row(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids and labels of the longest row that a question needs: all of its rounds, and the answer.

        Raises:
            ValueError: where it is too long.
        """
        rounds = rounds_of(question)
        numbers = {key: self.ids - 1 - place for place, key in enumerate(question["positives"])}
        segments = self._segments(question, rounds, None, numbers)
        ids, labels, _ = self._tokens(segments, 0)
        if not self._fits(segments):
            raise ValueError(
                f"Question {question['question'][:60]!r} has {len(ids)} tokens with its answer and the documents that "
                f"it reads, above the limit of {self.max_length}; shorten these."
            )
        return ids, labels

    def __call__(self, questions: Sequence[Question]) -> Batch:
        """The arguments of the training forward."""
        pick = random.Random(f"{self.seed}, batch {self.drawn}")
        self.drawn += 1
        keys = draw_pool(self.documents, self.keys, questions, self.pool, pick)
        numbers = dict(zip(keys, pick.sample(range(self.ids), len(keys)), strict=True))
        place = {key: number for number, key in enumerate(keys)}
        rows, positives = [], []
        for question in questions:
            tokens, wanted = self._draw(question, keys, numbers, pick)
            rows.append(tokens)
            positives.append([place[key] for key in wanted])
        left = self.tokenizer.padding_side == "left"
        documents = [self._wrapped(numbers[key], key) for key in keys]
        return {
            "input_ids": pad([ids for ids, _, _ in rows], 0, left),
            "attention_mask": pad([[1] * len(ids) for ids, _, _ in rows], 0, left),
            "labels": pad([labels for _, labels, _ in rows], IGNORED, left),
            "routing_mask": pad([[int(item) for item in routes] for _, _, routes in rows], 0, left).bool(),
            "positive_docs": pad(positives, -1),
            "documents": pooled(documents),
        }

    def _draw(
        self, question: Question, keys: Sequence[str], numbers: Mapping[str, int], pick: random.Random
    ) -> tuple[tuple[list[int], list[int], list[bool]], list[str]]:
        """A row of a question, and the documents that its routing tokens should find."""
        rounds = rounds_of(question)
        stage = len(rounds) if not rounds or pick.random() < 0.5 else pick.randrange(len(rounds))
        named = None if stage == len(rounds) else rounds[stage]
        read = [list(found) for found in rounds[:stage]]
        if not rounds and pick.random() < 0.5:
            read = [[]]  # a round that finds nothing
        others = [key for key in pick.sample(keys, len(keys)) if key not in question["positives"]]
        mixed: list[list[str]] = []
        for found in read:
            count = pick.randint(0 if found else 1, DISTRACTORS)
            chosen, others = [*found, *others[:count]], others[count:]
            pick.shuffle(chosen)
            if chosen:
                mixed.append(chosen)
        segments = self._segments(question, mixed, named, numbers)
        if not self._fits(segments):  # without the documents that only distract
            mixed = [found for found in read if found]
            segments = self._segments(question, mixed, named, numbers)
        wanted = question["positives"] if named is None else named
        return self._tokens(segments, len(mixed)), wanted

    def _segments(
        self,
        question: Question,
        read: Sequence[Sequence[str]],
        named: Sequence[str] | None,
        numbers: Mapping[str, int],
    ) -> list[Segment]:
        """The transcript after some rounds: with further ids named, or with the answer."""
        rounds = [[(numbers[key], self.documents[key]) for key in found] for found in read]
        answer = question["answer"] if named is None else None
        segments = self.protocol.transcript(self.tokenizer, question["question"], rounds, answer=answer)
        if named is not None:
            segments.append(self.protocol.ids_segment(self.tokenizer, [numbers[key] for key in named]))
        return segments

    def _fits(self, segments: Sequence[Segment]) -> bool:
        return self.max_length is None or sum(len(item.input_ids) for item in segments) <= self.max_length

    @staticmethod
    def _tokens(segments: Sequence[Segment], rounds: int) -> tuple[list[int], list[int], list[bool]]:
        """Token ids, labels and routing of a transcript; the ids of its first `rounds` rounds are given, not learnt."""
        ids, routes = PromptProtocol.join(segments)
        labels: list[int] = []
        for segment in segments:
            given = segment.kind == "ids" and rounds > 0
            rounds -= given
            labels += segment.input_ids if segment.generated and not given else [IGNORED] * len(segment.input_ids)
        return ids, labels, routes


def _refuse_long(lengths: Mapping[str, int], limit: int | None) -> None:
    """Compare the tokens of documents with the limit.

    Raises:
        ValueError: for documents above it, naming the first and how many there are.
    """
    long = [key for key, length in lengths.items() if limit is not None and length > limit]
    if long:
        others = f", and so are {len(long) - 1} others" if len(long) > 1 else ""
        raise ValueError(
            f"Document {long[0]!r} has {lengths[long[0]]} tokens, above the limit of {limit}{others}; split "
            f"{'them' if others else 'it'} into documents with keys of their own."
        )


def draw_pool(
    known: Collection[str],
    keys: Sequence[str],
    questions: Sequence[Question],
    size: int,
    pick: random.Random,
) -> list[str]:
    """The keys of a pool: the positives of `questions`, and others up to `size`, in random order.

    Raises:
        ValueError: for a positive that is not among the `known`, which are `keys`.
    """
    wanted = list(dict.fromkeys(key for question in questions for key in question["positives"]))
    if unknown := [key for key in wanted if key not in known]:
        raise ValueError(f"`positives` names {unknown[0]!r}, which is the key of no document.")
    taken = set(wanted)
    missing = min(size, len(keys)) - len(wanted)
    # As many too many as the positives can take away, so that nothing of the size of the corpus is built.
    for key in pick.sample(keys, min(size + len(wanted), len(keys))):
        if missing > 0 and key not in taken:
            wanted.append(key)
            missing -= 1
    pick.shuffle(wanted)
    return wanted
