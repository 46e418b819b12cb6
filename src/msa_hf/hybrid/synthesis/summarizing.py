"""Summaries of long documents: each part is summed up by itself, and the parts' summaries are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from tqdm import tqdm

from ..chains.template import render
from ..chat.chat_model import ChatModel, Message, messages_of
from .budget import Budget, BudgetError, Spending, pack
from .extracting import sentences_of
from .findings import Finding
from .synthesizing import Synthesis, Synthesizer

_Fits = Callable[[str], bool]  # whether a text fits into a prompt

PART_PROMPT = """Sum up this part of a document in a few sentences{focus}. Use nothing else.

{text}"""
TASK = "Sum up the document whose parts are summed up below{focus}."


def summarize(
    document: str | Sequence[Mapping[str, object]],
    chat: ChatModel,
    budget: Budget | None = None,
    *,
    focus: str = "",
    strategy: str = "map_reduce",
    on_unknown: str = "mark",
    show_progress: bool = False,
) -> Synthesis:
    """A summary with citations of the parts.

    Args:
        document: a text, which is cut between sentences into parts `part-1`, `part-2`, ... that fit; or its parts, each
            with `key` and `text`, as `chunk_document` makes them.
        chat: that reads and writes.
        budget: of every prompt and answer, and of all calls together.
        focus: of interest above all.
        strategy, on_unknown: as of `Synthesizer`.
        show_progress: a bar over the parts.

    Returns:
        a synthesis whose findings are the summaries of the parts.

    Raises:
        BudgetError: where the budget is too small.
        ValueError: for a document without text.
    """
    if not isinstance(focus, str):
        raise ValueError(f"`focus` must be a text, got {focus!r}.")
    about = f", above all of {focus.strip()}" if focus.strip() else ""
    spending = Spending(chat, budget or Budget())

    def prompt(text: str) -> list[Message]:
        return messages_of(render(PART_PROMPT, {"focus": about, "text": text}, "prompt"))

    parts = list(_parts(document, lambda text: spending.fits(prompt(text))))
    if not parts:
        raise ValueError("The document has no text.")
    findings = []
    for key, text in tqdm(parts, "Summing up", unit="part", disable=not show_progress):
        written = spending.complete(prompt(text)).text.strip()
        if written:
            findings.append(Finding(f"summary of {key}", written, "", key, quoted=False))
    writer = Synthesizer(chat, spending.budget, strategy, on_unknown, conflicts=False)
    return writer.synthesize(render(TASK, {"focus": about}, "task"), findings, spending)


def _parts(document: str | Sequence[Mapping[str, object]], fits: _Fits) -> Iterator[tuple[str, str]]:
    """Keys and texts that fit, in order."""
    if isinstance(document, str):
        for number, run in enumerate(_runs(document, fits), 1):
            yield f"part-{number}", run
        return
    for place, row in enumerate(document):
        key, text = row.get("key"), row.get("text")
        if not isinstance(key, str) or not key or not isinstance(text, str):
            raise ValueError(f"Part {place} needs a key and a text, got {key!r} and {text!r}.")
        for run in _runs(text, fits):
            yield key, run


def _runs(text: str, fits: _Fits) -> list[str]:
    pieces = [piece for sentence in sentences_of(text) for piece in _halved(sentence, fits)]
    return [" ".join(run) for run in pack(pieces, lambda run: fits(" ".join(run)))]


def _halved(text: str, fits: _Fits) -> Iterator[str]:
    """A sentence, in halves as long as it does not fit."""
    if fits(text):
        yield text
        return
    words = text.split(" ")
    if len(words) > 1:
        halves = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
    elif len(text) > 1:
        halves = [text[: len(text) // 2], text[len(text) // 2 :]]
    else:
        raise BudgetError("`prompt_tokens` has no room for a single character beside the instructions; raise it.")
    for half in halves:
        if half.strip():
            yield from _halved(half, fits)
