"""Figures of a server for Prometheus."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX = "msa_hf_serve_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
OTHER = "other"  # the route of what leads nowhere, so that no client can make up series


class ServerMetrics:
    """Counts what a server does.

    Args:
        gauges: name -> its help and what gives its value when it is asked for.
        registry: of prometheus_client. Default: one of its own.
    """

    def __init__(
        self, gauges: dict[str, tuple[str, Callable[[], float]]], registry: CollectorRegistry | None = None
    ) -> None:
        import prometheus_client as prometheus

        self.registry = registry = prometheus.CollectorRegistry() if registry is None else registry
        self.requests = prometheus.Counter(
            f"{PREFIX}requests", "Requests that were answered", ("route", "method", "status"), registry=registry
        )
        self.seconds = prometheus.Histogram(
            f"{PREFIX}request_seconds",
            "Seconds from a request's head to its last byte",
            ("route",),
            registry=registry,
            buckets=SECONDS,
        )
        self.first = prometheus.Histogram(
            f"{PREFIX}first_token_seconds",
            "Seconds until an answer begins, of streams",
            registry=registry,
            buckets=SECONDS,
        )
        self.rejected = prometheus.Counter(
            f"{PREFIX}rejected",
            "Requests that were refused for their size, number or time",
            ("reason",),
            registry=registry,
        )
        self.tokens = prometheus.Counter(f"{PREFIX}tokens", "Tokens read and written", ("kind",), registry=registry)
        self.batches = prometheus.Histogram(
            f"{PREFIX}batch_questions", "Questions that were generated together", registry=registry, buckets=BATCHES
        )
        self.batch_seconds = prometheus.Counter(
            f"{PREFIX}batch_seconds", "Seconds that the model spent on questions", registry=registry
        )
        for name, (text, value) in gauges.items():
            prometheus.Gauge(PREFIX + name, text, registry=registry).set_function(value)

    def batch(self, questions: int, seconds: float) -> None:
        """Note that so many questions were answered together."""
        self.batches.observe(questions)
        self.batch_seconds.inc(seconds)

    def reject(self, reason: str) -> None:
        """Note that a request was refused."""
        self.rejected.labels(reason=reason).inc()

    def count_tokens(self, prompt: int, completion: int) -> None:
        """Note the tokens of an answer."""
        self.tokens.labels(kind="prompt").inc(prompt)
        self.tokens.labels(kind="completion").inc(completion)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class Observer:
    """Gives every request an id, and counts it and its time."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, and watch it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, number = time.perf_counter(), 500, uuid.uuid4().hex

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                safe = [(b"x-request-id", number.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *safe]}
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)
            self.metrics.requests.labels(route=route, method=_known(scope["method"]), status=str(status)).inc()
            self.metrics.seconds.labels(route=route).observe(time.perf_counter() - start)


def _known(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS") else OTHER
