"""Fine-tuning on a user's files: what is refused, what a step is made of, and the script from data to adapter."""

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from peft import PeftModel
from setups import assert_same
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msa_hf import MSAForCausalLM
from msa_hf.data import DataError, read_documents
from msa_hf.data.questions import read_questions
from msa_hf.training import QuestionCollator, router_recall

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune_peft.py"
NAMES = 40
WORDS = ["<pad>", "<eos>", "who", "likes", *(f"name{n}" for n in range(NAMES)), *(f"thing{n}" for n in range(NAMES))]
DOCUMENTS = {f"d{n}": f"name{n} likes thing{(7 * n) % NAMES}" + " likes" * (n % 3) for n in range(NAMES)}
QUESTIONS = [
    {"question": f"who likes name{n}", "answer": f"thing{(7 * n) % NAMES}", "positives": [f"d{n}"]}
    for n in range(NAMES)
]


def word_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side=side
    )


def script() -> Any:
    specification = importlib.util.spec_from_file_location("finetune_peft", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def document_rows() -> list[dict[str, str]]:
    return [{"key": key, "text": text} for key, text in DOCUMENTS.items()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint with a tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    base_model("qwen3").save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "documents": write(tmp_path / "documents.jsonl", document_rows()),
        "questions": write(tmp_path / "questions.jsonl", QUESTIONS),
        "output": tmp_path / "adapter",
    }


def options(base: Path | str, files: dict[str, Path], **extra: Any) -> list[str]:
    given = {"base": base, **files, "top-k": 2, "chunk-size": 2, "pool": 24, "rank": 4, "batch-size": 8, **extra}
    return [item for name, value in given.items() for item in (f"--{name}", *([] if value is True else [str(value)]))]


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_are_read(tmp_path) -> None:
    """Empty lines and a byte order mark are no fault, a positive that is named twice counts once, more fields are left
    alone, and a question may have no positives."""
    path = write(
        tmp_path / "d.jsonl", ["\ufeff" + json.dumps({"key": "a", "text": "é", "x": 1}), "", '{"key":"b","text":"c"}']
    )
    documents = {row["key"]: row["text"] for row in read_documents(path)}
    assert documents == {"a": "é", "b": "c"}
    rows = [
        {"question": "q", "answer": "r", "positives": ["b", "a", "b"]},
        {"question": "q", "answer": "r", "positives": []},
    ]
    questions = read_questions(write(tmp_path / "q.jsonl", rows), documents)
    assert [question["positives"] for question in questions] == [["b", "a"], []]


def test_undecodable_and_missing_files_are_refused(tmp_path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "q", "answer": "r", "positives": []}\n{"question": "\xff"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 2: not UTF-8"):
        read_questions(tmp_path / "q.jsonl", {})
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_questions(tmp_path / "none.jsonl", {})


@pytest.mark.parametrize(
    "row, message",
    [
        (None, "q.jsonl: holds no questions"),
        ({"question": None}, "q.jsonl, line 1: the field 'question' is missing"),
        ({"answer": None}, "q.jsonl, line 1: the field 'answer' is missing"),
        ({"answer": ""}, "q.jsonl, line 1: 'answer' must be text that is not empty"),
        ({"positives": None}, "q.jsonl, line 1: the field 'positives' is missing"),
        ({"positives": "d1"}, "q.jsonl, line 1: 'positives' must be a list of document keys"),
        ({"positives": [1]}, "q.jsonl, line 1: 'positives' must be a list of document keys"),
        ({"positives": ["d1", "d99"]}, "q.jsonl, line 1: 'positives' names 'd99', which is the key of no document"),
    ],
    ids=["none", "no-question", "no-answer", "empty-answer", "no-positives", "one-key", "numbers", "unknown"],
)
def test_bad_questions_are_refused(row, message, tmp_path) -> None:
    """Naming file and line; None takes a field away."""
    rows = []
    if row is not None:
        rows = [{name: value for name, value in {**QUESTIONS[0], **row}.items() if value is not None}]
    with pytest.raises(DataError, match=re.escape(message)):
        read_questions(write(tmp_path / "q.jsonl", rows), DOCUMENTS)


# Steps ----------------------------------------------------------------------------------------------------------------


def keys_of(batch: dict[str, Any]) -> list[str]:
    """The documents of a pool, told by their tokens."""
    tokenizer, pool = word_tokenizer(), batch["documents"]
    key = {text: key for key, text in DOCUMENTS.items()}
    rows = zip(pool["input_ids"], pool["attention_mask"].bool(), strict=True)
    return [key[tokenizer.decode(ids[mask])] for ids, mask in rows]


@pytest.mark.parametrize("pool, expected", [(3, 3), (9, 9), (NAMES, NAMES), (NAMES + 9, NAMES), (1, 3)])
def test_a_pool_holds_the_positives_and_distinct_others(pool, expected) -> None:
    """As many documents as asked for, no more than there are, no fewer than the positives; each once; positions name
    the positives wherever they lie."""
    questions = [{**QUESTIONS[3], "positives": ["d3", "d5"]}, {**QUESTIONS[0], "positives": []}, QUESTIONS[7]]
    collator = QuestionCollator(word_tokenizer(), DOCUMENTS, pool=pool, seed=1)
    places = set()
    for _ in range(8):
        batch = collator(questions)
        keys = keys_of(batch)
        assert len(keys) == len(set(keys)) == expected
        named = [[keys[place] for place in row if place >= 0] for row in batch["positive_docs"].tolist()]
        assert named == [["d3", "d5"], [], ["d7"]]
        places.add(int(batch["positive_docs"][2, 0]))
    assert len(places) > 1, "a positive that always lies at one place can be found without reading"


def test_draws_follow_the_seed() -> None:
    """The same seed and batches give the same pools; another seed others; so does the next batch."""

    def pools(seed: int) -> list[list[str]]:
        collator = QuestionCollator(word_tokenizer(), DOCUMENTS, pool=9, seed=seed)
        state = random.getstate()
        drawn = [keys_of(collator(QUESTIONS[:2])) for _ in range(2)]
        assert random.getstate() == state, "draws must not disturb those of others"
        return drawn

    assert pools(0) == pools(0)
    assert pools(0) != pools(1)
    assert pools(0)[0] != pools(0)[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_hold_question_and_answer_with_labels_on_the_answer(side) -> None:
    tokenizer = word_tokenizer(side)
    longer = {"question": "who who likes name3", "answer": "thing1 likes thing2", "positives": ["d3"]}
    batch = QuestionCollator(tokenizer, DOCUMENTS, pool=4)([QUESTIONS[0], longer])
    mask = batch["attention_mask"].bool()
    texts = [tokenizer.decode(ids[real]) for ids, real in zip(batch["input_ids"], mask, strict=True)]
    assert texts == ["who likes name0 thing0 <eos>", "who who likes name3 thing1 likes thing2 <eos>"]
    labeled = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert labeled == ["thing0 <eos>", "thing1 likes thing2 <eos>"]
    marked = batch["labels"] != -100
    assert torch.equal(batch["labels"][marked], batch["input_ids"][marked]) and bool(mask[marked].all())
    assert mask[0].tolist() == ([False] * 3 + [True] * 5 if side == "left" else [True] * 5 + [False] * 3)


def test_padding_side_changes_no_loss() -> None:
    """What the collator makes is a step of the training forward."""
    model = MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=2, top_k=2)
    questions = [QUESTIONS[0], {"question": "who who likes name3", "answer": "thing1", "positives": ["d3", "d4"]}]
    left, right = (
        model(**QuestionCollator(word_tokenizer(side), DOCUMENTS, pool=8)(questions)) for side in ("left", "right")
    )
    assert_same(left.loss, right.loss)
    assert left.aux_loss.item() > 0 and left.lm_loss.item() > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QuestionCollator(word_tokenizer(), {}), "`documents` is empty"),
        (lambda: QuestionCollator(word_tokenizer(), DOCUMENTS, pool=0), "`pool` must be at least 1, got 0"),
        (lambda: QuestionCollator(word_tokenizer(), {"a": "who", "b": " "}), "'b' has no tokens"),
        (
            lambda: QuestionCollator(word_tokenizer(), DOCUMENTS, max_length=4),
            "'d2' has 5 tokens, above the limit of 4",
        ),
        (
            lambda: QuestionCollator(word_tokenizer(), {"d0": "who"}, max_length=4)([QUESTIONS[0]]),
            "has 5 tokens with its answer, above the limit of 4",
        ),
        (
            lambda: QuestionCollator(word_tokenizer(), {"a": "who"})([QUESTIONS[0]]),
            "names 'd0', which is the key of no",
        ),
    ],
    ids=["none", "pool", "empty", "long", "long-question", "unknown"],
)
def test_what_makes_no_step_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# Recall ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 3, 7, NAMES, NAMES + 5])
def test_recall_counts_what_the_layers_rank_first(k) -> None:
    """Against the ranks of all documents, question by question: for as many documents as the model reads, fewer, more,
    and more than there are; and the model stays in training mode."""
    model = MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=2, top_k=4).train()
    tokenizer = word_tokenizer("left")
    bank = model.encode_documents(document_rows(), tokenizer, show_progress=False)
    questions = [
        {**question, "positives": [f"d{n}", f"d{(n + 9) % NAMES}", f"d{(n + 4) % NAMES}"][: n % 4]}
        for n, question in enumerate(QUESTIONS)
    ]
    result = router_recall(model, tokenizer, bank, questions, k=k, batch_size=7)
    assert model.training
    model.eval()
    share: dict[Any, list[float]] = {layer: [] for layer in (*model.config.memory_layers, "any")}
    chosen: dict[int, set[int]] = {layer: set() for layer in model.config.memory_layers}
    for question in questions:
        gold = {int(key[1:]) for key in question["positives"]}
        if not gold:
            continue
        ids = torch.tensor([tokenizer(question["question"])["input_ids"]])
        with torch.no_grad():
            routing = model(input_ids=ids, memory=bank, output_document_scores=True).routing
        best = {
            layer: item.document_scores[0].argsort(descending=True)[: k or 4].tolist()
            for layer, item in routing.items()
        }
        for layer, documents in best.items():
            share[layer].append(len(gold & {*documents}) / len(gold))
            chosen[layer] |= {*documents}
        share["any"].append(len(gold & set().union(*best.values())) / len(gold))
    mean = {name: sum(shares) / len(shares) for name, shares in share.items()}
    assert result["recall"] == pytest.approx(mean.pop("any"))
    assert result["layers"] == pytest.approx(mean)
    assert result["distinct"] == {layer: len(documents) for layer, documents in chosen.items()}
    assert (result["k"], result["questions"]) == (k or 4, 30)


def test_what_has_no_recall_is_refused() -> None:
    model = MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=2, top_k=4)
    tokenizer = word_tokenizer()
    bank = model.encode_documents(document_rows(), tokenizer, show_progress=False)
    with pytest.raises(ValueError, match="none with positives"):
        router_recall(model, tokenizer, bank, [{**QUESTIONS[0], "positives": []}])
    with pytest.raises(ValueError, match="'x', which the bank does not hold"):
        router_recall(model, tokenizer, bank, [{**QUESTIONS[0], "positives": ["x"]}])
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        router_recall(model, tokenizer, bank, QUESTIONS, k=0)


# The script -----------------------------------------------------------------------------------------------------------


def recalls(printed: str) -> dict[str, tuple[float, float]]:
    """The table: layer -> recall before and after."""
    found = re.findall(r"^ *(\d+|any layer) +([01]\.\d{3}) +([01]\.\d{3})", printed, re.MULTILINE)
    return {layer: (float(before), float(after)) for layer, before, after in found}


@pytest.mark.parametrize("kind", ["plain", "memory"])
def test_the_adapter_comes_back(kind, base, files, tmp_path, capsys) -> None:
    """A few steps on a plain checkpoint and on one with a memory; the expression that the script prints loads a model
    with the trained logits, which are not the base's, in a process that knows the files alone."""
    start = MSAForCausalLM.from_base(base, top_k=2, chunk_size=2)
    if kind == "memory":
        base = tmp_path / "retrofit"
        start.save_pretrained(base)
        word_tokenizer().save_pretrained(base)
    module = script()
    kept: list[Any] = []
    make = module.make_trainer
    module.make_trainer = lambda *args: kept.append(make(*args)) or kept[0]
    assert module.main(options(base, files, steps=3, **{"learning-rate": 1e-2, "eval-questions": 4})) == 0
    printed = capsys.readouterr().out
    assert recalls(printed).keys() == {"2", "3", "any layer"}
    assert f"4 held-out questions, bank of {NAMES} documents" in printed
    expression = printed[printed.index("PeftModel.") :].splitlines()[0]
    loaded = eval(expression, {"PeftModel": PeftModel, "MSAForCausalLM": MSAForCausalLM})
    logits = []
    tokenizer = word_tokenizer()
    batch = tokenizer([question["question"] for question in QUESTIONS[:5]], return_tensors="pt")
    for model in (kept[0].model, loaded, start):
        model.eval()
        bank = model.encode_documents(document_rows(), tokenizer, show_progress=False)
        with torch.no_grad():
            logits.append(model(input_ids=batch["input_ids"], memory=bank).logits)
    assert_same(logits[1], logits[0], tolerance=1e-6)
    assert float((logits[2] - logits[0]).abs().max()) > 1e-2


def test_routers_learn_at_their_own_rate_and_find_more(base, files, capsys) -> None:
    """Routers that nothing but their own learning rate moves find documents, in every layer, for held-out questions,
    whose documents were asked for in other words. Chance is 2 of 40; without a step of its own a router stays there."""
    forms = ("who likes name{}", "name{} likes who", "likes who name{}", "likes name{} who")
    rows = [{**row, "question": form.format(number)} for number, row in enumerate(QUESTIONS) for form in forms]
    write(files["questions"], rows)
    extra = {"steps": 80, "learning-rate": 1e-9, "router-learning-rate": 2e-2, "eval-questions": 16, "batch-size": 16}
    assert script().main(options(base, files, **extra)) == 0
    found = recalls(capsys.readouterr().out)
    assert all(after >= before + 0.25 for before, after in found.values()), found
    assert found["any layer"][1] >= 0.5, found


@pytest.mark.parametrize("extra", [{"bf16": True, "gradient-checkpointing": True}, {"eval-questions": 0}])
def test_options_that_change_how_it_trains(extra, base, files, capsys) -> None:
    """A step with each; without held-out questions there is no table."""
    assert script().main(options(base, files, steps=1, **extra)) == 0
    assert (files["output"] / "adapter_model.safetensors").exists()
    assert bool(recalls(capsys.readouterr().out)) == ("eval-questions" not in extra)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"documents": "none.jsonl"}, "none.jsonl: no such file or directory"),
        ({"base": "none/at/all/here"}, "--base none/at/all/here: "),
        ({"eval-questions": 21}, "--eval-questions 21: of 40 questions with positives at most 20 can be held out"),
        ({"eval-questions": -1}, "--eval-questions must be at least 0, got -1"),
        (
            {"max-length": 4},
            "'d2' has 5 tokens, above the limit of 4, and so are 12 others; split them into documents with keys",
        ),
        ({"questions": SCRIPT}, "finetune_peft.py, line 1: not valid JSON"),
        ({"output": SCRIPT}, "finetune_peft.py: File exists"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(change, message, base, files, capsys) -> None:
    given = {**files, **{name: value for name, value in change.items() if name != "base"}}
    assert script().main(options(change.get("base", base), given, steps=1)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not files["output"].exists()


def test_a_pool_that_leaves_nothing_out_is_remarked_on(base, files, capsys) -> None:
    """Where each layer reads the whole pool there is nothing to choose."""
    assert script().main(options(base, files, steps=1, **{"pool": 2, "batch-size": 2})) == 0
    assert "note: 2 documents a step, of which each layer reads 2" in capsys.readouterr().err
