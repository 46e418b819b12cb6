"""BM25 beside the routers: rankings to measure with, and words to teach with.

    python scripts/real_lexical.py rank  --work build/real --parts 0-10 --sizes 5,10,30,99
    python scripts/real_lexical.py words --work build/real --parts 0-10
    python scripts/real_lexical.py asked --work build/real --shards 1

Needs `bm25s` and `PyStemmer`; k1 0.9, b 0.4, English stop words, stemming. `rank` writes `lexical.npz`: per size the
best passages of every development and held-out question and their scores, in the order of `asked_questions`; banks and
questions are those of `eval_real.py`. `words` writes `words.pt`: the weights of all passages' words, the words of
labeled training questions, and the best passages that do not answer them. `asked` writes `asked0.words.pt` and so on,
the words of questions that a base asked.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import Stemmer
import torch
from real_rows import load, log, save, source_names
from real_systems import asked_questions, bank_limits
from real_words import WordRows

from msa_hf.bm25 import SELECTION, import_bm25s

KEPT = 100  # passages per question
NEAR = 40  # passages per labeled question that do not answer it
bm25s = import_bm25s("BM25", "eval")


def tokenized(texts: Sequence[str], as_words: bool = False) -> Any:
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=not as_words, show_progress=False)


def index_of(tokens: Any, limit: int | None = None) -> Any:
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenization.Tokenized(tokens.ids[:limit], tokens.vocab), show_progress=False)
    return index


def best_of(index: Any, asked: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[Q, count] the best passages and their scores; -1 and 0 where there are fewer passages."""
    found = min(count, int(index.scores["num_docs"]))
    best, scores = index.retrieve(asked, k=found, show_progress=False, n_threads=-1, backend_selection=SELECTION)
    behind = ((0, 0), (0, count - found))
    return (
        np.pad(best.astype(np.int32), behind, constant_values=-1),
        np.pad(scores.astype(np.float32), behind),
    )


def texts_of(arguments: argparse.Namespace) -> list[str]:
    return [text for name in source_names(arguments.parts) for text in load(Path(arguments.work, f"{name}.texts"))]


def rank(arguments: argparse.Namespace) -> None:
    """The best passages of every question, in banks of all sizes."""
    work, start = Path(arguments.work), time.time()
    data, texts = load(work / "sets.pt"), texts_of(arguments)
    names = source_names(arguments.parts)
    lengths = np.concatenate([load(work / f"{name}.pt")["lengths"].numpy() for name in names])
    tokens = tokenized(texts)
    asked = tokenized([item["question"] for item in asked_questions(data)], as_words=True)
    log("tokenized", len(texts), "passages in", round(time.time() - start), "s")
    found: dict[str, np.ndarray] = {}
    for size, limit in bank_limits(lengths, len(data["lengths"]), arguments.sizes).items():
        start = time.time()
        found[f"{size} places"], found[f"{size} scores"] = best_of(index_of(tokens, limit), asked, KEPT)
        log(size, limit, "passages in", round(time.time() - start), "s")
    np.savez_compressed(work / "lexical.npz", **found)


def words(arguments: argparse.Namespace) -> None:
    """What passages' words weigh, and the labeled training questions' words and near-misses."""
    work, start = Path(arguments.work), time.time()
    train, texts = load(work / "sets.pt")["train"]["questions"], texts_of(arguments)
    tokens = tokenized(texts)
    index = index_of(tokens)
    weights, texts_by_word, starts = (index.scores[name] for name in ("data", "indices", "indptr"))
    order = np.argsort(texts_by_word, kind="stable")  # by text, words ascending
    of_entry = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
    counts = np.bincount(texts_by_word, minlength=len(texts))
    passages = WordRows(
        torch.from_numpy(of_entry[order]),
        torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
        torch.from_numpy(weights[order].astype(np.float16)),
    )
    log("weighed the words of", len(texts), "passages in", round(time.time() - start), "s")
    asked = tokenized([item["question"] for item in train], as_words=True)
    best, _ = best_of(index, asked, min(2 * NEAR, len(texts)))
    near = np.full((len(train), NEAR), -1, dtype=np.int32)
    for number, (question, row) in enumerate(zip(train, best.tolist(), strict=True)):
        right = {place for group in question["wanted"] for place in group}
        wrong = [place for place in row if place not in right][:NEAR]
        near[number, : len(wrong)] = wrong
    questions = WordRows.of([[tokens.vocab[word] for word in row if word in tokens.vocab] for row in asked])
    save(
        work / "words.pt",
        {
            "passages": passages.state(),
            "train": questions.state(),
            "near": torch.from_numpy(near),
            "vocab": tokens.vocab,
        },
    )
    log("found near-misses of", len(train), "questions;", round(time.time() - start), "s in all")


def asked(arguments: argparse.Namespace) -> None:
    """The words of the questions that a base asked."""
    work = Path(arguments.work)
    vocab = load(work / "words.pt")["vocab"]
    for shard in range(arguments.shards):
        rows = tokenized(load(work / f"asked{shard}.pt")["texts"], as_words=True)
        found = WordRows.of([[vocab[word] for word in row if word in vocab] for row in rows])
        save(work / f"asked{shard}.words.pt", found.state())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (rank, words, asked):
        made = commands.add_parser(run.__name__, help=run.__doc__)
        made.set_defaults(run=run)
        made.add_argument("--work", required=True)
        if run is asked:
            made.add_argument("--shards", type=int, default=1)
        else:
            made.add_argument("--parts", default="0-10")
        if run is rank:
            made.add_argument(
                "--sizes", default="5,10,30,99", help="of banks, in million tokens; the first is all sets"
            )
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
