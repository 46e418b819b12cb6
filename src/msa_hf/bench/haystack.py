"""Haystacks: documents of a wanted number of tokens, small ones the beginning of large ones, and sentences in them."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.documents import Corpus
from ..model.bank_manifest_msa import holds_bank
from ..model.splitting_msa import split_text
from ..model.tokenizing_msa import tokenize
from ..synthetic.corpora import make_corpus
from ..synthetic.prose import prose_documents
from ..synthetic.sentences import insert_sentence
from .facts import digest_of

LEAST_TOKENS = 16  # of a document; shorter rests of a text are left out
GENERATED = 2_000_000  # documents of the generated corpus that texts are taken from, about 200M tokens
BLOCK = 2048  # texts made or cut at a time

Insert = Callable[[str, str, float], str]  # text, sentence and place in it, 0 to 1 -> text with the sentence


class HaystackTooSmall(ValueError):
    """The texts are fewer than were asked for."""


@dataclass(frozen=True)
class Plant:
    """A sentence that is put into a document.

    Attributes:
        depth: of the document in the haystack, 0 to 1 by tokens.
        place: in the document, 0 (before its first sentence) to 1 (behind its last).
        apart: from the sentence before it in a list, as a share of all tokens, below 0 towards the beginning; None: its
            place is by its depth alone. Counted from where that sentence came to stand, so that a distance is kept
            where a depth was taken.
    """

    sentence: str
    depth: float
    place: float = 0.5
    apart: float | None = None


class Haystack:
    """Documents in order, as many as a number of tokens takes.

    Args:
        texts: in order; no more are read than it takes.
        tokenizer: counts tokens, the model's.
        tokens: at least so many; None: all of the texts.
        document_tokens: of a document at most; longer texts are cut where a paragraph or sentence ends.
        least_tokens: of a document; what is shorter is left out.
        show_progress: a bar of the tokens read, where that takes longer than a second (about 5 s for 1M on one core).

    Attributes:
        texts: of the documents.

    Raises:
        HaystackTooSmall: where the texts have fewer tokens.
        ValueError: for documents of fewer tokens than one must have, which all would be left out.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        tokens: int | None,
        document_tokens: int = 112,
        least_tokens: int = LEAST_TOKENS,
        show_progress: bool = False,
    ) -> None:
        if document_tokens < least_tokens:
            raise ValueError(
                f"Documents of {document_tokens} tokens at most are too short: those of fewer than {least_tokens} are "
                "left out. Ask for longer ones."
            )
        self.texts: list[str] = []
        self._ends = array("q")  # tokens up to the end of each document
        total = short = 0
        bar = {"unit": "tokens", "unit_scale": True, "delay": 1.0, "disable": not show_progress}
        with tqdm(total=tokens, desc="Reading texts", **bar) as progress:
            for text, count in _cut(texts, tokenizer, document_tokens):
                if count < least_tokens:
                    short += 1
                    continue
                total += count
                self.texts.append(text)
                self._ends.append(total)
                progress.update(count)
                if tokens is not None and total >= tokens:
                    return
        if tokens is None and total:
            return
        raise HaystackTooSmall(
            f"The texts have {total:,} tokens{_left_out(short, least_tokens)}, but {tokens or 1:,} were asked for. "
            "Name more texts or ask for smaller sizes."
        )

    @classmethod
    def of_documents(cls, texts: Sequence[str], tokens: Sequence[int]) -> Haystack:
        """The haystack of these documents, whose numbers of tokens are known."""
        made = cls.__new__(cls)
        made.texts, made._ends = list(texts), array("q", accumulate(tokens))
        return made

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def digest(self) -> str:
        """A name that tells these texts from others."""
        return digest_of(self.texts)

    def documents(self, tokens: int) -> int:
        """The number of first documents that have so many tokens."""
        return min(bisect_left(self._ends, tokens) + 1, len(self))

    def tokens(self, documents: int) -> int:
        """Tokens of the first documents, without what wraps them."""
        return self._ends[documents - 1] if documents else 0

    def place(self, documents: int, plants: Sequence[Plant]) -> list[int]:
        """The document among the first ones that each sentence goes into: the one at its depth, or so far from the
        sentence before it, or the nearest to that which is still free.

        Raises:
            HaystackTooSmall: for more sentences than documents.
        """
        if len(plants) > documents:
            raise HaystackTooSmall(f"{len(plants)} sentences do not go into {documents} documents, one into each.")
        total, taken, places = self.tokens(documents), set[int](), list[int]()
        for plant in plants:
            tokens = plant.depth * total
            if plant.apart is not None and places:
                tokens = self.tokens(places[-1] + 1) + plant.apart * total
            wanted = min(bisect_left(self._ends, tokens), documents - 1)
            near = (step for width in range(documents) for step in (wanted + width, wanted - width))
            place = next(step for step in near if 0 <= step < documents and step not in taken)
            taken.add(place)
            places.append(place)
        return places

    def planted(self, places: Sequence[int], plants: Sequence[Plant], insert: Insert | None = None) -> dict[int, str]:
        """The texts of the documents at these places with a sentence in each."""
        insert = insert_sentence if insert is None else insert
        return {
            place: insert(self.texts[place], plant.sentence, plant.place)
            for place, plant in zip(places, plants, strict=True)
        }


def file_texts(sources: Sequence[str | Path], **options: object) -> Iterator[str]:
    """The texts of files and folders, one source after the other, each read once it is its turn.

    Args:
        options: of `msa_hf.data.documents.Corpus`.

    Raises:
        DataError: for what cannot be read.
        ValueError: for a bank, whose texts are encoded already.
    """
    for source in sources:
        if holds_bank(Path(source)):
            raise ValueError(
                f"{source}: a bank, where texts are wanted; name the documents that it was made of. `bench needles` "
                "and `bench mine` take a bank."
            )
        yield from (row["text"] for row in Corpus(source, **options))  # type: ignore[arg-type]


def generated_texts(seed: int = 0, prose_share: float = 0.2) -> Iterator[str]:
    """Texts about invented entities whose names no training document has, and real prose between them.

    Args:
        seed: another seed gives other entities.
        prose_share: of the texts; they come from the standard library's documentation.
    """
    prose = prose_documents(200, seed=seed, words=55, packages=False) if prose_share else []
    corpus = make_corpus(GENERATED, seed=seed, split="test", prose=prose, prose_share=prose_share)
    for start in range(0, GENERATED, BLOCK):
        yield from corpus.texts(start, min(start + BLOCK, GENERATED))


def _cut(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> Iterator[tuple[str, int]]:
    """Texts in pieces of at most `limit` tokens, and how many each has; several texts at a time, in threads, since
    tokenizers leave Python's lock to others."""
    size = 64  # so that a small haystack reads little
    source = iter(texts)
    threads = ThreadPoolExecutor()
    try:
        while block := [text for _, text in zip(range(size), source, strict=False)]:
            size = min(2 * size, BLOCK)
            for pieces in threads.map(partial(_pieces, tokenizer, limit), block):
                yield from pieces
    finally:
        threads.shutdown(cancel_futures=True)


def _pieces(tokenizer: PreTrainedTokenizerBase, limit: int, text: str) -> list[tuple[str, int]]:
    if len(text) < 8 * limit and (count := len(tokenize(tokenizer, text))) <= limit:  # a long one is cut in any case
        return [(text, count)]
    cuts = [(cut, len(ids)) for cut, ids in split_text(tokenizer, text, limit)]
    if len(cuts) == 1:
        return cuts
    stripped = ((cut.strip(), cut, count) for cut, count in cuts)
    return [
        (piece, count if piece == cut else len(tokenize(tokenizer, piece))) for piece, cut, count in stripped if piece
    ]


def _left_out(short: int, least: int) -> str:
    return f", {short:,} documents or rests of fewer than {least} left out" * bool(short)


def depths_of(count: int) -> list[float]:
    """Depths from 0 to 1 in equal steps."""
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    return [0.5] if count == 1 else [round(number / (count - 1), 4) for number in range(count)]
