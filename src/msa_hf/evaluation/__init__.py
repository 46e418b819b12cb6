"""Judging a model with a memory: corpora to ask about, and whether an answer is right."""

from ..synthetic.corpora import UNANSWERABLE, Corpus, Fact, Question, make_corpus
from ..synthetic.prose import prose_documents
from .metrics import exact_match, normalise_answer
from .quantised import quantised_recall

__all__ = [
    "UNANSWERABLE",
    "Corpus",
    "Fact",
    "Question",
    "exact_match",
    "make_corpus",
    "normalise_answer",
    "prose_documents",
    "quantised_recall",
]
