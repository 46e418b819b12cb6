"""`StreamMetrics`: what a consumer has done, how fast, and how far behind it is, as Prometheus reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields

PREFIX = "msa_hf_stream"


@dataclass
class StreamMetrics:
    """Counters since the consumer began.

    Attributes:
        applied: events that changed the bank.
        unchanged: events that were known or late.
        rejected: messages that went to the dead letters.
        commits: of the bank.
        apply_seconds: spent in applying and committing, encoding included.
        errors: answers of the stream's server that failed.
        lag: messages that are not acknowledged, when last looked at; None: not known.
        behind_seconds: age of the newest message when it was applied; None: not known.
    """

    applied: int = 0
    unchanged: int = 0
    rejected: int = 0
    commits: int = 0
    apply_seconds: float = 0.0
    errors: int = 0
    lag: int | None = None
    behind_seconds: float | None = None

    @property
    def events(self) -> int:
        """Messages that were dealt with."""
        return self.applied + self.unchanged + self.rejected

    def prometheus(self) -> str:
        """Prometheus' text format; what is not known is left out."""
        lines = [
            f"# HELP {PREFIX}_events_total Messages that were dealt with.",
            f"# TYPE {PREFIX}_events_total counter",
            *(
                f'{PREFIX}_events_total{{outcome="{outcome}"}} {getattr(self, outcome)}'
                for outcome in ("applied", "unchanged", "rejected")
            ),
        ]
        others = {
            "commits": ("commits_total", "counter", "Commits of the bank."),
            "apply_seconds": ("apply_seconds_total", "counter", "Time spent in applying events, encoding included."),
            "errors": ("errors_total", "counter", "Failed requests to the stream's server."),
            "lag": ("lag", "gauge", "Messages that are not acknowledged."),
            "behind_seconds": ("behind_seconds", "gauge", "Age of the newest message when it was applied."),
        }
        assert {item.name for item in fields(self)} == {*others, "applied", "unchanged", "rejected"}
        for field, (name, kind, text) in others.items():
            if (value := getattr(self, field)) is not None:
                lines += [
                    f"# HELP {PREFIX}_{name} {text}",
                    f"# TYPE {PREFIX}_{name} {kind}",
                    f"{PREFIX}_{name} {value}",
                ]
        return "\n".join(lines) + "\n"
