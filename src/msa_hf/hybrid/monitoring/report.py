"""The report of a monitor: the questions to look at, why, and what to do; Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from ...json_object import JsonObject
from .calibration import Calibration
from .coverage import Drift, Probe, never_routed, probe_documents, score_drift
from .finding import Cost, Finding
from .monitor import Monitor
from .signals import SIGNALS

SHOWN_KEYS = 5  # documents that are named of a list
SHOWN_QUESTIONS = 50  # in Markdown; JSON has all


@dataclass(frozen=True)
class Report:
    """The finding of a monitor.

    Attributes:
        findings: the suspicious first.
        documents: of the bank.
        asked: questions that were to be monitored, of which the budget may have left out some.
        never_routed: keys of documents that no memory layer chose for any question.
        probes: of some of these, asked for with their own sentences.
        drift: of the best router scores since the calibration; None without one.
        calibration: by which questions were flagged.
        settings: of the monitor.
    """

    findings: Sequence[Finding]
    documents: int
    asked: int
    never_routed: Sequence[str] = ()
    probes: Sequence[Probe] = ()
    drift: Drift | None = None
    calibration: Calibration | None = None
    settings: JsonObject = field(default_factory=dict)

    @property
    def flagged(self) -> list[Finding]:
        """The questions to be looked at."""
        return [finding for finding in self.findings if finding.flagged]

    @property
    def unanswered_rate(self) -> float:
        """The share of questions without an answer."""
        return sum(finding.unanswered for finding in self.findings) / max(len(self.findings), 1)

    @property
    def cost(self) -> dict[str, Cost]:
        """Part -> the mean extra work for a question."""
        total: dict[str, Cost] = {}
        for finding in self.findings:
            for part, cost in finding.cost.items():
                total[part] = total.get(part, Cost()) + cost
        count = len(self.findings)
        return {part: Cost(cost.seconds / count, round(cost.tokens / count)) for part, cost in total.items()}

    @property
    def unreachable(self) -> list[Probe]:
        """Probes whose document was not found."""
        return [probe for probe in self.probes if probe.rank is None]

    def to_dict(self) -> JsonObject:
        """All of it as JSON values."""
        calibration = self.calibration
        return {
            "documents": self.documents,
            "asked": self.asked,
            "checked": len(self.findings),
            "flagged": len(self.flagged),
            "unanswered_rate": self.unanswered_rate,
            "settings": self.settings,
            "calibration": None
            if calibration is None
            else {
                "false_alarms": calibration.false_alarms,
                "confidence": calibration.confidence,
                "questions": 2 * len(calibration.suspicions),
                "documents": calibration.documents,
            },
            "cost": {part: asdict(cost) for part, cost in self.cost.items()},
            "drift": None if self.drift is None else {**asdict(self.drift), "drifted": self.drift.drifted},
            "never_routed": list(self.never_routed),
            "probes": [asdict(probe) for probe in self.probes],
            "findings": [{**finding.to_dict(), "flagged": finding.flagged} for finding in self.findings],
        }

    def to_json(self, indent: int | None = None) -> str:
        """All of it as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)

    def to_markdown(self) -> str:
        """The questions to look at, and the figures."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        flagged = self.flagged
        yield "# Blind spots"
        yield ""
        yield (
            f"{len(flagged)} of {len(self.findings)} questions are to be looked at; {self.documents} documents, "
            f"{self.unanswered_rate:.1%} of the questions unanswered."
        )
        if len(self.findings) < self.asked:
            yield f"{self.asked - len(self.findings)} more questions were left out: the budget was spent."
        if self.calibration is None:
            yield ""
            yield "**Not calibrated**: every disagreement is shown, however often good answers disagree."
        else:
            yield (
                f"Of questions that are answered well at most {self.calibration.false_alarms:.1%} are flagged "
                f"(confidence {self.calibration.confidence:.0%})."
            )
        for number, finding in enumerate(flagged[:SHOWN_QUESTIONS], 1):
            yield ""
            yield f"## {number}. {_line(finding.question)}"
            yield ""
            yield f"* Answer: {_line(finding.answer) or '(none)'}"
            yield f"* Read: {_keys(finding.read)}"
            for name in finding.reasons:
                yield f"* Flagged: {SIGNALS[name].meaning}. {self._value(name, finding)}"
            for check, second in finding.second.items():
                if not second.agrees:
                    yield f"* By `{check}`: {_line(second.text)}; it saw {_keys(second.documents)}"
            yield f"* To do: {SIGNALS[finding.reasons[0]].remedy}"
        if len(flagged) > SHOWN_QUESTIONS:
            yield ""
            yield f"{len(flagged) - SHOWN_QUESTIONS} more are in the JSON report."
        yield ""
        yield "## The bank"
        yield ""
        yield f"* Never routed by these questions: {len(self.never_routed)} of {self.documents} documents."
        if self.probes:
            yield (
                f"* Asked for with their own sentences: {len(self.probes)} probes of such documents, "
                f"{len(self.unreachable)} of which the routers did not find."
            )
        for probe in self.unreachable:
            yield f"  * `{probe.key}`, {probe.side} sentence: {_line(probe.sentence)}"
        if self.unreachable:
            yield "  * To do: encode these documents again; where last sentences alone are lost, they were cut short."
        if self.drift is not None:
            verdict = "more than chance" if self.drift.drifted else "no more than chance"
            yield (
                f"* Best router scores since the calibration: distance {self.drift.distance:.2f} (chance "
                f"{self.drift.limit:.2f}), median {self.drift.shift:+.3f}: {verdict}."
            )
            if self.drift.drifted:
                yield "  * To do: calibrate again with questions to the bank of now, and look at what was added."
        yield ""
        yield "## Cost"
        yield ""
        yield "| part | seconds a question | tokens a question |"
        yield "|---|---|---|"
        for part, cost in self.cost.items():
            yield f"| {part} | {cost.seconds:.3f} | {cost.tokens} |"

    def _value(self, name: str, finding: Finding) -> str:
        if self.calibration is None or name not in finding.shares:
            return f"({name} {finding.signals[name]:.2f})"
        return f"({name} {finding.signals[name]:.2f}; {finding.shares[name]:.2%} of good answers look as bad)"


def make_report(monitor: Monitor, findings: Sequence[Finding], asked: int | None = None, probes: int = 0) -> Report:
    """The report of findings.

    Args:
        asked: questions that were to be monitored (default: those that were).
        probes: at most so many documents that were never routed are asked for with their own sentences, evenly over
            the bank. Costs a routing of two sentences each.

    Raises:
        ValueError: for no findings.
    """
    if not findings:
        raise ValueError("There are no findings to report: no question was monitored.")
    never = never_routed(findings, len(monitor.bank))
    chosen = never[:: -(-len(never) // probes)] if probes and never else []
    calibration = monitor.calibration
    drift = None
    if calibration is not None and "low_score" in calibration.references:
        scores = [-finding.signals["low_score"] for finding in findings if "low_score" in finding.signals]
        if scores:
            drift = score_drift([-value for value in calibration.references["low_score"]], scores)
    ordered = sorted(findings, key=lambda item: (not item.flagged, 1.0 if item.p_value is None else item.p_value))
    return Report(
        ordered,
        len(monitor.bank),
        len(findings) if asked is None else asked,
        [monitor.bank.documents[position].key for position in never],
        probe_documents(monitor.searcher, chosen) if chosen else [],
        drift,
        calibration,
        {"checks": list(monitor.checks), "ways": list(monitor.ways), "refusal": monitor.refusal},
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _keys(keys: Sequence[str]) -> str:
    shown = ", ".join(f"`{key}`" for key in keys[:SHOWN_KEYS])
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return (shown + more) or "nothing"
