"""Needles in real text as one more set of questions, for `train_real.py prepare`.

    python scripts/real_needles.py --data DATA --part 11 --out DATA/needles

Sentences that give a key a value (`msa_hf.synthetic.needles`, of which training has keys, values and wordings that
tests have not) stand in passages of the further text, each of another article. The texts of one task, whose keys differ
in one word, count as one article, so that pools hold them beside each other. Take a part that no bank is made of.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real_data import LONGEST, read_rows, split_passages

from msa_hf.synthetic.hashing import Draws
from msa_hf.synthetic.needles import TASKS, VALUES, NeedleTasks
from msa_hf.synthetic.sentences import insert_sentence

SHORTEST, ROOM = 300, 120  # characters of a passage at least, and left for a sentence


def carriers(data: str | Path, part: int) -> Iterator[tuple[str, str]]:
    """Titles and passages, one of every article that has one of a fitting length."""
    for row in read_rows(Path(data, "wikipedia", f"part-{part:02d}.jsonl.xz")):
        pieces = split_passages(row["text"], LONGEST - ROOM)
        fitting = [piece for piece in pieces if len(piece) >= SHORTEST]
        if fitting:
            yield row["title"], fitting[len(row["text"]) % len(fitting)]


def make(data: str | Path, part: int, count: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Documents and questions about the first `count` tasks, as many as there are articles for."""
    tasks, draws, texts = NeedleTasks(seed, "train"), Draws("real needles", seed), carriers(data, part)
    documents: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for number in range(min(count, len(tasks))):
        name = TASKS[number % len(TASKS)]
        task = tasks.task(name, draws.pick(VALUES), number)
        made = []
        for place, (needle, (title, text)) in enumerate(zip(task.needles, texts, strict=False)):
            text = insert_sentence(text, needle.sentence, draws.below(1001) / 1000)
            key = f"needle-{number}-{place}"
            made.append({"key": key, "title": title, "text": text, "article": f"needle-{number}"})
        if len(made) < len(task.needles):
            break
        documents += made
        gold = [row["key"] for row in made[: len(task.gold)]]
        questions.append({"question": task.question, "answers": [", ".join(task.answers)], "gold": gold, "kind": name})
    return documents, questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--tasks", type=int, default=900)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(
        ("documents", "questions.train"), make(arguments.data, arguments.part, arguments.tasks), strict=True
    ):
        with lzma.open(arguments.out / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(len(rows), name)


if __name__ == "__main__":
    main()
