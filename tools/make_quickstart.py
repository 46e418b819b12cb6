"""Make the documents and questions of `examples/quickstart`.

    python tools/make_quickstart.py

Everything follows from SEED; the questions are the first of each kind, whatever a model makes of them. The prose comes
from the standard library of the running Python, so that another version of it gives other prose, and only that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msa_hf.evaluation import make_corpus, prose_documents

OUT = Path(__file__).parents[1] / "examples" / "quickstart"
SEED = 8  # of the first dozen, the one whose questions read best; no model was asked
DOCUMENTS = 300
PROSE_SHARE = 0.2
PROSE_WORDS = 55
QUESTIONS = {"one_hop": 2, "two_hop": 2, "unanswerable": 1}


def make(prose: Sequence[str]) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Rows of documents.jsonl and of questions.jsonl.

    Args:
        prose: the texts that are mixed in.
    """
    corpus = make_corpus(DOCUMENTS, seed=SEED, split="test", prose=prose, prose_share=PROSE_SHARE)
    keys: list[str] = []
    for name in corpus.names():
        keys.append(name or f"prose-{sum(key.startswith('prose-') for key in keys) + 1:02}")
    documents = [{"key": key, "text": text} for key, text in zip(keys, corpus.texts(), strict=True)]
    questions = [
        {
            "kind": kind,
            "question": question.text,
            "answer": question.answer,
            "positives": [keys[position] for position in question.positives],
        }
        for kind, count in QUESTIONS.items()
        for question in corpus.questions(count, kind, seed=SEED)  # type: ignore[arg-type]
    ]
    return documents, questions


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="directory (default: examples/quickstart)")
    out = parser.parse_args().out
    documents, questions = make(
        prose_documents(round(DOCUMENTS * PROSE_SHARE), seed=SEED, words=PROSE_WORDS, packages=False)
    )
    out.mkdir(parents=True, exist_ok=True)
    write(out / "documents.jsonl", documents)
    write(out / "questions.jsonl", questions)
    print(f"{out}: {len(documents)} documents, {len(questions)} questions")


if __name__ == "__main__":
    main()
