"""Readers of users' documents and questions."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .documents import Corpus, DocumentRow, read_documents
    from .errors import DataError
    from .folders import Skipped

__all__ = ["Corpus", "DataError", "DocumentRow", "Skipped", "read_documents"]

__getattr__ = exports(
    __name__,
    {
        ".documents": ["Corpus", "DocumentRow", "read_documents"],
        ".errors": ["DataError"],
        ".folders": ["Skipped"],
    },
)
