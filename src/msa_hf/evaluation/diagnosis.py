"""Diagnoses of what a model with a memory gets right, and which part gets the rest wrong: router or reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import SELECTORS, MemoryInterleave, PromptProtocol
from ..generation.selectors import selector_named
from ..model.memory_msa import MemoryBank
from ..model.modes_msa import evaluating
from .conditions import CONDITIONS as CONDITIONS
from .conditions import checked_conditions
from .judged_questions import JudgedQuestion, look_up
from .judged_questions import read_judged as read_judged
from .lexical import BM25
from .metrics import exact_match
from .prompting import Writer, text_of
from .recall import JudgedFields, router_recall
from .recall import positions_of as positions_of
from .report import EVERY, Answers, Diagnosis


def diagnose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: MemoryBank,
    questions: Sequence[JudgedFields],
    protocol: PromptProtocol | None = None,
    conditions: Sequence[str] | None = None,
    k: int | None = None,
    batch_size: int = 8,
    show_progress: bool = True,
    *,
    refusal: str | None = None,
    max_rounds: int = 3,
    documents_per_round: int | None = None,
    select: str = "router",
    max_new_tokens: int = 64,
    interleave: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Measure routers and answers of a model with a memory, trained or not.

    The conditions differ in what the model sees before it answers, greedily:

    * `"routed"`: what it finds by itself, by Memory Interleave; without a protocol by plain `generate(memory=bank)`.
    * `"single_round"`: the same with one round.
    * `"forced_gold"`: the positives are what memory layers attend to and, with a protocol, what is read, round by
      round.
    * `"gold_text"`: the positives' texts in the prompt, no memory.
    * `"bm25"`: the texts that BM25 ranks highest in the prompt, as many as `"routed"` read (at least one; without a
      protocol as many as a layer attends to), no memory.
    * `"no_memory"`: the question alone.
    * `"ids"`: not how it answers, but whether it names the right documents in the first round, freely and constrained.

    With a protocol, prompts are its transcripts; without, the texts and the question, each followed by a line break.

    Args:
        model: a causal LM with a memory.
        tokenizer: of the model.
        bank: documents encoded by this model as it is now, with their texts; thousands of them, or routing is easy.
        questions: mappings with `question`; `answer` (missing or None: only routing is measured); `positives`, keys of
            the documents that answer it in the order of the hops, none where nothing does; `rounds`, the same keys as
            one list per round (default: one document a round); `kind`, by which figures are given (default: whether
            the question can be answered).
        protocol: that wrapped the documents.
        conditions: among those above (default: all but `"ids"`).
        k: documents per layer that count as found (default: those that the model attends to).
        batch_size: questions at a time.
        show_progress: a progress bar.
        refusal: the answer to what the memory does not hold; the answer of questions without positives that have none.
        max_rounds, documents_per_round, select: of Memory Interleave.
        max_new_tokens: of an answer.
        interleave: further arguments of `MemoryInterleave`.

    Raises:
        ValueError: for no questions, a positive that the bank does not hold, rounds that are not the positives, an
            unknown condition, a question that is too long, and texts that the bank does not hold.
        ImportError: for `"bm25"` where bm25s is missing.
    """
    names = checked_conditions(conditions, protocol)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not questions:
        raise ValueError("`questions` is empty.")
    asked = look_up(bank, questions, refusal)
    options = {"max_rounds": max_rounds, "documents_per_round": documents_per_round, "select": select}
    naming = [name for name, selector in SELECTORS.items() if selector.model_names_documents]
    kinds = list(dict.fromkeys(question.kind for question in asked))
    result = Diagnosis(
        documents=len(bank),
        tokens=bank.num_tokens,
        questions={kind: sum(question.kind == kind for question in asked) for kind in kinds},
        settings={"conditions": names, "max_new_tokens": max_new_tokens, **(options if protocol is not None else {})},
    )
    settings = {**(interleave or {}), **options, "max_new_tokens": max_new_tokens}
    with evaluating(model):
        run = _Run(model, tokenizer, bank, protocol, asked, settings, batch_size)
        for question in asked:
            run.writer.prompt(question.text, ())  # what is too long is said before any work
        if any(question.positives for question in asked):
            plain: list[JudgedFields] = [{"positives": (), **question} for question in questions]
            result.router = router_recall(model, tokenizer, bank, plain, k, batch_size, protocol)
        total = sum(len(run.places(name)) * (len(naming) if name == "ids" else 1) for name in names)
        with tqdm(total=total, unit="question", disable=not show_progress) as run.progress:
            for name in names:
                if name == "ids":
                    result.ids = {way: _named(asked, run.named(way)) for way in naming}
                    continue
                answers = run.answers(name)
                result.predictions[name] = [answers.get(place) for place in range(len(asked))]
                result.answers[name] = _judged(asked, answers, run.read.get(name, {}), refusal)
    result.left_out = {name: count for name, count in run.left_out.items() if count}
    return result


class _Run:
    """The conditions of one diagnosis.

    Attributes:
        read: condition -> question -> positions of the documents whose texts were read.
        left_out: condition -> texts that did not fit.
        progress: a bar over the questions of all conditions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: MemoryBank,
        protocol: PromptProtocol | None,
        questions: Sequence[JudgedQuestion],
        interleave: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.protocol = model, tokenizer, bank, protocol
        self.questions, self.interleave, self.batch_size = questions, interleave, batch_size
        self.writer = Writer(model, tokenizer, bank, protocol, interleave["max_new_tokens"])
        self.progress: tqdm[NoReturn] = tqdm(disable=True)  # `diagnose` puts the one that shows in its place
        self.read: dict[str, dict[int, list[int]]] = {}
        self.left_out: dict[str, int] = {}

    def places(self, condition: str) -> list[int]:
        """The questions that a condition is about."""
        gold_only = condition in ("forced_gold", "gold_text", "ids")
        return [
            place
            for place, question in enumerate(self.questions)
            if (question.answer is not None or condition == "ids") and (question.positives or not gold_only)
        ]

    def answers(self, condition: str) -> dict[int, str]:
        """Question -> what was answered."""
        if condition in ("routed", "single_round") and self.protocol is not None:
            return self._interleaved(condition)
        if condition == "routed":
            return self._written(condition, lambda place: (), memory=True)
        if condition == "forced_gold":
            return self._written(condition, lambda place: self.questions[place].rounds, memory=True, forced=True)
        if condition == "gold_text":
            return self._written(condition, lambda place: self.questions[place].rounds)
        if condition == "bm25":
            return self._written(condition, self._ranked())
        return self._written(condition, lambda place: ())

    def named(self, selection: str) -> dict[int, bool]:
        """Question -> whether exactly the documents of the first round were named in it."""
        asker = self._asker(select=selection, max_rounds=1, max_new_tokens=1)
        right = {}
        for part in self._batches("ids"):
            for place, answer in zip(part, asker.ask([self.questions[place].text for place in part]), strict=True):
                wanted = {asker.ids.id_of(position) for position in self.questions[place].rounds[0]}
                right[place] = set(answer.trace.rounds[0].named) == wanted
        return right

    def _asker(self, **changes: Any) -> MemoryInterleave:
        assert self.protocol is not None
        options = {**self.interleave, **changes}
        return MemoryInterleave(self.model, self.tokenizer, self.bank, self.protocol, **options)

    def _batches(self, condition: str) -> Iterator[list[int]]:
        self.progress.set_description(condition)
        places = self.places(condition)
        for start in range(0, len(places), self.batch_size):
            yield places[start : start + self.batch_size]
            self.progress.update(len(places[start : start + self.batch_size]))

    def _interleaved(self, condition: str) -> dict[int, str]:
        asker = self._asker(**({"max_rounds": 1} if condition == "single_round" else {}))
        texts: dict[int, str] = {}
        self.read[condition] = {}
        for part in self._batches(condition):
            found = asker.ask([self.questions[place].text for place in part], batch_size=self.batch_size)
            for place, answer in zip(part, found, strict=True):
                texts[place] = answer.text
                self.read[condition][place] = [source.position for source in answer.documents]
        return texts

    def _written(
        self,
        condition: str,
        rounds: Callable[[int], Sequence[Sequence[int]]],
        memory: bool = False,
        forced: bool = False,
    ) -> dict[int, str]:
        """Answers behind prompts with the texts of these rounds; where documents are forced, the memory is they."""
        texts: dict[int, str] = {}
        if self.protocol is not None or not memory:
            self.read[condition] = {}
        for part in self._batches(condition):
            groups = [rounds(place) for place in part]
            shown = [() if forced and self.protocol is None else group for group in groups]
            prompts = []
            for place, group in zip(part, shown, strict=True):
                prompt, left_out = self.writer.prompt(self.questions[place].text, group)
                prompts.append(prompt)
                self.left_out[condition] = self.left_out.get(condition, 0) + left_out
                if condition in self.read:
                    read = [position for found in group for position in found]
                    self.read[condition][place] = read[: len(read) - left_out]
            attended = [self.questions[place].positives for place in part] if forced else None
            texts |= zip(part, self.writer.write(prompts, memory, attended), strict=True)
        return texts

    def _ranked(self) -> Callable[[int], list[list[int]]]:
        """The documents that BM25 would read for a question, by round."""
        ranking = BM25([text_of(self.bank, position) for position in range(len(self.bank))])
        per_round = self.interleave["documents_per_round"]
        per_round = per_round or selector_named(self.interleave["select"]).documents_per_round
        if self.protocol is None:
            usual = self.model.config.top_k
        else:
            usual = self.interleave["max_rounds"] * (per_round or 1)
        routed = self.read.get("routed", {})

        def rounds(place: int) -> list[list[int]]:
            count = len(routed[place]) if place in routed else usual
            found = ranking.best(self.questions[place].text, max(count, 1))
            step = per_round or len(found)
            return [found[start : start + step] for start in range(0, len(found), step)]

        return rounds


def _by_kind(questions: Sequence[JudgedQuestion], places: Iterable[int]) -> dict[str, list[int]]:
    """Kind -> which of the questions at these places are of it; all of them last."""
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(questions[place].kind, []).append(place)
    return {**found, EVERY: [place for group in found.values() for place in group]} if found else {}


def _named(questions: Sequence[JudgedQuestion], right: Mapping[int, bool]) -> dict[str, float]:
    return {kind: _mean([right[place] for place in places]) for kind, places in _by_kind(questions, right).items()}


def _judged(
    questions: Sequence[JudgedQuestion],
    answers: Mapping[int, str],
    read: Mapping[int, Sequence[int]],
    refusal: str | None,
) -> dict[str, Answers]:
    """Kind -> figures."""

    def judged(places: Sequence[int]) -> Answers:
        texts = [answers[place] for place in places]
        gold = {place: set(questions[place].positives) for place in places if place in read}
        found = [len(wanted & set(read[place])) / len(wanted) for place, wanted in gold.items() if wanted]
        return Answers(
            questions=len(places),
            exact=_mean([exact_match(answers[place], questions[place].answer or "") for place in places]),
            empty=_mean([not text.strip() for text in texts]),
            refused=None if refusal is None else _mean([exact_match(text, refusal) for text in texts]),
            gold_read=_mean(found) if found else None,
        )

    return {kind: judged(places) for kind, places in _by_kind(questions, answers).items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
