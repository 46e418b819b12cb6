"""Splitting: cutting a long text where a paragraph, line, sentence or word ends."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from .tokenizing_msa import token_spans, tokenize

# Where a text may be cut, best first; looked for in the last quarter of what fits.
BOUNDARIES = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"[.!?][\"')\]]*\s|[。！？]"),
    re.compile(r"\s"),
)
SECTION = 1_000_000  # characters whose tokens are held at a time: some hundred bytes each


class LimitTooSmall(ValueError):
    """The limit leaves no room for a single character."""


def split_text(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: int, add_special_tokens: bool = False
) -> Iterator[tuple[str, list[int]]]:
    """Pieces that together are `text`, each with its token ids.

    The tokens of the whole say where to cut, those of a section at a time where it is very long; each piece is then
    tokenized by itself.

    Args:
        tokenizer: a fast tokenizer, which knows where its tokens lie in the text.
        text: what to split.
        limit: most tokens of a piece, special ones included.
        add_special_tokens: whether the tokenizer adds its own to every piece.

    Raises:
        LimitTooSmall: where one character has more tokens than the limit.
    """
    start, length = 0, SECTION
    while start + length < len(text):
        begun = start
        pieces = _split_section(tokenizer, text[start : start + length], limit, add_special_tokens)
        # The last piece ends where the section does, so the next one begins with it; of a single piece, more is needed.
        for piece, _ in pairwise(pieces):
            yield piece
            start += len(piece[0])
        length = SECTION if start > begun else 2 * length
    yield from _split_section(tokenizer, text[start:], limit, add_special_tokens)


def _split_section(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: int, add_special_tokens: bool
) -> Iterator[tuple[str, list[int]]]:
    """The pieces of `split_text`, of a text whose tokens fit in memory."""

    def tokens(piece: str) -> list[int]:
        return tokenize(tokenizer, piece, add_special_tokens)

    spans = token_spans(tokenizer, text)
    starts = [first for first, _ in spans]
    special = len(tokens(""))
    room = limit - special
    start = token = 0
    while start < len(text):
        if room < 1:
            raise LimitTooSmall(f"a limit of {limit} tokens is too small")
        end = len(text)
        if token + room < len(spans):
            end = _boundary(text, start, spans[token][1], max(starts[token + room], start + 1))
        # A text cut out may have more tokens than it had inside the whole.
        while len(piece := tokens(text[start:end])) > limit:
            end = start + (end - start) * 15 // 16
        if end == start or len(piece) == special:
            raise LimitTooSmall(f"a limit of {limit} tokens is too small")
        yield text[start:end], piece
        start, token = end, bisect_left(starts, end)


def _boundary(text: str, start: int, least: int, most: int) -> int:
    """Where to end the piece of `text` from `start`: at the best boundary in the last quarter before `most`."""
    least = max(start + (most - start) * 3 // 4, least)
    for boundary in BOUNDARIES:
        # One character further: white space behind `most` makes a boundary there.
        ends = [match.end() for match in boundary.finditer(text, start, most + 1) if match.end() >= least]
        if ends:
            return min(ends[-1], most)
    return most
