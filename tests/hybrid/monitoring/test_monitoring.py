"""A monitor of msa-hf-tiny: planted blind spots are flagged, and what it says of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from blind_spots import plant
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.evaluation import UNANSWERABLE, Question, exact_match, make_corpus
from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.hybrid.monitoring import Budget, Finding, Monitor, Watched, calibrate, make_report
from msa_hf.hybrid.monitoring.names import KnownNames, QuestionNames, names_of
from msa_hf.hybrid.monitoring.second_reading import Evidence, SecondReader
from msa_hf.model.memory_msa import DocumentTable
from msa_hf.retrieval import Searcher, add_lexical_index

pytest.importorskip("tantivy")
ROOT = Path(__file__).parents[3]
SEED = 1
CHECKPOINT = ROOT / "model_cards" / "msa-hf-tiny"
KINDS = ("zeroed", "second_hop")
DOCUMENTS = 16
TOP_K = 8  # half of them
HEALTHY = 3  # questions, behind those of the kinds: one_hop, two_hop, unanswerable


@dataclass
class World:
    model: Any
    tokenizer: Any
    protocol: PromptProtocol
    bank: Any
    questions: list[tuple[str, Question]]
    monitor: Monitor
    findings: list[Finding]


@pytest.fixture(scope="module")
def world() -> World:
    model = MSAForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, top_k=TOP_K).eval()
    tokenizer, protocol = AutoTokenizer.from_pretrained(CHECKPOINT), PromptProtocol.from_pretrained(CHECKPOINT)
    prose = ["Tools are kept in the shed behind the house. Paint is kept there too, on the upper shelf by the door."]
    planted = plant(model, tokenizer, protocol, make_corpus(DOCUMENTS, SEED, "test"), 1, 1, prose, KINDS, SEED)
    add_lexical_index(planted.bank)
    questions = [(kind, question) for kind in KINDS for question in planted.questions[kind]]
    questions += [("healthy", question) for question in planted.healthy]
    monitor = Monitor(model, tokenizer, planted.bank, protocol, refusal=UNANSWERABLE, max_new_tokens=12)
    findings = monitor.check([question.text for _, question in questions])
    return World(model, tokenizer, protocol, planted.bank, questions, monitor, findings)


def test_planted_blind_spots_are_flagged_and_good_answers_are_not(world: World) -> None:
    for (kind, question), finding in zip(world.questions, world.findings, strict=True):
        right = exact_match(finding.answer, question.answer)
        assert right == (kind == "healthy"), kind
        assert finding.flagged == (kind != "healthy"), (kind, finding)


def test_the_document_that_routing_missed_is_named(world: World) -> None:
    for (kind, question), finding in zip(world.questions, world.findings, strict=True):
        gold = str(question.positives[-1]) if question.positives else ""
        if kind == "zeroed":
            assert gold not in finding.read and gold in finding.second["texts"].documents, kind
        if question.kind == "two_hop" and kind == "healthy":
            assert gold == finding.read[-1]


def test_costs_are_stated(world: World) -> None:
    for finding in world.findings:
        assert set(finding.cost) == {"answer", "routing", "denser", "hybrid", "texts"}
        assert all(cost.seconds > 0 for cost in finding.cost.values())
        assert all(finding.cost[part].tokens > 20 for part in ("answer", "denser", "hybrid", "texts"))
        assert finding.total_cost.tokens == sum(cost.tokens for cost in finding.cost.values())


def test_given_answers_are_checked_and_cost_nothing(world: World) -> None:
    """Those with a trace are not asked again; of a text the routing is found by asking."""
    texts = [question.text for _, question in world.questions[-HEALTHY:][:2]]
    asker = MemoryInterleave(world.model, world.tokenizer, world.bank, world.protocol, max_new_tokens=12)
    monitor = Monitor(
        world.model,
        world.tokenizer,
        world.bank,
        world.protocol,
        checks=["texts"],
        refusal=UNANSWERABLE,
        max_new_tokens=12,
    )
    traced, said = monitor.check(texts, [asker.ask(texts[0]), "Nobody knows."])
    ours = world.findings[-HEALTHY]
    same = {name: pytest.approx(ours.signals[name], abs=1e-4) for name in traced.signals}
    assert (
        "answer" not in traced.cost
        and said.cost["answer"].tokens > 20
        and traced.signals == same
        and "texts_disagree" in same
    )
    assert said.answer == "Nobody knows." and said.flagged and said.signals["texts_disagree"] > 1.0
    watched = Watched(asker.ask, monitor, rate=1.0)
    assert watched(texts[0]).text == ours.answer
    assert [item.signals for item in watched.work()] == [same]


def test_the_budget_ends_the_work(world: World) -> None:
    texts = [question.text for _, question in world.questions[:3]]
    monitor = Monitor(
        world.model, world.tokenizer, world.bank, world.protocol, checks=(), batch_size=1, max_new_tokens=4
    )
    assert len(monitor.check(texts, budget=Budget(questions=2))) == 2
    assert len(monitor.check(texts, budget=Budget(seconds=1e-9))) == 1, "a batch that has begun is finished"
    assert len(monitor.check(texts, budget=Budget(tokens=1))) == 1
    assert monitor.check(texts, budget=Budget(questions=0)) == []


def test_an_advantage_is_the_difference_of_log_likelihoods(world: World) -> None:
    """Against one forward for each answer, with the texts in the prompt and with a memory."""
    reader = SecondReader(world.model, world.tokenizer, world.bank, world.protocol, 16)
    question = world.questions[-HEALTHY][1]
    gold = question.positives[0]
    for evidence in (Evidence([[gold]]), Evidence([[gold]], [gold, (gold + 1) % DOCUMENTS])):
        (reading,) = reader.read([question.text], [evidence], ["Somebody else."])
        prompt, routes = reader.writer.prompt(question.text, evidence.rounds)[0]
        logs = []
        for answer in (reading.text, "Somebody else."):
            ids = list(world.protocol.answer_segment(world.tokenizer, answer).input_ids)
            inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt + ids])}
            if evidence.attended is not None:
                inputs |= {"memory": world.bank, "force_documents": torch.tensor([list(evidence.attended)])}
                inputs["routing_mask"] = torch.tensor([routes + [False] * len(ids)])
            with torch.no_grad():
                logits = world.model(**inputs).logits[0].log_softmax(-1)
            logs.append(sum(float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(ids)))
        assert exact_match(reading.text, question.answer)
        assert reading.advantage == pytest.approx(logs[0] - logs[1], abs=1e-3) and reading.advantage > 0
        assert reader.read([question.text], [evidence], [reading.text])[0].advantage == 0.0


def test_the_report_says_what_to_do(world: World) -> None:
    report = make_report(world.monitor, world.findings, asked=10, probes=2)
    text = report.to_markdown()
    assert "2 of 5 questions are to be looked at; 16 documents" in text and "5 more questions were left out" in text
    assert "**Not calibrated**" in text and "To do: Look at the documents" in text
    first = report.flagged[0]
    assert f"## 1. {first.question}" in text and f"`{first.second['texts'].documents[0]}`" in text
    record = json.loads(report.to_json())
    assert (record["asked"], record["checked"], record["flagged"]) == (10, 5, 2)
    assert [item["flagged"] for item in record["findings"]] == [True] * 2 + [False] * 3
    assert record["cost"]["texts"]["tokens"] > 100 and record["probes"] == [], "all documents were routed"
    assert set(record["never_routed"]).isdisjoint({key for item in world.findings for key in item.read})
    with pytest.raises(ValueError, match="no findings to report"):
        make_report(world.monitor, [])


def test_a_calibration_decides(world: World) -> None:
    """With thresholds that all of these questions keep, none is flagged; the report tells of the guarantee."""
    signals = [finding.signals for finding in world.findings]
    monitor = Monitor(world.model, world.tokenizer, world.bank, world.protocol, checks=(), max_new_tokens=16)
    names = set(monitor.check([world.questions[-1][1].text])[0].signals)
    kept = [{name: value for name, value in item.items() if name in names} for item in signals]
    monitor.calibration = calibrate(kept * 20, 0.05, confidence=0)
    findings = monitor.check([question.text for _, question in world.questions])
    assert not any(finding.flagged for finding in findings)
    assert all(finding.p_value is not None and 0 < finding.p_value <= 1 for finding in findings)
    report = make_report(monitor, findings)
    assert "at most 5.0% are flagged" in report.to_markdown() and report.drift is not None
    assert not report.drift.drifted


def test_names_that_no_document_has_make_an_answer_worth_less(world: World) -> None:
    texts = ["Ada Quorn keeps bees.", "Ada Velt keeps ducks, as Ada does.", "It rains on the hill."]
    bank = world.model.encode_documents(texts, world.tokenizer, show_progress=False)
    add_lexical_index(bank)
    searcher = Searcher(bank)

    def names(question: str, read: set[int]) -> KnownNames:
        return QuestionNames(searcher, question).known(searcher.rankings("lexical", [question], 10)[0], read)

    def weight(word: str) -> float:
        return searcher.rankings("lexical", [word], 1)[0][0][1]

    assert names("What does Ada Quorn keep?", {0}) == KnownNames(
        pytest.approx(_share(weight("Ada"), weight("Quorn"))), 1.0
    )
    assert names("What does Ada Quorn keep?", {2}) == KnownNames(1.0, 0.0)
    unknown = math.log(1 + 3.5 / 0.5)  # a word of no document, of three
    assert names("What does Ada Holm keep?", set()).other == pytest.approx(_share(weight("Ada"), unknown))
    both = QuestionNames(searcher, "Do Ada Quorn and Ada Velt meet?")
    assert both.share([0]) < 1.0 == both.share([0, 1]) and both.share([2]) == both.share([]) == 0.0
    assert QuestionNames(searcher, "who is he?").share([]) == 1.0, "without names nothing is missing"
    assert names("where is rain", {0}) == names("Who is he?", {0}) == KnownNames(1.0, 0.0)
    assert names_of("Who knows Ada's hill, Bo?") == ["Ada", "Bo"]


def _share(there: float, missing: float) -> float:
    return there / (there + missing)


def test_without_a_protocol(world: World) -> None:
    """Plain questions: memory layers attend to what is routed, and nothing is read but by the check of texts."""
    texts = ["The roses are cut in March.", "The hedge is cut in June.", "The printer was paid twice.", "It rains."]
    bank = world.model.encode_documents(texts, world.tokenizer, show_progress=False)
    add_lexical_index(bank)
    monitor = Monitor(world.model, world.tokenizer, bank, max_new_tokens=4)
    found = monitor.check(["When are the roses cut?", "Who was paid?"], ["In March.", None])
    assert found[0].answer == "In March." and [len(item.read) for item in found] == [4, 4]
    assert set(found[0].second) == {"denser", "hybrid", "texts"} and found[0].signals["lexical_gap"] == 0.0


def test_mistakes_are_named_with_their_remedy(world: World) -> None:
    model, tokenizer, bank, protocol = world.model, world.tokenizer, world.bank, world.protocol
    with pytest.raises(ValueError, match="`questions` is empty"):
        world.monitor.check([])
    with pytest.raises(ValueError, match="Question 1 is ' '"):
        world.monitor.check(["Who?", " "])
    with pytest.raises(ValueError, match="1 entries for 2 questions"):
        world.monitor.check(["Who?", "Where?"], ["I"])
    with pytest.raises(ValueError, match="no check 'foo'; there are denser, hybrid, texts"):
        Monitor(model, tokenizer, bank, protocol, checks=["foo"])
    with pytest.raises(ValueError, match="`denser` must be an integer of at least 2"):
        Monitor(model, tokenizer, bank, protocol, denser=1)
    rows = list(protocol.encode_corpus(["The roses are cut in March."], tokenizer))
    plain = model.encode_documents(rows, tokenizer, show_progress=False)
    assert Monitor(model, tokenizer, plain, protocol).checks == ["denser", "texts"]
    with pytest.raises(ValueError, match=r"no lexical index. Make one: `msa-hf bank index BANK --lexical`"):
        Monitor(model, tokenizer, plain, protocol, checks=["hybrid"])
    plain.documents = DocumentTable(plain.documents.to_arrow().set_column(1, "text", [[None]]))
    with pytest.raises(ValueError, match="made without texts, which the checks denser, texts read"):
        Monitor(model, tokenizer, plain, protocol)
    assert Monitor(model, tokenizer, plain, protocol, checks=()).checks == []
    empty = BankStore(model, None, tokenizer, protocol)
    with pytest.raises(ValueError, match="has no documents"):
        Monitor(model, tokenizer, empty, protocol)
