"""A lexical index: documents ranked by the words of a query (BM25), kept by tantivy in a directory or in memory."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.bounds_msa import read_json

# Words are cut at what is neither letter nor digit, lower-cased, freed of accents, of the language's stop words and of
# endings. "bigrams" takes pairs of characters instead, for languages that do not put spaces between words; "none" has
# neither stop words nor stems.
_STOPPED = (
    *("danish", "dutch", "english", "finnish", "french", "german", "hungarian", "italian", "norwegian"),
    *("portuguese", "russian", "spanish", "swedish"),
)
STOP_WORDS = frozenset(_STOPPED)
LANGUAGES = (*_STOPPED, "arabic", "greek", "romanian", "tamil", "turkish", "bigrams", "none")
LONGEST_WORD = 64  # bytes; what is longer is no word that somebody looks for
THREAD_BYTES = 32 * 2**20  # of memory for each indexing thread
MOST_THREADS = 8
FEW_DOCUMENTS = 2000  # up to so many one thread indexes as fast
KEPT_WORDS = 65_536  # of questions, whose rarity is not looked up again
META = "meta.json"  # tantivy's, of its last commit


def require_tantivy() -> types.ModuleType:
    """The module `tantivy`.

    Raises:
        ImportError: naming the extra.
    """
    try:
        return importlib.import_module("tantivy")
    except ImportError as error:
        raise ImportError("A lexical index needs tantivy: pip install 'msa-hf[lexical]'.") from error


def composed(text: str) -> str:
    """A text with each accent in one character with its letter, however it was written: words are cut at lone ones."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Change:
    """Rows that leave an index, then rows with their texts that come."""

    gone: Iterable[int]
    texts: Iterable[tuple[int, str | None]]
    many: bool


class LexicalIndex:
    """Rows of a bank by the words of their texts.

    BM25 with k1 = 1.2 and b = 0.75, tantivy's own. A row that was removed is never found; the statistics (how rare a
    word is, the mean length) count it until the index is made anew, which compacting a bank does.

    Args:
        language: of `LANGUAGES`, for stop words and stems.
        directory: of tantivy's files: an index that lies there, or an empty one. None: in memory.

    Raises:
        ImportError: where tantivy is missing.
        ValueError: for another language, or files that tantivy cannot open.
    """

    def __init__(self, language: str = "english", directory: Path | None = None) -> None:
        if language not in LANGUAGES:
            raise ValueError(f"`language` must be one of {', '.join(LANGUAGES)}, got {language!r}.")
        self._tantivy: Any = require_tantivy()
        self.language, self.directory = language, directory
        self._analyzer = self._make_analyzer()
        builder = self._tantivy.SchemaBuilder()
        builder.add_text_field("text", tokenizer_name="words", index_option="freq")
        builder.add_integer_field("row", indexed=True, fast=True)
        self._schema = builder.build()
        with _panics_told():
            self._index = self._tantivy.Index(self._schema, path=None if directory is None else str(directory))
            self._index.register_tokenizer("words", self._analyzer)
            self._index.config_reader("manual")  # a searcher sees what was committed when it was asked for
            self._index.reload()

    def _make_analyzer(self) -> Any:
        tantivy, language = self._tantivy, self.language
        tokenizer = tantivy.Tokenizer.simple() if language != "bigrams" else tantivy.Tokenizer.ngram(2, 2)
        made, filters = tantivy.TextAnalyzerBuilder(tokenizer), tantivy.Filter
        for item in (filters.remove_long(LONGEST_WORD), filters.lowercase()):
            made = made.filter(item)
        if language in STOP_WORDS:
            made = made.filter(filters.stopword(language))
        if language not in ("bigrams", "none"):
            made = made.filter(filters.stemmer(language))
        return made.filter(filters.ascii_fold()).build()

    def terms(self, text: str) -> list[str]:
        """The words of a text as the index has them, in order."""
        found: list[str] = self._analyzer.analyze(composed(text))
        return [term for term in found if term.strip()]

    def apply(self, change: Change) -> int:
        """Make a change, as one commit of tantivy; returns the number that tantivy knows it by."""
        threads = max(min(os.cpu_count() or 1, MOST_THREADS), 1) if change.many else 1
        writer = self._index.writer(threads * THREAD_BYTES, threads)
        try:
            with _panics_told():
                for row in change.gone:
                    writer.delete_documents_by_term("row", row)
                for row, text in change.texts:
                    if text is not None:
                        document = self._tantivy.Document()
                        document.add_text("text", composed(text))
                        document.add_integer("row", row)
                        writer.add_document(document)
                stamp: int = writer.commit()
        except BaseException:
            with _panics_told():
                writer.rollback()
            raise
        finally:
            writer.wait_merging_threads()  # and lets go of the lock
        self._index.reload()
        return stamp

    def searcher(self) -> LexicalSearcher:
        """The index as it is now, for good."""
        return LexicalSearcher(self, self._index.searcher())


@contextlib.contextmanager
def _panics_told() -> Iterator[None]:
    """A block in which tantivy works on files; it panics, with what is no `Exception`, where they are not its own.

    Raises:
        ValueError: for a panic.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tantivy cannot work with the files of this index ({error}).") from error


@dataclass(frozen=True)
class UnbuiltIndex:
    """A lexical index that was pickled: another process opens the bank's own, or makes one of its texts."""

    language: str


class LexicalSearcher:
    """A lexical index as one commit left it; later ones do not change it."""

    def __init__(self, index: LexicalIndex, searcher: Any) -> None:
        self._index, self._searcher = index, searcher
        self._rarity: dict[str, float] = {}

    def __reduce__(self) -> tuple[type[UnbuiltIndex], tuple[str]]:
        return UnbuiltIndex, (self.language,)  # tantivy's files stay where they are

    @property
    def language(self) -> str:
        """Of its words."""
        return self._index.language

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def terms(self, text: str) -> list[str]:
        """`LexicalIndex.terms`."""
        return self._index.terms(text)

    def rarity(self, term: str) -> float:
        """The logarithm of one over the share of texts with a word; a word of none is the rarest."""
        if term not in self._rarity:
            if len(self._rarity) >= KEPT_WORDS:
                self._rarity.clear()
            with _panics_told():
                count = self._searcher.doc_freq("text", term)
            self._rarity[term] = math.log((len(self) + 1) / (min(count, len(self)) + 0.5))
        return self._rarity[term]

    def best(self, query: str, k: int, is_there: Callable[[int], bool] = lambda row: True) -> list[tuple[int, float]]:
        """The k best rows for a query with their scores, best first; equal scores go to the lower row.

        Rows that have none of its words are not among them.

        Args:
            is_there: tells which rows are documents, where some are not any more.
        """
        tantivy, index = self._index._tantivy, self._index
        clauses = [
            (tantivy.Occur.Should, tantivy.Query.term_query(index._schema, "text", term, "freq"))
            for term in index.terms(query)
        ]
        if not clauses or k < 1 or not len(self):
            return []
        question = tantivy.Query.boolean_query(clauses)
        limit = min(k, len(self)) + 1  # tantivy reserves room for all of them, and ends the process where there is none
        while True:
            with _panics_told():
                hits = self._searcher.search(question, limit, count=False).hits
                rows: Sequence[int] = self._searcher.fast_field_values("row", [address for _, address in hits])
            found = [(row, score) for row, (score, _) in zip(rows, hits, strict=True) if is_there(row)]
            # Until the last one is worse than the k-th: tantivy breaks ties by where a row lies in its files.
            if len(hits) < limit or (len(found) >= k and hits[-1][0] < found[k - 1][1]):
                return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]
            limit *= 4


def stamp_of(directory: Path) -> int | None:
    """The number of tantivy's last commit in a directory; None where there is none."""
    try:
        stamp = read_json(directory / META).get("opstamp")
    except (OSError, ValueError, AttributeError):
        return None
    return stamp if type(stamp) is int else None
