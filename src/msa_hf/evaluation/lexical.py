"""A lexical baseline: BM25 over the texts of a bank."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from ..bm25 import SELECTION, import_bm25s

if TYPE_CHECKING:
    from bm25s.tokenization import Tokenized


def require_bm25s() -> ModuleType:
    """bm25s.

    Raises:
        ImportError: where it is missing.
    """
    return import_bm25s("The condition 'bm25'", "eval")


class BM25:
    """The documents of a bank, ranked by their words."""

    def __init__(self, texts: list[str]) -> None:
        self.module, self.size = require_bm25s(), len(texts)
        self.index = self.module.BM25()
        self.index.index(self._words(texts), show_progress=False)

    def _words(self, texts: list[str]) -> Tokenized:
        return self.module.tokenize(texts, stopwords=None, show_progress=False)

    def best(self, question: str, count: int) -> list[int]:
        found, _ = self.index.retrieve(
            self._words([question]), k=min(count, self.size), show_progress=False, backend_selection=SELECTION
        )
        return found[0].tolist()
