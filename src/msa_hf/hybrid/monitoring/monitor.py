"""`Monitor`: questions whose answers may lack a document that is there."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...generation import Answer, MemoryInterleave, PromptProtocol
from ...generation.combining import combine_layers
from ...model.memory_msa import Memory, MemoryBank, Snapshots
from ...model.modeling_msa import MSAForCausalLM
from ...model.tokenizing_msa import tokenize
from ...retrieval import Embedder, FusionWeights, Searcher
from .calibration import Calibration, calibrate
from .coverage import left_out, sentences_of
from .finding import Cost, Finding, SecondAnswer
from .look_alikes import look_alikes, words_of
from .names import QuestionNames
from .recovering import Recovered, Unanswered, confirm, read_one_by_one
from .second_reading import Evidence, Reading, SecondReader, same_answer, standing
from .signals import CHECKS, SIGNALS, RoutedRound, routing_signals

DEPTH = 100  # documents of each way that are looked at
LINKED = 3  # more texts for a question without an answer
ALONE = 2  # more that are read by themselves
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Budget:
    """Limits of the extra work; None: no limit. A batch that has begun is finished.

    Attributes:
        questions, seconds, tokens: at most.
    """

    questions: int | None = None
    seconds: float | None = None
    tokens: int | None = None

    def allows(self, done: int, spent: Cost) -> bool:
        """Tell whether another batch may begin."""
        return (
            (self.questions is None or done < self.questions)
            and (self.seconds is None or spent.seconds < self.seconds)
            and (self.tokens is None or spent.tokens < self.tokens)
        )


@dataclass
class _Watched:
    """A question on its way through the checks."""

    question: str
    answer: str
    rounds: list[RoutedRound]
    read: list[list[int]]
    routed: list[int]
    scores: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    linked: list[int] = field(default_factory=list)
    names: QuestionNames | None = None
    known_names: float = 1.0
    signals: dict[str, float] = field(default_factory=dict)
    second: dict[str, SecondAnswer] = field(default_factory=dict)
    cost: dict[str, Cost] = field(default_factory=dict)

    @property
    def known(self) -> list[int]:
        """Positions that the answer read, or without a protocol attended to."""
        return [position for group in self.read for position in group] or self.attended

    @property
    def attended(self) -> list[int]:
        return [] if any(self.read) else self.routed


class Monitor:
    """Answers questions again in other ways and says which of them may be blind spots of the routing.

    Checks, each an answer with more documents than the first one had:

    * `"denser"`: `denser` times as many routed documents are attended to and read.
    * `"hybrid"`: memory layers attend to what a hybrid search finds, and its best documents are read.
    * `"texts"`: no memory; texts that were read and those of the best candidates of all ways are in the prompt: by
      words and vectors for the question, for each sentence of the text that was read first, and by the routers. Without
      an answer there are three more of them, in place of what the rounds after the first one read.

    A check whose answer is empty or a refusal says nothing against the first answer. Else it counts by how many nats
    more likely its own answer is than the first one, both given what the check read: as `..._disagree`; or where the
    first answer was empty or a refusal as `..._recover`, times the share of the question's names that a document has.
    Disagreements count nothing where more checks give the first answer again than do not, and where of several checks
    no other one gives the same answer. Without an answer `"texts"` also reads each candidate alone, behind what was
    read first, and what all of them together say counts if the documents that say it are enough for it; the better of
    the two counts.

    Args:
        model, tokenizer: that answer.
        bank: that is asked, with its texts; its state of now.
        protocol: that wrapped the documents; None: questions are put plainly.
        calibration: thresholds; None: a question is flagged where a check disagrees.
        checks: among `CHECKS`. Default: all, but `"hybrid"` only where the bank has an index or vectors.
        refusal: the answer to what the memory does not hold.
        denser: how many times as many documents.
        candidates: texts that a check reads beyond those of the first answer, at most.
        max_new_tokens: of an answer.
        interleave: arguments of `MemoryInterleave`, as answers in production have them.
        embedder, fusion: as of `Searcher`.
        batch_size: questions at a time.

    Raises:
        ValueError: for an unknown check, an option out of range, a check of texts that the bank does not hold, and a
            hybrid check of a bank without index and vectors, with the remedy.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        bank: MemoryBank | Memory | Snapshots,
        protocol: PromptProtocol | None = None,
        *,
        calibration: Calibration | None = None,
        checks: Sequence[str] | None = None,
        refusal: str | None = None,
        denser: int = 4,
        candidates: int = 3,
        max_new_tokens: int = 64,
        interleave: Mapping[str, Any] | None = None,
        embedder: Embedder | None = None,
        fusion: FusionWeights | str | None = None,
        batch_size: int = 8,
    ) -> None:
        least = {"denser": 2, "candidates": 1, "max_new_tokens": 1, "batch_size": 1}
        for name, lowest in least.items():
            value = locals()[name]
            if type(value) is not int or value < lowest:
                raise ValueError(f"`{name}` must be an integer of at least {lowest}, got {value!r}.")
        self.searcher = Searcher(
            bank, model=model, tokenizer=tokenizer, protocol=protocol, embedder=embedder, fusion=fusion
        )
        self.bank = self.searcher.bank
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.ways = self._other_ways(required=checks is not None and "hybrid" in checks)
        if checks is None:
            checks = [check for check in CHECKS if check != "hybrid" or self.ways]
        if unknown := [check for check in checks if check not in CHECKS]:
            raise ValueError(f"There is no check {unknown[0]!r}; there are {', '.join(CHECKS)}.")
        self.checks = [check for check in CHECKS if check in checks]
        self._require_texts()
        self.calibration, self.refusal = calibration, refusal
        self.denser, self.candidates, self.batch_size = denser, candidates, batch_size
        self.reader = SecondReader(model, tokenizer, self.bank, protocol, max_new_tokens)
        self._missing: dict[int, float] = {}
        self.asker: MemoryInterleave | None = None
        if protocol is not None:
            options = {"max_new_tokens": max_new_tokens, **(interleave or {})}
            self.asker = MemoryInterleave(model, tokenizer, self.bank, protocol, **options)

    def _other_ways(self, required: bool) -> tuple[str, ...]:
        """The ways of searching beside the routers that the bank has."""
        try:
            return self.searcher.kept()
        except (ValueError, ImportError):
            if required:
                raise
            return ()

    def _require_texts(self) -> None:
        if not len(self.bank):
            raise ValueError("The bank has no documents, so there is nothing to be found.")
        if self.checks and all(text is None for _, text in self.bank.documents.texts()):
            raise ValueError(
                f"The bank was made without texts, which the checks {', '.join(self.checks)} read: encode the "
                "documents with their texts, or pass `checks=()` for the signals of routing alone."
            )

    # Checking ---------------------------------------------------------------------------------------------------------

    def check(
        self,
        questions: Sequence[str],
        answers: Sequence[Answer | str | None] | None = None,
        budget: Budget | None = None,
        show_progress: bool = False,
    ) -> list[Finding]:
        """Monitor questions.

        Args:
            questions: texts.
            answers: those that were given, with their traces where there are any. Default: the monitor asks.
            budget: of extra work; the findings of the first questions where it does not reach for all.
            show_progress: a progress bar.

        Raises:
            ValueError: for no questions, one that is empty or too long, and a document that is to be read and has no
                text.
        """
        if not questions:
            raise ValueError("`questions` is empty: there is nothing to monitor.")
        given: list[Answer | str | None] = list(answers) if answers is not None else [None] * len(questions)
        if len(given) != len(questions):
            raise ValueError(f"`answers` has {len(given)} entries for {len(questions)} questions.")
        for number, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"Question {number} is {question!r}; a question is a text that is not empty.")
        limits, findings, spent = budget or Budget(), [], Cost()
        count = len(questions) if limits.questions is None else min(limits.questions, len(questions))
        with tqdm(total=count, unit="question", disable=not show_progress) as progress:
            for start in range(0, count, self.batch_size):
                if not limits.allows(start, spent):
                    break
                stop = min(start + self.batch_size, count)
                found = self._check(list(questions[start:stop]), given[start:stop])
                findings += found
                spent = sum((finding.total_cost for finding in found), spent)
                progress.update(len(found))
        return findings

    def calibrate(
        self,
        questions: Sequence[str],
        false_alarms: float = 0.05,
        confidence: float = 0.9,
        weights: Mapping[str, float] | None = None,
        show_progress: bool = False,
    ) -> Calibration:
        """Take thresholds from questions that are known to be answered well, and use them from now on.

        Args:
            questions: texts; a few hundred, of all kinds that are asked.
            false_alarms, confidence, weights: see `msa_hf.hybrid.monitoring.calibrate`.
            show_progress: a progress bar.

        Raises:
            ValueError: for too few questions.
        """
        findings = self.check(questions, show_progress=show_progress)
        signals = [finding.signals for finding in findings]
        everywhere = set(signals[0]).intersection(*signals)
        common = [{name: item[name] for name in item if name in everywhere} for item in signals]
        self.calibration = calibrate(common, false_alarms, confidence, weights, len(self.bank))
        return self.calibration

    def _check(self, questions: list[str], answers: list[Answer | str | None]) -> list[Finding]:
        watched = self._answered(questions, answers)
        self._search(watched)
        for item in watched:
            unanswered = self._says_nothing(item.answer)
            item.signals = routing_signals(item.rounds, unanswered, self.model.config.top_k) | self._gaps(item)
            item.signals |= self._texts_at_fault(item)
        for check in self.checks:
            start = time.perf_counter()
            self._second(check, watched)
            self._share(watched, check, time.perf_counter() - start)
        for item in watched:
            self._outvote(item)
        return [self._finding(item) for item in watched]

    def _share(self, watched: Sequence[_Watched], part: str, seconds: float) -> None:
        """Charge each question of a batch its share of the time."""
        for item in watched:
            item.cost[part] = item.cost.get(part, Cost()) + Cost(seconds / len(watched))

    # The first answer -------------------------------------------------------------------------------------------------

    def _answered(self, questions: list[str], answers: list[Answer | str | None]) -> list[_Watched]:
        """First answers with their routing; those that are missing are asked for."""
        start = time.perf_counter()
        missing = [place for place, answer in enumerate(answers) if not isinstance(answer, Answer)]
        if self.asker is None:
            watched = self._plain(questions, answers)
        else:
            asked = dict(zip(missing, self._ask([questions[place] for place in missing]), strict=True))
            known = {place: answer for place, answer in enumerate(answers) if isinstance(answer, Answer)} | asked
            watched = [self._traced(questions[place], known[place]) for place in range(len(questions))]
            for place, answer in asked.items():
                watched[place].cost["answer"] = Cost(0.0, _tokens(answer))
        for place in missing:
            if isinstance(given := answers[place], str):
                watched[place].answer = given
        if missing:
            self._share([watched[place] for place in missing], "answer", time.perf_counter() - start)
        return watched

    def _ask(self, questions: list[str]) -> list[Answer]:
        assert self.asker is not None
        return self.asker.ask(questions, batch_size=self.batch_size)

    def _traced(self, question: str, answer: Answer) -> _Watched:
        rounds, read, before = [], [], set()
        routed: dict[int, None] = {}
        for number, item in enumerate(answer.trace.rounds):
            routed |= dict.fromkeys(choice.position for choices in item.chosen.values() for choice in choices)
            here = [choice.position for choice in item.read]
            if here or not number:
                left = {
                    layer: [choice for choice in choices if choice.position not in before]
                    for layer, choices in item.chosen.items()
                }
                combined = [(choice.position, choice.score or 0.0) for choice in combine_layers(left, "mean")]
                best = {layer: choices[0].position for layer, choices in left.items() if choices}
                rounds.append(RoutedRound(combined, best, frozenset(here)))
            if here:
                read.append(here)
                before |= set(here)
        return _Watched(question, answer.text, rounds, read, list(routed))

    def _plain(self, questions: list[str], answers: list[Answer | str | None]) -> list[_Watched]:
        """Without a protocol: memory layers attend to what they choose, and nothing is read."""
        from ...retrieval.router_scores import router_scores

        scores = router_scores(self.model, self.tokenizer, self.bank, questions, None)
        k = min(self.model.config.top_k, len(self.bank))
        texts = [answer if isinstance(answer, str) else "" for answer in answers]
        if any(not isinstance(answer, str) for answer in answers):
            prompts = [self.reader.writer.prompt(question, ())[0] for question in questions]
            written = self.reader.writer.write(prompts, memory=True)
            texts = [given if isinstance(given, str) else made for given, made in zip(answers, written, strict=True)]
        watched: list[_Watched] = []
        for number, (question, text) in enumerate(zip(questions, texts, strict=True)):
            values, positions = scores.mean[number].topk(k)
            combined = list(zip(positions.tolist(), values.tolist(), strict=True))
            chosen = {layer: item[number].topk(k).indices.tolist() for layer, item in scores.layers.items()}
            best = {layer: places[0] for layer, places in chosen.items()}
            routed = list(dict.fromkeys(place for places in chosen.values() for place in places))
            watched.append(
                _Watched(question, text, [RoutedRound(combined, best, frozenset({combined[0][0]}))], [], routed)
            )
        return watched

    # Candidates -------------------------------------------------------------------------------------------------------

    def _search(self, watched: list[_Watched]) -> None:
        """The lists of all ways, for the question and for it with what was read."""
        start = time.perf_counter()
        questions = [item.question for item in watched]
        if self.checks:
            depth = max(DEPTH, self.denser * self.model.config.top_k)
            for item, ranking in zip(watched, self.searcher.rankings("router", questions, depth), strict=True):
                item.scores["router"] = ranking
        for way in self.ways:
            for item, ranking in zip(watched, self.searcher.rankings(way, questions, DEPTH), strict=True):
                item.scores[way] = ranking
            if "texts" in self.checks:
                self._follow(way, watched)
        self._share(watched, "routing", time.perf_counter() - start)

    def _follow(self, way: str, watched: list[_Watched]) -> None:
        """The best document for each sentence of the texts that were read first, without the question's words: those
        that it names, whichever of them the next round should have found."""
        for item in watched:
            known, asked = set(item.known), set(_WORD.findall(item.question.lower()))
            texts = [self.bank.documents[position].text or "" for position in (item.read[0] if item.read else ())]
            queries = []
            for sentence in (part for text in texts for part in sentences_of(text)):
                words = [word for word in _WORD.findall(sentence) if word.lower() not in asked]
                queries += [" ".join(words)] if words else []
            for ranking in self.searcher.rankings(way, queries, len(known) + 1) if queries else ():
                item.linked += [position for position, _ in ranking if position not in known][:1]

    def _gaps(self, item: _Watched) -> dict[str, float]:
        """The lead of the best document of other ways over the best that was read, in their own scores; of words
        as far as it has names of the question that the others lack."""
        found, known = {}, set(item.known)
        for way in self.ways:
            ranking = item.scores[way]
            best = ranking[0][1] if ranking else 0.0
            low = 0.0 if way == "lexical" or not ranking else ranking[-1][1]
            own = max((score for position, score in ranking if position in known), default=low)
            found[f"{way}_gap"] = best - own
        if "lexical" in self.ways:
            item.names = QuestionNames(self.searcher, item.question)
            names = item.names.known(item.scores["lexical"], known)
            item.known_names = max(names.other, names.read)
            found["lexical_gap"] *= max(names.other - names.read, 0.0)
        return found

    def _texts_at_fault(self, item: _Watched) -> dict[str, float]:
        """Documents that look like one that was read, and documents for the question that are encoded in part."""
        ranked = [position for way in self.ways for position, _ in item.scores[way]]
        known = set(item.known)
        others = [position for position in dict.fromkeys([*item.routed, *ranked]) if position not in known]
        texts = self.bank.documents
        alike = look_alikes((texts[position].text or "" for position in known), (texts[n].text or "" for n in others))
        best = [position for way in self.ways for position, _ in item.scores[way][: self.candidates]]
        shares = [
            self._left_out(position) * (1.0 if item.names is None else item.names.share([position]))
            for position in dict.fromkeys([*item.known, *best])
        ]
        return {"look_alikes": float(alike), "partly_encoded": max(shares, default=0.0)}

    def _left_out(self, position: int) -> float:
        """The share of a document's text that is not encoded."""
        if position not in self._missing:
            document = self.bank.documents[position]
            needed = 0
            if document.text is not None and self.protocol is not None:
                needed = len(self.protocol.document_row(position, document.text, self.tokenizer)["input_ids"])
            elif document.text is not None:
                needed = len(tokenize(self.tokenizer, document.text))
            self._missing[position] = left_out(document.tokens, needed)
        return self._missing[position]

    def _candidates(self, check: str, item: _Watched) -> list[int]:
        """Documents that a check reads beyond those of the first answer, best first."""
        known = set(item.known)

        def unread(ranking: Sequence[tuple[int, float]]) -> list[int]:
            return [position for position, _ in ranking if position not in known]

        router = [unread(round.combined) for round in item.rounds[::-1]] + [unread(item.scores["router"])]
        if check == "denser":
            lists = router
            count = min((self.denser - 1) * max(len(item.known), 1), self.candidates) if self.protocol else 0
        elif check == "hybrid":
            lists = [unread(self.searcher.fused(item.scores, item.question))]
            count = self.candidates if self.protocol else 0
        elif self._says_nothing(item.answer):  # the way to the answer may go through any document that was named
            best = list(islice(_in_turns([unread(item.scores[way]) for way in self.ways]), len(self.ways)))
            lists = [[*best, *item.linked, *(position for ranking in router for position in ranking)]]
            count = self.candidates + LINKED
        else:
            lists = [*(unread(item.scores[way]) for way in self.ways), item.linked, *router[:1]]
            count = self.candidates
        return list(islice(self._distinct(_in_turns(lists), item.known), count))

    def _distinct(self, positions: Iterable[int], known: Iterable[int]) -> Iterator[int]:
        """Documents without those that have the words of another one, or of a known one: these say nothing new."""
        seen = {words_of(self.bank.documents[position].text or "") for position in known}
        for position in positions:
            words = words_of(self.bank.documents[position].text or "")
            if words not in seen or not words:
                seen.add(words)
                yield position

    def _evidence(self, check: str, item: _Watched) -> tuple[Evidence, list[int]]:
        """The documents of a check, and those that are new in it."""
        more = self._candidates(check, item)
        rounds = [*item.read, *([more] if more else [])]
        if check == "texts":
            if self._says_nothing(item.answer):  # what the later rounds read led nowhere
                rounds = [*item.read[:1], *([more] if more else [])]
            if not item.read:
                best = [position for position, _ in item.rounds[0].combined] if item.rounds else []
                rounds = [list(dict.fromkeys([*more, *best]))[: self.candidates]]
            return Evidence(rounds), more
        k = self.model.config.top_k
        if check == "denser":
            attended = [position for position, _ in item.scores["router"]][: self.denser * k]
        else:
            attended = [position for position, _ in self.searcher.fused(item.scores, item.question)][:k]
        known = set(item.known)
        new = more or [position for position in attended if position not in known][: self.candidates]
        return Evidence(rounds, attended), new

    # The second answer ------------------------------------------------------------------------------------------------

    def _second(self, check: str, watched: list[_Watched]) -> None:
        evidence = [self._evidence(check, item) for item in watched]
        readings = self.reader.read(
            [item.question for item in watched], [found for found, _ in evidence], [item.answer for item in watched]
        )
        for item, reading, (_, new) in zip(watched, readings, evidence, strict=True):
            agrees, advantage = self._agrees(item, reading), reading.advantage
            recovers = not agrees and self._says_nothing(item.answer)
            keys = [self.bank.documents[position].key for position in new]
            item.second[check] = SecondAnswer(reading.text, agrees, keys)
            item.signals[f"{check}_recover"] = advantage * item.known_names if recovers else 0.0
            item.signals[f"{check}_disagree"] = 0.0 if agrees or recovers else advantage
            item.cost[check] = Cost(0.0, reading.tokens)
        if check == "texts":
            rows = zip(watched, readings, evidence, strict=True)
            self._recover([(item, reading, new) for item, reading, (_, new) in rows if self._says_nothing(item.answer)])

    def _recover(self, rows: Sequence[tuple[_Watched, Reading, Sequence[int]]]) -> None:
        """Look for the answer to questions without one: by what their texts say together, if that is confirmed, and by
        each of them alone; the better one counts."""
        asked = []
        for item, _, new in rows:
            ranked = [position for way in self.ways for position, _ in item.scores[way]]
            given = {*new, *item.known}
            others = self._distinct((position for position in dict.fromkeys(ranked) if position not in given), given)
            read = item.read[0] if item.read else ()
            candidates = [*new, *islice(others, ALONE)]
            asked.append(Unanswered(item.question, item.answer, read, candidates, item.names))
        alone = read_one_by_one(self.reader, asked, self._says_nothing, self.batch_size)
        for (item, reading, new), question, single in zip(rows, asked, alone, strict=True):
            together, tokens = 0.0, single.tokens
            if not self._agrees(item, reading):
                together, more = confirm(
                    self.reader, question, reading, lambda position: self.bank.documents[position].text or ""
                )
                together, tokens = together * item.known_names, tokens + more
            item.second["texts"] = self._recovered(reading, new, together, single)
            item.signals["texts_recover"] = max(together, single.advantage)
            item.cost["texts"] = Cost(0.0, item.cost["texts"].tokens + tokens)

    def _recovered(self, reading: Reading, new: Sequence[int], together: float, single: Recovered) -> SecondAnswer:
        best = single.position if single.advantage > together else None
        order = new if best is None else [best, *(position for position in new if position != best)]
        keys = [self.bank.documents[position].key for position in order]
        return SecondAnswer(reading.text if best is None else single.text, not max(together, single.advantage), keys)

    def _outvote(self, item: _Watched) -> None:
        """Let disagreements count nothing that do not stand (`standing`)."""
        if not self._says_nothing(item.answer):
            kept = standing(item.answer, {check: second.text for check, second in item.second.items()})
            item.signals |= {f"{check}_disagree": 0.0 for check in item.second if check not in kept}

    def _agrees(self, item: _Watched, reading: Reading) -> bool:
        return self._says_nothing(reading.text) or same_answer(reading.text, item.answer)

    def _says_nothing(self, answer: str) -> bool:
        return not answer.strip() or (self.refusal is not None and same_answer(answer, self.refusal))

    def _finding(self, item: _Watched) -> Finding:
        found = Finding(
            question=item.question,
            answer=item.answer,
            unanswered=self._says_nothing(item.answer),
            read=[self.bank.documents[position].key for position in item.known],
            routed=item.routed,
            signals=item.signals,
            second=item.second,
            cost=item.cost,
            reasons=[name for name, value in item.signals.items() if value > 0 and SIGNALS[name].check is not None],
        )
        return found if self.calibration is None else judged(found, self.calibration)


def judged(finding: Finding, calibration: Calibration) -> Finding:
    """A finding with the verdict of a calibration."""
    from dataclasses import replace

    return replace(
        finding,
        shares=calibration.shares(finding.signals),
        p_value=calibration.p_value(finding.signals),
        reasons=calibration.reasons(finding.signals),
    )


def _tokens(answer: Answer) -> int:
    """The tokens that all stages of an answer processed."""
    stages = [stage for item in answer.trace.rounds for stage in item.stages.values()]
    return sum(stage.tokens for stage in (*stages, *answer.trace.stages.values()))


def _in_turns(lists: Sequence[Sequence[int]]) -> Iterator[int]:
    """The first of each list, then the second of each, and so on; each once."""
    seen = set[int]()
    for place in range(max(map(len, lists), default=0)):
        for ranking in lists:
            if place < len(ranking) and ranking[place] not in seen:
                seen.add(ranking[place])
                yield ranking[place]
