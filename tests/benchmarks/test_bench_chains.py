"""benchmarks/bench_chains.py, rehearsed: questions of the right hops, and figures of both parts."""

import json
import lzma
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from msa_hf.hybrid.chains import plan_by_rules
from msa_hf.synthetic import make_corpus

pytest.importorskip("tantivy")
ROOT = Path(__file__).parents[2]
BENCH = runpy.run_path(str(ROOT / "benchmarks" / "bench_chains.py"))


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_questions_have_their_hops_and_their_answer_in_the_last_document(hops: int) -> None:
    corpus = make_corpus(120, seed=5, split="test", linked_share=1.0)
    texts = corpus.texts()
    asked = BENCH["questions_of"](corpus, hops, 8, seed=5)
    assert len({question.text for question in asked}) == 8
    for question in asked:
        assert len(set(question.gold)) == hops and question.answer in texts[question.gold[-1]]
        assert not any(question.answer in texts[place] for place in question.gold[:-1])
        names = [str(name) for name in corpus.names() if name is not None and str(name) in question.text]
        assert names == [corpus.names()[question.gold[0]]]
        assert len(plan_by_rules(question.text, BENCH["world_rules"]()).steps) == hops


def test_worlds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "worlds.json"
    options = ["--documents", "20", "--questions", "1", "--systems", "chain, lexical", "--out", str(out)]
    BENCH["main"](["worlds", str(ROOT / "model_cards" / "msa-hf-tiny"), *options])
    figures = json.loads(out.read_text())["figures"]["chain, lexical"]
    assert set(figures) == {"1", "2", "3", "4"} and figures["1"]["questions"] == 1 == figures["1"]["all_gold_read"]


def test_real_questions_need_the_second_hop(tmp_path: Path) -> None:
    noise = [f"The weather in spring {number} was mild and the harvest fair." for number in range(30)]
    documents = {
        "lamp": ("Oskel Lantern", "The Oskel Lantern was made by Mira Vale."),
        "mira": ("Mira Vale", "Mira Vale was born in Harrow Bay."),
        **{f"n{number}": ("Weather", text) for number, text in enumerate(noise)},
    }
    questions = [{"question": "Where was the maker of the Oskel Lantern from?", "gold": ["lamp", "mira"]}]
    rows = {
        "documents": [{"key": key, "title": title, "text": text} for key, (title, text) in documents.items()],
        "questions.dev": questions,
    }
    for name, records in rows.items():
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    out = tmp_path / "real.json"
    BENCH["main"](["real", str(tmp_path), "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["passages"] == 32 and report["questions"] == 1
    assert report["figures"]["lexical, one search"]["gold_recall@10"] == 0.5
    assert report["figures"]["lexical, two hops"]["all_gold@10"] == 1.0
