"""Questions: chat completions and completions, as in OpenAI's API, and the models that answer them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ..json_object import JsonObject
from .answers import AnswerStream, Asked, answer_whole
from .errors import ApiError
from .schemas import SHOWN_NAME, ChatRequest, CompletionRequest, Generated
from .service import Service
from .waiting import Turn


def asking_routes(service: Service) -> APIRouter:
    """The routes."""
    router, settings = APIRouter(tags=["asking"]), service.settings
    model = {"id": settings.name, "object": "model", "created": 0, "owned_by": "msa-hf"}

    def check_model(name: str) -> None:
        if name != settings.name:
            message = f"There is no model {name[:SHOWN_NAME]!r} here; this server serves {settings.name!r}."
            raise ApiError(404, message, "model_not_found", "model")

    async def answer(request: Request, body: Generated, turns: list[list[Turn]], chat: bool) -> Response | JsonObject:
        check_model(body.model)
        longest = body.max_completion_tokens if isinstance(body, ChatRequest) else None
        asked = Asked(
            turns,
            body.options(settings.new_tokens, service.limits, longest),
            chat,
            settings.name,
            usage=bool(body.stream_options and body.stream_options.include_usage),
            trace=bool(body.trace),
        )
        return AnswerStream(service, request, asked) if body.stream else await answer_whole(service, request, asked)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response | JsonObject:
        """Answer the last message of a chat from the memory."""
        return await answer(request, body, [body.turns], chat=True)

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response | JsonObject:
        """Answer a text from the memory; several are several choices."""
        turns = [[{"role": "user", "content": text}] for text in body.prompts]
        return await answer(request, body, turns, chat=False)

    @router.get("/v1/models")
    async def models() -> JsonObject:
        """The model that this server serves."""
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JsonObject:
        """A model by its name."""
        check_model(name)
        return model

    return router
