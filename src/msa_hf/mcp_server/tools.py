"""The tools: what each is called with, what it gives, and what it does with a bank."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..user_errors import UserError
from .documents import excerpt_of, uri_of
from .limits import Limits
from .stopping import Stop

if TYPE_CHECKING:
    from ..retrieval import Hit
    from .shared_bank import SharedBank


class Arguments(BaseModel):
    """What a tool is called with: these fields and no others, of these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SearchArguments(Arguments):
    """A query."""

    query: Annotated[str, Field(description="What to look for, in words or as a question.")]
    k: Annotated[int, Field(ge=1, description="Documents to find at most.")] = 5
    mode: Annotated[
        Literal["router", "lexical", "dense", "hybrid"] | None,
        Field(description="By the model's routers, by words, by vectors, or by all that are there (the default)."),
    ] = None
    where: Annotated[
        dict[str, Any] | None,
        Field(description='Metadata that documents have: {"year": 1889}; a list says several, one of which is enough.'),
    ] = None


class Place(BaseModel):
    """Where one way of searching has a document."""

    rank: Annotated[int, Field(description="From 1, best first.")]
    score: float


class FoundDocument(BaseModel):
    """A document that fits."""

    key: str
    uri: Annotated[str, Field(description="To read the whole document as a resource.")]
    score: Annotated[float, Field(description="Orders the results of this search alone.")]
    text: Annotated[str | None, Field(description="The beginning of the text.")]
    truncated: Annotated[bool, Field(description="Whether the text goes on; `read` gives the rest.")]
    metadata: dict[str, Any] | None
    found_by: Annotated[dict[str, Place], Field(description="Rank and score in each way of searching.")]
    words: Annotated[list[str], Field(description="Words of the query that the text has.")]


class SearchResult(BaseModel):
    """The documents that fit a query, best first."""

    mode: str
    documents: list[FoundDocument]


class AskArguments(Arguments):
    """A question."""

    question: Annotated[str, Field(description="One question, complete in itself.")]


class SourceDocument(BaseModel):
    """A document that was read for an answer."""

    key: str
    uri: str
    score: Annotated[float | None, Field(description="The routers' score; null where they did not choose it.")]
    round: Annotated[int, Field(description="The round of retrieval it was read in, from 1.")]
    text: str | None
    truncated: bool


class AskResult(BaseModel):
    """An answer and its sources."""

    answer: str
    sources: Annotated[list[SourceDocument], Field(description="Documents that were read, in reading order.")]
    note: Annotated[str | None, Field(description="What to know about this model's answers.")]


class ReadArguments(Arguments):
    """Which document, and from where on."""

    key: str
    offset: Annotated[int, Field(ge=0, description="Characters to skip.")] = 0


class ReadResult(BaseModel):
    """A document, or a part of its text."""

    key: str
    uri: str
    text: str | None
    characters: Annotated[int, Field(description="Length of the whole text.")]
    next_offset: Annotated[int | None, Field(description="Where to read on; null at the end.")]
    metadata: dict[str, Any] | None
    version: int | None


class RememberArguments(Arguments):
    """A document."""

    key: Annotated[str, Field(min_length=1, description="Names the document; one that has this key is replaced.")]
    text: Annotated[str, Field(min_length=1, description="What to remember, complete in itself.")]
    metadata: Annotated[dict[str, Any] | None, Field(description="Any JSON values by name.")] = None
    version: Annotated[
        int | None, Field(ge=0, le=2**62, description="Where given, older versions of this key are ignored.")
    ] = None


class RememberResult(BaseModel):
    """What became of a document."""

    key: str
    uri: str
    outcome: Annotated[
        Literal["added", "replaced", "unchanged"],
        Field(description="unchanged: the same document is there, or one of the same or a newer version."),
    ]


class ForgetArguments(Arguments):
    """Which document."""

    key: str


class ForgetResult(BaseModel):
    """Whether a document was deleted."""

    key: str
    deleted: Annotated[bool, Field(description="False where there was no such document.")]


@dataclass(frozen=True)
class Tool:
    """A tool as clients see it.

    Attributes:
        name, title, description: for models and people.
        arguments, result: types of what goes in and out.
        run: does it.
        reads_only: changes nothing.
        destroys: may overwrite or delete.
        needs_model: encodes or generates.
    """

    name: str
    title: str
    description: str
    arguments: type[Arguments]
    result: type[BaseModel]
    run: Callable[[SharedBank, Any, Limits, Stop], BaseModel]
    reads_only: bool = True
    destroys: bool = False
    needs_model: bool = False


def _search(bank: SharedBank, given: SearchArguments, limits: Limits, stop: Stop) -> SearchResult:
    _check_length("query", given.query, limits.query)
    if given.k > limits.results:
        raise UserError(f"`k` is {given.k}; this server finds {limits.results} documents at most (--max-k)")
    mode, hits = bank.search(given.query, given.k, given.mode, stop, given.where)
    return SearchResult(mode=mode, documents=[_found(hit, limits) for hit in hits])


def _found(hit: Hit, limits: Limits) -> FoundDocument:
    text, truncated = excerpt_of(hit.text, limits.excerpt)
    ways = {"router": hit.why.router, "lexical": hit.why.lexical, "dense": hit.why.dense}
    return FoundDocument(
        key=hit.key,
        uri=uri_of(hit.key),
        score=hit.score,
        text=text,
        truncated=truncated,
        metadata=hit.metadata,
        found_by={name: Place(rank=way.rank, score=way.score) for name, way in ways.items() if way is not None},
        words=list(hit.why.terms),
    )


def _ask(bank: SharedBank, given: AskArguments, limits: Limits, stop: Stop) -> AskResult:
    _check_length("question", given.question, limits.query)
    answer, documents = bank.ask(given.question, stop)
    sources = []
    for source, document in zip(answer.documents, documents, strict=True):
        text, truncated = excerpt_of(document.text, limits.excerpt)
        sources.append(
            SourceDocument(
                key=source.key,
                uri=uri_of(source.key),
                score=source.score,
                round=source.round + 1,
                text=text,
                truncated=truncated,
            )
        )
    return AskResult(answer=answer.text, sources=sources, note=bank.note)


def _read(bank: SharedBank, given: ReadArguments, limits: Limits, stop: Stop) -> ReadResult:
    document = bank.get(given.key)
    if document is None:
        raise UserError(f"no document has the key {given.key!r:.200}; search finds keys")
    text = document.text or ""
    end = given.offset + limits.part
    return ReadResult(
        key=document.key,
        uri=uri_of(document.key),
        text=None if document.text is None else text[given.offset : end],
        characters=len(text),
        next_offset=end if end < len(text) else None,
        metadata=document.metadata,
        version=document.version,
    )


def _remember(bank: SharedBank, given: RememberArguments, limits: Limits, stop: Stop) -> RememberResult:
    _check_length("key", given.key, limits.key)
    _check_length("text", given.text, limits.text)
    if not given.text.strip():
        raise UserError("`text` is blank; there is nothing to remember")
    if given.metadata is not None:
        _check_length("metadata", json.dumps(given.metadata, ensure_ascii=False), limits.metadata)
    outcome = bank.upsert(given.key, given.text, given.version, given.metadata, stop)
    return RememberResult.model_validate({"key": given.key, "uri": uri_of(given.key), "outcome": outcome})


def _forget(bank: SharedBank, given: ForgetArguments, limits: Limits, stop: Stop) -> ForgetResult:
    return ForgetResult(key=given.key, deleted=bank.delete(given.key))


def _check_length(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise UserError(f"`{name}` has {len(text)} characters; this server takes {most} at most")


TOOLS = (
    Tool(
        "search",
        "Search the memory",
        "Find the documents of the memory that fit a query, best first, with their texts. Use this to look things up.",
        SearchArguments,
        SearchResult,
        _search,
    ),
    Tool(
        "ask",
        "Ask the memory",
        "Let the memory's own language model answer a question from the documents that it reads for it. Gives the "
        "answer and its sources; check the sources, as the model may be small.",
        AskArguments,
        AskResult,
        _ask,
        needs_model=True,
    ),
    Tool(
        "read",
        "Read a document",
        "The text of a document by its key, in parts where it is long.",
        ReadArguments,
        ReadResult,
        _read,
    ),
    Tool(
        "remember",
        "Remember a document",
        "Put a document into the memory for good, or in the place of the one with the same key. It can be searched as "
        "soon as this returns.",
        RememberArguments,
        RememberResult,
        _remember,
        reads_only=False,
        destroys=True,
        needs_model=True,
    ),
    Tool(
        "forget",
        "Forget a document",
        "Delete the document of a key from the memory.",
        ForgetArguments,
        ForgetResult,
        _forget,
        reads_only=False,
        destroys=True,
    ),
)


def tools_for(with_model: bool, read_only: bool) -> dict[str, Tool]:
    """The tools of a server, by name."""
    return {
        tool.name: tool for tool in TOOLS if (with_model or not tool.needs_model) and (tool.reads_only or not read_only)
    }
