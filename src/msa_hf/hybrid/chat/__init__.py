"""Chat models: any causal LM of transformers, or an endpoint that speaks OpenAI's protocol (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exports

if TYPE_CHECKING:
    from .chat_model import ChatModel, Completion, Message, PromptTooLong
    from .endpoint_chat import EndpointChat, EndpointError
    from .json_schema import AnswerError, SchemaError
    from .transformers_chat import TransformersChat

__all__ = [
    "AnswerError",
    "ChatModel",
    "Completion",
    "EndpointChat",
    "EndpointError",
    "Message",
    "PromptTooLong",
    "SchemaError",
    "TransformersChat",
]

__getattr__ = exports(
    __name__,
    {
        ".chat_model": ["ChatModel", "Completion", "Message", "PromptTooLong"],
        ".endpoint_chat": ["EndpointChat", "EndpointError"],
        ".json_schema": ["AnswerError", "SchemaError"],
        ".transformers_chat": ["TransformersChat"],
    },
)
