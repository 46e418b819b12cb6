"""The result of monitoring one question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from ...json_object import JsonObject


@dataclass(frozen=True)
class Cost:
    """Extra work for one question.

    Attributes:
        seconds: wall time; of a batch, its share.
        tokens: that the model processed, prompts and answers.
    """

    seconds: float = 0.0
    tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.tokens + other.tokens)


@dataclass(frozen=True)
class SecondAnswer:
    """The answer of a check.

    Attributes:
        text: of the answer.
        agrees: it is the first answer, or says nothing against it (empty, or a refusal).
        documents: keys of the documents that it saw and the first answer had not read, best first.
    """

    text: str
    agrees: bool
    documents: Sequence[str]


@dataclass(frozen=True)
class Finding:
    """A monitored question.

    Attributes:
        question, answer: texts.
        unanswered: the answer is empty or a refusal.
        read: keys of the documents that the answer read (without a protocol: attended to).
        routed: positions of all documents that a memory layer chose.
        signals: by name, larger is worse.
        shares: signal -> the share of well answered questions that look at least as bad; empty without a calibration.
        p_value: the same for all signals together; None without a calibration.
        reasons: signals that flagged the question, worst first; none: it is not flagged. Without a calibration the
            checks that disagree.
        second: check -> its answer.
        cost: part -> extra work: `"answer"` where the monitor had to ask by itself, `"routing"`, and the checks.
    """

    question: str
    answer: str
    unanswered: bool
    read: Sequence[str]
    routed: Sequence[int]
    signals: Mapping[str, float]
    shares: Mapping[str, float] = field(default_factory=dict)
    p_value: float | None = None
    reasons: Sequence[str] = ()
    second: Mapping[str, SecondAnswer] = field(default_factory=dict)
    cost: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def flagged(self) -> bool:
        """Tell whether the question is to be looked at."""
        return bool(self.reasons)

    @property
    def total_cost(self) -> Cost:
        """The extra work of all parts."""
        return sum(self.cost.values(), Cost())

    def to_dict(self) -> JsonObject:
        """JSON values."""
        return asdict(self)
