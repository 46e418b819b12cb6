"""Questions about a user's passages, asked by a model that has learned to ask (`question_generation`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..model.tokenizing_msa import tokenize, tokenize_texts
from .question_generation import by_length, sample_questions
from .router_settings import RouterSettings
from .settings import SettingError

ASKED_FILE = "asked_questions.json"
TAGS = ("\nQuery:", "\nQuestion:")  # as the model was taught to ask: a search query, and a question
SAME_LENGTH = 8  # passages are cut to a multiple of so many tokens, so that many have the same
MOST_ASKED = 50_000  # passages that are asked about
BATCH_TOKENS = {"cuda": 200_000, "cpu": 4_096}


def ask_about(
    settings: RouterSettings, output: Path, texts: Sequence[str], held_out: set[int], device: torch.device
) -> dict[int, list[str]]:
    """Place of a passage -> questions about it, of the model that `settings.ask` names; none where it names none.

    They are kept in the output directory, where an interrupted run finds them again.

    Raises:
        SettingError: for what is no causal LM with a tokenizer that has both kinds of tags in as many tokens.
    """
    if settings.ask is None:
        return {}
    path = output / ASKED_FILE
    if settings.resume and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {int(place): questions for place, questions in kept.items()}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.ask)
        model = AutoModelForCausalLM.from_pretrained(settings.ask, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise SettingError("ask", "{} {}: {}", settings.ask, error) from None
    tags = [tokenize(tokenizer, tag) for tag in TAGS]
    end = tokenizer.eos_token_id
    if end is None or len({len(tag) for tag in tags}) > 1:
        raise SettingError("ask", "{} {}: its tokenizer has no end of a text, or tags of two lengths", settings.ask)
    torch.manual_seed(settings.seed)
    rows = {}
    for place, ids in enumerate(tokenize_texts(tokenizer, texts)):
        length = min(len(ids), settings.max_length) // SAME_LENGTH * SAME_LENGTH
        if place not in held_out and length:
            rows[place] = ids[:length]
    places = list(rows)
    lengths = torch.tensor([len(rows[place]) for place in places])
    found: dict[int, list[str]] = {}
    budget = BATCH_TOKENS["cpu" if device.type == "cpu" else "cuda"]
    for batch in by_length(lengths, budget, 2_048):
        chosen = [places[number] for number in batch.tolist()]
        passages = torch.tensor([rows[place] for place in chosen]).to(device)
        for place, questions in zip(chosen, sample_questions(model, passages, tags, end).tolist(), strict=True):
            texts_of = [tokenizer.decode(row[: row.index(end)]).strip() for row in questions if end in row]
            if kept_ones := list(dict.fromkeys(text for text in texts_of if len(text.split()) > 1)):
                found[place] = kept_ones
        if len(found) >= MOST_ASKED:
            break
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    os.replace(new, path)
    return found
