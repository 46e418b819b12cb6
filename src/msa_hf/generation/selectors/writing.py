"""Letting the model write which documents it wants to read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .selector import Asker, Selected, SelectionRound

if TYPE_CHECKING:
    from torch import Tensor

# Logits [n, vocabulary] and the questions that are still written for -> the next token of each of the n; None: it ends.
Choose = Callable[["Tensor", Collection[int]], list[int | None]]


def write_ids(asker: Asker, round: SelectionRound, choose: Choose) -> list[Selected]:
    """Write for every question of a round until a marker, a stop or `max_id_tokens`; the model forgets it after that.

    Args:
        choose: the next tokens.
    """
    protocol = asker.protocol

    def text_of(tokens: list[int]) -> str:
        return asker.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    written: list[list[int]] = [[] for _ in round.asked]
    writing = set(range(len(written)))
    logits = round.logits
    for step in range(asker.max_id_tokens):
        if step:
            logits = round.step([tokens[-1] if tokens else round.pad_id for tokens in written])
        tokens = choose(logits, frozenset(writing))
        for row in sorted(writing):
            token = tokens[row]
            if token is None:
                writing.discard(row)
                continue
            written[row].append(token)
            text = text_of(written[row])
            if protocol.ids_end in text or protocol.retrieval_end in text:
                writing.discard(row)
            elif token in round.stops:
                written[row].pop()
                writing.discard(row)
        if not writing:
            break
    round.rewind()
    selected = []
    for tokens_written in written:
        text = text_of(tokens_written)
        ids, marker = protocol.named_ids(text)
        selected.append(Selected(ids, marker == protocol.retrieval_end, tokens_written, text))
    return selected
