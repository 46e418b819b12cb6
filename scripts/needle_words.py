"""Tell how well words alone find the needles of `msa-hf bench needles`, at any size and without a model's work.

    python scripts/needle_words.py --tokenizer build/real/model --text articles.jsonl --sizes 64K,1M

Haystack, needles and questions are those of the benchmark. A question counts where BM25, as `--select hybrid` asks it,
has all documents of its values among its first n.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transformers import AutoTokenizer

from msa_hf.bench.haystack import Haystack, file_texts
from msa_hf.bench.needles import NeedleSettings, needle_tasks
from msa_hf.bench.planting import banks_of_tasks
from msa_hf.bench.report import short
from msa_hf.cli.bench.options import sizes
from msa_hf.retrieval.lexical import Change, LexicalIndex
from msa_hf.synthetic.needles import NeedleTasks
from msa_hf.tables import table_lines

FIRST = (1, 2, 4, 8, 16)
MISSED = sys.maxsize


def ranks(haystack: Haystack, settings: NeedleSettings, tokens: int) -> dict[str, list[int]]:
    """The rank, from 1, of the last document that a question needs, by kind; MISSED where words do not find it."""
    documents = haystack.documents(tokens)
    found: dict[str, list[int]] = {}
    taken = NeedleTasks(settings.seed).keys_in(haystack.texts)
    for group in banks_of_tasks(list(needle_tasks(settings, tokens, taken)), documents):
        plants = [plant for task in group for plant in task.plants]
        places = haystack.place(documents, plants)
        texts = {**dict(enumerate(haystack.texts[:documents])), **haystack.planted(places, plants)}
        index = LexicalIndex()
        index.apply(Change((), texts.items(), many=True))
        words, rest = index.searcher(), iter(places)
        for task in group:
            own = [next(rest) for _ in task.plants]
            for question in task.questions:
                rank = {row: place for place, (row, _) in enumerate(words.best(question.text, documents), 1)}
                last = max(rank.get(own[number], MISSED) for number in question.gold)
                found.setdefault(question.kind, []).append(last)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a checkpoint, whose tokens count")
    parser.add_argument("--text", nargs="+", required=True, help="files or folders")
    parser.add_argument("--sizes", type=sizes, required=True, help="in tokens, by commas")
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--document-tokens", type=int, default=112)
    given = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    haystack = Haystack(file_texts(given.text), tokenizer, given.sizes[-1], given.document_tokens)
    settings = NeedleSettings(depths=given.depths, repeats=given.repeats, document_tokens=given.document_tokens)
    rows = [["tokens", "documents", "kind", "asked", *(f"in the first {number}" for number in FIRST)]]
    for tokens in given.sizes:
        for kind, last in sorted(ranks(haystack, settings, tokens).items()):
            counts = [str(sum(rank <= number for rank in last)) for number in FIRST]
            rows.append([short(tokens), str(haystack.documents(tokens)), kind, str(len(last)), *counts])
    print("\n".join(table_lines(rows, left=3)))


if __name__ == "__main__":
    main()
