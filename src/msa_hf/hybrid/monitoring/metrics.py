"""Prometheus metrics of a monitor: `pip install "msa-hf[monitor]"`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    from .finding import Finding
    from .report import Report

PREFIX = "msa_hf_monitor_"
SHARE_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
SECOND_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Metric:
    """A metric as Prometheus sees it; counters are exposed with `_total` behind the name."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    "seen": Metric("counter", "Questions that passed by, sampled or not"),
    "sampled": Metric("counter", "Questions that were chosen for monitoring"),
    "dropped": Metric("counter", "Questions that were chosen and dropped because the queue was full"),
    "failed": Metric("counter", "Questions whose monitoring raised an error"),
    "checked": Metric("counter", "Questions that were monitored"),
    "flagged": Metric("counter", "Questions that are to be looked at"),
    "unanswered": Metric("counter", "Monitored questions without an answer"),
    "reasons": Metric("counter", "Signals that flagged questions", ("signal",)),
    "disagreements": Metric("counter", "Second answers that differ from the first", ("check",)),
    "seconds": Metric("counter", "Extra seconds for monitored questions", ("part",)),
    "tokens": Metric("counter", "Extra tokens for monitored questions", ("part",)),
    "question_seconds": Metric("histogram", "Extra seconds of a monitored question", buckets=SECOND_BUCKETS),
    "share": Metric(
        "histogram",
        "Per signal, the share of well answered questions that look as bad; spread evenly while all is well",
        ("signal",),
        SHARE_BUCKETS,
    ),
    "signal": Metric("gauge", "Signals of the last monitored question", ("signal",)),
    "queue": Metric("gauge", "Questions that wait to be monitored"),
    "documents": Metric("gauge", "Documents of the bank"),
    "never_routed": Metric("gauge", "Documents that no monitored question routed"),
    "unreachable": Metric("gauge", "Documents that the routers do not find by a sentence of their own"),
    "score_drift": Metric("gauge", "Distance of the best router scores from those of the calibration, 0 to 1"),
    "score_drift_limit": Metric("gauge", "Distance that chance explains"),
}


def exposed_names() -> set[str]:
    """The names of all series that are exposed."""
    found = set()
    for name, metric in METRICS.items():
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[metric.kind]
        found |= {f"{PREFIX}{name}{ending}" for ending in endings}
    return found


class MonitorMetrics:
    """Counts what monitors find.

    Args:
        registry: of prometheus_client, such as its `REGISTRY`. Default: one of its own.

    Raises:
        ImportError: where prometheus_client is missing, naming the extra.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ImportError('Prometheus metrics need prometheus_client: `pip install "msa-hf[monitor]"`.') from error
        self.registry = prometheus.CollectorRegistry() if registry is None else registry
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, metric in METRICS.items():
            given = (PREFIX + name, metric.help, metric.labels)
            if metric.kind == "counter":
                self._counters[name] = prometheus.Counter(*given, registry=self.registry)
            elif metric.kind == "gauge":
                self._gauges[name] = prometheus.Gauge(*given, registry=self.registry)
            else:
                self._histograms[name] = prometheus.Histogram(*given, registry=self.registry, buckets=metric.buckets)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter.

        Raises:
            ValueError: for an unknown one, and labels that it does not have.
        """
        counter = self._counters[_known(name, "counter", labels)]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge; errors as of `count`."""
        gauge = self._gauges[_known(name, "gauge", labels)]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram; errors as of `count`."""
        histogram = self._histograms[_known(name, "histogram", labels)]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def add(self, findings: Iterable[Finding]) -> None:
        """Count monitored questions."""
        for finding in findings:
            self.count("checked")
            self.count("flagged", finding.flagged)
            self.count("unanswered", finding.unanswered)
            for signal in finding.reasons:
                self.count("reasons", signal=signal)
            for check, second in finding.second.items():
                self.count("disagreements", not second.agrees, check=check)
            for part, cost in finding.cost.items():
                self.count("seconds", cost.seconds, part=part)
                self.count("tokens", cost.tokens, part=part)
            self.observe("question_seconds", finding.total_cost.seconds)
            for signal, value in finding.signals.items():
                self.set("signal", value, signal=signal)
            for signal, share in finding.shares.items():
                self.observe("share", share, signal=signal)

    def describe(self, report: Report) -> None:
        """Set what a report says of the bank."""
        self.set("documents", report.documents)
        self.set("never_routed", len(report.never_routed))
        if report.probes:
            self.set("unreachable", len({probe.key for probe in report.unreachable}))
        if report.drift is not None:
            self.set("score_drift", report.drift.distance)
            self.set("score_drift_limit", report.drift.limit)

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode("utf-8")

    def write(self, path: str | Path) -> None:
        """Write a file for the textfile collector of Prometheus' node exporter, all or nothing."""
        from prometheus_client import write_to_textfile

        write_to_textfile(str(path), self.registry)


def _known(name: str, kind: str, labels: dict[str, str]) -> str:
    metric = METRICS.get(name)
    if metric is None or metric.kind != kind:
        there = ", ".join(other for other, item in METRICS.items() if item.kind == kind)
        raise ValueError(f"There is no {kind} {name!r}; there are {there}.")
    if set(labels) != set(metric.labels):
        raise ValueError(f"The metric {name!r} has the labels {list(metric.labels)}, got {sorted(labels)}.")
    return name
