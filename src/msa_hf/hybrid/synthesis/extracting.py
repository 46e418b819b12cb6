"""Extraction: findings from groups of documents, by a memory model or by a chat model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ...evaluation.metrics import normalize_answer
from ...generation import PromptProtocol
from ...model.modeling_msa import MSAForCausalLM
from ...synthetic.corpora import UNANSWERABLE
from ..chains.memory_reader import InterleaveReader, MemoryReader
from ..chains.sources import Source, sources_text
from ..chains.template import render
from ..chat.chat_model import ChatModel, Message, messages_of
from ..chat.json_schema import AnswerError, read_json
from .budget import Budget, Spending, pack, shorten
from .findings import DocumentGroup, Finding

_SENTENCE = re.compile(
    r"""[^.!?\u3002\uff01\uff1f\n]*(?:[.!?](?=[^\s"')\]])[^.!?\u3002\uff01\uff1f\n]*)*[.!?\u3002\uff01\uff1f]*["')\]]*"""
)


class Extractor(Protocol):
    """A finder of answers in a group of documents."""

    def extract(self, questions: Sequence[str], group: DocumentGroup) -> list[Finding]:
        """The findings for some questions; none for a question that the group does not answer."""
        ...


def extract_findings(
    extractor: Extractor, questions: Sequence[str], groups: Sequence[DocumentGroup], show_progress: bool = False
) -> list[Finding]:
    """The findings of all groups, in order.

    Raises:
        ValueError: where there are no questions, or an empty one.
    """
    if not questions or not all(isinstance(item, str) and item.strip() for item in questions):
        raise ValueError(f"`questions` must be texts that are not empty, got {list(questions)!r}.")
    bar = tqdm(groups, "Extracting", unit="group", disable=not show_progress)
    return [finding for group in bar for finding in extractor.extract(questions, group)]


def encoded_reader(
    model: MSAForCausalLM, tokenizer: PreTrainedTokenizerBase, protocol: PromptProtocol, **interleave: Any
) -> Callable[[DocumentGroup], MemoryReader]:
    """A function that encodes a group as a bank of its own, and gives what reads it.

    Args:
        model, tokenizer, protocol: of the memory.
        interleave: further arguments of `MemoryInterleave`.
    """

    def read(group: DocumentGroup) -> MemoryReader:
        rows = [{"key": document.key, "text": document.text or ""} for document in group.documents]
        wrapped = protocol.encode_corpus(rows, tokenizer)
        bank = model.encode_documents(wrapped, tokenizer, show_progress=False)
        return InterleaveReader(model, tokenizer, bank, protocol, **interleave)

    return read


class MemoryExtractor:
    """A memory model asks each group; the document that it read last and that has the answer is the source.

    Args:
        reader_of: what reads a group: `encoded_reader(model, tokenizer, protocol)`, or, for questions in groups over
            one bank, a function that gives the bank's reader whatever the group.
        max_new_tokens: of an answer.
        no_answers: texts that say that there is none.
    """

    def __init__(
        self,
        reader_of: Callable[[DocumentGroup], MemoryReader],
        max_new_tokens: int = 64,
        no_answers: Sequence[str] = (UNANSWERABLE,),
    ) -> None:
        self.reader_of, self.max_new_tokens = reader_of, max_new_tokens
        self.no_answers = {normalize_answer(text) for text in no_answers}

    def extract(self, questions: Sequence[str], group: DocumentGroup) -> list[Finding]:
        """See `Extractor.extract`."""
        reader, findings = self.reader_of(group), []
        for question in questions:
            reading = reader.read(question, None, self.max_new_tokens)
            if not reading.sources or normalize_answer(reading.text) in {"", *self.no_answers}:
                continue
            source, evidence = evidence_of(question, reading.text, reading.sources)
            findings.append(Finding(question, reading.text, evidence, source.key, group.name, bool(evidence)))
        return findings


def evidence_of(question: str, answer: str, sources: Sequence[Source]) -> tuple[Source, str]:
    """The document that has an answer, and its sentence that says it.

    Of sentences that have the answer, the one with most words of the question; without any, the sentence with most
    words of answer and question. Equal ones go to the document that was read last, and in it to the first.
    """
    wanted, asked = normalize_answer(answer), set(normalize_answer(question).split())
    best: tuple[tuple[bool, int, int, int], Source, str] | None = None
    for place, source in enumerate(sources):
        for number, sentence in enumerate(sentences_of(source.text or "")):
            plain = normalize_answer(sentence)
            words = set(plain.split())
            there = f" {wanted} " in f" {plain} "
            shared = len(words & asked) + (0 if there else len(words & set(wanted.split())))
            rank = (there, shared, place, -number)
            if best is None or rank > best[0]:
                best = (rank, source, sentence)
    if best is None or not (best[0][0] or best[0][1]):
        return sources[-1], ""
    return best[1], best[2]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, without white space around them."""
    return [found for match in _SENTENCE.finditer(text) if (found := match[0].strip())]


EXTRACT_PROMPT = """Read the texts. For the question, list every answer that a text gives: the answer in few words, \
the sentence of the text that says so, copied word for word, and the label of the text. If no text answers, an empty \
list. Do not use what you know otherwise.

{texts}

Question: {question}"""


class ChatExtractor:
    """A chat model reads each group, in as many prompts as its texts need.

    Args:
        chat: that reads.
        budget: of each prompt and answer, and of all calls for a group.
        repairs: times that an answer which is not the JSON asked for may be asked for again.
    """

    def __init__(self, chat: ChatModel, budget: Budget | None = None, repairs: int = 1) -> None:
        self.chat, self.budget, self.repairs = chat, budget or Budget(), repairs

    def extract(self, questions: Sequence[str], group: DocumentGroup) -> list[Finding]:
        """See `Extractor.extract`.

        Raises:
            AnswerError: for an answer that is not the JSON asked for, after all repairs.
            BudgetError: where the budget is too small.
        """
        spending = Spending(self.chat, self.budget)
        findings: list[Finding] = []
        for question in questions:
            fitted = [self._fitted(question, document) for document in group.documents]
            for part in pack(fitted, partial(self._fits, question)):
                findings += self._ask(spending, question, part, group)
        return findings

    def _fits(self, question: str, sources: Sequence[Source]) -> bool:
        # A repair repeats the prompt with an answer and two sentences behind it, for which half of the room stays.
        room = self.budget.prompt_tokens // 2 if self.repairs else self.budget.prompt_tokens
        return self.chat.count_tokens(self._messages(question, sources)) <= room

    def _fitted(self, question: str, document: Source) -> Source:
        """A document, its text cut where it would not fit into a prompt by itself."""
        text = shorten(document.text or "", lambda text: self._fits(question, [Source(document.key, text)]))
        return Source(document.key, text or "")

    def _messages(self, question: str, sources: Sequence[Source]) -> list[Message]:
        labeled = [Source(f"S{number}", source.text) for number, source in enumerate(sources, 1)]
        texts = sources_text(labeled)
        return messages_of(render(EXTRACT_PROMPT, {"question": question, "texts": texts}, "prompt"))

    def _ask(self, spending: Spending, question: str, sources: Sequence[Source], group: DocumentGroup) -> list[Finding]:
        labels = {f"S{number}": source for number, source in enumerate(sources, 1)}
        schema = _schema(list(labels))
        messages = self._messages(question, sources)
        for attempt in range(self.repairs + 1):
            written = spending.complete(messages, schema)
            try:
                records = read_json(written.text, schema)
                break
            except AnswerError as error:
                again = [
                    *messages[:1],
                    Message("assistant", written.text),
                    Message("user", f"That is not the JSON asked for: {error.problem}. Answer with the JSON alone."),
                ]
                messages = again if spending.fits(again) else messages[:1]
                if attempt == self.repairs:
                    raise
        whole = {document.key: document.text or "" for document in group.documents}
        found = []
        for record in records:
            key = labels[record["source"]].key
            quoted = " ".join(record["evidence"].split()) in " ".join(whole[key].split())
            if record["answer"].strip():
                found.append(Finding(question, record["answer"].strip(), record["evidence"], key, group.name, quoted))
        return found


def _schema(labels: list[str]) -> dict[str, Any]:
    text = {"type": "string", "maxLength": 400}
    properties = {"answer": text, "evidence": text, "source": {"type": "string", "enum": labels}}
    item = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "array", "items": item, "maxItems": 16}
