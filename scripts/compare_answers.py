"""Show answers beside the expected ones.

    msa-hf ask MODEL BANK QUESTION ... --json | python scripts/compare_answers.py questions.jsonl

Args: a file with one JSON object per line: question, answer, positives (the keys of the documents that it takes).
Exit code 1 where the answers are not those of the questions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from msa_hf.evaluation import exact_match


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    questions = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    right = 0
    for number, asked in enumerate(questions, start=1):
        line = sys.stdin.readline()
        record = json.loads(line) if line else {}
        if record.get("question") != asked["question"]:
            raise SystemExit(f"error: no answer to question {number}: {asked['question']}")
        same = any(exact_match(record["answer"], right) for right in (asked["answer"], *asked.get("also", [])))
        right += same
        print(f"\n{number}. {asked['question']} ({asked['kind'].replace('_', '-')})")
        print(f"   answer    {record['answer'] or '(none)'}")
        print(f"   expected  {asked['answer']} {'(right)' if same else '(WRONG)'}")
        for source in record["sources"]:
            score = "not routed" if source["score"] is None else f"score {source['score']:.3f}"
            needed = ", needed" if source["key"] in asked["positives"] else ""
            print(f"   source    [{source['id']}] {source['key']} ({score}, round {source['round'] + 1}{needed})")
        print(f"   time      {sum(stage['seconds'] for stage in record['stages']):.2f} s", flush=True)
    print(f"\n{right} of {len(questions)} answers are right.")


if __name__ == "__main__":
    main()
