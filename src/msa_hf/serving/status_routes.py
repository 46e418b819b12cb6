"""The state of a server: health, figures, and what its bank holds."""

from __future__ import annotations

from collections.abc import Callable

from anyio import to_thread
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from ..json_object import JsonObject
from .service import Service


def status_routes(service: Service, draining: Callable[[], bool]) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["status"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def healthz() -> Response:
        """200 while the server takes requests, 503 when it is ending or cannot work."""
        problem = await to_thread.run_sync(service.problem)
        if problem or draining():
            return JSONResponse({"status": "failed" if problem else "draining", "problem": problem or None}, 503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/bank")
    async def bank() -> JsonObject:
        """Numbers about the bank, and what the server does with it."""
        service.documents.follow()
        stat = await to_thread.run_sync(service.store.stat)
        config = service.model.config
        return {
            "object": "bank",
            **stat,
            "model": service.settings.name,
            "memory_layers": list(config.memory_layers),
            "routers_trained": config.routers_trained,
            "answers_by": "interleave" if service.protocol is not None else "prompt",
            "read_only": service.store.read_only,
        }

    return router
