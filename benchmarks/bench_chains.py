r"""Questions of several hops with and without a prompt chain.

On an invented world, a small checkpoint answers questions of one to four hops: alone, with rounds enough for the hops;
from the texts that a lexical index finds for the whole question; and by a chain that rules plan, whose steps find their
own documents or retrieve them. The rules are the world's own ways of describing something, so that planning is not what
is measured:

    python benchmarks/bench_chains.py worlds model_cards/msa-hf-tiny --documents 150 --questions 16 --out worlds.json

On real questions, the share of the gold passages among the ten best: one search with the question, and a chain whose
second hop searches for the question with each name that the best passages have and the question has not. Lexically over
all passages of a set of questions, and, with a checkpoint, by all ways over the passages of its questions and others:

    python benchmarks/bench_chains.py real DATA --questions 200 --out real.json
    python benchmarks/bench_chains.py real DATA --base BASE --adapter ADAPTER --passages 1200 --questions 100 \
        --out hybrid.json

DATA has `documents.jsonl.xz` (key, title, text) and `questions.dev.jsonl.xz` (question, gold: keys).
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.evaluation import Corpus, exact_match, make_corpus
from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.hybrid.chains import (
    BankRetriever,
    Chain,
    ChainRunner,
    InterleaveReader,
    Retrieve,
    Rule,
    Source,
    chain_from_dict,
    plan_by_rules,
)
from msa_hf.hybrid.chains.sources import Filters
from msa_hf.retrieval import FusionWeights, add_lexical_index
from msa_hf.retrieval.lexical import Change, LexicalIndex
from msa_hf.synthetic.templates import ATTRIBUTES

HOPS = (1, 2, 3, 4)


# Invented worlds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question of some hops: its answer, and the documents that lead to it."""

    text: str
    answer: str
    gold: tuple[int, ...]


def world_rules() -> list[Rule]:
    return [
        Rule(description, attribute.questions[0])
        for attributes in ATTRIBUTES
        for attribute in attributes
        for description in attribute.descriptions
    ]


def questions_of(corpus: Corpus, hops: int, count: int, seed: int) -> list[Asked]:
    """Questions that follow `hops - 1` links from a document to the next, none of which tells the answer before the
    last."""
    pick = random.Random(f"{seed}/{hops}")
    names, facts, texts = corpus.names(), corpus.facts(), corpus.texts()
    place_of = {name: place for place, name in enumerate(names) if name is not None}
    linked = {
        attribute.questions[0]: attribute
        for attributes in ATTRIBUTES
        for attribute in attributes
        if attribute.link >= 0
    }
    found: dict[str, Asked] = {}
    for _ in range(20_000):
        if len(found) == count:
            break
        path, called = [pick.choice(list(place_of.values()))], ""
        while True:
            place = path[-1]
            own = re.compile(rf"(?:the )?{re.escape(str(names[place]))}")
            if len(path) == hops:
                break
            ways = []
            for fact in facts[place]:
                for template, attribute in linked.items():
                    subject = own.search(fact.questions[0])
                    if subject and template.format(n=subject[0]) == fact.questions[0] and fact.answer in place_of:
                        ways.append((fact.answer, attribute, subject[0]))
            if not ways:
                break
            target, attribute, subject_text = pick.choice(ways)
            called = pick.choice(attribute.descriptions).format(n=called or subject_text)
            path.append(place_of[target])
        if len(path) < hops or len(set(path)) < hops or not facts[path[-1]]:
            continue
        fact = pick.choice(facts[path[-1]])
        question = pick.choice(fact.questions)
        text = own.sub(lambda match: called or match[0], question, count=1)  # noqa: B023 (used at once)
        if not any(fact.answer in texts[place] for place in path[:-1]) and own.search(question):
            found.setdefault(text, Asked(text, fact.answer, tuple(path)))
    return list(found.values())


def worlds(arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, padding_side="left")
    model = MSAForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    protocol = PromptProtocol.from_pretrained(arguments.checkpoint)
    corpus = make_corpus(arguments.documents, seed=arguments.seed, split="test", linked_share=1.0)
    start = time.perf_counter()
    bank = model.encode_documents(protocol.encode_corpus(corpus.texts(), tokenizer), tokenizer)
    encoding = time.perf_counter() - start
    add_lexical_index(bank)
    retriever = BankRetriever(bank, model=model, tokenizer=tokenizer, protocol=protocol)
    runner = ChainRunner(retriever, InterleaveReader(model, tokenizer, bank, protocol))
    rules = world_rules()
    report: dict[str, Any] = {"documents": arguments.documents, "tokens": bank.num_tokens, "encoding_s": encoding}

    def alone(asked: Asked) -> tuple[str, set[str]]:
        asker = MemoryInterleave(model, tokenizer, bank, protocol, max_rounds=len(asked.gold) + 1, max_new_tokens=24)
        answer = asker.ask(asked.text)
        return answer.text, {source.key for source in answer.documents}

    def chained(plan: Callable[[Asked], Chain]) -> Callable[[Asked], tuple[str, set[str]]]:
        def answer(asked: Asked) -> tuple[str, set[str]]:
            result = runner.run(plan(asked), asked.text)
            return result.answer, {source["key"] for source in result.sources()}

        return answer

    def one_read(asked: Asked) -> Chain:
        retrieve = Retrieve("{question}", "lexical", len(asked.gold))
        return plan_by_rules(asked.text, [], retrieve=retrieve, max_new_tokens=24)

    def plan(mode: str | None) -> Callable[[Asked], Chain]:
        retrieve = None if mode is None else Retrieve("{question}", mode, 1)
        return lambda asked: plan_by_rules(asked.text, rules, retrieve=retrieve, max_new_tokens=24)

    systems = {
        "alone, a round more than hops": alone,
        "texts of a lexical index": chained(one_read),
        "chain, own documents": chained(plan(None)),
        "chain, lexical": chained(plan("lexical")),
        "chain, hybrid": chained(plan("hybrid")),
    }
    figures: dict[str, dict[str, Any]] = defaultdict(dict)
    for hops in HOPS:
        questions = questions_of(corpus, hops, arguments.questions, arguments.seed)
        for name in arguments.systems or systems:
            start, right, whole = time.perf_counter(), 0, 0
            for asked in tqdm(questions, desc=f"{hops} hops, {name}", disable=None):
                answer, keys = systems[name](asked)
                right += exact_match(answer, asked.answer)
                whole += {str(place) for place in asked.gold} <= keys
            seconds = (time.perf_counter() - start) / max(len(questions), 1)
            figures[name][str(hops)] = {
                "questions": len(questions), "exact": right, "all_gold_read": whole, "seconds_each": round(seconds, 2)
            }  # fmt: skip
            print(f"{hops} hops, {name}: {figures[name][str(hops)]}", flush=True)
            save(arguments, {**report, "figures": figures})
    return {**report, "figures": figures}


# Real questions -------------------------------------------------------------------------------------------------------


class LexicalRetriever:
    """A lexical index alone, without a bank."""

    name = "lexical index"

    def __init__(self, passages: Sequence[tuple[str, str]]) -> None:
        self.passages = passages
        index = LexicalIndex()
        index.apply(Change((), ((row, text) for row, (_, text) in enumerate(passages)), many=True))
        self.searcher = index.searcher()

    def retrieve(self, query: str, mode: str, k: int, filters: Filters) -> list[Source]:
        assert mode == "lexical" and not filters
        found = self.searcher.best(query, k)
        return [Source(*self.passages[row], score, row, row) for row, score in found]


def one_search(mode: str, k: int) -> Chain:
    step = {"name": "hits", "model": None, "retrieve": {"mode": mode, "k": k}}
    return chain_from_dict({"name": "one search", "steps": [step]})


def two_hops(mode: str, k: int, best: int, names: int, each: int) -> Chain:
    """A search; the names of its best passages; a search with each of them."""
    look = {
        "name": "look",
        "model": None,
        "retrieve": {"mode": mode, "k": best},
        "extract": {"names": {"at_most": names}},
    }
    further = {
        "name": "further",
        "model": None,
        "retrieve": {"query": "{item} {question}", "mode": mode, "k": each},
    }
    return chain_from_dict(
        {
            "name": "two hops by names",
            "steps": [
                {"name": "hits", "model": None, "retrieve": {"mode": mode, "k": k}},
                look,
                {"name": "names", "loop": {"over": "look", "at_most": max(names, 1), "steps": [further]}},
            ],
        }
    )


def ranked(records: Sequence[dict[str, Any]], first: int, limit: int = 10) -> list[str]:
    """Keys: the best `first` of the first search, then those of the second hop by reciprocal ranks over its searches,
    then the others of the first."""
    by_step = {record["step"]: [source["key"] for source in record.get("sources", ())] for record in records}
    hits = by_step["hits"]
    scores: dict[str, float] = defaultdict(float)
    for step, keys in by_step.items():
        if step.startswith("names["):
            for rank, key in enumerate(keys):
                scores[key] += 1 / (60 + rank)
    second = sorted(scores, key=lambda key: -scores[key])
    return list(dict.fromkeys([*hits[:first], *(second if scores else ()), *hits]))[:limit]


def rows(path: Path) -> Iterable[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def real(arguments: argparse.Namespace) -> dict[str, Any]:
    pick = random.Random(arguments.seed)
    questions = [row for row in rows(arguments.data / f"questions.{arguments.split}.jsonl.xz") if len(row["gold"]) > 1]
    pick.shuffle(questions)
    questions = questions[: arguments.questions]
    documents = {row["key"]: f"{row['title']}\n{row['text']}" for row in rows(arguments.data / "documents.jsonl.xz")}
    keys = list(documents)
    if arguments.passages is not None:
        gold = {key for question in questions for key in question["gold"]}
        others = [key for key in keys if key not in gold]
        pick.shuffle(others)
        kept = gold | set(others[: max(arguments.passages - len(gold), 0)])
        keys = [key for key in keys if key in kept]
    passages = [(key, documents[key]) for key in keys]
    report: dict[str, Any] = {"passages": len(passages), "questions": len(questions), "split": arguments.split}
    modes: Sequence[str] = ("lexical",)
    runner = ChainRunner(LexicalRetriever(passages))
    if arguments.base is not None:
        runner, tokens = ChainRunner(bank_retriever(arguments, passages, report)), report["tokens"]
        modes = ("lexical", "hybrid")
        print(f"{tokens} tokens encoded in {report['encoding_s']:.0f} s", flush=True)
    figures: dict[str, Any] = {}
    for mode in modes:
        chains = {
            "one search": one_search(mode, 10),
            "two hops": two_hops(mode, 10, arguments.best, arguments.names, arguments.each),
        }
        for name, chain in chains.items():
            start, recall, whole = time.perf_counter(), 0.0, 0
            for question in tqdm(questions, desc=f"{mode}, {name}", disable=None):
                found = set(ranked(runner.run(chain, question["question"]).records, arguments.first))
                share = len(found & set(question["gold"])) / len(question["gold"])
                recall, whole = recall + share, whole + (share == 1)
            figures[f"{mode}, {name}"] = {
                "gold_recall@10": round(recall / len(questions), 4),
                "all_gold@10": round(whole / len(questions), 4),
                "seconds_each": round((time.perf_counter() - start) / len(questions), 4),
            }
            print(f"{mode}, {name}: {figures[f'{mode}, {name}']}", flush=True)
            save(arguments, {**report, "figures": figures})
    return {**report, "figures": figures}


def bank_retriever(
    arguments: argparse.Namespace, passages: Sequence[tuple[str, str]], report: dict[str, Any]
) -> BankRetriever:
    from peft import PeftModel

    fields = json.loads((arguments.adapter / "memory.json").read_text())
    model = MSAForCausalLM.from_base(arguments.base, dtype=torch.float32, **fields)
    model = PeftModel.from_pretrained(model, arguments.adapter).eval().to(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    protocol = PromptProtocol.from_pretrained(arguments.adapter)
    start = time.perf_counter()
    wrapped = protocol.encode_corpus([{"key": key, "text": text} for key, text in passages], tokenizer)
    bank = model.encode_documents(wrapped, tokenizer, batch_tokens=4096)
    report |= {"tokens": bank.num_tokens, "encoding_s": round(time.perf_counter() - start, 1)}
    add_lexical_index(bank)
    fusion = FusionWeights.from_pretrained(arguments.adapter)
    return BankRetriever(bank, model=model, tokenizer=tokenizer, protocol=protocol, fusion=fusion)


def save(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    if arguments.out is not None:
        versions = {name: metadata.version(name) for name in ("torch", "transformers")}
        made_on = {"threads": torch.get_num_threads(), "versions": versions}
        arguments.out.write_text(json.dumps({**report, **made_on}, indent=1) + "\n")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    world = parts.add_parser("worlds")
    world.add_argument("checkpoint")
    world.add_argument("--documents", type=int, default=150)
    world.add_argument("--systems", nargs="*", help="some of them, by name")
    asked = parts.add_parser("real")
    asked.add_argument("data", type=Path)
    asked.add_argument("--base", type=Path, help="a plain checkpoint; with it --adapter")
    asked.add_argument("--adapter", type=Path)
    asked.add_argument("--device", default="cpu", help="of the checkpoint (default: cpu)")
    asked.add_argument("--passages", type=int, help="gold ones and others, so many in all (default: all)")
    asked.add_argument("--split", default="dev")
    asked.add_argument("--best", type=int, default=2, help="passages whose names the second hop searches for")
    asked.add_argument("--names", type=int, default=10)
    asked.add_argument("--each", type=int, default=5, help="passages of each search of the second hop")
    asked.add_argument("--first", type=int, default=4, help="passages of the first search that come first")
    for part, run, count in ((world, worlds, 16), (asked, real, 200)):
        part.add_argument("--questions", type=int, default=count, help=f"of each kind (default: {count})")
        part.add_argument("--seed", type=int, default=99)
        part.add_argument(
            "--threads", type=int, default=1, help="of torch; more wait for each other on a loaded machine"
        )
        part.add_argument("--out", type=Path)
        part.set_defaults(run=run)
    arguments = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    save(arguments, arguments.run(arguments))


if __name__ == "__main__":
    main()
