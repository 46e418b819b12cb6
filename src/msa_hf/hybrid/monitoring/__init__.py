"""Finding blind spots in production: questions whose answers may lack a document that is there (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exports

if TYPE_CHECKING:
    from .calibration import Calibration, calibrate
    from .coverage import Drift, Probe, never_routed, probe_documents, score_drift
    from .dashboard import dashboard
    from .finding import Cost, Finding, SecondAnswer
    from .metrics import METRICS, MonitorMetrics
    from .monitor import Budget, Monitor, judged
    from .report import Report, make_report
    from .signals import CHECKS, SIGNALS, Signal
    from .watching import Watched

__all__ = [
    "CHECKS",
    "METRICS",
    "SIGNALS",
    "Budget",
    "Calibration",
    "Cost",
    "Drift",
    "Finding",
    "Monitor",
    "MonitorMetrics",
    "Probe",
    "Report",
    "SecondAnswer",
    "Signal",
    "Watched",
    "calibrate",
    "dashboard",
    "judged",
    "make_report",
    "never_routed",
    "probe_documents",
    "score_drift",
]

__getattr__ = exports(
    __name__,
    {
        ".calibration": ["Calibration", "calibrate"],
        ".coverage": ["Drift", "Probe", "never_routed", "probe_documents", "score_drift"],
        ".dashboard": ["dashboard"],
        ".finding": ["Cost", "Finding", "SecondAnswer"],
        ".metrics": ["METRICS", "MonitorMetrics"],
        ".monitor": ["Budget", "Monitor", "judged"],
        ".report": ["Report", "make_report"],
        ".signals": ["CHECKS", "SIGNALS", "Signal"],
        ".watching": ["Watched"],
    },
)
