"""The bodies of requests: what clients of OpenAI's API send, and what is sent about documents.

Options of that API which change nothing here are taken; those which would change the answer are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..json_object import JsonObject
from ..model.metadata_msa import checked_metadata
from ..retrieval.where import checked_where
from .errors import bad_parameter
from .limits import Limits
from .waiting import Options, Turn

MOST_STOPS = 4
SHOWN_NAME = 100  # characters of a name in an error
LONGEST_KEY = 1024  # characters
MOST_DOCUMENTS = 256  # of one commit
LEAST_TEMPERATURE = 1e-30  # logits over less overflow; the most likely token alone is drawn long before
# Option -> the values of it that ask for nothing.
ABSENT: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not Unicode ({error.reason} at character {error.start})") from None
    return text


def _key(text: str) -> str:
    if not text or len(text) > LONGEST_KEY:
        raise ValueError(f"a key has 1 to {LONGEST_KEY} characters, got {len(text)}")
    return _unicode(text)


Text = Annotated[str, AfterValidator(_unicode)]
Key = Annotated[str, AfterValidator(_key)]


def _metadata(values: JsonObject) -> JsonObject:
    return checked_metadata(values, "the document")


def _where(values: JsonObject) -> JsonObject:
    checked_where(values)
    return values


class Body(BaseModel):
    """A JSON object whose fields are known, and are what they say: no text is taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream has besides the answer."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class Generated(Body):
    """What both ways of asking have."""

    model: Text
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Text | list[Text] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    trace: bool | None = False
    # Taken, without effect
    user: str | None = None
    metadata: JsonObject | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, absent in ABSENT.items():
            if name in given:
                value = given[name]
                if value is not None and not any(_same(value, item) for item in absent):
                    allowed = ", ".join(repr(item) for item in absent) or "left out"
                    raise ValueError(f"`{name}` is not supported here; it must be {allowed}")
        return {name: value for name, value in given.items() if name not in ABSENT}

    @model_validator(mode="after")
    def _check(self) -> Generated:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise ValueError(f"`stop` must be up to {MOST_STOPS} texts that are not empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` belongs to `stream`")
        return self

    def options(self, default: int, limits: Limits, new_tokens: int | None = None) -> Options:
        """How the answer is generated.

        Raises:
            ApiError: where more tokens are asked for than may be.
        """
        asked = self.max_tokens if new_tokens is None else new_tokens
        if asked is not None and asked > limits.new_tokens:
            name = "max_tokens" if new_tokens is None else "max_completion_tokens"
            raise bad_parameter(name, f"at most {limits.new_tokens} on this server, got {asked}.")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        temperature = self.temperature or 0.0
        return Options(
            default if asked is None else asked,
            temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            1.0 if self.top_p is None else self.top_p,
            self.seed,
            stops,
        )


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a chat; what clients keep besides is passed over."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Generated):
    """A chat, whose last message asks."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_messages(self) -> ChatRequest:
        last = self.messages[-1]
        if last.role != "user" or not last.text.strip():
            raise ValueError("`messages` must end with a message of the user that is not empty")
        return self

    @property
    def turns(self) -> list[Turn]:
        """The messages, empty ones left out."""
        names = {"developer": "system"}
        return [{"role": names.get(item.role, item.role), "content": item.text} for item in self.messages if item.text]


class CompletionRequest(Generated):
    """Texts to be answered."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class DocumentBody(Body):
    """A document as it is put in."""

    text: Text
    metadata: Annotated[JsonObject, AfterValidator(_metadata)] | None = None
    version: int | None = Field(None, ge=0, le=2**62)
    expected_version: int | None = Field(None, ge=0, le=2**62)


class KeyedDocument(DocumentBody):
    """A document with its key."""

    key: Key


class DocumentList(Body):
    """Documents that are put in together."""

    documents: list[KeyedDocument] = Field(min_length=1, max_length=MOST_DOCUMENTS)


class SearchRequest(Body):
    """A search."""

    query: Text
    k: int = Field(10, ge=1, le=100)
    mode: Literal["router", "lexical", "dense", "hybrid"] | None = None
    where: Annotated[JsonObject, AfterValidator(_where)] | None = None

    @model_validator(mode="after")
    def _check_query(self) -> SearchRequest:
        if not self.query.strip():
            raise ValueError("`query` is empty")
        return self


def _same(value: object, item: object) -> bool:
    """Equal values; 0 and 0.0 are, 1 and true are not."""
    return value == item and isinstance(value, bool) == isinstance(item, bool)
