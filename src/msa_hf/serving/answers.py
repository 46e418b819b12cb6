"""Answers in the shape that clients of OpenAI's API read, as a whole and as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..json_object import JsonObject
from .errors import api_error
from .service import Service
from .waiting import Answered, Delta, Options, Question, Turn


@dataclass(frozen=True)
class Asked:
    """A request as it is answered.

    Attributes:
        turns: what is asked, one chat for each choice.
        options: of the answers.
        chat: in the shape of a chat, else of a completion.
        model: its name.
        usage: a stream ends with the tokens that were read and written.
        trace: with the way to each answer.
        id, created: of the answer; seconds since 1970.
    """

    turns: list[list[Turn]]
    options: Options
    chat: bool
    model: str
    usage: bool = False
    trace: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def param(self) -> str:
        """The parameter of the request that asks."""
        return "messages" if self.chat else "prompt"

    def head(self, streamed: bool) -> JsonObject:
        """The fields that stand before the choices."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": f"{kind}.chunk" if streamed and self.chat else kind,
            "created": self.created,
            "model": self.model,
        }

    def whole(self, answers: Sequence[Answered]) -> JsonObject:
        """All answers."""
        choices = []
        for index, answer in enumerate(answers):
            said = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
            ended = {"finish_reason": answer.finish_reason, "logprobs": None}
            choices.append({"index": index, **said, **ended, **({} if self.chat else self.origin(answer))})
        origin = self.origin(answers[0]) if len(answers) == 1 else {}
        return {**self.head(False), "choices": choices, "usage": usage(answers), **origin, **notices(answers)}

    def origin(self, answer: Answered) -> JsonObject:
        """The sources of an answer, and its trace where that is asked for."""
        return {"sources": answer.sources, **({"trace": answer.trace} if self.trace else {})}

    def chunk(self, index: int, text: str | None, reason: str | None = None, first: bool = False) -> JsonObject:
        """A piece of an answer."""
        said: JsonObject = {"text": text or ""}
        if self.chat:
            said = {"delta": {} if text is None else {"content": text}}
            if first:
                said["delta"] = {"role": "assistant", "content": text or ""}
        choice = {"index": index, **said, "finish_reason": reason, "logprobs": None}
        return {**self.head(True), "choices": [choice], **({"usage": None} if self.usage else {})}


def usage(answers: Sequence[Answered]) -> JsonObject:
    """Tokens that were read and written."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    written = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def notices(answers: Sequence[Answered]) -> JsonObject:
    """The notices of what was done otherwise than a client may think, each once."""
    found = list(dict.fromkeys(notice for answer in answers for notice in answer.notices))
    return {"notices": found} if found else {}


async def answer_whole(service: Service, request: Request, asked: Asked) -> JsonObject:
    """Answer a request."""
    async with service.asking(request, asked.turns, asked.options, asked.param) as questions:
        answers = [await question.answer() for question in questions]
    counted = usage(answers)
    service.metrics.count_tokens(counted["prompt_tokens"], counted["completion_tokens"])
    return asked.whole(answers)


class AnswerStream(Response):
    """Server-sent events with the pieces of answers as they come, and `[DONE]`.

    The response begins with the first piece: whatever goes wrong before has a status of its own. What goes wrong later
    is an event with an `error`, behind which the stream ends without `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, request: Request, asked: Asked) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.service, self.request, self.asked = service, request, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        begun = False

        async def write(event: Mapping[str, object] | str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            text = event if isinstance(event, str) else json.dumps(event, allow_nan=False)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            async for event in self.events():
                await write(event)
            await write("[DONE]")
        except Exception as error:
            if not begun:
                raise
            await write(api_error(error).to_dict())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def events(self) -> AsyncIterator[JsonObject]:
        """The objects of the stream."""
        asked, start = self.asked, time.perf_counter()
        seen: set[int] = set()
        answers: dict[int, Answered] = {}
        async with (
            self.service.asking(self.request, asked.turns, asked.options, asked.param) as questions,
            contextlib.aclosing(merged(questions)) as events,
        ):
            async for index, event in events:
                if not seen:
                    self.service.metrics.first.observe(time.perf_counter() - start)
                if isinstance(event, Delta):
                    yield asked.chunk(index, event.text, first=index not in seen)
                else:
                    if index not in seen and asked.chat:  # an empty answer
                        yield asked.chunk(index, "", first=True)
                    answers[index] = event
                    end = asked.chunk(index, None, event.finish_reason)
                    yield {**end, **asked.origin(event), **notices([event])}
                seen.add(index)
        counted = usage([answers[index] for index in sorted(answers)])
        self.service.metrics.count_tokens(counted["prompt_tokens"], counted["completion_tokens"])
        if asked.usage:
            yield {**asked.head(True), "choices": [], "usage": counted}


async def merged(questions: Sequence[Question]) -> AsyncGenerator[tuple[int, Delta | Answered]]:
    """The events of several questions as they come, with the number of the question."""
    found: asyncio.Queue[tuple[int, Delta | Answered | Exception]] = asyncio.Queue()

    async def follow(index: int, question: Question) -> None:
        try:
            async for event in question.events():
                found.put_nowait((index, event))
        except Exception as error:
            found.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(index, question)) for index, question in enumerate(questions)]
    left = len(tasks)
    try:
        while left:
            index, event = await found.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Answered)
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
