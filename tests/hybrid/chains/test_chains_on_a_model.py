"""Chains on the small checkpoint: filters of a real bank, the memory model, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.cli import main
from msa_hf.generation import PromptProtocol
from msa_hf.hybrid.chains import BankRetriever, ChainRunner, InterleaveReader, Retrieve, Rule, plan_by_rules
from msa_hf.hybrid.chains.sources import Source
from msa_hf.retrieval import Hit, Why, add_lexical_index

pytest.importorskip("tantivy")
NAME = Path(__file__).parents[3] / "model_cards" / "msa-hf-tiny"
TEXTS = {
    "trial": "The Jethefux Crossing is held at Krikutust Heights. It begins at noon.",
    "place": "Krikutust Heights is known for its roses. The wind blows from the west.",
    "moor": "Drornatho Moor is known for its peat. It has 88,100 inhabitants.",
    "urn": "The Klikinkind Urn was made by Mira Vale. It is kept by Ranturmot Mill.",
}
QUESTION = "What is the venue of the Jethefux Crossing known for?"
RULES = [Rule("the venue of {n}", "Where is {n} held?")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chains")
    model, tokenizer = MSAForCausalLM.from_pretrained(NAME).eval(), AutoTokenizer.from_pretrained(NAME)
    protocol = PromptProtocol.from_pretrained(NAME)
    documents = [
        {"key": key, "text": text, "kind": "event" if key == "trial" else "thing"} for key, text in TEXTS.items()
    ]
    model.encode_documents(protocol.encode_corpus(documents, tokenizer), tokenizer).save_pretrained(root / "bank")
    add_lexical_index(root / "bank")
    return root


@pytest.fixture(scope="module")
def parts(place: Path) -> tuple[Any, ...]:
    model, tokenizer = MSAForCausalLM.from_pretrained(NAME).eval(), AutoTokenizer.from_pretrained(NAME)
    protocol = PromptProtocol.from_pretrained(NAME)
    return model, tokenizer, MemoryBank.from_pretrained(place / "bank", model, tokenizer), protocol


def test_filters_of_a_real_bank(parts: tuple[Any, ...]) -> None:
    model, tokenizer, bank, protocol = parts
    retriever = BankRetriever(bank, model=model, tokenizer=tokenizer, protocol=protocol)
    for mode in ("router", "lexical", "hybrid"):
        found = retriever.retrieve("Krikutust Heights is known for", mode, 1, {"kind": ["thing"]})
        assert [source.key for source in found] == ["place"] and found[0].text == TEXTS["place"]
        assert retriever.retrieve("known", mode, 3, {"kind": ["nothing"]}) == []
    every = retriever.retrieve("Krikutust Heights", "router", 4, {})
    for kind in ("thing", "event"):
        wanted = [item.key for item in every if (item.metadata or {})["kind"] == kind]
        assert [item.key for item in retriever.retrieve("Krikutust Heights", "router", 4, {"kind": [kind]})] == wanted


class Ranked:
    """A bank that finds its documents in their order; each third one is odd."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.looks: list[tuple[int, int | None]] = []

    def __len__(self) -> int:
        return self.size

    def search(self, query: str, k: int, mode: str, **options: Any) -> list[Hit]:
        self.looks.append((k, options.get("depth")))
        return [
            Hit(n + 1, f"d{n}", n, n, -n, "text", {"odd": n % 3 == 2, "far": n == self.size - 1}, Why())
            for n in range(min(k, self.size))
        ]


def test_filters_look_as_far_as_they_must() -> None:
    bank = Ranked(500)
    found = BankRetriever(bank).retrieve("x", "hybrid", 3, {"odd": [True]})
    assert [item.key for item in found] == ["d2", "d5", "d8"] and bank.looks == [(64, None)]
    bank = Ranked(500)
    found = BankRetriever(bank).retrieve("x", "hybrid", 3, {"far": [True]})
    assert [item.key for item in found] == ["d499"] and bank.looks == [(64, None), (256, 256), (500, 500)]
    bank = Ranked(500)
    assert len(BankRetriever(bank).retrieve("x", "lexical", 3, {})) == 3 and bank.looks == [(3, None)]
    assert BankRetriever(Ranked(0)).retrieve("x", "lexical", 3, {}) == []


def test_two_hops_by_the_memory_model(parts: tuple[Any, ...]) -> None:
    model, tokenizer, bank, protocol = parts
    runner = ChainRunner(
        BankRetriever(bank, model=model, tokenizer=tokenizer, protocol=protocol),
        InterleaveReader(model, tokenizer, bank, protocol),
    )
    for retrieve in (None, Retrieve("{question}", "lexical", 1), Retrieve("{question}", "router", 1)):
        result = runner.run(plan_by_rules(QUESTION, RULES, retrieve=retrieve), QUESTION)
        assert result.values == {"hop1": "Krikutust Heights", "hop2": "roses"} and result.answer == "roses"
        assert {"trial", "place"} <= {source["key"] for source in result.sources()}
    reader = InterleaveReader(model, tokenizer, bank, protocol)
    with pytest.raises(ValueError, match="no document 'gone' any more"):
        reader.read("x?", [Source("gone", "text")], 4)
    with torch.no_grad():
        assert reader.read("What is Drornatho Moor known for?", [], 8).sources == ()


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = place / "chain.yaml"
    chain.write_text(
        'name: two\nsteps:\n  - name: where\n    model: memory\n    prompt: "Where is the Jethefux Crossing held?"\n'
        '    retrieve: {query: "Jethefux Crossing", mode: lexical, k: 1}\n'
        '  - name: what\n    model: memory\n    prompt: "What is {where} known for?"\n'
    )
    common = [str(chain), "--bank", str(place / "bank"), "--model", str(NAME), "--question", QUESTION]
    trace = str(place / "trace.jsonl")
    capsys.readouterr()
    assert main(["chain", *common, "--trace", trace]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("roses\nSteps:\n  where: Krikutust Heights [trial]\n  what: roses [place")
    assert main(["chain", *common, "--trace", trace, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] == "roses" and record["resumed"] == 2 and record["values"]["where"] == "Krikutust Heights"
    assert main(["chain", str(chain), "--check"]) == 0
    assert capsys.readouterr().out.endswith("chain.yaml: a chain of 2 steps\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--question", "x"], "give either CHAIN.yaml or --plan"),
        (["chain.yaml"], "nothing to answer"),
        (["gone.yaml", "--question", "x"], "gone.yaml"),
        (["bad.yaml", "--check"], "bad.yaml: step 'a', prompt: there is no step or value 'b'"),
        (["ok.yaml", "--question", "x"], "step 'a' asks the chat model 'chat', which is not there"),
        (["ok.yaml", "--question", "x", "--question", "y", "--trace", "t"], "--trace is of one question"),
        (["ok.yaml", "--question", "x", "--endpoint", "http://x"], "belong together"),
        (["--plan", "model", "--question", "x"], "--plan model needs a chat model"),
        (["ok.yaml", "--question", "x", "--endpoint", "x", "--endpoint-model", "m"], "must begin with http"),
        (["ok.yaml", "--question", "x", "--endpoint", "http://127.0.0.1:1", "--endpoint-model", "m"], "Is it running"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ok.yaml").write_text("name: x\nsteps: [{name: a, prompt: hello}]")
    Path("bad.yaml").write_text("name: x\nsteps: [{name: a, prompt: '{b}'}]")
    assert main(["chain", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("msa-hf: error: ") and says in error
