"""Diagnoses whose figures are known beforehand: models that answer what they can read, routers that are rigged."""

import json
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import COMPACT, PUBLISHED, TEXTS, Script, bank_of, byte_tokenizer, memory_model
from torch import nn

from msa_hf.data.questions import DataError
from msa_hf.evaluation import diagnosis
from msa_hf.evaluation.judged_questions import read_judged
from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.training import diagnose, router_recall

UNKNOWN = "The memory does not say."
QUESTIONS: list[dict[str, Any]] = [
    {"question": "How far is the amber?", "answer": "10 miles", "positives": ["0"], "kind": "one_hop"},
    {"question": "How far is the birch?", "answer": "11 miles", "positives": ["1"], "kind": "one_hop"},
    {"question": "Is the cedar by the dune?", "answer": "by the heath", "positives": ["2", "7"], "kind": "two_hop"},
    {"question": "How far is the moon?", "answer": UNKNOWN, "positives": [], "kind": "unanswerable"},
    {"question": "How tall is the ember?", "answer": UNKNOWN, "positives": ["4"], "kind": "unanswerable"},
]
# What the model names: the right document, a wrong one, both in their order, none, and the right one.
NAMED = [["[0]<|docs|>"], ["[5]<|docs|>"], ["[2]<|docs|>", "[7]<|docs|>"], [], ["[4]<|docs|>"]]
SAYS = {item["question"]: [*named, "<|answer|>"] for item, named in zip(QUESTIONS, NAMED, strict=True)}


class Named(Script):
    """Names what it is told to, and lets the measurement of routers pass."""

    def _override(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if output.past_key_values is not None:
            super()._override(model, args, kwargs, output)


class Reader(Named):
    """Names what it is told to and answers rightly where it reads every document that it takes; with others it says
    something wrong, with none it says nothing, or that it does not know where there is none to read.

    Attributes:
        forced: the documents forced on each row of a prefill with a memory, in the order of the prefills.
        routes: which tokens of those rows route.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer, COMPACT, SAYS)
        self.forced: list[list[int]] = []
        self.routes: list[list[bool]] = []

    def _override(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["input_ids"].shape[1] > 1 and kwargs.get("force_documents") is not None:
            self.forced += kwargs["force_documents"].tolist()
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(kwargs["input_ids"]) if mask is None else mask
            rows = zip(kwargs["routing_mask"], mask.bool(), strict=True)
            self.routes += [routes[real].tolist() for routes, real in rows]
        super()._override(model, args, kwargs, output)

    def _emission(self, transcript: str) -> list[int] | None:
        if COMPACT.retrieval_end not in transcript:
            return super()._emission(transcript)
        question = next(item for item in QUESTIONS if item["question"] in transcript)
        read = {str(place) for place, text in enumerate(TEXTS) if f"[{place}] {text}\n" in transcript}
        if question["positives"] and read >= set(question["positives"]):
            return self.tokens(question["answer"])
        return self.tokens("something wrong" if read else "" if question["positives"] else UNKNOWN)


@pytest.fixture(scope="module")
def compact() -> Iterator[SimpleNamespace]:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    yield SimpleNamespace(model=model, tokenizer=tokenizer, bank=bank_of(model, tokenizer, COMPACT))


def figures(found: Any, condition: str) -> dict[str, Any]:
    """Exact answers by kind, and of all together what was empty, refused and read."""
    answers = found.answers[condition]
    every = answers["all"]
    shares = {"empty": every.empty, "refused": every.refused, "read": every.gold_read}
    return {**{kind: item.exact for kind, item in answers.items()}, **shares}


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(compact: SimpleNamespace) -> SimpleNamespace:
    """A diagnosis of the reader, and the reader."""
    with Reader(compact.model, compact.tokenizer) as reader:
        found = diagnose(
            compact.model,
            compact.tokenizer,
            compact.bank,
            QUESTIONS,
            COMPACT,
            batch_size=3,
            show_progress=False,
            refusal=UNKNOWN,
            select="generate",
            max_new_tokens=32,
        )
    return SimpleNamespace(found=found, reader=reader)


@pytest.mark.parametrize(
    "condition, one_hop, two_hop, unanswerable, every, empty, refused, gold",
    [
        ("routed", 1 / 2, 1, 1, 4 / 5, 0, 2 / 5, 3 / 4),  # the second one-hop question read another document
        ("single_round", 1 / 2, 0, 1, 3 / 5, 0, 2 / 5, 2.5 / 4),  # and the two-hop question one of two
        ("forced_gold", 1, 1, 1, 1, 0, 1 / 4, 1),  # of four: one has no documents
        ("gold_text", 1, 1, 1, 1, 0, 1 / 4, 1),
        ("bm25", 1, 0, 1 / 2, 3 / 5, 0, 1 / 5, 3.5 / 4),  # words find both names of the two-hop question, not the hop
        ("no_memory", 0, 0, 1 / 2, 1 / 5, 4 / 5, 1 / 5, 0),
    ],
)
def test_conditions_show_what_a_reader_of_texts_can_answer(
    read: SimpleNamespace,
    condition: str,
    one_hop: float,
    two_hop: float,
    unanswerable: float,
    every: float,
    empty: float,
    refused: float,
    gold: float,
) -> None:
    shares = {"one_hop": one_hop, "two_hop": two_hop, "unanswerable": unanswerable, "all": every}
    assert figures(read.found, condition) == pytest.approx({**shares, "empty": empty, "refused": refused, "read": gold})


def test_questions_are_counted_where_they_are_asked(read: SimpleNamespace) -> None:
    counts = {
        name: {kind: item.questions for kind, item in kinds.items()} for name, kinds in read.found.answers.items()
    }
    every = {"one_hop": 2, "two_hop": 1, "unanswerable": 2, "all": 5}
    with_gold = {**every, "unanswerable": 1, "all": 4}
    assert counts == {name: with_gold if name in ("forced_gold", "gold_text") else every for name in counts}
    assert list(counts) == ["routed", "single_round", "forced_gold", "gold_text", "bm25", "no_memory"]
    assert read.found.questions == {"one_hop": 2, "two_hop": 1, "unanswerable": 2}
    assert read.found.predictions["forced_gold"] == ["10 miles", "11 miles", "by the heath", None, UNKNOWN]
    assert read.found.predictions["no_memory"] == ["", "", "", UNKNOWN, ""]


def test_gold_documents_are_attended_to_and_read_round_by_round(read: SimpleNamespace) -> None:
    """What a memory layer sees is the documents, padded by -1; what is read is one document a round, in their order."""
    assert [sorted(row) for row in read.reader.forced] == [[-1, 0], [-1, 1], [2, 7], [4]]
    rounds = [[(place, TEXTS[place])] for place in (2, 7)]
    segments = COMPACT.transcript(read.reader.tokenizer, QUESTIONS[2]["question"], rounds, closed=True)
    assert read.reader.routes[2] == PromptProtocol.join(segments)[1]
    wanted = f"[2]<|docs|>[2] {TEXTS[2]}\n<|ids|>[7]<|docs|>[7] {TEXTS[7]}\n<|ids|><|answer|>Is the cedar"
    shown = [row for rows in read.reader.transcripts for row in rows]
    assert sum(wanted in row for row in shown) == 3  # routed by itself, forced, and as text alone


def test_rounds_of_several_documents_are_read_together(compact: SimpleNamespace) -> None:
    questions = [{**QUESTIONS[2], "rounds": [["7", "2"]]}]
    with Reader(compact.model, compact.tokenizer) as reader:
        diagnose(compact.model, compact.tokenizer, compact.bank, questions, COMPACT, ["gold_text"], show_progress=False)
    assert f"[7][2]<|docs|>[7] {TEXTS[7]}\n[2] {TEXTS[2]}\n<|ids|><|answer|>" in reader.transcripts[0][0]


def test_recall_after_rounds_that_were_read(compact: SimpleNamespace) -> None:
    """What the routers choose behind the texts of the first round, and whether the second document is among it."""
    model, tokenizer, bank = compact.model, compact.tokenizer, compact.bank
    rounds = [[(2, TEXTS[2])]]
    ids, routes = PromptProtocol.join(COMPACT.transcript(tokenizer, QUESTIONS[2]["question"], rounds))
    with torch.no_grad():
        output = model(torch.tensor([ids]), memory=bank, routing_mask=torch.tensor([routes]))
    ranks = {layer: item.documents[0].tolist() for layer, item in output.routing.items()}
    for k in (1, 2, 4):
        found = router_recall(model, tokenizer, bank, QUESTIONS, k=k, protocol=COMPACT, rounds_read=1)
        assert found["first_layers"] == {layer: float(7 in chosen[:k]) for layer, chosen in ranks.items()}
        assert found["questions"] == 1
    ids, routes = PromptProtocol.join(COMPACT.transcript(tokenizer, QUESTIONS[2]["question"]))
    with torch.no_grad():
        before = model(torch.tensor([ids]), memory=bank, routing_mask=torch.tensor([routes])).routing
    assert any(before[layer].documents[0].tolist() != chosen for layer, chosen in ranks.items())  # or nothing is shown


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds_read": 1}, "needs a protocol"),
        ({"rounds_read": 2, "protocol": COMPACT}, "after 2 rounds"),
    ],
)
def test_rounds_that_cannot_have_been_read(compact: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_recall(compact.model, compact.tokenizer, compact.bank, QUESTIONS, **options)


def test_the_figures_do_not_depend_on_the_batch(compact: SimpleNamespace) -> None:
    """A model that nobody scripts, by the router: one question at a time and all at once."""
    first, second = (
        diagnose(
            compact.model,
            compact.tokenizer,
            compact.bank,
            QUESTIONS,
            COMPACT,
            batch_size=size,
            show_progress=False,
            documents_per_round=2,
            max_new_tokens=6,
        )
        for size in (1, 5)
    )
    assert first.to_dict() == second.to_dict()


@pytest.mark.parametrize(
    "conditions, wanted", [(["routed", "bm25"], [2, 1]), (["bm25"], [2, 2, 2])], ids=["as-routed", "as-many-as-may-be"]
)
def test_bm25_reads_as_many_as_are_routed(compact: SimpleNamespace, conditions: list[str], wanted: list[int]) -> None:
    """Two and then one; where routing is not measured, two a round in three rounds. By rounds of two."""
    says = {"amber": ["[9][8]<|docs|>", "[7]<|docs|>", "<|answer|>"]}
    with Named(compact.model, compact.tokenizer, COMPACT, says) as script:
        diagnose(
            compact.model,
            compact.tokenizer,
            compact.bank,
            QUESTIONS[:1],
            COMPACT,
            conditions,
            show_progress=False,
            max_rounds=3,
            documents_per_round=2,
            select="generate",
            max_new_tokens=2,
        )
    rounds = script.transcripts[-1][0].split(COMPACT.ids_end)[1:]
    assert [sum(f"[{n}] {text}" in item for n, text in enumerate(TEXTS)) for item in rounds] == wanted
    assert TEXTS[0] in rounds[0]  # the only one that has the question's rare word


# Prompts --------------------------------------------------------------------------------------------------------------


def generated(model: Any, tokenizer: Any, ids: Sequence[int], **kwargs: Any) -> list[int]:
    rows = torch.tensor([list(ids)])
    output = model.generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=8, do_sample=False, **kwargs
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("condition", ["gold_text", "no_memory", "forced_gold"])
def test_a_protocols_prompts_are_its_transcripts(condition: str) -> None:
    """Of the published protocol, which has a prefix. Without the memory: as the plain base continues prefix and
    transcript. With forced documents: as with a bank that holds no others."""
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, PUBLISHED)
    bank = bank_of(model, tokenizer, PUBLISHED)
    found = diagnose(
        model, tokenizer, bank, QUESTIONS[:3], PUBLISHED, [condition], show_progress=False, max_new_tokens=8
    )
    for question, prediction in zip(QUESTIONS, found.predictions[condition], strict=False):
        places = [int(key) for key in question["positives"]]
        rounds = [] if condition == "no_memory" else [[(place, TEXTS[place])] for place in places]
        ids, routes = PromptProtocol.join(PUBLISHED.transcript(tokenizer, question["question"], rounds, closed=True))
        if condition == "forced_gold":
            rows = [PUBLISHED.document_row(place, TEXTS[place], tokenizer) for place in places]
            gold = model.encode_documents(rows, tokenizer, show_progress=False)
            written = generated(model, tokenizer, ids, memory=gold, routing_mask=torch.tensor([routes]))
        else:
            written = generated(model, tokenizer, [*PUBLISHED.prefix_token_ids(tokenizer), *ids])
        stops = [place for place, token in enumerate(written) if token in (tokenizer.eos_token_id, 3)]
        text = tokenizer.decode(written[: min(stops, default=8)], skip_special_tokens=True)
        assert prediction == PUBLISHED.answer_text(text) != ""


@pytest.mark.parametrize("condition", ["routed", "forced_gold", "gold_text", "no_memory", "bm25"])
def test_without_a_protocol_texts_and_question_stand_on_lines(compact: SimpleNamespace, condition: str) -> None:
    model, tokenizer = compact.model, compact.tokenizer
    bank = model.encode_documents(TEXTS, tokenizer, show_progress=False)
    found = diagnose(
        model, tokenizer, bank, QUESTIONS[:3], None, [condition], batch_size=2, show_progress=False, max_new_tokens=8
    )
    for question, prediction in zip(QUESTIONS, found.predictions[condition], strict=False):
        places = [int(key) for key in question["positives"]]
        texts = [TEXTS[place] for place in places] if condition == "gold_text" else []
        if condition == "bm25":  # as many as a layer attends to
            texts = [TEXTS[place] for place in diagnosis.BM25(TEXTS).best(question["question"], 4)]
            assert len(texts) == 4
        ids = tokenizer("".join(f"{line}\n" for line in [*texts, question["question"]]))["input_ids"]
        memory: dict[str, Any] = {}
        if condition == "routed":
            memory = {"memory": bank}
        if condition == "forced_gold":
            gold = [TEXTS[place] for place in places]
            memory = {"memory": model.encode_documents(gold, tokenizer, show_progress=False)}
        written = generated(model, tokenizer, ids, **memory)
        stop = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else len(written)
        assert prediction == tokenizer.decode(written[:stop], skip_special_tokens=True).strip() != ""


def test_texts_that_do_not_fit_are_left_out_and_counted(compact: SimpleNamespace) -> None:
    """Of two documents, with room for one; the last is left out, and does not count as read."""
    model, tokenizer = compact.model, compact.tokenizer
    length = len(
        PromptProtocol.join(COMPACT.transcript(tokenizer, "Is the cedar by the dune?", [[(2, TEXTS[2])]], True))[0]
    )
    positions = model.config.max_position_embeddings
    try:
        model.config.max_position_embeddings = model.config.first_position + length + 4
        found = diagnose(
            model,
            tokenizer,
            compact.bank,
            [QUESTIONS[2]],
            COMPACT,
            ["gold_text"],
            show_progress=False,
            max_new_tokens=4,
        )
        with pytest.raises(ValueError, match=r"'Is the cedar .* 4 fit beside an answer of"):
            diagnose(
                model, tokenizer, compact.bank, [QUESTIONS[2]], COMPACT, ["no_memory"], max_new_tokens=length,
                show_progress=False,
            )  # fmt: skip
    finally:
        model.config.max_position_embeddings = positions
    assert found.left_out == {"gold_text": 1}
    assert found.answers["gold_text"]["two_hop"].gold_read == 0.5
    assert "gold_text: 1 texts were left out" in str(found)


# What questions say ---------------------------------------------------------------------------------------------------


def test_questions_without_an_answer_are_only_routed(compact: SimpleNamespace) -> None:
    questions = [QUESTIONS[0], {"question": "Where is the birch?", "positives": ["1"]}, {"question": "Why?"}]
    found = diagnose(
        compact.model,
        compact.tokenizer,
        compact.bank,
        questions,
        COMPACT,
        ["no_memory"],
        show_progress=False,
        max_new_tokens=2,
    )
    assert found.router["questions"] == 2 and found.router["wanted"] == 2
    assert found.answers["no_memory"]["all"].questions == 1
    assert [text is None for text in found.predictions["no_memory"]] == [False, True, True]


def test_kinds_are_whether_a_question_can_be_answered_where_none_are_given(compact: SimpleNamespace) -> None:
    """Unanswerable: without positives, and then the refusal is the answer, or answered by the refusal."""
    questions = [{name: item[name] for name in ("question", "answer", "positives")} for item in QUESTIONS]
    del questions[3]["answer"]
    with Reader(compact.model, compact.tokenizer):
        found = diagnose(
            compact.model,
            compact.tokenizer,
            compact.bank,
            questions,
            COMPACT,
            ["no_memory"],
            show_progress=False,
            refusal=UNKNOWN,
        )
    assert found.questions == {"answerable": 3, "unanswerable": 2}
    assert found.answers["no_memory"]["unanswerable"].exact == 0.5


def test_ids_named_are_compared_with_the_first_round(compact: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freely and constrained; for a two-hop question the first document alone is right."""
    selections = []

    class Recorded(MemoryInterleave):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            selections.append((self.select, self.max_rounds))

    monkeypatch.setattr(diagnosis, "MemoryInterleave", Recorded)
    monkeypatch.setattr(compact.model.config, "top_k", len(TEXTS))  # every document is a candidate
    with Reader(compact.model, compact.tokenizer):
        found = diagnose(
            compact.model, compact.tokenizer, compact.bank, QUESTIONS, COMPACT, ["ids"], show_progress=False
        )
    assert selections == [("generate", 1), ("constrained", 1)]
    shares = {"one_hop": 0.5, "two_hop": 1.0, "unanswerable": 1.0, "all": 0.75}
    assert found.ids == {"generate": shares, "constrained": shares}
    assert "constrained" in str(found)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conditions": ["routed", "magic"]}, "got 'magic'"),
        ({"conditions": ["single_round"], "protocol": None}, "'single_round' needs a protocol"),
        ({"conditions": ["ids"], "protocol": None}, "'ids' needs a protocol"),
        ({"questions": []}, "`questions` is empty"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"k": 0}, "`k` must be at least 1, got 0"),
        ({"questions": [{**QUESTIONS[0], "positives": ["x"]}]}, "names 'x', which the bank does not hold"),
        ({"questions": [{**QUESTIONS[0], "rounds": [["1"]]}]}, "`rounds` of 'How far is the amber.' are not"),
        ({"questions": [{**QUESTIONS[0], "rounds": [["0"], ["0"]]}]}, "`rounds` of 'How far is the amber.' are not"),
        ({"max_rounds": -1}, "`max_rounds` must be an integer of at least 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(compact: SimpleNamespace, changes: dict[str, Any], message: str) -> None:
    arguments = {"questions": QUESTIONS, "protocol": COMPACT, "show_progress": False, "max_new_tokens": 1, **changes}
    with pytest.raises(ValueError, match=message):
        diagnose(compact.model, compact.tokenizer, compact.bank, **arguments)


def test_bm25_without_its_library_names_the_extra(compact: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install msa-hf\[eval\]"):
        diagnose(compact.model, compact.tokenizer, compact.bank, QUESTIONS, COMPACT, ["bm25"])


def test_a_bank_without_texts_cannot_be_read(compact: SimpleNamespace) -> None:
    rows = [{**row, "text": None} for row in COMPACT.encode_corpus(TEXTS, compact.tokenizer)]
    bank = compact.model.encode_documents(rows, show_progress=False)
    with pytest.raises(ValueError, match="'0' was stored without its text"):
        diagnose(compact.model, compact.tokenizer, bank, QUESTIONS, COMPACT, ["gold_text"], show_progress=False)


def test_the_model_keeps_its_mode_and_has_no_gradients(compact: SimpleNamespace) -> None:
    compact.model.train()
    try:
        diagnose(
            compact.model,
            compact.tokenizer,
            compact.bank,
            QUESTIONS[:1],
            COMPACT,
            ["routed", "no_memory"],
            show_progress=False,
            max_new_tokens=1,
        )
        assert all(module.training for module in compact.model.modules())
    finally:
        compact.model.eval()


# Report ---------------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table_and_json(read: SimpleNamespace) -> None:
    lines = str(read.found).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["condition"][:4] == ["one_hop", "two_hop", "unanswerable", "all"]
    assert rows["bm25"] == ["1.000", "0.000", "0.500", "0.600", "0.000", "0.200", "0.875"]
    assert rows["any"] == [
        f"{read.found.router[name]:.3f}" for name in ("recall", "first", "recall_at_1", "first_at_1")
    ]
    assert "forced_gold: of 4 questions; the others have no positives" in lines
    record = json.loads(read.found.to_json())
    assert record == read.found.to_dict()
    assert record["answers"]["bm25"]["all"]["exact"] == pytest.approx(0.6)
    assert record["router"]["distinct"] == {str(layer): n for layer, n in read.found.router["distinct"].items()}


# Routers --------------------------------------------------------------------------------------------------------------


class Rigged(nn.Module):
    """Chooses the documents that a table gives for the last token of a question, the same in evaluation alone."""

    device = torch.device("cpu")

    def __init__(self, chosen: dict[int, list[list[int]]]) -> None:
        super().__init__()
        self.config = SimpleNamespace(top_k=3, memory_layers=list(chosen))
        self.chosen = chosen

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        assert not self.training
        numbers = input_ids[:, -2].tolist()  # a line break follows
        return SimpleNamespace(
            routing={
                layer: SimpleNamespace(documents=torch.tensor([rows[number] for number in numbers]))
                for layer, rows in self.chosen.items()
            }
        )


def number_tokenizer(text: str, **kwargs: Any) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.split()] + [99]}


def bank_of_keys(count: int) -> Any:
    return SimpleNamespace(documents=SimpleNamespace(position=lambda key: range(count)[int(key)]))


def test_recall_is_counted_for_first_and_all_documents_and_ranks() -> None:
    """Five questions, two layers, worked out by hand; the fourth has no positives and does not count."""
    chosen = {
        2: [[0, 1, 2], [0, 3, 1], [5, 4, -1], [9, 9, 9]],
        5: [[1, 0, 2], [0, 1, 2], [4, 6, 0], [9, 9, 9]],
    }
    questions = [
        {"question": "7 0", "positives": ["0"]},  # found by both, first in the one
        {"question": "7 1", "positives": ["3", "8"]},  # the first of two found by one layer, never in the first place
        {"question": "2", "positives": ["4", "5"]},  # both found by the one; first of all in the other
        {"question": "3", "positives": []},
        {"question": "0", "positives": ["0"]},  # as the first
    ]
    found = router_recall(Rigged(chosen), number_tokenizer, bank_of_keys(10), questions, batch_size=3)
    assert (found["k"], found["questions"], found["wanted"]) == (3, 4, 3)
    assert found["distinct"] == {2: 6, 5: 5}
    expected = {
        "recall": (1 + 1 / 2 + 1 + 1) / 4,
        "layers": {2: (1 + 1 / 2 + 1 + 1) / 4, 5: (1 + 0 + 1 / 2 + 1) / 4},
        "first": 1.0,
        "first_layers": {2: 1.0, 5: 3 / 4},
        "recall_at_1": (1 + 0 + 1 + 1) / 4,
        "layers_at_1": {2: (1 + 0 + 1 / 2 + 1) / 4, 5: (0 + 0 + 1 / 2 + 0) / 4},
        "first_at_1": 3 / 4,
        "first_layers_at_1": {2: 2 / 4, 5: 1 / 4},
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_a_collapsed_router_chooses_few_documents() -> None:
    questions = [{"question": str(n), "positives": [str(n)]} for n in range(8)]
    found = router_recall(Rigged({1: [[0, 1, 2]] * 8}), number_tokenizer, bank_of_keys(8), questions)
    assert (found["distinct"], found["wanted"], found["recall"]) == ({1: 3}, 8, 3 / 8)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_recall_with_a_protocol_is_that_of_the_first_round(compact: SimpleNamespace, k: int) -> None:
    """Markers of the prompt do not route: what is measured is what Memory Interleave chooses."""
    model, tokenizer = compact.model, compact.tokenizer
    names = [text.split()[1] for text in TEXTS]
    questions = [{"question": f"Where is the {name}?", "positives": [str(n)]} for n, name in enumerate(names)]
    found = router_recall(model, tokenizer, compact.bank, questions, k=k, batch_size=5, protocol=COMPACT)
    top_k = model.config.top_k
    chosen: dict[int, list[list[int]]] = {layer: [] for layer in model.config.memory_layers}
    for item in questions:
        ids, routes = PromptProtocol.join(COMPACT.prompt_segments(tokenizer, item["question"]))
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([ids]),
                routing_mask=torch.tensor([routes]),
                memory=compact.bank,
                output_document_scores=True,
            )
        for layer, routing in output.routing.items():
            chosen[layer].append(routing.document_scores[0].argsort(descending=True)[:k].tolist())
    assert found["distinct"] == {layer: len(set(sum(rows, []))) for layer, rows in chosen.items()}  # noqa: RUF017
    assert found["layers"] == pytest.approx(
        {layer: sum(n in row for n, row in enumerate(rows)) / len(TEXTS) for layer, rows in chosen.items()}
    )
    if k == top_k:
        asker = MemoryInterleave(model, tokenizer, compact.bank, COMPACT, max_rounds=1, max_new_tokens=1)
        traces = [answer.trace for answer in asker.ask([item["question"] for item in questions])]
        for layer, rows in chosen.items():
            assert [[choice.position for choice in trace.rounds[0].chosen[layer]] for trace in traces] == rows


# Files ----------------------------------------------------------------------------------------------------------------


def test_questions_are_read_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": "Who?", "answer": None, "more": 1},
        {"question": "Where?", "answer": "here", "positives": ["a", "b"], "rounds": [["a"], ["b"]], "kind": "hops"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_judged(path) == [{"question": "Who?"}, rows[1]]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"answer": "x"}', "questions.jsonl, line 2: the field 'question' is missing"),
        ('{"question": "Who?", "answer": 3}', "questions.jsonl, line 2: 'answer' must be text"),
        ('{"question": "Who?", "kind": " "}', "questions.jsonl, line 2: 'kind' must be text"),
        (
            '{"question": "Who?", "positives": "a"}',
            "questions.jsonl, line 2: 'positives' must be a list",
        ),
        (
            '{"question": "Who?", "positives": [1]}',
            "questions.jsonl, line 2: 'positives' must be a list",
        ),
        ('{"question": "Who?", "rounds": ["a"]}', "questions.jsonl, line 2: 'rounds' must be lists of document keys"),
        ("[]", "questions.jsonl, line 2: not a JSON object"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Any, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"question": "Why?"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read_judged(path)


def test_a_file_without_questions_is_refused(tmp_path: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        read_judged(tmp_path / "empty.jsonl")
