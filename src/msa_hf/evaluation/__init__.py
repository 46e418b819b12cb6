"""Judging a model with a memory: corpora to ask about, and whether an answer is right."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from ..synthetic.corpora import UNANSWERABLE, Corpus, Fact, Question, make_corpus
    from ..synthetic.prose import prose_documents
    from .metrics import exact_match, normalize_answer
    from .quantized import quantized_recall

__all__ = [
    "UNANSWERABLE",
    "Corpus",
    "Fact",
    "Question",
    "exact_match",
    "make_corpus",
    "normalize_answer",
    "prose_documents",
    "quantized_recall",
]

__getattr__ = exports(
    __name__,
    {
        "..synthetic.corpora": ["UNANSWERABLE", "Corpus", "Fact", "Question", "make_corpus"],
        "..synthetic.prose": ["prose_documents"],
        ".metrics": ["exact_match", "normalize_answer"],
        ".quantized": ["quantized_recall"],
    },
    old_names={"quantised_recall": "quantized_recall", "normalise_answer": "normalize_answer"},
)
