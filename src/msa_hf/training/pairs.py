"""Questions that documents answer, made of the documents themselves: no labels, no other model.

A sentence taken out of its passage asks for the passage; so do a title, a heading, a piece of a sentence, and a few of
the rarer words. None of them is a question as people ask it, but a router that finds passages by them finds passages by
what they are about.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..model.splitting_msa import LimitTooSmall, split_text
from ..model.tokenizing_msa import tokenize_texts
from .progress import phase

KINDS = ("sentence", "first", "part", "keywords", "heading", "title")
# Of the pairs of a passage that is asked for once.
SHARES = {"sentence": 0.3, "first": 0.15, "part": 0.25, "keywords": 0.2, "heading": 0.05, "title": 0.05}
# Share of the pairs whose positive is the passage without the words that ask for it.
TAKEN_OUT = {"sentence": 0.8, "first": 0.8, "part": 0.5, "keywords": 0.0, "heading": 0.8, "title": 0.5}
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
SENTENCE = re.compile(r"[^\n]+?(?:[.!?][\"')\]]*(?=\s)|[。！？]|(?=\n)|$)", re.M)
HEADING = re.compile(r"^(?:#{1,6}[ \t]+(?P<marked>\S.*?)[ \t#]*|(?P<bare>[^\W\d_][^\n.!?:;,]{2,70}))$(?=\n)", re.M)
LONGEST_QUERY = 40  # words
LEAST_LEFT = 4  # words of a passage that something was taken out of
BATCH = 1_000
LONG = 100  # characters to a token of the limit, from which on a text is cut without being counted first


def words(text: str) -> list[str]:
    """The words of a text in lower case; of scripts without spaces, its characters."""
    return WORD.findall(text.casefold())


@dataclass(frozen=True)
class Passage:
    """A stretch of a document, short enough to be encoded as one.

    Attributes:
        text: of the passage.
        document: number of its document.
        title: of the document; empty where it has none.
    """

    text: str
    document: int
    title: str = ""


@dataclass(frozen=True)
class Pair:
    """A question and the passage that it asks for.

    Attributes:
        query: the question.
        kind: one of `KINDS`.
        text: the passage as it is to be found: without the question's words where they were taken out.
    """

    query: str
    kind: str
    text: str


def cut_passages(
    documents: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    titles: Mapping[str, str] | None = None,
) -> tuple[list[Passage], list[tuple[int, int]]]:
    """Passages of at most `limit` tokens, in order, and those left out because they occurred before.

    Of each passage left out: the number of its document, and the place of the passage that says the same.

    Args:
        documents: key -> text.
        tokenizer: whose tokens count; a fast one where a document has to be cut.
        limit: tokens of a passage.
        titles: key -> title; default the first line, if it looks like a heading.

    Raises:
        ValueError: for a limit without room for a character.
    """
    found: list[Passage] = []
    seen: dict[int, int] = {}
    repeated: list[tuple[int, int]] = []
    keys = list(documents)
    with phase("cutting documents", sum(map(len, documents.values())), "characters") as done:
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            texts = [documents[key] for key in some]
            fits = _fit(tokenizer, texts, limit)
            for number, (key, text, whole) in enumerate(zip(some, texts, fits, strict=True), start):
                title = (titles or {}).get(key) or first_heading(text)
                try:
                    for piece in [text] if whole else (piece for piece, _ in split_text(tokenizer, text, limit)):
                        done(len(piece))
                        if not (piece := piece.strip()):
                            continue
                        same = hash(tuple(words(piece)) or piece)
                        if same in seen:
                            repeated.append((number, seen[same]))
                        else:
                            seen[same] = len(found)
                            found.append(Passage(piece, number, title))
                except LimitTooSmall as error:
                    raise ValueError(f"Document {key!r} cannot be cut: {error}.") from None
    return found, repeated


def _fit(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[bool]:
    """Tell of each text whether it has no more tokens than the limit; a very long one is not counted for that."""
    asked = [text for text in texts if len(text) <= LONG * limit]
    lengths = iter([len(ids) for ids in tokenize_texts(tokenizer, asked)])
    return [len(text) <= LONG * limit and next(lengths) <= limit for text in texts]


def first_heading(text: str) -> str:
    """The heading that a text begins with; empty where it begins otherwise."""
    text = text.lstrip()
    found = HEADING.match(text)
    return "" if found is None else _heading_of(found)


def _heading_of(found: re.Match[str]) -> str:
    return (found["marked"] or found["bare"]).strip()


class Frequencies:
    """In how many texts words occur.

    Args:
        texts: all of them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = 0
        self.counts: Counter[str] = Counter()
        for text in texts:
            self.texts += 1
            self.counts.update(set(words(text)))

    def rarity(self, word: str) -> float:
        """The logarithm of one over the share of texts with a word."""
        return math.log((1 + self.texts) / (0.5 + self.counts[word]))

    def rare_words(self, text: str, count: int) -> list[str]:
        """The words that tell a text from others, best first: rare, and often in it; those of one letter count little.

        Words of no other text are typing errors and numbers as often as names, so they stand behind those of two.
        """
        inside = Counter(words(text))
        value = {
            word: self.rarity(word) * (1 + math.log(times)) * min(len(word), 4) / (1 + (self.counts[word] < 2))
            for word, times in inside.items()
        }
        return sorted(value, key=lambda word: (-value[word], word))[:count]


class PairMaker:
    """Makes the pairs of a passage, the same ones for the same turn.

    Args:
        passages: all of the corpus.
        seed: of what is chosen at random.
        frequencies: of words in the passages; default counted here.
    """

    def __init__(self, passages: Sequence[Passage], seed: int = 0, frequencies: Frequencies | None = None) -> None:
        self.passages, self.seed = passages, seed
        self.frequencies = Frequencies(passage.text for passage in passages) if frequencies is None else frequencies
        # What several documents say asks for none of them.
        said: dict[int, int] = {}
        self.repeated: set[int] = set()
        with phase("reading sentences", len(passages), "passages") as done:
            for passage in passages:
                lines = [*_sentences(passage.text), *_headings(passage.text), passage.title]
                for line in map(_key, lines):
                    if said.setdefault(line, passage.document) != passage.document:
                        self.repeated.add(line)
                done(1)

    def of(self, number: int, turn: int = 0) -> list[Pair]:
        """A pair of every kind that a passage has, each question once; none where it has too few words.

        Args:
            number: of the passage.
            turn: others are made in another.
        """
        pick = random.Random(f"{self.seed}, passage {number}, {turn}")
        found: dict[int, Pair] = {}
        for kind in KINDS:
            pair = self._make(kind, self.passages[number], pick)
            if pair is not None:
                found.setdefault(_key(pair.query), pair)
        return list(found.values())

    def one(self, number: int, turn: int = 0) -> Pair | None:
        """A pair of a passage, of a kind drawn by `SHARES`, in a sixth of the time; None where it has too few words."""
        pick = random.Random(f"{self.seed}, one of passage {number}, {turn}")
        for kind in sorted(KINDS, key=lambda kind: pick.random() ** (1 / SHARES[kind]), reverse=True):
            pair = self._make(kind, self.passages[number], pick)
            if pair is not None:
                return pair
        return None

    def _make(self, kind: str, passage: Passage, pick: random.Random) -> Pair | None:
        if kind == "title":
            made = self._of_title(passage, pick)
        elif kind == "heading":
            made = self._of_heading(passage.text, pick)
        elif kind == "keywords":
            made = self._of_keywords(passage.text, pick)
        else:
            made = self._of_sentence(kind, passage.text, pick)
        if made is None or not made.query or _key(made.query) in self.repeated or len(words(made.text)) < LEAST_LEFT:
            return None
        return made

    def _of_sentence(self, kind: str, text: str, pick: random.Random) -> Pair | None:
        spans = [found.span() for found in SENTENCE.finditer(text)]
        spans = [(first, last) for first, last in spans if 3 <= len(words(text[first:last])) <= LONGEST_QUERY]
        if not spans or (kind == "first" and len(spans) == 1):
            return None
        if kind == "first":
            return self._pair(kind, text, *spans[0], pick)
        if kind == "sentence":
            return self._pair(kind, text, *pick.choice(spans[1:] or spans), pick)
        span = pick.choice(spans)
        piece = self._piece(text[slice(*span)], pick)
        return self._pair(kind, text, *span, pick, piece) if piece else None

    def _of_keywords(self, text: str, pick: random.Random) -> Pair | None:
        rare = self.frequencies.rare_words(text, 10)
        if len(rare) < 2:
            return None
        return Pair(" ".join(pick.sample(rare, min(pick.randint(2, 5), len(rare)))), "keywords", text)

    def _of_heading(self, text: str, pick: random.Random) -> Pair | None:
        headings = list(HEADING.finditer(text))
        if not headings:
            return None
        found = pick.choice(headings)
        return self._pair("heading", text, *found.span(), pick, _heading_of(found))

    @staticmethod
    def _of_title(passage: Passage, pick: random.Random) -> Pair | None:
        text = passage.text
        without = re.sub(rf"\A[#\s]*{re.escape(passage.title)}[#\s]*", "", text)
        whole = pick.random() >= TAKEN_OUT["title"] or without == text
        return Pair(passage.title, "title", text if whole else without)

    def _piece(self, sentence: str, pick: random.Random) -> str:
        """Some words of a sentence that follow one another, a rare one among them."""
        pieces = sentence.split()
        count = min(pick.randint(4, 10), len(pieces))
        start = pick.randint(0, len(pieces) - count)
        piece = " ".join(pieces[start : start + count])
        common = self.frequencies.texts / 10 if self.frequencies.texts >= 10 else self.frequencies.texts
        return piece if any(self.frequencies.counts[word] <= common for word in words(piece)) else ""

    @staticmethod
    def _pair(kind: str, text: str, first: int, last: int, pick: random.Random, query: str | None = None) -> Pair:
        query = text[first:last].strip() if query is None else query
        left = f"{text[:first].rstrip(' ')} {text[last:].lstrip(' ')}".strip()
        taken = pick.random() < TAKEN_OUT[kind] and len(words(left)) >= LEAST_LEFT
        return Pair(query, kind, left if taken else text)


def _key(text: str) -> int:
    return hash(tuple(words(text)) or text)


def _sentences(text: str) -> list[str]:
    return [found.group() for found in SENTENCE.finditer(text)]


def _headings(text: str) -> list[str]:
    return [_heading_of(found) for found in HEADING.finditer(text)]
