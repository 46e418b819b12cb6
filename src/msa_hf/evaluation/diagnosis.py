"""What a model with a memory gets right, and which part of it gets wrong what it does not: router or reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.questions import DataError, _pad, _rows, _text
from ..generation import SELECTORS, DocumentIds, MemoryInterleave, PromptProtocol
from ..generation.selectors import selector_named
from ..model.memory_msa import MemoryBank
from ..model.modes_msa import evaluating
from ..model.routing_msa import select_documents
from . import exact_match
from .prompting import BM25, Writer, prompt_of, require_bm25s, text_of

# In the order in which they are measured: what BM25 reads depends on what was routed.
CONDITIONS = ("routed", "single_round", "forced_gold", "gold_text", "bm25", "no_memory", "ids")
WITH_PROTOCOL = ("single_round", "ids")
EVERY = "all"  # what questions of all kinds together are called


def positions_of(bank: MemoryBank, keys: Sequence[str]) -> list[int]:
    """Where the documents with these keys stand, in order and once each.

    Raises:
        ValueError: naming a key that the bank does not hold.
    """
    try:
        return list(dict.fromkeys(bank.documents.position(key) for key in keys))
    except KeyError as error:
        raise ValueError(f"`positives` names {error.args[0]!r}, which the bank does not hold.") from None


def router_recall(
    model: Any,
    tokenizer: Any,
    bank: MemoryBank,
    questions: Sequence[Mapping[str, Any]],
    k: int | None = None,
    batch_size: int = 16,
    protocol: PromptProtocol | None = None,
    rounds_read: int = 0,
) -> dict[str, Any]:
    """How many of the documents that answer them routers find for questions as they are first put, or later.

    Args:
        model: a causal LM with a memory, with or without adapters.
        tokenizer: of the model.
        bank: documents encoded by this model as it is now; thousands of them, or the figures flatter.
        questions: with `question` and `positives`, keys of the bank; those without positives are left out.
        k: documents per layer (default: those that the model attends to).
        batch_size: questions at a time.
        protocol: whose prompt puts the question; None: the question and a line break, as `QuestionCollator` does.
        rounds_read: with a protocol, how many rounds' documents have been read already (`rounds`, or one positive
            each): the positives are then those of the rounds to come, and questions without any are left out. The bank
            must hold the texts.

    Returns:
        `k`; `questions`, their number; `wanted`, the number of different documents that are the first positive of one.
        `recall`, the mean share of a question's positives that any layer has among its k best, and `layers`, the same
        by layer; `first` and `first_layers`, the share of questions whose first positive is found, the only one that a
        first round can be asked for where questions take several hops. The same four for the best document alone:
        `recall_at_1`, `layers_at_1`, `first_at_1`, `first_layers_at_1`. `distinct`, by layer, how many different
        documents the k best of all questions are: few of them for many questions is a collapsed router.

    Raises:
        ValueError: for k < 1, no question with positives, a positive that the bank does not hold, and rounds read
            without a protocol or without texts.
    """
    k = model.config.top_k if k is None else k
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if rounds_read and protocol is None:
        raise ValueError("`rounds_read` needs a protocol: without one there are no rounds.")
    asked = [question for question in questions if len(_rounds_of(question)) > rounds_read]
    if not asked:
        raise ValueError(
            "`questions` holds none with positives, so nothing can be found."
            if not rounds_read
            else f"`questions` holds none with documents to be found after {rounds_read} rounds."
        )
    rounds = [[positions_of(bank, group) for group in _rounds_of(question)] for question in asked]
    gold = [[position for group in groups[rounds_read:] for position in group] for groups in rounds]
    layers = list(model.config.memory_layers)
    found: dict[int, list[list[int]]] = {layer: [] for layer in layers}
    all_scores = k > model.config.top_k
    with evaluating(model):
        for start in range(0, len(asked), batch_size):
            rows = [
                prompt_of(tokenizer, item["question"], protocol, _texts(bank, groups[:rounds_read]))
                for item, groups in zip(
                    asked[start : start + batch_size], rounds[start : start + batch_size], strict=True
                )
            ]
            routing = model(
                input_ids=_pad([ids for ids, _ in rows], 0, left=True).to(model.device),
                attention_mask=_pad([[1] * len(ids) for ids, _ in rows], 0, left=True).to(model.device),
                routing_mask=_pad([[int(item) for item in routes] for _, routes in rows], 0, left=True)
                .bool()
                .to(model.device),
                memory=bank,
                output_document_scores=all_scores,
                use_cache=False,
                logits_to_keep=1,
            ).routing
            for layer in layers:
                chosen = routing[layer].documents[:, :k]
                if all_scores:
                    chosen, _ = select_documents(routing[layer].document_scores, k)
                found[layer] += [[place for place in row if place >= 0] for row in chosen.tolist()]

    def shares(best: int, wanted: Sequence[Sequence[int]]) -> tuple[float, dict[int, float]]:
        """The mean share of the wanted documents among the best: of any layer, and by layer."""

        def share(chosen: Sequence[set[int]]) -> float:
            return sum(len(a & set(b)) / len(b) for a, b in zip(chosen, wanted, strict=True)) / len(wanted)

        sets = {layer: [set(row[:best]) for row in rows] for layer, rows in found.items()}
        union = [set().union(*row) for row in zip(*sets.values(), strict=True)]
        return share(union), {layer: share(rows) for layer, rows in sets.items()}

    result: dict[str, Any] = {
        "k": k,
        "questions": len(asked),
        "wanted": len({row[0] for row in gold}),
        "distinct": {layer: len(set().union(*rows)) for layer, rows in found.items()},
    }
    for ending, best in (("", k), ("_at_1", 1)):
        result["recall" + ending], result["layers" + ending] = shares(best, gold)
        result["first" + ending], result["first_layers" + ending] = shares(best, [row[:1] for row in gold])
    return result


def _rounds_of(question: Mapping[str, Any]) -> list[Sequence[str]]:
    """Keys of the documents that each round should find."""
    return question.get("rounds") or [[key] for key in question["positives"]]


def _texts(bank: MemoryBank, rounds: Sequence[Sequence[int]]) -> list[list[tuple[int, str]]]:
    """Ids and texts of documents at these positions."""
    ids, found = DocumentIds(bank), []
    for group in rounds:
        found.append([(ids.id_of(position), text_of(bank, position)) for position in group])
    return found


# Questions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """A question whose documents were looked up.

    Attributes:
        rounds: positions of the documents that answer it, by the round of retrieval that should find them.
    """

    text: str
    answer: str | None
    kind: str
    rounds: tuple[tuple[int, ...], ...]

    @property
    def positives(self) -> list[int]:
        return [position for found in self.rounds for position in found]


def read_judged(path: str | Path) -> list[dict[str, Any]]:
    """The questions of a JSON Lines file for `diagnose`; fields that it does not know are passed over.

    Raises:
        DataError: for a file that is missing, undecodable or empty, and a field of another type, naming file and line.
    """
    questions = []
    for place, row in _rows(Path(path)):
        question: dict[str, Any] = {"question": _text(place, row, "question")}
        for name in ("answer", "kind"):
            if row.get(name) is not None:
                question[name] = _text(place, row, name)
        if (keys := row.get("positives")) is not None:
            if not _are_keys(keys):
                raise DataError(f"{place}: 'positives' must be a list of document keys, got {json.dumps(keys)}")
            question["positives"] = keys
        if (rounds := row.get("rounds")) is not None:
            if not isinstance(rounds, list) or not all(map(_are_keys, rounds)):
                raise DataError(f"{place}: 'rounds' must be lists of document keys, got {json.dumps(rounds)}")
            question["rounds"] = rounds
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return questions


def _are_keys(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(key, str) for key in value)


def _looked_up(bank: MemoryBank, questions: Sequence[Mapping[str, Any]], refusal: str | None) -> list[_Question]:
    made = []
    with_kinds = any(item.get("kind") for item in questions)
    for item in questions:
        keys = list(item.get("positives") or ())
        rounds = [positions_of(bank, group) for group in item.get("rounds") or [[key] for key in keys]]
        if sorted(position for group in rounds for position in group) != sorted(positions_of(bank, keys)):
            raise ValueError(f"`rounds` of {item['question'][:60]!r} are not its `positives`, each in one round.")
        answer = item.get("answer")
        if answer is None and not keys:
            answer = refusal
        unanswerable = not keys or (refusal is not None and answer == refusal)
        kind = item.get("kind") or ("other" if with_kinds else "unanswerable" if unanswerable else "answerable")
        made.append(_Question(item["question"], answer, kind, tuple(map(tuple, rounds))))
    return made


# Figures --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """How questions of one kind were answered under one condition; shares of them.

    Attributes:
        questions: how many there were.
        exact: answered right, by `exact_match`.
        empty: answered with nothing.
        refused: answered with the refusal, rightly or not; None where the caller named none.
        gold_read: the mean share of a question's positives whose texts were read; None where no texts are read.
    """

    questions: int
    exact: float
    empty: float
    refused: float | None = None
    gold_read: float | None = None


@dataclass
class Diagnosis:
    """What `diagnose` measured.

    Attributes:
        documents, tokens: of the bank.
        questions: kind -> how many.
        router: what `router_recall` returned; None where no question has positives.
        answers: condition -> kind -> figures. The kind `"all"` is all of them.
        ids: how documents were named (`"generate"`, `"constrained"`) -> kind -> share of the questions in whose first
            round exactly the right ids were named.
        predictions: condition -> what was answered to each question; None where it was not asked.
        left_out: condition -> texts that did not fit into the model's positions.
        settings: what was asked for.
    """

    documents: int
    tokens: int
    questions: dict[str, int]
    router: dict[str, Any] | None = None
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    ids: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: dict[str, list[str | None]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; layers become strings, as keys of JSON objects are."""
        return json.loads(self.to_json())

    def to_json(self, indent: int | None = None) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, indent=indent)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.questions.items())
        lines = [f"{self.documents} documents, {self.tokens} tokens; questions: {counts}"]
        if self.router is not None:
            lines += ["", *_router_table(self.router)]
        if self.answers:
            lines += ["", *self._answer_table()]
        if self.ids:
            lines += ["", "ids named in the first round, exactly the right ones"]
            rows = [[name, *(_shown(found.get(kind)) for kind in self._columns())] for name, found in self.ids.items()]
            lines += _table(["selection", *self._columns()], rows)
        return "\n".join(lines)

    def _columns(self) -> list[str]:
        kinds = list(self.questions)
        return [*kinds, EVERY] if len(kinds) > 1 else kinds

    def _answer_table(self) -> Iterator[str]:
        columns = self._columns()
        rows, notes = [], []
        for condition, found in self.answers.items():
            total = found[EVERY]
            rows.append(
                [
                    condition,
                    *(_shown(found[kind].exact if kind in found else None) for kind in columns),
                    *(_shown(value) for value in (total.empty, total.refused, total.gold_read)),
                ]
            )
            most = max(item[EVERY].questions for item in self.answers.values())
            if total.questions < most:
                notes.append(f"{condition}: of {total.questions} questions; the others have no positives")
            if self.left_out.get(condition):
                notes.append(f"{condition}: {self.left_out[condition]} texts were left out, as they did not fit")
        yield "exact answers by kind of question; over all of them: empty, refused, gold documents read"
        yield from _table(["condition", *columns, "empty", "refused", "gold read"], rows)
        yield from notes


def _router_table(router: Mapping[str, Any]) -> Iterator[str]:
    k = router["k"]
    yield f"router, {router['questions']} questions as first put, {router['wanted']} documents wanted first"
    names = ("layers", "first_layers", "layers_at_1", "first_layers_at_1")
    rows = [
        [str(layer), *(_shown(router[name][layer]) for name in names), str(router["distinct"][layer])]
        for layer in router["layers"]
    ]
    rows.append(["any", *(_shown(router[name]) for name in ("recall", "first", "recall_at_1", "first_at_1")), ""])
    yield from _table(["layer", f"all@{k}", f"first@{k}", "all@1", "first@1", "distinct"], rows)


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in (header, *rows)
    ]


# Asking ---------------------------------------------------------------------------------------------------------------


def checked_conditions(conditions: Sequence[str] | None, protocol: PromptProtocol | None) -> list[str]:
    """The conditions in the order in which they are measured; None: all that make sense, but `"ids"`.

    Raises:
        ValueError: for an unknown condition, and one that needs a protocol where there is none.
        ImportError: for `"bm25"` where bm25s is missing.
    """
    if conditions is None:
        conditions = [name for name in CONDITIONS if name != "ids" and (protocol or name not in WITH_PROTOCOL)]
    for name in conditions:
        if name not in CONDITIONS:
            raise ValueError(f"`conditions` must be among {', '.join(CONDITIONS)}, got {name!r}.")
        if protocol is None and name in WITH_PROTOCOL:
            raise ValueError(f"The condition {name!r} needs a protocol: without one there are no rounds and no ids.")
    if "bm25" in conditions:
        require_bm25s()
    return [name for name in CONDITIONS if name in conditions]


def diagnose(
    model: Any,
    tokenizer: Any,
    bank: MemoryBank,
    questions: Sequence[Mapping[str, Any]],
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
    asked = _looked_up(bank, questions, refusal)
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
            plain = [{"positives": (), **question} for question in questions]
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
        model: Any,
        tokenizer: Any,
        bank: MemoryBank,
        protocol: PromptProtocol | None,
        questions: Sequence[_Question],
        interleave: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.protocol = model, tokenizer, bank, protocol
        self.questions, self.interleave, self.batch_size = questions, interleave, batch_size
        self.writer = Writer(model, tokenizer, bank, protocol, interleave["max_new_tokens"])
        self.progress: Any = None
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
        """What BM25 would read for a question, by round."""
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


def _by_kind(questions: Sequence[_Question], places: Iterable[int]) -> dict[str, list[int]]:
    """Kind -> which of the questions at these places are of it; all of them last."""
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(questions[place].kind, []).append(place)
    return {**found, EVERY: [place for group in found.values() for place in group]} if found else {}


def _named(questions: Sequence[_Question], right: Mapping[int, bool]) -> dict[str, float]:
    return {kind: _mean([right[place] for place in places]) for kind, places in _by_kind(questions, right).items()}


def _judged(
    questions: Sequence[_Question],
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
