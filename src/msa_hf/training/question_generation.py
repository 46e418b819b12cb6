"""Questions for documents that have none, written by the base model itself.

A model that was shown passages with their questions (`question_rows`) writes others for further passages
(`sample_questions`): pairs to train routers with, from the documents alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.questions import IGNORED
from ..model.compat_msa import CACHE, cache_of


def question_row(
    passage: Sequence[int], tag: Sequence[int], question: Sequence[int], end: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example: the passage, the tag that asks for a question, the question and its end."""
    given = [*passage, *tag]
    written = [*question, end]
    return [*given, *written], [IGNORED] * len(given) + written


def by_length(lengths: Tensor, batch_tokens: int, largest: int) -> Iterator[Tensor]:
    """Batches of places of documents of equal length, which need neither padding nor a mask, in random order.

    Args:
        lengths: [N] int64.
        batch_tokens: tokens of a batch at most, but for single documents.
        largest: documents of a batch at most.
    """
    order = lengths.argsort(stable=True)
    batches: list[Tensor] = []
    for group in order.split(torch.unique_consecutive(lengths[order], return_counts=True)[1].tolist()):
        group = group[torch.randperm(len(group))]
        batches += group.split(max(min(batch_tokens // max(int(lengths[group[0]]), 1), largest), 1))
    for place in torch.randperm(len(batches)).tolist():
        yield batches[place]


@torch.no_grad()
def sample_questions(
    model: Any, passages: Tensor, tags: Sequence[Sequence[int]], end: int, max_tokens: int = 24, top_p: float = 0.9
) -> Tensor:
    """One question per passage and tag; the passages are read once.

    Args:
        model: a causal LM of transformers.
        passages: [N, L] int64, without padding.
        tags: token ids that ask for a kind of question, all of one length.
        end: the token that ends a question.
        max_tokens: of a question.
        top_p: mass of the tokens that are sampled from.

    Returns:
        [N, len(tags), max_tokens] int64 token ids, `end` from the end on. A question without an end fills its row.
    """
    count, kinds = passages.shape[0], len(tags)
    output = model(input_ids=passages, use_cache=True, logits_to_keep=1)
    cache = cache_of(output)
    if cache is None:
        raise ValueError("The model returned no cache of what it read; questions cannot be sampled from it.")
    cache.batch_repeat_interleave(kinds)
    ids = torch.tensor([list(tag) for tag in tags], device=passages.device).repeat(count, 1)
    found = torch.full((count * kinds, max_tokens), end, dtype=torch.long, device=passages.device)
    done = torch.zeros(count * kinds, dtype=torch.bool, device=passages.device)
    for place in range(max_tokens):
        logits = model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
        drawn = _nucleus(logits.float(), top_p)
        drawn = drawn.masked_fill(done, end)
        found[:, place] = drawn
        done |= drawn == end
        if place % 4 == 3 and bool(done.all()):
            break
        ids = drawn[:, None]
    return found.view(count, kinds, max_tokens)


def _nucleus(logits: Tensor, top_p: float, most: int = 64) -> Tensor:
    """[N, V] -> [N] tokens, drawn from the smallest set among the `most` likeliest that has `top_p` of their mass."""
    values, tokens = logits.topk(min(most, logits.shape[1]), dim=1)
    shares = values.softmax(1)
    kept = shares.cumsum(1) - shares < top_p
    place = torch.multinomial(shares * kept, 1)
    return tokens.gather(1, place).squeeze(1)
