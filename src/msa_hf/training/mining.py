"""Wrong passages that look right: what a question's words find, and what the router itself takes for the answer.

Nothing counts as wrong that may well be right: the passage asked for, one that says nearly the same, or one that has
the question's words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bm25 import SELECTION, import_bm25s
from ..model.memory_msa import DenseLayer
from ..model.modeling_msa import MSAForCausalLM
from ..model.routing_msa import select_documents
from .contrastive import TokenRows, encode_rows, route_rows
from .pairs import words
from .progress import phase

SAME_SHARE = 0.6  # of the shorter text's pieces, from which on two texts say the same
COVERED_SHARE = 0.9  # of a question's words, from which on a passage may answer it
PIECE = 3  # words
# Tokens. A part of fewer takes a GPU as long, whose kernels are launched no faster; and what a part costs beside. As of
# models of some hundred million weights.
LEAST_PART, PART_COST = 65_536, 8_192
ROWS = (
    128  # of which a part has a multiple, so that few shapes occur, and what plans for each has planned for them soon
)
MULTIPLE = 8  # to which rows are padded
SCORES = 64_000_000  # numbers held at once while questions are scored on an accelerator; on a CPU a sixteenth


class TokenStore:
    """Token rows of different lengths, one behind the other, on the CPU.

    Args:
        rows: token ids, none of them empty.
    """

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        kept = [np.asarray(row, dtype=np.int32) for row in rows]
        self.lengths = np.asarray([len(row) for row in kept], dtype=np.int64)
        self.tokens = np.concatenate(kept) if kept else np.zeros(0, dtype=np.int32)
        self.starts = self.lengths.cumsum() - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, place: int) -> list[int]:
        start = int(self.starts[place])
        found: list[int] = self.tokens[start : start + int(self.lengths[place])].tolist()
        return found


def padded(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", multiple: int = MULTIPLE, skipped: int = 0
) -> TokenRows:
    """Rows padded to a multiple of a width, so that shapes are few; `skipped` as of `TokenRows`."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return TokenRows(ids.to(device), torch.tensor([len(row) for row in rows]).to(device), skipped)


def part_sizes(lengths: NDArray[np.int64], budget: int, multiple: int = MULTIPLE) -> list[int]:
    """Cut rows into parts with the least padding, unless these become so many or small that launching them costs more.

    Args:
        lengths: [N] int64, ascending.
        budget: padded tokens of a part, at most, but for one of a single row.
        multiple: to which the longest row of a part is padded.

    Returns:
        Rows of each part, in order; their sum is N.
    """
    widths = -(-lengths // multiple) * multiple
    ends, stops = [0], [*range(ROWS, len(widths), ROWS), len(widths)] if len(widths) else []
    for stop in stops:
        start, most = ends[-1], max(budget // max(int(widths[stop - 1]), 1), 1)
        ends += [*range(start + most, stop, most), stop]
    least, before = [0], [0]  # cost of the rows up to each end, and the place among `ends` where the last part begins
    for place in range(1, len(ends)):
        width = int(widths[ends[place] - 1])
        found: list[tuple[int, int]] = []
        for start in range(place - 1, -1, -1):
            tokens = (ends[place] - ends[start]) * width
            if found and tokens > budget:
                break
            found.append((least[start] + max(tokens, LEAST_PART) + PART_COST, start))
        cost, start = min(found)
        least.append(cost)
        before.append(start)
    sizes, place = [], len(ends) - 1
    while place:
        sizes.append(ends[place] - ends[before[place]])
        place = before[place]
    return sizes[::-1]


def in_parts(lengths: Sequence[int] | NDArray[np.int64], budget: int) -> Iterator[list[int]]:
    """Places by length, in parts of `part_sizes`."""
    found = np.asarray(lengths, dtype=np.int64)
    order = found.argsort(kind="stable")
    start = 0
    for size in part_sizes(found[order], budget):
        yield order[start : start + size].tolist()
        start += size


@dataclass(frozen=True)
class EncodedCorpus:
    """What the memory layers keep of passages; of the last layer, to which nothing attends while questions are routed,
    the routing keys alone.

    Attributes:
        layers: layer -> memory of all passages, in order.
        lengths: [N] int64 tokens of the passages, on the same device.
    """

    layers: dict[int, DenseLayer]
    lengths: Tensor


@torch.no_grad()
def encode_corpus(
    model: MSAForCausalLM,
    store: TokenStore,
    places: Sequence[int],
    part_tokens: int,
    done: Callable[[int], object] | None = None,
) -> EncodedCorpus:
    """Encode the passages at `places`, shortest first, and put them in the order of `places`.

    `done` is called with the number of passages that have been encoded since, part by part.
    """
    size, last, device = model.config.chunk_size, model.config.memory_layers[-1], model.device
    parts: dict[int, list[DenseLayer]] = {layer: [] for layer in model.config.memory_layers}
    owners = []
    lengths = store.lengths[np.asarray(places)]
    for part in in_parts(lengths, part_tokens):
        rows = padded([store.row(places[number]) for number in part], device)
        for layer, memory in encode_rows(model, rows).items():
            content = memory.pooled_kv[:, :, :0] if layer == last else memory.pooled_kv
            parts[layer].append(DenseLayer(memory.routing_keys, content))
        owners.append(torch.tensor(part, device=device).repeat_interleave((rows.lengths + size - 1) // size))
        if done is not None:
            done(len(part))
    order = torch.cat(owners).argsort(stable=True)
    layers = {
        layer: DenseLayer(
            torch.cat([part.routing_keys for part in found])[order],
            torch.cat([part.pooled_kv for part in found])[order],
        )
        for layer, found in parts.items()
    }
    return EncodedCorpus(layers, torch.from_numpy(lengths).to(device))


@torch.no_grad()
def best_passages(
    model: MSAForCausalLM,
    corpus: EncodedCorpus,
    questions: Sequence[Sequence[int]],
    count: int,
    skipped: int = 0,
    part_tokens: int | None = None,
    done: Callable[[int], object] | None = None,
) -> tuple[dict[int, NDArray[np.int64]], NDArray[np.int64]]:
    """Layer -> [Q, count] places in the corpus that it scores highest, best first; and those by the sum of layers.

    Args:
        model: with a memory.
        corpus: what is searched.
        questions: token ids.
        count: of the best places.
        skipped: tokens of every question that do not route, the first ones.
        part_tokens: of questions that run together, at most, padding included; None: as many as there are scores for.
        done: called with the number of questions that have been put since, part by part.
    """
    layers, total = list(corpus.layers), len(corpus.lengths)
    count = min(count, total)
    held = SCORES if model.device.type != "cpu" else SCORES // 16
    step = max(held // (total * len(layers)), 1)
    order = np.argsort([len(question) for question in questions], kind="stable")
    found = np.zeros((len(layers) + 1, len(questions), count), dtype=np.int64)
    start = 0
    while start < len(questions):
        places = order[start : start + step]
        if part_tokens is not None:  # the longest stands last
            places = places[: max(part_tokens // max(len(questions[places[-1]]), 1), 1)]
        start += len(places)
        rows = padded([questions[place] for place in places], model.device, skipped=skipped)
        scores = route_rows(model, rows, corpus.layers, corpus.lengths)
        every = [scores[layer] for layer in layers]
        for number, item in enumerate([*every, torch.stack(every).sum(0)]):
            found[number, places] = select_documents(item, count)[0].cpu().numpy()
        if done is not None:
            done(len(places))
    return dict(zip(layers, found[:-1], strict=True)), found[-1]


def recall_of(found: NDArray[np.int64], gold: Sequence[set[int]], count: int) -> float:
    """Share of the questions that have one of their passages among the first `count` found."""
    hits = [bool(wanted & set(row[:count].tolist())) for row, wanted in zip(found, gold, strict=True)]
    return sum(hits) / max(len(hits), 1)


class LexicalIndex:
    """Passages ranked by BM25.

    Args:
        texts: of all passages.

    Raises:
        ImportError: where bm25s is missing.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        bm25s = import_bm25s("Training without questions", "train")
        self.size, self.index = len(texts), bm25s.BM25()
        listed = []
        with phase("reading words", len(texts), "passages") as done:
            for text in texts:
                listed.append(words(text) or ["\0"])
                done(1)
        self.index.index(listed, show_progress=False)

    def best(self, questions: Sequence[str], count: int) -> NDArray[np.int64]:
        """[Q, count] places of passages, best first."""
        asked = [words(question) or ["\0"] for question in questions]
        found, _ = self.index.retrieve(asked, k=min(count, self.size), show_progress=False, backend_selection=SELECTION)
        return np.asarray(found)


class WrongPassages:
    """Judges which passages are wrong for a question.

    Args:
        texts: of all passages.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self._kept: dict[int, tuple[frozenset[str], frozenset[tuple[str, ...]]]] = {}

    def _of(self, place: int) -> tuple[frozenset[str], frozenset[tuple[str, ...]]]:
        if place not in self._kept:
            if len(self._kept) > 200_000:
                self._kept.clear()
            self._kept[place] = _words_and_pieces(self.texts[place])
        return self._kept[place]

    def choose(self, query: str, gold: set[int], candidates: Sequence[int], count: int) -> list[int]:
        """The first `count` of the candidates that are wrong."""
        asked = set(words(query))
        answers = [self._of(place)[1] for place in gold]
        found: list[int] = []
        for place in candidates:
            if len(found) == count:
                break
            if place in gold or place in found:
                continue
            has, pieces = self._of(place)
            if len(asked & has) >= COVERED_SHARE * len(asked) or any(_same(pieces, other) for other in answers):
                continue
            found.append(place)
        return found


def _words_and_pieces(text: str) -> tuple[frozenset[str], frozenset[tuple[str, ...]]]:
    listed = words(text)
    pieces = frozenset(tuple(listed[start : start + PIECE]) for start in range(max(len(listed) - PIECE + 1, 1)))
    return frozenset(listed), pieces


def _same(one: frozenset[Any], other: frozenset[Any]) -> bool:
    return len(one & other) >= SAME_SHARE * min(len(one), len(other))
