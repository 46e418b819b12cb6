"""BM25 beside the routers: the best passages of every development and held-out question, in nested banks.

    python scripts/real_lexical.py --work build/real --parts 0-10 --sizes 5,10,30,99

Needs `bm25s` and `PyStemmer`. The banks and questions are those of `eval_real.py`; k1 0.9, b 0.4, English stop words,
stemming. Writes `lexical.npz`: per size the best passages and their scores, in the order of `asked_questions`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import Stemmer
from real_rows import load, log, source_names
from real_systems import asked_questions, bank_limits

from msa_hf.bm25 import SELECTION, import_bm25s

KEPT = 100  # passages per question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--parts", default="0-10")
    parser.add_argument("--sizes", default="5,10,30,99", help="of the banks, in million tokens; the first is all sets")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    names = source_names(arguments.parts)
    texts = [text for name in names for text in load(work / f"{name}.texts")]
    data = load(work / "sets.pt")
    lengths = np.concatenate([load(work / f"{name}.pt")["lengths"].numpy() for name in names])
    questions = [item["question"] for item in asked_questions(data)]
    bm25s = import_bm25s("BM25", "eval")
    stemmer = Stemmer.Stemmer("english")
    start = time.time()
    tokens = bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)
    asked = bm25s.tokenize(questions, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
    log("tokenized", len(texts), "passages in", round(time.time() - start), "s")
    found: dict[str, np.ndarray] = {}
    for size, limit in bank_limits(lengths, len(data["lengths"]), arguments.sizes).items():
        start = time.time()
        index = bm25s.BM25(k1=0.9, b=0.4)
        index.index(bm25s.tokenization.Tokenized(tokens.ids[:limit], tokens.vocab), show_progress=False)
        best, scores = index.retrieve(asked, k=KEPT, show_progress=False, n_threads=0, backend_selection=SELECTION)
        found[f"{size} places"], found[f"{size} scores"] = best.astype(np.int32), scores.astype(np.float32)
        log(size, limit, "passages in", round(time.time() - start), "s")
    np.savez_compressed(work / "lexical.npz", **found)


if __name__ == "__main__":
    main()
