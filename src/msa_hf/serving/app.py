"""The server as an ASGI application: the routes, and behind which gates they lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from .asking_routes import asking_routes
from .document_routes import document_routes
from .errors import install_handlers
from .hosts import HostGate
from .keys import ApiKey, KeyGate
from .limits import BodyGate, LoadGate
from .metrics import Observer
from .page_routes import page_routes
from .service import Service
from .status_routes import status_routes


class Application:
    """The server, from the outside in: who watches, who may come in, how much, and the routes.

    Args:
        service: what answers.
        keys: of clients; none: everybody may ask, who calls the server by a name of this machine or an allowed one.
        allowed_hosts: further names; `*` for all.

    Attributes:
        load: counts the requests in flight, and turns new ones away while the server ends.
    """

    def __init__(self, service: Service, keys: Sequence[ApiKey] = (), allowed_hosts: Collection[str] = ()) -> None:
        routes = FastAPI(title="msa-hf", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
        install_handlers(routes)
        routes.include_router(asking_routes(service))
        routes.include_router(document_routes(service))
        routes.include_router(page_routes())
        routes.include_router(status_routes(service, lambda: self.load.draining))
        app: ASGIApp = BodyGate(routes, service.limits)
        app = KeyGate(app, keys)
        if not keys and "*" not in allowed_hosts:
            app = HostGate(app, allowed_hosts)
        self.load = LoadGate(app, service.limits.requests, service.metrics.reject)
        self.service = service
        self._app: ASGIApp = Observer(self.load, service.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self._app(scope, receive, send)
