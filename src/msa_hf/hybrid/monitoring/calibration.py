"""Thresholds from questions that are known to be answered well, with a guarantee on the rate of false alarms."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...json_object import JsonObject
from .signals import SIGNALS, signal_named

FORMAT_VERSION = 1
CAP = 4.0  # no signal counts more than this beyond its largest reference value, in nats
RARE = 0.1  # a signal is a reason if at most this share of well answered questions looks as bad
TAIL = 0.1  # the share of the largest reference values whose mean excess says how fast a signal's tail falls

Signals = Mapping[str, float]  # signal -> value, of one question


@dataclass(frozen=True)
class Calibration:
    """Thresholds of signals.

    Every signal of a question becomes the share of well answered questions that look at least as bad, by those of the
    calibration, the references; behind the largest of these the tail is taken to fall exponentially. The question's
    suspicion is the sum of the logarithms of one over these shares, times the signals' weights. The threshold comes
    from the suspicions of the calibration's questions, each by all others as references. A new question is one more of
    the same kind: so the guarantee holds whatever the signals and weights are, up to what one question among the
    references changes, as long as well answered questions are alike (exchangeable) then and now. Half of the questions
    as references and the other half for the threshold would be exact, but two outliers in a small half set it.

    Attributes:
        references: signal -> its values of the calibration's questions, ascending.
        suspicions: of these questions, each without itself among the references, ascending.
        weights: signal -> its say.
        false_alarms: the most of well answered questions that may be flagged.
        confidence: with which this holds for this calibration; 0: on average over calibrations.
        threshold: a question is flagged whose suspicion is above it.
        documents: that the bank held.
    """

    references: Mapping[str, tuple[float, ...]]
    suspicions: tuple[float, ...]
    weights: Mapping[str, float]
    false_alarms: float
    confidence: float
    threshold: float
    documents: int = 0

    def share(self, name: str, value: float) -> float:
        """The share, above 0, of well answered questions whose signal is at least as large."""
        return _share(self.references[name], value, signal_named(name).unit)

    def shares(self, signals: Signals) -> dict[str, float]:
        """`share` of each signal that the calibration knows."""
        return {name: self.share(name, value) for name, value in signals.items() if name in self.references}

    def suspicion(self, signals: Signals) -> float:
        """The unlikeness of a question to well answered ones; more where more signals are given.

        Raises:
            ValueError: where no signal is one of the calibration's.
        """
        return _suspicion(self.references, self.weights, signals)

    def p_value(self, signals: Signals) -> float:
        """The share of well answered questions that are at least as suspicious, this one counted among them."""
        above = len(self.suspicions) - bisect.bisect_left(self.suspicions, self.suspicion(signals))
        return (1 + above) / (len(self.suspicions) + 1)

    def reasons(self, signals: Signals) -> list[str]:
        """The signals by which a question is flagged, those that count most first; none where it is not flagged."""
        if self.suspicion(signals) <= self.threshold:
            return []
        shares = self.shares(signals)
        counts = {
            name: _counted(len(self.references[name]), self.weights[name], share) for name, share in shares.items()
        }
        ordered = sorted(counts, key=lambda name: -counts[name])
        return [name for name in ordered if shares[name] <= RARE] or ordered[:1]

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        record = {"version": FORMAT_VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            OSError: where it cannot be read.
            ValueError: where it is no calibration, or one of a newer version.
        """
        try:
            record: JsonObject = json.loads(Path(path).read_text(encoding="utf-8"))
            if (version := record.pop("version", None)) != FORMAT_VERSION:
                raise ValueError(f"its version is {version!r}, this release reads {FORMAT_VERSION}")
            record["references"] = {signal: tuple(values) for signal, values in record["references"].items()}
            for signal in record["references"]:
                signal_named(signal)
            record["suspicions"] = tuple(record["suspicions"])
            return cls(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a calibration of a monitor ({error}); calibrate again.") from error


def calibrate(
    questions: Sequence[Signals],
    false_alarms: float = 0.05,
    confidence: float = 0.9,
    weights: Mapping[str, float] | None = None,
    documents: int = 0,
) -> Calibration:
    """Thresholds from the signals of questions that are answered well.

    Args:
        questions: signals of each, all with the same names; a few hundred.
        false_alarms: the share of well answered questions that may be flagged.
        confidence: the probability, over the choice of the calibration's questions, that the share is kept. 0: it is
            kept on average over calibrations.
        weights: signal -> its say, positive. Default: those of `SIGNALS`.
        documents: that the bank held.

    Raises:
        ValueError: for too few questions, saying how many are needed, questions with different signals, an unknown
            signal, and numbers out of range.
    """
    if not 0 < false_alarms < 1 or not 0 <= confidence < 1:
        raise ValueError(
            f"`false_alarms` must lie between 0 and 1 and `confidence` from 0 to below 1, got {false_alarms} and "
            f"{confidence}."
        )
    if not questions:
        raise ValueError("`questions` is empty: a calibration needs questions that are answered well.")
    names = list(questions[0])
    say = {name: signal_named(name).weight for name in names} | dict(weights or {})
    for name, weight in say.items():
        signal_named(name)
        if weight <= 0:
            raise ValueError(f"The weight of {name!r} must be positive, got {weight}.")
    for number, signals in enumerate(questions):
        if signals.keys() != set(names) or not all(math.isfinite(value) for value in signals.values()):
            raise ValueError(
                f"Question {number} has the signals {sorted(signals)}, the first {sorted(names)}; all must be numbers."
            )
    count = len(questions)
    allowed = allowed_alarms(count, false_alarms, confidence)
    if allowed < 1 or count < 2:
        needed = next(count for count in range(2, 1 << 20) if allowed_alarms(count, false_alarms, confidence))
        raise ValueError(
            f"{count} questions are too few for at most {false_alarms:.1%} false alarms with confidence "
            f"{confidence:.0%}: {needed} are needed. Give more, or allow more false alarms."
        )
    references = {name: tuple(sorted(signals[name] for signals in questions)) for name in names}
    known = {name: say[name] for name in names}
    suspicions = sorted(_suspicion(references, known, signals, among=True) for signals in questions)
    return Calibration(references, tuple(suspicions), known, false_alarms, confidence, suspicions[-allowed], documents)


def allowed_alarms(count: int, false_alarms: float, confidence: float = 0.0) -> int:
    """The largest m so that the m-th largest of `count` suspicions is a threshold that keeps the rate of false alarms.

    The rate above the m-th largest has the distribution Beta(m, count + 1 - m), whatever that of suspicions: its mean
    m / (count + 1) must not be above the rate, or with a confidence, its quantile.
    """
    if not confidence:
        return int(false_alarms * (count + 1) + 1e-9)
    # P(Beta(m, count + 1 - m) <= rate) = P(Binomial(count, rate) >= m)
    fewer, found = 0.0, 0
    for hits in range(count):
        ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
        fewer += math.exp(ways + hits * math.log(false_alarms) + (count - hits) * math.log1p(-false_alarms))
        if 1 - fewer < confidence:
            break
        found = hits + 1
    return found


def _scale(reference: Sequence[float], unit: float) -> float:
    """The mean excess of the largest values over where they begin, at least the signal's unit."""
    count = max(int(len(reference) * TAIL), 1)
    start = reference[-count]
    return max(sum(value - start for value in reference[-count:]) / count, unit)


def _share(reference: Sequence[float], value: float, unit: float, among: bool = False) -> float:
    """The share of the references that are at least as large. `among`: the value is one of them, and not compared with
    itself."""
    above = len(reference) - among - bisect.bisect_left(reference, value)
    share = (1 + above) / (len(reference) - among + 1)
    if above:
        return share
    others = reference[:-1] if among else reference
    return share * math.exp(-min((value - others[-1]) / _scale(others, unit), 600.0))


def _counted(count: int, weight: float, share: float) -> float:
    """The weight of a signal that is as bad as a share of `count` references."""
    return weight * min(-math.log(share), math.log(count + 1) + CAP)


def _suspicion(
    references: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    signals: Signals,
    among: bool = False,
) -> float:
    found = [
        _counted(len(reference) - among, weights[name], _share(reference, value, SIGNALS[name].unit, among))
        for name, value in signals.items()
        if (reference := references.get(name)) is not None
    ]
    if not found:
        raise ValueError(f"None of the signals {sorted(signals)} is one of the calibration's {sorted(references)}.")
    return sum(found)
