"""Documents and searches over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.responses import JSONResponse

from ..json_object import JsonObject
from ..model.memory_msa import Document
from .documents import Expected, Given, described, etag
from .errors import ApiError, bad_parameter
from .schemas import LONGEST_KEY, DocumentBody, DocumentList, KeyedDocument, SearchRequest
from .searching import Search
from .service import Service

Tags = Annotated[str | None, Header(max_length=4096)]
MOST_VERSION = 2**62


class _KeyConvertor(PathConvertor):
    """The rest of a path, line breaks too: starlette's own leaves one at the end out, which is another key."""

    regex = "(?s:.*)"


register_url_convertor("document_key", _KeyConvertor())


def document_routes(service: Service) -> APIRouter:
    """The routes. A key that no path can hold, such as `..`, goes into the query or the body instead."""
    router, documents, search = APIRouter(), service.documents, Search(service)

    async def show(key: str, if_none_match: str | None) -> Response:
        found = await to_thread.run_sync(documents.get, checked(key))
        tags = _tags("If-None-Match", if_none_match)
        if tags is not None and (etag(found) in tags or "*" in tags):
            return Response(status_code=304, headers={"ETag": etag(found)})
        return JSONResponse(described(found), headers={"ETag": etag(found)})

    async def put(request: Request, given: list[Given]) -> list[tuple[Document, bool, bool]]:
        return await service.run(request, lambda: documents.put(given))

    async def remove(request: Request, key: str, expected: Expected) -> Response:
        gone = await service.run(request, lambda: documents.delete(checked(key), expected))
        record = {"object": "document.deleted", "key": gone.key, "id": gone.id, "deleted": True}
        return JSONResponse(record)

    @router.get("/v1/documents", tags=["documents"], dependencies=[Depends(query_of("limit", "after", "key"))])
    async def list_documents(
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        after: Annotated[int, Query(ge=-1, lt=2**63)] = -1,
        key: str | None = None,
        if_none_match: Tags = None,
    ) -> Response:
        """Documents by their ids, a page at a time: `after` is `next` of the page before. With `key` that document."""
        if key is not None:
            return await show(key, if_none_match)
        return JSONResponse(await to_thread.run_sync(documents.page, after, limit))

    @router.post("/v1/documents", tags=["documents"], dependencies=[Depends(query_of())])
    async def put_documents(
        body: KeyedDocument | DocumentList, request: Request, if_match: Tags = None, if_none_match: Tags = None
    ) -> Response:
        """Put a document in, or several in one commit: all of them or none."""
        several = isinstance(body, DocumentList)
        if several and (if_match or if_none_match):
            raise bad_parameter("documents", "ETags belong to a single document; use `expected_version`.")
        bodies = body.documents if isinstance(body, DocumentList) else [body]
        wanted = [expected(item.expected_version, if_match, if_none_match) for item in bodies]
        places = [f"documents[{place}]." if several else "" for place in range(len(bodies))]
        asked = [given(item.key, item, one, place) for item, one, place in zip(bodies, wanted, places, strict=True)]
        done = await put(request, asked)
        records = [as_put(*item) for item in done]
        if several:
            return JSONResponse({"object": "list", "data": records})
        return JSONResponse(records[0], 201 if records[0]["created"] else 200, {"ETag": etag(done[0][0])})

    @router.delete("/v1/documents", tags=["documents"], dependencies=[Depends(query_of("key", "expected_version"))])
    async def delete_by_query(
        request: Request,
        key: str,
        expected_version: Annotated[int | None, Query(ge=0, le=MOST_VERSION)] = None,
        if_match: Tags = None,
    ) -> Response:
        """Delete a document."""
        return await remove(request, key, expected(expected_version, if_match))

    @router.get("/v1/documents/{key:document_key}", tags=["documents"], dependencies=[Depends(query_of())])
    async def get_document(key: str, if_none_match: Tags = None) -> Response:
        """A document with its text."""
        return await show(key, if_none_match)

    @router.put("/v1/documents/{key:document_key}", tags=["documents"], dependencies=[Depends(query_of())])
    async def put_document(
        key: str, body: DocumentBody, request: Request, if_match: Tags = None, if_none_match: Tags = None
    ) -> Response:
        """Put a document in, or in the place of the one with its key."""
        wanted = expected(body.expected_version, if_match, if_none_match)
        ((document, fresh, changed),) = await put(request, [given(checked(key), body, wanted)])
        return JSONResponse(as_put(document, fresh, changed), 201 if fresh else 200, {"ETag": etag(document)})

    @router.delete(
        "/v1/documents/{key:document_key}", tags=["documents"], dependencies=[Depends(query_of("expected_version"))]
    )
    async def delete_document(
        key: str,
        request: Request,
        expected_version: Annotated[int | None, Query(ge=0, le=MOST_VERSION)] = None,
        if_match: Tags = None,
    ) -> Response:
        """Delete a document."""
        return await remove(request, key, expected(expected_version, if_match))

    @router.post("/v1/search", tags=["search"], dependencies=[Depends(query_of())])
    async def find(body: SearchRequest, request: Request) -> JsonObject:
        """The documents that fit a query, best first, without generating."""
        return await search.find(request, body.query, body.k, body.mode, body.where)

    return router


def checked(key: str) -> str:
    """A key of an address.

    Raises:
        ApiError: for one that is empty or too long.
    """
    if not key or len(key) > LONGEST_KEY:
        raise bad_parameter("key", f"a key has 1 to {LONGEST_KEY} characters, got {len(key)}.")
    return key


def expected(version: int | None, if_match: str | None = None, if_none_match: str | None = None) -> Expected:
    """The state that a change was made for."""
    return Expected(version, _tags("If-Match", if_match), _tags("If-None-Match", if_none_match))


def given(key: str, body: DocumentBody, wanted: Expected, within: str = "") -> Given:
    """A document that is to be put in, from its place in a body."""
    if not body.text.strip():
        name = f"{within}text"
        raise ApiError(400, f"`{name}` is empty; delete the document instead.", "invalid_parameter", name)
    return Given(key, body.text, body.metadata, body.version, wanted, within)


def query_of(*names: str) -> Callable[[Request], None]:
    """A dependency that refuses whatever else a query has: `?expectedversion=3`, passed over, would delete a document
    that has changed."""

    def check(request: Request) -> None:
        takes = f"takes {' and '.join(names)}" if names else "is empty: what a change is made with belongs in its body"
        for name in request.query_params:
            if name not in names:
                raise ApiError(
                    400, f"Unknown parameter: `{name[:100]}`. The query here {takes}.", "unknown_parameter", name[:100]
                )
            if len(request.query_params.getlist(name)) > 1:
                raise bad_parameter(name, "is there more than once.")

    return check


def as_put(document: Document, fresh: bool, changed: bool) -> JsonObject:
    """A document that was put in, as JSON values."""
    return {**described(document), "created": fresh, "changed": changed}


def _tags(name: str, header: str | None) -> tuple[str, ...] | None:
    """The ETags of a header; weak ones count as strong ones."""
    if header is None:
        return None
    tags = tuple(tag.strip().removeprefix("W/") for tag in header.split(",") if tag.strip())
    if not tags or any(tag != "*" and not (len(tag) > 1 and tag[0] == tag[-1] == '"') for tag in tags):
        raise bad_parameter(name, f'must be ETags such as "1f3a" in quotes, or *, got {header[:100]!r}.')
    return tags
