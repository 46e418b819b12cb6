"""What Prometheus reads, parsed, and the dashboard over it."""

import json
from pathlib import Path

import pytest
from findings import finding, healthy

from msa_hf.hybrid.monitoring import METRICS, MonitorMetrics, dashboard
from msa_hf.hybrid.monitoring.dashboard import metrics_of
from msa_hf.hybrid.monitoring.metrics import PREFIX, exposed_names

prometheus = pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families as parse  # noqa: E402


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Series -> value."""
    found = {}
    for family in parse(text):
        assert family.documentation
        for sample in family.samples:
            found[sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_findings_are_counted() -> None:
    metrics = MonitorMetrics()
    metrics.add([finding(shares={"texts_disagree": 0.004}), healthy(unanswered=True)])
    found = samples(metrics.text())
    one = (("signal", "texts_disagree"),)
    assert (found["checked_total", ()], found["flagged_total", ()], found["unanswered_total", ()]) == (2, 1, 1)
    assert found["reasons_total", one] == 1
    assert found["disagreements_total", (("check", "texts"),)] == 1
    assert found["disagreements_total", (("check", "denser"),)] == 0
    assert found["seconds_total", (("part", "texts"),)] == 1.0 and found["tokens_total", (("part", "texts"),)] == 240
    assert found["share_bucket", (("le", "0.001"), *one)] == 0 and found["share_bucket", (("le", "0.005"), *one)] == 1
    assert found["question_seconds_count", ()] == 2 and found["question_seconds_sum", ()] == 1.5
    assert found["signal", (("signal", "low_score"),)] == -0.9


def test_every_metric_is_exposed_under_its_name(tmp_path: Path) -> None:
    metrics = MonitorMetrics()
    for name, metric in METRICS.items():
        labels = dict.fromkeys(metric.labels, "x")
        if metric.kind == "counter":
            metrics.count(name, **labels)
        elif metric.kind == "gauge":
            metrics.set(name, 3, **labels)
        else:
            metrics.observe(name, 0.5, **labels)
    metrics.write(tmp_path / "monitor.prom")
    text = (tmp_path / "monitor.prom").read_text()
    assert text == metrics.text()
    exposed = {sample.name for family in parse(text) for sample in family.samples}
    assert {name for name in exposed if not name.endswith("_created")} == exposed_names()


def test_unknown_metrics_and_labels_are_named() -> None:
    metrics = MonitorMetrics()
    with pytest.raises(ValueError, match="no counter 'foo'; there are seen, sampled"):
        metrics.count("foo")
    with pytest.raises(ValueError, match="no gauge 'seen'"):
        metrics.set("seen", 1)
    with pytest.raises(ValueError, match="no histogram 'queue'"):
        metrics.observe("queue", 1)
    with pytest.raises(ValueError, match=r"has the labels \['signal'\], got \[\]"):
        metrics.count("reasons")


def test_the_dashboard_asks_for_what_is_there() -> None:
    made = json.loads(json.dumps(dashboard()))
    named = metrics_of(made)
    asked = {name.removeprefix(PREFIX) for name in named}
    of_metrics = {next(metric for metric in METRICS if name in (metric, *_series(metric))) for name in asked}
    assert of_metrics == set(METRICS), "every metric is in a panel"
    ids = [panel["id"] for panel in made["panels"]]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in made["panels"]]
    assert len(set(ids)) == len(ids) and len(set(places)) == len(places)
    labels = {label for metric in METRICS.values() for label in metric.labels}
    for panel in made["panels"]:
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")") and target["expr"].count("[") >= 0
            assert set(target["legendFormat"].strip("{}").split()) & labels or "{" not in target["legendFormat"]
    made["panels"][0]["targets"][0]["expr"] = f"rate({PREFIX}foo_total[5m])"
    with pytest.raises(ValueError, match="foo_total', which no monitor exposes"):
        metrics_of(made)


def _series(name: str) -> list[str]:
    return [f"{name}{ending}" for ending in ("_total", "_bucket", "_sum", "_count")]


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"pip install \"msa-hf\[monitor\]\""):
        MonitorMetrics()
