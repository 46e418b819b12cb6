"""A model and its bank behind Ray Serve: replicas that answer, and one writer that changes the bank.

    serve run examples.deploying.ray_serve:application model=model_cards/msa-hf-tiny bank=/shared/my-bank

`model` is a checkpoint and `bank` a directory that all machines see. POST /ask takes {"question": ...}, PUT /documents
takes {"key": ..., "text": ...}; both answer with JSON.
"""

from __future__ import annotations

import asyncio
import os

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.generation import Answer, MemoryInterleave, PromptProtocol
from msa_hf.hybrid.streams import open_when_free
from msa_hf.json_object import JsonObject


def opened(model_name: str, directory: str, read_only: bool, device: str) -> BankStore:
    """The bank, with the model that made it."""
    model = MSAForCausalLM.from_pretrained(model_name).to(device).eval()
    tokenizer, protocol = AutoTokenizer.from_pretrained(model_name), PromptProtocol.from_pretrained(model_name)

    def open_bank() -> BankStore:
        return BankStore(model, directory, tokenizer, protocol, read_only=read_only, device=device)

    # A new writer starts before the old one has ended when Serve replaces it.
    return open_when_free(open_bank, patience=60)


@serve.deployment(num_replicas=2, max_ongoing_requests=16)
class Answering:
    """Answers questions from the bank as it was last committed."""

    def __init__(self, model_name: str, directory: str, device: str = "cpu") -> None:
        self.bank = opened(model_name, directory, read_only=True, device=device)
        self.asker = self.new_asker()

    def new_asker(self) -> MemoryInterleave:
        bank = self.bank
        return MemoryInterleave(bank.model, bank.tokenizer, bank.snapshot(), bank.protocol)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def ask(self, questions: list[str]) -> list[JsonObject]:
        """Questions that came at about the same time, answered together, while the replica goes on listening."""
        return await asyncio.to_thread(self.answer, questions)

    def answer(self, questions: list[str]) -> list[JsonObject]:
        """Answers from the bank as it is now."""
        if self.bank.refresh():  # reads a small file; what is new is appended to what is in memory
            self.asker = self.new_asker()
        try:
            return [self.told(answer) for answer in self.asker.ask(questions)]
        except ValueError:  # one of them is empty or too long: that is nothing to the others
            return [self.ask_one(question) for question in questions]

    def ask_one(self, question: str) -> JsonObject:
        """An answer, or what is wrong with the question."""
        try:
            return self.told(self.asker.ask(question))
        except ValueError as error:
            return {"error": str(error)}

    def told(self, answer: Answer) -> JsonObject:
        """An answer as JSON values, and where it comes from."""
        return {
            "answer": answer.text,
            "sources": [source.key for source in answer.documents],
            "generation": self.bank.generation,
            "process": os.getpid(),
        }

    def check_health(self) -> None:
        """Raise where the bank cannot be read any more, so that Serve starts another replica."""
        self.bank.refresh()


@serve.deployment(num_replicas=1, max_ongoing_requests=16)
class Writing:
    """Changes the bank; there is one of these, and its process holds the lock."""

    def __init__(self, model_name: str, directory: str, device: str = "cpu") -> None:
        self.bank = opened(model_name, directory, read_only=False, device=device)

    def upsert(self, key: str, text: str, version: int | None = None) -> JsonObject:
        """Put a document in; it is on the disk when this returns."""
        try:
            changed = self.bank.upsert(key, text, version)
        except (ValueError, TypeError) as error:
            return {"error": str(error)}
        return {"changed": changed, "generation": self.bank.generation}


@serve.deployment(num_replicas=1)
class Front:
    """The addresses that clients use."""

    def __init__(self, answering: DeploymentHandle, writing: DeploymentHandle) -> None:
        self.answering, self.writing = answering, writing

    async def __call__(self, request: Request) -> JSONResponse:
        route = f"{request.method} {request.url.path}"
        try:
            given = await request.json() if route in ("POST /ask", "PUT /documents") else {}
            if route == "POST /ask":
                told = await self.answering.ask.remote(given["question"])
            elif route == "PUT /documents":
                told = await self.writing.upsert.remote(given["key"], given["text"], given.get("version"))
            else:
                return JSONResponse({"error": f"there is no {route}"}, 404)
        except (KeyError, TypeError, ValueError) as error:  # of the request itself
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 400)
        return JSONResponse(told, 400 if "error" in told else 200)


def application(args: dict[str, str]) -> Application:
    """The whole of it, for `serve run` and `serve.run`."""
    given = args["model"], args["bank"], args.get("device", "cpu")
    return Front.bind(Answering.bind(*given), Writing.bind(*given))
