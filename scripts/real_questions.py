"""A stage of `train_real.py`: the base learns to ask questions about passages, and asks about the further text.

It names the answer first and asks for that, so that what it writes also teaches to read (`real_reading.py`).
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from real_rows import Flat, device, load, log, save, source_names, tokenized
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from msa_hf.training.compiling import compiled_layers
from msa_hf.training.question_generation import by_length, question_row, sample_questions
from msa_hf.training.weights import TrainedWeights, linear_ranks

LONGEST_PASSAGE = 256  # tokens
SAME_LENGTH = 8  # passages that questions are asked about are cut to a multiple of so many tokens
TAGS = ("\nQuery:", "\nQuestion:")  # search queries, and questions asked with the passage in view
UNASKED = ("multihop", "needles")  # sets of questions that no passage alone leads to, or that nobody asks
SEARCHED = ("nq",)  # sets of search queries
BETWEEN = " |"  # an answer and its question
LONGEST_ANSWER = 12  # tokens
LONGEST_WRITTEN = 40  # tokens of an answer and its question


def questions(arguments: argparse.Namespace) -> None:
    """Teach the base to ask, and have it ask about the passages of the parts, until the time is up."""
    start, work, where = time.time(), Path(arguments.work), device()
    torch.manual_seed(arguments.shard)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).to(where)
    tags = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in TAGS]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    data = load(work / "sets.pt")
    named = [next(filter(str.strip, item["answers"]), "") for item in data["train"]["questions"]]
    answers = [
        tokenizer(first_line(text) + BETWEEN, add_special_tokens=False)["input_ids"] if text else [] for text in named
    ]
    ranks = linear_ranks(model, dict.fromkeys(range(model.config.num_hidden_layers), 64))
    weights = TrainedWeights(model, ranks)
    learn_to_ask(arguments, model, weights, data, answers, tags, end, where)
    log("taught to ask in", round(time.time() - start), "s")

    names = source_names(arguments.parts)[1:]
    loaded = [load(work / f"{name}.pt") for name in names]
    counts = torch.tensor([len(item["lengths"]) for item in loaded])
    flat = Flat.joined([Flat(item["tokens"], item["lengths"]) for item in loaded]).to(where)
    # Cut to few lengths, so that many passages have the same.
    shortened = flat.lengths.clamp(max=LONGEST_PASSAGE) // SAME_LENGTH * SAME_LENGTH
    usable = (shortened >= 3 * SAME_LENGTH).nonzero().squeeze(1)[arguments.shard :: arguments.shards]
    made: list[Tensor] = []
    lengths: list[Tensor] = []
    places: list[Tensor] = []
    until, asked = time.time() + 60 * arguments.minutes, 0
    for batch in by_length(shortened[usable], arguments.batch_tokens, arguments.largest):
        chosen = usable[batch]
        within = torch.arange(int(shortened[chosen[0]]), device=where)
        rows = sample_questions(
            model, flat.tokens[flat.starts[chosen][:, None] + within].long(), tags, end, LONGEST_WRITTEN
        )
        count = (rows != end).sum(2)
        good = (count < rows.shape[2]) & (count > 2)
        for kind in range(len(tags)):
            kept = good[:, kind]
            taken = rows[:, kind][kept]
            made.append(taken[taken != end].int().cpu())
            lengths.append(count[:, kind][kept].cpu())
            places.append(chosen[kept].cpu())
        asked += len(batch)
        if time.time() > until:
            break
    log(
        "asked about",
        asked,
        "of",
        len(usable),
        "passages;",
        sum(map(len, lengths)),
        "questions;",
        round(time.time() - start),
        "s",
    )
    written = [text for part, sizes in zip(made, lengths, strict=True) for text in decoded(tokenizer, part, sizes)]
    pairs = [text.partition(BETWEEN.strip())[::2] for text in written]
    whole = [number for number, (answer, question) in enumerate(pairs) if answer.strip() and question.strip()]
    if not whole:
        raise SystemExit(
            f"The base asked no whole question with an answer about {asked} passages: it takes more labeled questions "
            "to learn from, or more --ask-steps."
        )
    places_of = torch.cat(places)
    sources = torch.bucketize(places_of, counts.cumsum(0), right=True)
    within_source = places_of - torch.nn.functional.pad(counts.cumsum(0), (1, 0))[sources]
    answers_of, texts = ([pairs[number][part].strip() for number in whole] for part in (0, 1))
    again = tokenized(tokenizer, [text + "\n" for text in texts])
    save(
        work / f"asked{arguments.shard}.pt",
        {
            "tokens": again.tokens,
            "lengths": again.lengths,
            "texts": texts,
            "answers": answers_of,
            "places": within_source[whole],
            "sources": sources[whole],
            "names": names,
        },
    )
    log("asked", len(texts), "questions;", "for example:")
    for place in random.Random(0).sample(range(len(texts)), min(12, len(texts))):
        log("   ", texts[place], "->", answers_of[place])


def decoded(tokenizer: Any, tokens: Tensor, lengths: Tensor) -> list[str]:
    """The texts of rows that stand one behind the other."""
    return tokenizer.batch_decode([row.tolist() for row in tokens.split(lengths.tolist())])


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0].replace(BETWEEN.strip(), " ")


def learn_to_ask(
    arguments: argparse.Namespace,
    model: Any,
    weights: TrainedWeights,
    data: dict[str, Any],
    answers: list[list[int]],
    tags: Any,
    end: int,
    where: Any,
) -> None:
    train, passages = data["train"], Flat(data["tokens"], data["lengths"])
    question_tokens = Flat(train["tokens"], train["lengths"])
    pick = random.Random(arguments.shard)
    rows = []
    for number, question in enumerate(train["questions"]):
        if question["set"] in UNASKED or not 0 < len(answers[number]) <= LONGEST_ANSWER:
            continue
        searched = question["set"] in SEARCHED
        place = pick.choice(question["wanted"][0])
        first, length = int(question_tokens.starts[number]), int(question_tokens.lengths[number])
        # The question without its line break.
        written = [*answers[number], *question_tokens.tokens[first : first + length - 1].tolist()]
        first = int(passages.starts[place])
        passage = passages.tokens[first : first + int(passages.lengths[place])].tolist()
        rows += [question_row(passage, tags[0 if searched else 1], written, end)] * (4 if searched else 1)
    pick.shuffle(rows)
    batch = arguments.ask_batch
    steps = min(len(rows) // batch, arguments.ask_steps)
    # Rows of like length together, in random order.
    kept = sorted(rows[: steps * batch], key=lambda row: len(row[0]))
    batches = [kept[start : start + batch] for start in range(0, len(kept), batch)]
    pick.shuffle(batches)
    optimizer = torch.optim.AdamW(
        weights.low_rank_parameters(), lr=arguments.ask_rate, betas=(0.9, 0.99), weight_decay=0
    )
    head = model.get_output_embeddings()
    with compiled_layers(model) if arguments.compile else nullcontext():
        for step, chosen in enumerate(batches):
            rate = arguments.ask_rate * min((step + 1) / 10, 1.0) * (1 - step / len(batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            width = -(-max(len(ids) for ids, _ in chosen) // 8) * 8
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen]).to(where)
            labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in chosen]).to(where)
            weights.write()
            states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            wanted = labels[:, 1:] != -100
            logits = head(states[:, :-1][wanted])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])
            loss.backward()
            weights.take_gradients()
            torch.nn.utils.clip_grad_norm_(weights.low_rank_parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0 or step + 1 == len(batches):
                log("asking: step", step, "of", len(batches), "loss", round(float(loss.detach()), 3))
    weights.write()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
