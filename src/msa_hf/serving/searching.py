"""Searches of the bank as it is now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request

from ..json_object import JsonObject
from ..retrieval import Searcher
from ..retrieval.router_scores import QueryTooLong
from ..retrieval.where import Where
from .errors import ApiError
from .passages import passage_of
from .service import Service

if TYPE_CHECKING:
    from ..retrieval import Hit


class Search:
    """Finds documents for queries, on the thread of the model."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def find(self, request: Request, query: str, k: int, mode: str | None, where: Where | None) -> JsonObject:
        """The documents that fit a query, as JSON values.

        Args:
            mode: None: as many of the ways as there are.
            where: values of metadata that documents have.

        Raises:
            ApiError: 400 for a mode whose index the bank has not.
        """
        return await self.service.run(request, lambda: self._find(query, k, mode, where))

    def _find(self, query: str, k: int, mode: str | None, where: Where | None) -> JsonObject:
        service = self.service
        service.documents.follow()
        searcher = Searcher(service.store, model=service.model, tokenizer=service.tokenizer, protocol=service.protocol)
        chosen = self._best_mode(searcher) if mode is None else mode
        try:
            (hits,) = searcher.search([query], k, chosen, where=where)
        except QueryTooLong as error:
            raise ApiError(400, str(error), "context_length_exceeded", "query") from error
        except (ValueError, ImportError) as error:
            raise ApiError(400, str(error), "search_mode_unavailable", "mode") from error
        return {"object": "list", "mode": chosen, "data": [described(hit, query) for hit in hits]}

    def _best_mode(self, searcher: Searcher) -> str:
        """All ways together where there are two of them, else the one that there is."""
        try:
            searcher.ways()
        except ValueError:
            pass
        else:
            return "hybrid"
        try:
            return searcher.kept()[0]
        except (ValueError, ImportError):
            return "router"


def described(hit: Hit, query: str) -> JsonObject:
    """A hit as JSON values, with the passage that has most of the query's words."""
    record = hit.to_dict()
    return {**record, "passage": passage_of(hit.text or "", query)}
