"""Semantic chunking: documents cut where their subject changes, each chunk with the section it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...model.splitting_msa import split_text
from ...model.tokenizing_msa import tokenize_texts
from ...retrieval.embedders import Embedder

PARENT, SECTION, PART, SPAN = "parent", "section", "part", "section_parts"
_HEADING = re.compile(r"^(#{1,6})[ \t]+(\S.*)$", re.MULTILINE)
_END = re.compile(r"(?:[.!?][\"')\]]*|[\u3002\uff01\uff1f])(?=\s)\s+|\n\s*\n|(?<=[\u3002\uff01\uff1f])")
WINDOW = 2  # sentences on each side of a place that are compared
PARAGRAPH = 0.1  # of similarity: how much rather a chunk ends with a paragraph


def split_semantically(
    text: str, embedder: Embedder, tokenizer: PreTrainedTokenizerBase, limit: int, least: int | None = None
) -> list[str]:
    """Pieces that together are `text`, cut between sentences where those before and behind are least alike.

    Every place between two sentences has the cosine of the mean vectors of the two sentences before and the two behind
    it. A cut is worth making where this is more than a standard deviation below the mean of the text, and is made
    elsewhere only for the limit; the set of cuts that is best on the whole is taken. Of equally good ones, the one with
    fewer pieces. A sentence above the limit is cut by `split_text`.

    Args:
        text: to be cut.
        embedder: of sentences.
        tokenizer: a fast one, which counts.
        limit: most tokens of a piece.
        least: tokens that a piece has if it can. Default: a quarter of the limit.

    Raises:
        LimitTooSmall: where one character has more tokens than the limit.
        ValueError: for a limit below 1, or a `least` above it.
    """
    least = limit // 4 if least is None else least
    if type(limit) is not int or limit < 1 or type(least) is not int or not 0 <= least <= limit:
        raise ValueError(
            f"`limit` must be an integer of at least 1 and `least` from 0 to it, got {limit!r}, {least!r}."
        )
    sentences = [piece for sentence in _sentences(text) for piece in _small(sentence, tokenizer, limit) if piece]
    if len(sentences) < 2:
        return sentences
    counts = [len(ids) for ids in tokenize_texts(tokenizer, sentences)]
    costs = _cut_costs(sentences, embedder)
    pieces = ["".join(sentences[start:end]) for start, end in _best_cuts(counts, costs, limit, least)]
    # Sentences joined may have a token more than each had by itself.
    return [small for piece in pieces for small in _small(piece, tokenizer, limit)]


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for found in _END.finditer(text):
        if found.end() > start:
            yield text[start : found.end()]
            start = found.end()
    if start < len(text):
        yield text[start:]


def _small(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[str]:
    if len(tokenize_texts(tokenizer, [text])[0]) <= limit:
        return [text]
    return [piece for piece, _ in split_text(tokenizer, text, limit)]


def _cut_costs(sentences: Sequence[str], embedder: Embedder) -> list[float]:
    """The cost of a cut behind each sentence but the last; below 0 where it is worth making."""
    told = [place for place, sentence in enumerate(sentences) if sentence.strip()]
    if not told:
        return [0.0] * (len(sentences) - 1)
    found = embedder.embed_documents([sentences[place].strip() for place in told]).detach().float().cpu()
    vectors = torch.zeros(len(sentences), found.shape[1])  # of white space by itself: like nothing
    vectors[told] = torch.nn.functional.normalize(found, dim=-1)
    alike = torch.stack(
        [
            torch.cosine_similarity(
                _mean(vectors[max(place - WINDOW, 0) : place]), _mean(vectors[place : place + WINDOW]), dim=0
            )
            for place in range(1, len(vectors))
        ]
    ).double()
    threshold = alike.mean() - (alike.std(correction=0) if len(alike) > 1 else 0.0)
    paragraphs = torch.tensor(
        [PARAGRAPH * (sentence.count("\n") > 1) for sentence in sentences[:-1]], dtype=torch.double
    )
    return (alike - threshold - paragraphs).tolist()


def _mean(vectors: Tensor) -> Tensor:
    return vectors.mean(dim=0)


def _best_cuts(counts: Sequence[int], costs: Sequence[float], limit: int, least: int) -> list[tuple[int, int]]:
    """The runs of sentences that cost least: [first, end) of each, by dynamic programming."""
    size = len(counts)
    # Of the first `end` sentences: what they cost, in how many pieces, and where the last piece begins.
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for end in range(1, size + 1):
        tokens, found = 0, None
        for start in range(end - 1, -1, -1):
            tokens += counts[start]
            if tokens > limit and start < end - 1:
                break
            cost, pieces, _ = best[start]
            short = 1.0 if tokens < least else 0.0
            cut = costs[end - 1] if end < size else 0.0
            option = (cost + short + cut, pieces + 1, start)
            if found is None or option[:2] < found[:2]:
                found = option
        assert found is not None
        best.append(found)
    runs, end = [], size
    while end:
        start = best[end][2]
        runs.append((start, end))
        end = start
    return runs[::-1]


def chunk_document(
    key: str,
    text: str,
    embedder: Embedder,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    least: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A document as rows for a bank (`protocol.encode_corpus`, `BankStore.add`): chunks that know where they belong.

    Sections begin at the headings of Markdown (`# Title`); a document without any is one section. No chunk crosses a
    heading. All texts together are the document.

    Args:
        key: of the document; those of chunks are `key#0`, `key#1`, ...
        text: of the document.
        embedder, tokenizer, limit, least: as of `split_semantically`.
        metadata: of every chunk.

    Returns:
        rows with `key`, `text`, the metadata, and `parent` (the document's key), `section` (its headings, such as
        `"Guide > Install"`), `part` (the number of the chunk), `section_parts` (first and last number of the section).

    Raises:
        ValueError: where `metadata` has one of these names, or the document is empty.
    """
    taken = {"key", "text", PARENT, SECTION, PART, SPAN} & set(metadata or {})
    if taken:
        raise ValueError(f"`metadata` has {sorted(taken)[0]!r}, which chunks need for themselves; rename it.")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"Document {key!r} has no text.")
    rows: list[dict[str, Any]] = []
    blank = ""
    for title, body in _sections(text):
        # White space by itself is no chunk; it goes to the text behind it, or to the last one.
        pieces = [piece for piece in split_semantically(body, embedder, tokenizer, limit, least)]
        first, own = len(rows), []
        for piece in pieces:
            if piece.strip():
                own.append(blank + piece)
                blank = ""
            elif own:
                own[-1] += piece
            elif rows:
                rows[-1]["text"] += piece
            else:
                blank += piece
        for piece in own:
            place = {PARENT: key, SECTION: title, PART: len(rows), SPAN: [first, first + len(own) - 1]}
            rows.append({"key": f"{key}#{len(rows)}", "text": piece, **(metadata or {}), **place})
    return rows


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Titles with the headings above them, and the texts from each heading to the next."""
    headings: list[str] = []
    start, title = 0, ""
    for found in _HEADING.finditer(text):
        if found.start() > start:
            yield title, text[start : found.start()]
        depth = len(found[1])
        name = found[2].rstrip(" \t#") or found[2].strip()
        headings = [*headings[: depth - 1], *[""] * (depth - 1 - len(headings)), name]
        start, title = found.start(), " > ".join(filter(None, headings))
    yield title, text[start:]
