"""A Grafana dashboard of the metrics, as the JSON that Grafana imports."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...json_object import JsonObject
from .metrics import PREFIX, exposed_names

SOURCE = {"type": "prometheus", "uid": "${source}"}
_NAME = re.compile(rf"\b{PREFIX}\w+")

# Title, unit, and queries with their legends, in rows of two panels; {rate} is the interval of Grafana.
PANELS: Sequence[tuple[str, str, Sequence[tuple[str, str]]]] = (
    (
        "Questions to look at, share of those monitored",
        "percentunit",
        [("sum(rate(@flagged_total[$__rate_interval])) / sum(rate(@checked_total[$__rate_interval]))", "flagged")],
    ),
    (
        "Why they were flagged, per hour",
        "short",
        [("sum by (signal) (increase(@reasons_total[1h]))", "{{signal}}")],
    ),
    (
        "Second answers that differ",
        "percentunit",
        [
            (
                "sum by (check) (rate(@disagreements_total[$__rate_interval])) / ignoring (check) group_left "
                "sum(rate(@checked_total[$__rate_interval]))",
                "{{check}}",
            )
        ],
    ),
    (
        "Unanswered",
        "percentunit",
        [
            (
                "sum(rate(@unanswered_total[$__rate_interval])) / sum(rate(@checked_total[$__rate_interval]))",
                "unanswered",
            )
        ],
    ),
    (
        "Questions as bad as the worst twentieth of the calibration",
        "percentunit",
        [
            (
                'sum by (signal) (rate(@share_bucket{le="0.05"}[$__rate_interval])) / '
                "sum by (signal) (rate(@share_count[$__rate_interval]))",
                "{{signal}}",
            )
        ],
    ),
    (
        "Signals of the last question",
        "short",
        [("@signal", "{{signal}}")],
    ),
    (
        "Drift of router scores",
        "short",
        [("@score_drift", "distance"), ("@score_drift_limit", "chance")],
    ),
    (
        "Documents",
        "short",
        [("@documents", "all"), ("@never_routed", "never routed"), ("@unreachable", "not found by themselves")],
    ),
    (
        "Sampling, questions a second",
        "short",
        [
            ("sum(rate(@seen_total[$__rate_interval]))", "seen"),
            ("sum(rate(@sampled_total[$__rate_interval]))", "sampled"),
            ("sum(rate(@dropped_total[$__rate_interval]))", "dropped"),
            ("sum(rate(@failed_total[$__rate_interval]))", "failed"),
            ("@queue", "waiting"),
        ],
    ),
    (
        "Cost of a monitored question",
        "s",
        [
            (
                "sum by (part) (rate(@seconds_total[$__rate_interval])) / ignoring (part) group_left "
                "sum(rate(@checked_total[$__rate_interval]))",
                "{{part}}",
            ),
            (
                "histogram_quantile(0.95, sum by (le) (rate(@question_seconds_bucket[$__rate_interval])))",
                "all parts, 95 %",
            ),
        ],
    ),
    (
        "Tokens of a monitored question",
        "short",
        [
            (
                "sum by (part) (rate(@tokens_total[$__rate_interval])) / ignoring (part) group_left "
                "sum(rate(@checked_total[$__rate_interval]))",
                "{{part}}",
            )
        ],
    ),
)


def dashboard(title: str = "MSA: blind spots") -> JsonObject:
    """The dashboard: import it in Grafana, which asks for the Prometheus data source.

    Args:
        title: of the dashboard.
    """
    panels = [_panel(number, *panel) for number, panel in enumerate(PANELS)]
    return {
        "title": title,
        "uid": "msa-hf-monitor",
        "schemaVersion": 39,
        "tags": ["msa_hf"],
        "time": {"from": "now-24h", "to": "now"},
        "refresh": "1m",
        "editable": True,
        "templating": {
            "list": [{"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]
        },
        "panels": panels,
    }


def metrics_of(made: JsonObject) -> set[str]:
    """The metrics of this package that the queries of a dashboard name.

    Raises:
        ValueError: for one that a monitor does not expose, naming the panel.
    """
    found: set[str] = set()
    for panel in made["panels"]:
        for target in panel["targets"]:
            named = set(_NAME.findall(target["expr"]))
            if unknown := sorted(named - exposed_names()):
                raise ValueError(f"The panel {panel['title']!r} asks for {unknown[0]!r}, which no monitor exposes.")
            found |= named
    return found


def _panel(number: int, title: str, unit: str, queries: Sequence[tuple[str, str]]) -> JsonObject:
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": SOURCE,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0} if unit == "percentunit" else {"unit": unit},
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": SOURCE,
                "expr": query.replace("@", PREFIX),
                "legendFormat": legend,
            }
            for place, (query, legend) in enumerate(queries)
        ],
    }
