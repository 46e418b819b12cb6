"""The things that a server serves: a model, a bank, and the thread on which the model works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from transformers import PreTrainedTokenizerBase

from ..bank import BankStore
from ..generation import PromptProtocol
from ..model.bank_format_msa import BankError
from ..model.bank_manifest_msa import read_manifest
from ..model.modeling_msa import MSAForCausalLM
from .asking import BankAsker
from .batching import ModelThread
from .documents import Documents
from .errors import ApiError
from .limits import Limits
from .metrics import ServerMetrics
from .waiting import Options, Question, Turn, Work

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The ways in which a server answers.

    Attributes:
        name: of the model, as clients call it.
        new_tokens: of an answer where a request does not say.
        limits: what clients may send.
        interleave: options of `MemoryInterleave`, for a checkpoint with a protocol.
    """

    name: str = "msa"
    new_tokens: int = 128
    limits: Limits = field(default_factory=Limits)
    interleave: dict[str, Any] = field(default_factory=dict)


class Service:
    """A model and its bank at work.

    Args:
        store: the bank; closed with the service.
        model, tokenizer: that made it.
        protocol: of the checkpoint, None where it has none.
        settings: how it answers.
    """

    def __init__(
        self,
        store: BankStore,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        settings: Settings,
    ) -> None:
        self.store, self.model, self.tokenizer, self.protocol = store, model, tokenizer, protocol
        self.settings, self.limits = settings, settings.limits
        self.documents = Documents(store)
        self.metrics = ServerMetrics(
            {
                "waiting": ("Questions, searches and changes that wait for the model", lambda: len(self.thread)),
                "documents": ("Documents of the bank", lambda: len(store)),
                "generation": ("Commits of the bank", lambda: store.generation),
            }
        )
        self.asker = BankAsker(store, model, tokenizer, protocol, settings.interleave)
        self.thread = ModelThread(self.asker.answer, self.limits.batch, self.limits.waiting, self.metrics)

    def check(self) -> None:
        """Make sure that questions can be asked, before somebody does.

        Raises:
            ValueError: for options that make no sense for this model.
        """
        self.asker.asker()

    def start(self) -> None:
        """Begin to work."""
        self.thread.start()

    def close(self) -> None:
        """Finish what waits, and let another writer have the bank."""
        self.thread.end()
        self.store.close()

    def problem(self) -> str:
        """Why the server cannot do its work; empty where it can. Reads the bank's manifest where others write it."""
        if self.store.read_only and self.store.directory is not None:
            try:
                read_manifest(self.store.directory)
            except (BankError, OSError) as error:
                logger.error("the bank cannot be read: %s", error)
                return "the bank cannot be read; the log of the server says why"
        return self.documents.broken or ("" if self.thread.alive else "the thread of the model has ended")

    @contextlib.asynccontextmanager
    async def asking(
        self, request: Request, asked: Sequence[list[Turn]], options: Options, param: str = "messages"
    ) -> AsyncIterator[list[Question]]:
        """Questions on their way; they are let be at the end of the block, and when the client goes or its time is up.

        Raises:
            ApiError: 429 where too much waits; 504 where the time is up.
        """
        questions = [Question(turns, options, param) for turns in asked]
        watcher = asyncio.create_task(_gone(request, questions))
        try:
            async with asyncio.timeout(self.limits.seconds):
                for question in questions:
                    self._put(question)
                yield questions
        except TimeoutError:
            raise self.late() from None
        finally:
            watcher.cancel()
            for question in questions:
                question.cancel()

    async def run(self, request: Request, function: Callable[[], T]) -> T:
        """Run something on the thread of the model. What has begun is not broken off.

        Raises:
            ApiError: 429 where too much waits; 504 where its turn did not come in time.
        """
        work = Work(function)
        self._put(work)
        done = asyncio.wrap_future(work.future)
        watcher = asyncio.create_task(_gone(request, [work.future]))
        try:
            finished, _ = await asyncio.wait([done], timeout=self.limits.seconds)
            if not finished and work.future.cancel():
                raise self.late()
            return await done
        except asyncio.CancelledError:
            if work.future.cancelled():
                raise ApiError(499, "The client went away.", "client_gone") from None
            raise
        finally:
            watcher.cancel()

    def _put(self, item: Question | Work) -> None:
        try:
            self.thread.put(item)
        except ApiError as error:
            self.metrics.reject(error.code)
            raise

    def late(self) -> ApiError:
        """The answer to a request whose time is up."""
        self.metrics.reject("timeout")
        message = (
            f"The request took longer than the {self.limits.seconds:g} seconds that it may; ask for less, or later."
        )
        return ApiError(504, message, "timeout")


async def _gone(request: Request, items: Sequence[Any]) -> None:
    """Cancel things once a client goes away; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for item in items:
        item.cancel()
