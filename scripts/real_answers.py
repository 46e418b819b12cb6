"""Answers that the reader of `train_real.py` and `eval_real.py` gives to questions that stand before texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from real_data import sets_among
from real_model import PROTOCOL
from transformers import AutoTokenizer

from msa_hf.evaluation import exact_match
from msa_hf.generation import PromptProtocol

PromptRow = tuple[int, tuple[int, ...], list[int]]  # number of a question, places that are read, tokens
READ = 3  # texts put before the reader
READ_SETS = ("nq", "squad11", "squadshifts_newwiki")


def prompt_row(number: int, question: str, places: Sequence[int], texts: Sequence[str], tokenizer: Any) -> PromptRow:
    """What is read before a question is answered; passages are numbered by their place in the bank."""
    rounds = [[(place, texts[place]) for place in places]] if places else []
    segments = PROTOCOL.transcript(tokenizer, question, rounds, closed=True)
    return number, tuple(places), PromptProtocol.join(segments)[0]


def answers_to(
    rows: Sequence[PromptRow], model: Any, tokenizer: Any, batch: int, batch_tokens: int, **options: Any
) -> dict[tuple[int, tuple[int, ...]], str]:
    """Number of a question and the places that were read -> the answer.

    Args:
        batch, batch_tokens: prompts, and padded tokens of prompts, at a time.
        options: of `generate`, which is greedy otherwise.
    """
    rows = sorted(rows, key=lambda row: len(row[2]))
    end = tokenizer.convert_tokens_to_ids(PROTOCOL.answer_end)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": end, "pad_token_id": end, **options}
    found = {}
    while rows:
        size = max(min(batch, batch_tokens // len(rows[-1][2])), 1)
        some, rows = rows[-size:], rows[:-size]
        width = len(some[-1][2])
        ids = torch.tensor([[end] * (width - len(row)) + row for _, _, row in some], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for _, _, row in some], device=model.device)
        made = model.generate(input_ids=ids, attention_mask=mask, **options)
        for (number, places, _), text in zip(some, tokenizer.batch_decode(made[:, width:]), strict=True):
            found[number, places] = PROTOCOL.answer_text(text)
    return found


def holding_place(places: Sequence[int], answers: Sequence[str], texts: Sequence[str]) -> int:
    """The first passage of a document that holds an answer; the first of all, if none does."""
    wanted = [answer.lower() for answer in answers if answer.strip()]
    return next((place for place in places if any(answer in texts[place].lower() for answer in wanted)), places[0])


@torch.no_grad()
def gold_text_answers(
    model: Any, base: str, questions: Sequence[dict[str, Any]], texts: Sequence[str], limit: int, **limits: int
) -> dict[str, float]:
    """Set -> exact match of its first `limit` questions that have an answer, from a passage that holds it.

    Args:
        base: whose tokenizer it is.
        limits: `batch` and `batch_tokens` of `answers_to`.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = {}
    graded = [number for number, item in enumerate(questions) if any(map(str.strip, item["answers"]))]
    for kind in sets_among({questions[number]["set"] for number in graded}, READ_SETS):
        numbers = [number for number in graded if questions[number]["set"] == kind][:limit]
        rows = []
        for number in numbers:
            item = questions[number]
            gold = [holding_place(group, item["answers"], texts) for group in item["wanted"]]
            rows.append(prompt_row(number, item["question"], gold[:READ], texts, tokenizer))
        answered = answers_to(rows, model, tokenizer, **limits)
        right = [any(exact_match(answered[row[:2]], wanted) for wanted in questions[row[0]]["answers"]) for row in rows]
        found[kind] = sum(right) / len(right)
    return found
