"""Invented worlds: corpora of entities that no model has seen, with questions about them, and real prose between."""

from .corpora import UNANSWERABLE, Corpus, Fact, Question, make_corpus
from .prose import prose_documents

__all__ = ["UNANSWERABLE", "Corpus", "Fact", "Question", "make_corpus", "prose_documents"]
