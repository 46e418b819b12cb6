"""Questions of several hops: a second search by names, over the banks and rankings of `eval_real.py`.

    python scripts/real_hops.py --work build/real --out OUT --sizes 5M

The first search is any system of `best.npz`; the second asks a lexical index (tantivy) for the question together with
each name that the best passages have and the question does not. How they are put together, and the numbers, are those
that `benchmarks/bench_chains.py` chose on training questions. Prints recall of all gold documents among ten passages.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from real_rows import load, source_names
from real_systems import asked_questions, hit_groups, interval

from msa_hf.hybrid.chains import ChainRunner, Source

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from bench_chains import LexicalRetriever, ranked, two_hops

FIRST, BEST, NAMES, EACH = 4, 2, 10, 5  # kept of the first search; passages that give names, how many, passages each


class TwoRetrievers:
    """Finds what a ranking has for the question itself, and what a lexical index has for all else."""

    name = "ranking and lexical index"

    def __init__(self, words: LexicalRetriever, rankings: dict[str, list[int]]) -> None:
        self.words, self.rankings = words, rankings

    def retrieve(self, query: str, mode: str, k: int, filters: object) -> list[Source]:
        if query not in self.rankings:
            return self.words.retrieve(query, mode, k, {})
        return [Source(*self.words.passages[place], None, place, place) for place in self.rankings[query][:k]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parts", default="0-10")
    parser.add_argument("--sizes", default="5M", help="of the banks, separated by commas")
    parser.add_argument("--limit", type=int, help="questions (default: all)")
    arguments = parser.parse_args()
    work, out = Path(arguments.work), Path(arguments.out)
    questions = asked_questions(load(work / "sets.pt"))
    dev = [n for n, item in enumerate(questions) if item["split"] == "dev" and item["set"] == "multihop"]
    dev = dev[: arguments.limit]
    sizes, best = json.loads((out / "search.json").read_text())["sizes"], dict(np.load(out / "best.npz"))
    chain = two_hops("lexical", 10, BEST, NAMES, EACH)
    for size in arguments.sizes.split(","):
        count, texts = sizes[size]["passages"], []
        for name in source_names(arguments.parts):
            if len(texts) < count:
                texts += load(work / f"{name}.texts")
        words = LexicalRetriever([(str(place), text) for place, text in enumerate(texts[:count])])
        for system in (name.partition(" ")[2] for name in best if name.startswith(f"{size} ")):
            rows = best[f"{size} {system}"]
            rankings = {questions[n]["question"]: [place for place in rows[n].tolist() if place >= 0] for n in dev}
            runner = ChainRunner(TwoRetrievers(words, rankings))
            once, twice = [], []
            for n in dev:
                records = runner.run(chain, questions[n]["question"]).records
                places = np.array([int(key) for key in ranked(records, FIRST)])
                once.append(float(all(hit_groups(rows[n, :10], questions[n]))))
                twice.append(float(all(hit_groups(places, questions[n]))))
            low, high = interval(twice)
            print(
                f"{size} {system}: all gold @10 {np.mean(once):.3f} in one search,",
                f"{np.mean(twice):.3f} ({low:.3f} to {high:.3f}) with the second; {len(dev)} questions",
                flush=True,
            )


if __name__ == "__main__":
    main()
