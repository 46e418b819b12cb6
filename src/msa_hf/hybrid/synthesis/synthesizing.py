"""Synthesis: one text with citations out of many findings, by map and reduce or by refining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...json_object import JsonObject
from ..chains.template import JsonValue, render
from ..chat.chat_model import ChatModel, Message, messages_of
from .budget import Budget, BudgetError, Spending, pack, shorten
from .citations import CitationError, label_keys, resolve, without_labels
from .cited_sentences import attributed, write_sentences
from .conflicts import Conflict, find_conflicts
from .findings import Finding

STRATEGIES = ("map_reduce", "refine")
ON_UNKNOWN = ("mark", "refuse")
CITING = ("free", "every_sentence")
NOTHING = "No document answers this."

SYSTEM = "You put together what documents say. You use only what you are shown, and cite the label of each source."
WRITE = """{task}

{items}

Write the answer in a few sentences. Behind each statement cite its source by the label in brackets, such as [S1]. \
Where sources disagree, give each view with its source."""
REFINE = """{task}

The answer so far:
{before}

Further material:
{items}

Write the whole answer anew with what this adds or corrects. Keep the labels in brackets behind each statement, such \
as [S1]. Where sources disagree, give each view with its source."""

SENTENCES = """Write the answer as a JSON list. Each entry has `sources`, the labels of the sources that it takes \
from, and `sentence`, one sentence that says what they say. Where sources disagree, give each view its own entry."""
WRITE_SENTENCES = f"{{task}}\n\n{{items}}\n\n{SENTENCES}"
REFINE_SENTENCES = f"""{{task}}

The answer so far:
{{before}}

Further material:
{{items}}

Write the whole answer anew with what this adds or corrects. {SENTENCES}"""
# By the way of citing: the prompt of a text, and of one with a text so far.
PROMPTS = {"free": (WRITE, REFINE), "every_sentence": (WRITE_SENTENCES, REFINE_SENTENCES)}


@dataclass(frozen=True)
class Synthesis:
    """A text made of findings.

    Attributes:
        question: that it answers.
        answer: as the model wrote it, with keys in brackets; what it cites without having been shown it is marked.
        cited: keys that it cites, in order.
        unknown: labels that it cites and was not shown, at whatever stage.
        conflicts: questions on which the findings disagree, with all sides.
        findings: that it is made of.
        calls, tokens: of the chat model; tokens with the whole room of each answer.
        cut: findings that were shortened to fit.
        truncated: texts that the model did not end within `answer_tokens`.
        unbacked: sentences that have no answer of a source, of a text whose every sentence was to cite.
    """

    question: str
    answer: str
    cited: tuple[str, ...]
    unknown: tuple[str, ...]
    conflicts: tuple[Conflict, ...]
    findings: tuple[Finding, ...]
    calls: int
    tokens: int
    cut: int = 0
    truncated: int = 0
    unbacked: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The answer, and behind it what no source backs, and every disagreement of the sources, side by side."""
        lines = [self.answer]
        if self.unbacked:
            lines += ["", "In no source in these words:", *(f"- {sentence}" for sentence in self.unbacked)]
        if self.conflicts:
            lines += ["", "Sources disagree:", *(f"- {item.describe()}" for item in self.conflicts)]
        return "\n".join(lines)

    def to_dict(self) -> JsonObject:
        """JSON values, all of the above."""
        conflicts = [
            {"question": item.question, "sides": [[finding.to_dict() for finding in side] for side in item.sides]}
            for item in self.conflicts
        ]
        return {
            "question": self.question,
            "answer": self.answer,
            "text": self.text,
            "cited": list(self.cited),
            "unknown": list(self.unknown),
            "conflicts": conflicts,
            "findings": [finding.to_dict() for finding in self.findings],
            "calls": self.calls,
            "tokens": self.tokens,
            "cut": self.cut,
            "truncated": self.truncated,
            "unbacked": list(self.unbacked),
        }


@dataclass(frozen=True)
class _Piece:
    """A text that is put together with others, and the labels that it may be cited by."""

    text: str
    labels: frozenset[str]


class Synthesizer:
    """Has a chat model put findings together.

    Args:
        chat: that writes.
        budget: of every prompt and answer, and of all calls of a synthesis.
        strategy: `"map_reduce"`: findings in runs that fit, a text of each, and texts of these until there is one.
            `"refine"`: one run after the other, each with the text so far.
        on_unknown: if a text cites what it was not shown: `"mark"` it, or `"refuse"` the text.
        conflicts: whether different answers to one question are contradictions.
        citing: `"free"`: the model writes labels into its text as it likes. `"every_sentence"`: it writes a list of
            sentences, each with labels of sources that it was shown, by constrained decoding where the model can; what
            no source backs is listed. For models that do not cite by themselves.
    """

    def __init__(
        self,
        chat: ChatModel,
        budget: Budget | None = None,
        strategy: str = "map_reduce",
        on_unknown: str = "mark",
        conflicts: bool = True,
        citing: str = "free",
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, got {strategy!r}.")
        if on_unknown not in ON_UNKNOWN:
            raise ValueError(f"`on_unknown` must be one of {ON_UNKNOWN}, got {on_unknown!r}.")
        if citing not in CITING:
            raise ValueError(f"`citing` must be one of {CITING}, got {citing!r}.")
        self.chat, self.budget, self.citing = chat, budget or Budget(), citing
        self.strategy, self.on_unknown, self.conflicts = strategy, on_unknown, conflicts

    def synthesize(self, question: str, findings: Sequence[Finding], spending: Spending | None = None) -> Synthesis:
        """Answer a question from findings; without any the model is not asked.

        Args:
            question: to be answered, or another task.
            findings: of any questions; those that disagree stand next to each other in the prompts.
            spending: what was spent before and counts as well. Default: nothing.

        Raises:
            BudgetError: where the budget is too small, with the number that is.
            CitationError: for a citation of something else, with `on_unknown="refuse"`.
            AnswerError: with `citing="every_sentence"`, for an answer that is not the JSON asked for, after a repair.
        """
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`question` must be a text that is not empty, got {question!r}.")
        conflicts = find_conflicts(findings) if self.conflicts else []
        spending = spending or Spending(self.chat, self.budget)
        if not findings:
            return Synthesis(question, NOTHING, (), (), (), (), spending.calls, spending.tokens)
        ordered = _sides_together(findings, conflicts)
        labels = label_keys([finding.key for finding in ordered])
        writing = _Writing(self, spending, f"Question: {question}", labels, ordered)
        pieces, cut = writing.pieces(ordered)
        text = (writing.map_reduce if self.strategy == "map_reduce" else writing.refine)(pieces)
        answer, cited, _ = resolve(text, labels)
        return Synthesis(
            question,
            answer,
            tuple(cited),
            tuple(dict.fromkeys(writing.unknown)),
            tuple(conflicts),
            tuple(findings),
            spending.calls,
            spending.tokens,
            cut,
            writing.truncated,
            tuple(writing.unbacked),
        )


def _sides_together(findings: Sequence[Finding], conflicts: Sequence[Conflict]) -> list[Finding]:
    """Findings with those that disagree first, beside each other; otherwise as they came."""
    first = [finding for conflict in conflicts for side in conflict.sides for finding in side]
    return list(dict.fromkeys([*first, *findings]))


class _Writing:
    """The prompts and texts of one synthesis."""

    def __init__(
        self,
        owner: Synthesizer,
        spending: Spending,
        task: str,
        labels: Mapping[str, str],
        findings: Sequence[Finding],
    ) -> None:
        self.owner, self.spending, self.task, self.labels = owner, spending, task, labels
        self.label_of = {key: label for label, key in labels.items()}
        self.answers: dict[str, list[str]] = {}
        for finding in findings:
            self.answers.setdefault(self.label_of[finding.key], []).append(finding.answer)
        self.unknown: list[str] = []
        self.unbacked: list[str] = []  # of the last text
        self.truncated = 0

    def _messages(self, pieces: Sequence[_Piece], before: str = "") -> list[Message]:
        items = "\n".join(piece.text for piece in pieces)
        values: dict[str, JsonValue] = {"task": self.task, "items": items, "before": before}
        return messages_of(render(PROMPTS[self.owner.citing][bool(before)], values, "prompt"), SYSTEM)

    # Pieces -----------------------------------------------------------------------------------------------------------

    def pieces(self, findings: Sequence[Finding]) -> tuple[list[_Piece], int]:
        """A piece of each finding, its evidence cut where two of them would not fit; and how many were cut."""
        made, cut = [], 0
        for finding in findings:
            piece, whole = self._piece(finding)
            made.append(piece)
            cut += not whole
        return made, cut

    def _piece(self, finding: Finding) -> tuple[_Piece, bool]:
        label = self.label_of[finding.key]
        labels = frozenset((label,))
        head = f"[{label}] {without_labels(finding.question)} -> {without_labels(finding.answer)}"

        def told(evidence: str) -> str:
            return f'{head} ("{evidence}")' if evidence else head

        given = without_labels(finding.evidence)
        evidence = shorten(given, lambda text: self._half(_Piece(told(text), labels)))
        if evidence is not None:
            return _Piece(told(evidence), labels), evidence == given
        short = shorten(head, lambda text: self._half(_Piece(text, labels)))
        if short is None or not short.startswith(f"[{label}]"):
            raise BudgetError(
                f"`prompt_tokens={self.spending.budget.prompt_tokens}` has no room for two findings beside "
                "the question and the instructions; raise it."
            )
        return _Piece(short, labels), False

    def _half(self, piece: _Piece) -> bool:
        """Tell whether two such pieces fit beside an answer so far, so that every run takes two or more."""
        budget = self.spending.budget
        empty = self.owner.chat.count_tokens(self._messages([], "-"))
        own = self.owner.chat.count_tokens(self._messages([piece], "-")) - empty
        before = budget.answer_tokens if self.owner.strategy == "refine" else 0
        return empty + before + 2 * own <= budget.prompt_tokens

    # Strategies -------------------------------------------------------------------------------------------------------

    def map_reduce(self, pieces: list[_Piece]) -> str:
        while True:
            runs = pack(pieces, lambda run: self.spending.fits(self._messages(run)))
            if len(runs) == 1:
                return self._write(runs[0], self._messages(runs[0]))
            if len(runs) == len(pieces):
                raise BudgetError(
                    f"`prompt_tokens={self.spending.budget.prompt_tokens}` does not take two texts of "
                    f"`answer_tokens={self.spending.budget.answer_tokens}` at once: raise the first or lower the other."
                )
            pieces = [self._partial(run) for run in runs]

    def _partial(self, run: list[_Piece]) -> _Piece:
        if len(run) == 1:  # nothing to put together
            return run[0]
        text = self._write(run, self._messages(run))
        labels = frozenset().union(*(piece.labels for piece in run))
        short = shorten(text, lambda text: self._half(_Piece(text, labels)))
        if short is None:
            raise BudgetError(
                f"`prompt_tokens={self.spending.budget.prompt_tokens}` does not take two texts at once; raise it."
            )
        return _Piece(short, labels)

    def refine(self, pieces: list[_Piece]) -> str:
        text, seen = "", frozenset[str]()
        left = pieces
        while left:
            count = len(left)
            while count and not self.spending.fits(self._messages(left[:count], text)):
                count -= 1
            if not count:
                short = shorten(text, lambda before: self.spending.fits(self._messages(left[:1], before)))  # noqa: B023
                if not short:
                    raise BudgetError(
                        f"`prompt_tokens={self.spending.budget.prompt_tokens}` does not take the answer so far and a "
                        "finding; raise it, or lower `answer_tokens`."
                    )
                text, count = short, 1
            run, left = left[:count], left[count:]
            seen = seen.union(*(piece.labels for piece in run))
            text = self._write([_Piece(text, seen), *run], self._messages(run, text))
        return text

    def _write(self, shown: Sequence[_Piece], messages: list[Message]) -> str:
        """A text of the model in which every label is one that it was shown; others are marked."""
        if self.owner.citing == "every_sentence":
            return self._write_sentences(shown, messages)
        written = self.spending.complete(messages)
        text = written.text.strip()
        if not text:
            raise ValueError(
                f"{self.owner.chat.name} wrote nothing; its prompt ended with {messages[-1].content[-200:]!r}."
            )
        self.truncated += written.cut
        allowed = frozenset().union(*(piece.labels for piece in shown))
        own = {label: label for label in allowed}
        by_key = {self.labels[label]: label for label in allowed}
        marked, _, unknown = resolve(text, {**by_key, **own})
        if unknown and self.owner.on_unknown == "refuse":
            raise CitationError(
                f"{self.owner.chat.name} cites {', '.join(unknown)}, which is not among the sources it was shown "
                f"({', '.join(sorted(allowed))}): {text[:400]!r}"
            )
        self.unknown += unknown
        return marked

    def _write_sentences(self, shown: Sequence[_Piece], messages: list[Message]) -> str:
        """A text each of whose sentences cites what it was shown."""
        allowed = sorted(frozenset().union(*(piece.labels for piece in shown)), key=lambda label: int(label[1:]))
        sentences, cut = write_sentences(self.spending, messages, allowed)
        self.truncated += cut
        if not sentences:
            raise ValueError(
                f"{self.owner.chat.name} wrote nothing; its prompt ended with {messages[-1].content[-200:]!r}."
            )
        answers = {label: self.answers[label] for label in allowed}
        told = [attributed(sentence, answers) for sentence in sentences]
        self.unbacked = [sentence.text for sentence, backed in told if not backed]
        return " ".join(sentence.cited() for sentence, _ in told)
