"""Running chains: steps in order, each with its trace; what a trace has is not done again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...json_object import JsonObject
from ..chat.chat_model import ChatModel, Message, as_json, messages_of
from ..chat.endpoint_chat import EndpointError
from ..chat.json_schema import AnswerError
from .chain import MEMORY, Chain, Condition, Loop, Retrieve, Step
from .checking import ITEM, QUESTION, SOURCES, check_chain, in_order
from .errors import ChainError, StepError, TraceError
from .extracting import extract, holds
from .memory_reader import MemoryReader
from .reading import digest_of
from .sources import Retriever, Source, sources_text
from .template import JsonValue, as_text, look_up, parse_field, render
from .trace import TraceFile

Values = dict[str, JsonValue]


@dataclass(frozen=True)
class ChainResult:
    """The outcome of a chain.

    Attributes:
        answer: its answer.
        values: name of each step -> its value; of steps in loops, the loop's.
        records: what each step did, in the order in which they ended: the records of the trace.
        resumed: how many of them came from a trace.
    """

    answer: str
    values: Mapping[str, JsonValue]
    records: Sequence[JsonObject]
    resumed: int = 0

    def sources(self) -> list[JsonObject]:
        """The documents that steps got or read, each once, in the order in which they came."""
        found: dict[str, JsonObject] = {}
        for record in self.records:
            for source in record.get("sources", ()):
                found.setdefault(source["key"], source)
        return list(found.values())


class ChainRunner:
    """Runs chains on a memory, a bank and chat models.

    Args:
        retriever: searches for steps that retrieve; see `BankRetriever`.
        memory: answers for steps of the model `"memory"`; see `InterleaveReader`.
        chats: name -> chat model; steps that name no model ask `"chat"`.
    """

    def __init__(
        self,
        retriever: Retriever | None = None,
        memory: MemoryReader | None = None,
        chats: Mapping[str, ChatModel] | None = None,
    ) -> None:
        self.retriever, self.memory, self.chats = retriever, memory, dict(chats or {})
        if MEMORY in self.chats:
            raise ValueError(f"A chat model cannot have the name {MEMORY!r}, which is the memory model's.")

    def check(self, chain: Chain) -> None:
        """Make sure that a chain can run, and that this runner has what its steps need.

        Raises:
            ChainError: naming the place, the cause and the remedy.
        """
        check_chain(chain)
        self._check_needs(chain.steps)

    def _check_needs(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.loop is not None:
                self._check_needs(step.loop.steps)
                continue
            if step.retrieve is not None and self.retriever is None:
                raise ChainError(f"step {step.name!r} retrieves, but there is no bank to search: pass `retriever`")
            if step.model == MEMORY and self.memory is None:
                raise ChainError(f"step {step.name!r} asks the memory model, but there is none: pass `memory`")
            if step.model not in (None, MEMORY) and step.model not in self.chats:
                there = ", ".join(sorted(self.chats)) or "none"
                raise ChainError(
                    f"step {step.name!r} asks the chat model {step.model!r}, which is not there (there: {there}): "
                    "pass it in `chats`"
                )

    def run(self, chain: Chain, question: str, trace: str | Path | None = None) -> ChainResult:
        """Answer a question by a chain.

        Args:
            chain: what to do; checked first.
            question: a text that is not empty.
            trace: a file of JSON lines that gets a record of every step as soon as it is done. If it is there already,
                of the same chain, question and models, the run goes on behind its last record. Default: none.

        Raises:
            ChainError: before anything runs, for a chain that cannot.
            StepError: for a step that failed.
            TraceError: for a trace of another run, or a damaged one.
        """
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`question` must be a text that is not empty, got {question!r}.")
        self.check(chain)
        header: JsonObject = {
            "chain": chain.name,
            "digest": digest_of(chain),
            "question": question,
            "models": {name: chat.name for name, chat in sorted(self.chats.items())},
            "memory": None if self.memory is None else self.memory.name,
            "bank": None if self.retriever is None else self.retriever.name,
        }
        with TraceFile(trace, header) as file:
            resumed = len(file.done)
            run = _Run(self, file, question)
            values = run.steps(chain.steps, {QUESTION: question}, "")
            answer = render(chain.answer_template, values, "answer")
        own = {step.name: values[step.name] for step in chain.steps}
        return ChainResult(answer, own, file.records, resumed)


class _Run:
    """One run of a chain."""

    def __init__(self, runner: ChainRunner, trace: TraceFile, question: str) -> None:
        self.runner, self.trace, self.question = runner, trace, question

    def steps(self, steps: Sequence[Step], known: Values, before: str) -> Values:
        """Do steps in order; returns what is known behind them. `before` is the path of the round they stand in."""
        values = dict(known)
        for step in in_order(steps):
            values[step.name] = self._step(step, values, f"{before}{step.name}")
        return values

    def _step(self, step: Step, values: Values, path: str) -> JsonValue:
        if path in self.trace.done:
            value: JsonValue = self.trace.done[path]["value"]
            return value
        start = time.perf_counter()
        with _told(path):
            if step.when is not None and not self._holds(step.when, values, path):
                record: JsonObject = {"skipped": True, "value": None}
            elif step.loop is not None:
                record = self._rounds(step.loop, values, path)
            else:
                record = self._work(step, values, path)
        done = {"step": path, **record, "seconds": round(time.perf_counter() - start, 6)}
        with _told(path):
            self.trace.add(done)
        found: JsonValue = done["value"]
        return found

    def _holds(self, condition: Condition, values: Values, path: str) -> bool:
        return holds(condition, look_up(parse_field(condition.field, path), values, path))

    # A loop -----------------------------------------------------------------------------------------------------------

    def _rounds(self, loop: Loop, known: Values, path: str) -> JsonObject:
        state: Values = {name: render(text, known, path) for name, text in loop.start.items()}
        items: list[JsonValue] | None = None
        if loop.over is not None:
            value = look_up(parse_field(loop.over, path), known, path)
            if value is not None and not isinstance(value, list):
                raise ChainError(f"`over` names {loop.over!r}, whose value is no list: {as_text(value)[:200]!r}")
            items = value or []
        results: list[str] = []
        ended = "at_most"
        for number in range(loop.at_most):
            if items is not None and number == len(items):
                ended = "over"
                break
            inside = {**known, **state} if items is None else {**known, **state, ITEM: items[number]}
            behind = self.steps(loop.steps, inside, f"{path}[{number}].")
            results.append(render(loop.result, behind, path))
            if loop.until is not None and self._holds(loop.until, behind, path):
                ended = "until"
                break
            state = {name: render(text, behind, path) for name, text in loop.next.items()}
        left = 0 if items is None else max(len(items) - loop.at_most, 0)
        if items is not None and ended == "at_most" and not left:
            ended = "over"
        value = {"last": results[-1] if results else "", "all": [*results]}
        return {"rounds": len(results), "ended": ended, "left_out": left, "value": value}

    # A step -----------------------------------------------------------------------------------------------------------

    def _work(self, step: Step, values: Values, path: str) -> JsonObject:
        record: JsonObject = {}
        found: list[Source] | None = None
        if step.retrieve is not None:
            found = self._retrieve(step.retrieve, values, path, record)
            if step.retrieve.max_tokens is not None:
                found, left = self._fit(step, step.retrieve.max_tokens, found)
                record["left_out"] = [source.key for source in left]
            record["sources"] = [source.to_dict() for source in found]
        shown = values if found is None else {**values, SOURCES: sources_text(found)}
        prompt = render(step.template, shown, path)
        if step.model is None:
            record |= {"prompt": prompt, "output": prompt}
            return {**record, "value": extract(prompt, step.extract, self.question)}
        if not prompt.strip():
            raise ChainError(
                "its prompt is empty once its fields are filled in; skip the step with `when` where they are"
            )
        if step.model == MEMORY:
            assert self.runner.memory is not None
            reading = self.runner.memory.read(prompt, found, step.max_new_tokens)
            record |= {"model": MEMORY, "prompt": prompt, "output": reading.text}
            record["sources"] = [source.to_dict() for source in reading.sources]
            return {**record, "value": extract(reading.text, step.extract, self.question)}
        system = None if step.system is None else render(step.system, values, path)
        return {**record, **self._chat(step, messages_of(prompt, system), path)}

    def _retrieve(self, retrieve: Retrieve, values: Values, path: str, record: JsonObject) -> list[Source]:
        assert self.runner.retriever is not None
        query = render(retrieve.query, values, path)
        if not query.strip():
            raise ChainError(
                "its query is empty once its fields are filled in; skip the step with `when` where they are"
            )
        filters = {
            name: [
                render(item, values, path) if isinstance(item, str) else item
                for item in (value if isinstance(value, list | tuple) else [value])
            ]
            for name, value in retrieve.filters.items()
        }
        record |= {"query": query, "mode": retrieve.mode, "k": retrieve.k, "filters": filters}
        return self.runner.retriever.retrieve(query, retrieve.mode, retrieve.k, filters)

    def _fit(self, step: Step, most: int, found: list[Source]) -> tuple[list[Source], list[Source]]:
        """The best sources whose texts fit, and the others."""
        chat = self.runner.chats[step.model or ""]
        kept = len(found)
        while kept and chat.count_tokens([Message("user", sources_text(found[:kept]))]) > most:
            kept -= 1
        return found[:kept], found[kept:]

    def _chat(self, step: Step, messages: list[Message], path: str) -> JsonObject:
        """Ask a chat model, and ask again for what is not the JSON asked for."""
        chat, form = self.runner.chats[step.model or ""], step.extract
        record: JsonObject = {"model": step.model, "prompt": as_json(messages)}
        attempts: list[JsonObject] = []
        while True:
            written = chat.complete(
                messages, step.max_new_tokens, schema=form.schema, temperature=step.temperature, seed=step.seed
            )
            try:
                value = extract(written.text, form, self.question)
            except AnswerError as error:
                problem = f"{error.problem}{' (cut: max_new_tokens is reached)' if written.cut else ''}"
                attempts.append({"output": written.text, "problem": problem})
                if len(attempts) > form.repairs:
                    times = "" if len(attempts) == 1 else f" after {len(attempts)} attempts"
                    raise StepError(
                        path,
                        f"its answer is not the JSON asked for{times}: {AnswerError(problem, written.text)}",
                        written.text,
                    ) from error
                messages = [
                    *messages,
                    Message("assistant", written.text),
                    Message("user", f"That is not the JSON asked for: {error.problem}. Answer with the JSON alone."),
                ]
                continue
            if attempts:
                record["attempts"] = attempts
            if written.cut:
                record["cut"] = True
            return {**record, "output": written.text, "value": value}


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Errors of a step, with its path."""
    try:
        yield
    except (StepError, TraceError):
        raise
    except (ValueError, RuntimeError, ImportError, EndpointError) as error:
        raise StepError(path, str(error)) from error
