"""Training on a protocol's transcripts: what the rows say, which tokens are learnt, and which route."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from setups import assert_same
from test_finetune import write
from test_train_cli import TINY, curve, refusal
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from msa_hf import MSAForCausalLM
from msa_hf.cli import main
from msa_hf.data.questions import DataError, read_questions
from msa_hf.generation import COMPACT, PromptProtocol
from msa_hf.generation.protocol import PROTOCOL_FILE
from msa_hf.training import QuestionCollator, finetune, resume, router_recall
from msa_hf.training.collators import DISTRACTORS, TranscriptCollator
from msa_hf.training.finetune import make_trainer, split

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NAMES = 20
DOCUMENTS = {f"d{n}": f"n{n} likes t{(7 * n) % NAMES}" for n in range(NAMES)}
ONE = {"question": "who likes n3", "answer": "t1", "positives": ["d3"]}
BOTH = {"question": "n4 and n5", "answer": "t8", "positives": ["d4", "d5"]}
HOPS = {"question": "n7 of n6", "answer": "t9", "positives": ["d7", "d6"], "rounds": [["d6"], ["d7"]]}
NONE = {"question": "who likes t1", "answer": "nobody", "positives": []}
QUESTIONS = [ONE, BOTH, HOPS, NONE]
PROTOCOL = replace(COMPACT, answer_opening="so ")


def tokenizer_of(side: str = "right") -> PreTrainedTokenizerFast:
    """One token a character, so that what was decoded is what was said."""
    characters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789[] \n"))
    words = ["<pad>", "<eos>", *PROTOCOL.special_tokens, *characters]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        extra_special_tokens=list(PROTOCOL.special_tokens),
        padding_side=side,
        clean_up_tokenization_spaces=False,
    )


@dataclass
class Row:
    """A row as it reads: the whole, what is learnt of it, what routes, and the documents that should be found."""

    text: str
    learnt: str
    routing: str
    positives: list[str]
    names: dict[int, str]  # id -> key, of the pool


def rows_of(batch: dict[str, Any]) -> list[Row]:
    tokenizer = tokenizer_of()
    pool = batch["documents"]
    names: dict[int, str] = {}
    for ids, mask in zip(pool["input_ids"], pool["attention_mask"].bool(), strict=True):
        found = re.fullmatch(r"\[(\d+)\] (.*)\n\[(\d+)\]", tokenizer.decode(ids[mask]))
        assert found is not None and found[1] == found[3]
        names[int(found[1])] = next(key for key, text in DOCUMENTS.items() if text == found[2])
    assert len(names) == len(pool["input_ids"])
    keys = list(names.values())
    made = []
    for number, mask in enumerate(batch["attention_mask"].bool()):
        ids, labels = batch["input_ids"][number], batch["labels"][number]
        assert torch.equal(labels[labels != -100], ids[labels != -100]) and bool(mask[labels != -100].all())
        assert bool(mask[batch["routing_mask"][number]].all())
        wanted = [keys[place] for place in batch["positive_docs"][number].tolist() if place >= 0]
        parts = (ids[mask], ids[labels != -100], ids[batch["routing_mask"][number]])
        made.append(Row(*(tokenizer.decode(part) for part in parts), wanted, names))
    return made


def draws(question: dict[str, Any], count: int = 60, **options: Any) -> Iterator[Row]:
    """Rows of a question, from batches in which others share its pool."""
    collator = TranscriptCollator(tokenizer_of(), DOCUMENTS, PROTOCOL, pool=12, **options)
    for _ in range(count):
        yield rows_of(collator([question, ONE, HOPS]))[0]


def taken_apart(row: Row) -> tuple[str, list[list[str]], str, str]:
    """The question; the keys read, by round; the last block; and what follows. Blocks say what their ids stand for."""
    item = r"\[\d+\] [^\n]*\n"
    found = re.fullmatch(rf"(.*?)<\|ids\|>((?:(?:\[\d+\])+<\|docs\|>(?:{item})+<\|ids\|>)*)(.*)", row.text, re.DOTALL)
    assert found is not None, row.text
    read, last = [], ""
    for ids, block in re.findall(rf"((?:\[\d+\])+)<\|docs\|>((?:{item})+<\|ids\|>)", found[2]):
        numbers = [int(number) for number in re.findall(r"\[(\d+)\]", ids)]
        texts = [(int(number), text) for number, text in re.findall(r"\[(\d+)\] ([^\n]*)\n", block)]
        assert texts == [(number, DOCUMENTS[row.names[number]]) for number in numbers]
        read.append([row.names[number] for number in numbers])
        last = block
    return found[1], read, last, found[3]


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS, ids=["one", "both", "hops", "none"])
def test_rows_are_the_protocols_transcripts(question) -> None:
    """Every row ends with the ids of a round or with the answer. Before them stand the rounds that came first, before
    the answer all of them, in order and each with at most a few documents that do not answer. Learnt is what the model
    writes at the end; the question and the last block route; and to be found are a round's documents, or all."""
    rounds = question.get("rounds", [question["positives"]] if question["positives"] else [])
    kinds: Counter[str] = Counter()
    for row in draws(question):
        asked, read, last, rest = taken_apart(row)
        assert asked == question["question"]
        assert row.routing == asked + last
        assert len({key for found in read for key in found}) == sum(map(len, read)), "nothing is read twice"
        answer = f"<|answer|>{asked}\nso {question['answer']}<|end|>"
        if rest == answer:
            kinds["answered" if len(read) == len(rounds) else "answered after others"] += 1
            assert row.learnt == f"<|answer|>so {question['answer']}<|end|>"
            assert row.positives == question["positives"]
            gold = rounds or [[]] * len(read)
        else:
            stage = len(read)
            kinds[f"round {stage}"] += 1
            assert row.learnt == rest and rest.endswith("<|docs|>")
            named = [row.names[int(number)] for number in re.findall(r"\[(\d+)\]", rest)]
            assert named == rounds[stage] == row.positives
            gold = rounds[:stage]
        assert len(read) == len(gold)
        for found, wanted in zip(read, gold, strict=True):
            assert set(wanted) <= set(found) and len(found) <= len(wanted) + DISTRACTORS
            assert not set(found) - set(wanted) & set(question["positives"])
    expected = {
        "one": {"answered", "round 0"},
        "hops": {"answered", "round 0", "round 1"},
        "none": {"answered", "answered after others"},
    }
    name = {0: "none", 1: "one", 2: "hops"}[len(rounds)]
    assert kinds.keys() == expected[name]
    assert all(count >= 5 for count in kinds.values()), kinds
    assert 20 <= kinds["answered"] <= 40


def test_documents_that_answer_lie_anywhere_among_those_that_do_not() -> None:
    """Else their place would give them away; and their number varies."""
    places, counts = Counter(), Counter()
    for row in draws(ONE, 80):
        for found in taken_apart(row)[1]:
            places[found.index("d3")] += 1
            counts[len(found)] += 1
    assert places.keys() == {*range(DISTRACTORS + 1)}
    assert counts.keys() == {*range(1, DISTRACTORS + 2)}


def test_ids_are_new_in_every_step() -> None:
    """So that no document's id can be learnt by heart; the same seed and step give the same."""

    def ids(seed: int, drawn: int) -> dict[str, int]:
        collator = TranscriptCollator(tokenizer_of(), DOCUMENTS, PROTOCOL, pool=NAMES, seed=seed)
        collator.drawn = drawn
        state = random.getstate()
        names = rows_of(collator([ONE]))[0].names
        assert random.getstate() == state, "draws must not disturb those of others"
        assert len(names) == NAMES and max(names) > 10 * NAMES
        return {key: number for number, key in names.items()}

    assert ids(0, 3) == ids(0, 3)
    assert ids(0, 3) != ids(1, 3)
    shared = [key for key, number in ids(0, 3).items() if ids(0, 4)[key] == number]
    assert len(shared) <= 2


def test_documents_that_distract_make_room() -> None:
    """Where a row would be too long with them; what a question needs always fits, or is refused."""
    needed = len(TranscriptCollator(tokenizer_of(), DOCUMENTS, PROTOCOL).row(BOTH)[0])
    for row in draws(BOTH, max_length=needed):
        read = taken_apart(row)[1]
        assert len(tokenizer_of()(row.text)["input_ids"]) <= needed
        assert not read or sorted(read[0]) == ["d4", "d5"]
    collator = TranscriptCollator(tokenizer_of(), DOCUMENTS, PROTOCOL, max_length=needed - 1)
    with pytest.raises(ValueError, match=f"'n4 and n5' has {needed} tokens .* above the limit of {needed - 1}"):
        collator.row(BOTH)


def test_padding_side_changes_no_loss() -> None:
    """What the collator makes is a step of the training forward, with both losses."""
    model = MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=4, top_k=2)
    left, right = (
        model(**TranscriptCollator(tokenizer_of(side), DOCUMENTS, PROTOCOL, pool=8, max_length=250)(QUESTIONS))
        for side in ("left", "right")
    )
    assert_same(left.loss, right.loss)
    assert left.aux_loss.item() > 0 and left.lm_loss.item() > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TranscriptCollator(tokenizer_of(), {}, PROTOCOL), "`documents` is empty"),
        (lambda: TranscriptCollator(tokenizer_of(), DOCUMENTS, PROTOCOL, pool=0), "`pool` must be at least 1, got 0"),
        (
            # "[9999] a\n[9999]": with an id as long as any that can be drawn
            lambda: TranscriptCollator(tokenizer_of(), {"x": "a"}, PROTOCOL, max_length=14),
            "Document 'x' has 15 tokens, above the limit of 14",
        ),
        (
            lambda: TranscriptCollator(tokenizer_of(), {"x": "a"}, PROTOCOL)([ONE]),
            "names 'd3', which is the key of no document",
        ),
        (
            lambda: TranscriptCollator(
                tokenizer_of(), DOCUMENTS, replace(PROTOCOL, ids_end="<|x|>", special_tokens=("<|x|>",))
            ),
            "The tokenizer has no token '<|x|>'",
        ),
    ],
    ids=["none", "pool", "long", "unknown", "tokens"],
)
def test_what_makes_no_step_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# Questions in several rounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rounds, message",
    [
        (["d6", "d7"], "'rounds' must be a list of lists of document keys"),
        ("d6", "'rounds' must be a list of lists of document keys"),
        ([["d6", "d7"], []], "'rounds' must be a list of lists of document keys"),
        ([["d6"]], "'rounds' must hold the 'positives', each once"),
        ([["d6"], ["d6", "d7"]], "'rounds' must hold the 'positives', each once"),
        ([["d6"], [7]], "'rounds' must hold the 'positives', each once"),
        ([], "'rounds' must hold the 'positives', each once"),
    ],
)
def test_bad_rounds_are_refused(rounds, message, tmp_path) -> None:
    path = write(tmp_path / "q.jsonl", [ONE, {**HOPS, "rounds": rounds}])
    with pytest.raises(DataError, match=re.escape(f"q.jsonl, line 2: {message}")):
        read_questions(path, DOCUMENTS)


def test_rounds_are_read(tmp_path) -> None:
    """And left out where a question has none, or says null."""
    path = write(tmp_path / "q.jsonl", [HOPS, ONE, {**BOTH, "rounds": None}])
    assert read_questions(path, DOCUMENTS) == [HOPS, ONE, BOTH]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a protocol, documents and questions."""
    root = tmp_path_factory.mktemp("transcripts")
    model = MSAForCausalLM.from_base(base_model("qwen3"), top_k=2, chunk_size=4)
    model.save_pretrained(root / "base")
    tokenizer_of().save_pretrained(root / "base")
    PROTOCOL.save_pretrained(root / "base")
    write(root / "d.jsonl", [{"key": key, "text": text} for key, text in DOCUMENTS.items()])
    asked = [{"question": f"who likes n{n}", "answer": f"t{(7 * n) % NAMES}", "positives": [f"d{n}"]} for n in range(8)]
    write(root / "q.jsonl", [*asked, BOTH, HOPS, NONE])
    return root


def command(place: Path, out: Path, **extra: Any) -> list[str]:
    options = {**TINY, "held-out": 4, "steps": 2, **extra}
    given = [item for name, value in options.items() for item in (f"--{name}", *([] if value is True else [value]))]
    return [str(item) for item in ("train", place / "base", place / "d.jsonl", place / "q.jsonl", out, *given)]


@pytest.mark.parametrize("choice, kind", [("auto", TranscriptCollator), ("none", QuestionCollator)])
def test_a_checkpoints_own_protocol_is_trained(choice, kind, place, tmp_path, monkeypatch) -> None:
    """Unless plain questions are asked for. Its prompts measure the routers too, and it is saved with the result, which
    can be asked with no more being said."""
    made = []
    monkeypatch.setattr(finetune, "make_trainer", lambda prepared: made.append(make_trainer(prepared)) or made[0])
    out = tmp_path / "out"
    assert main(command(place, out, full=True, protocol=choice)) == 0
    assert type(made[0].data_collator) is kind
    assert (out / PROTOCOL_FILE).exists() == (choice == "auto")
    protocol = PROTOCOL if choice == "auto" else None
    if protocol is not None:
        assert PromptProtocol.from_pretrained(out) == protocol
    questions = read_questions(place / "q.jsonl", DOCUMENTS)
    tokenizer, model = AutoTokenizer.from_pretrained(out), MSAForCausalLM.from_pretrained(place / "base").eval()
    rows: Any = [{"key": key, "text": text} for key, text in DOCUMENTS.items()]
    if protocol is not None:
        rows = protocol.encode_corpus(rows, tokenizer)
    bank = model.encode_documents(rows, tokenizer, show_progress=False)
    found = router_recall(model, tokenizer, bank, split(questions, 4, 0)[1], protocol=protocol)
    assert json.loads(json.dumps(found)) == {name: curve(out)[1][0][name] for name in found}
    assert main(["encode", str(out), str(place / "d.jsonl"), str(tmp_path / "bank")]) == 0
    assert main(["ask", str(out), str(tmp_path / "bank"), "who likes n1", "--max-new-tokens", "4"]) == 0


def test_a_protocol_that_the_checkpoint_cannot_follow_is_refused(place, tmp_path, capsys) -> None:
    """Its tokens are not the tokenizer's; or the file is damaged."""
    line = refusal(capsys, command(place, tmp_path / "out", protocol="published"))
    assert f"MODEL {place / 'base'}: The tokenizer has no token" in line
    base = tmp_path / "base"
    base.mkdir()
    for path in (place / "base").iterdir():
        (base / path.name).symlink_to(path)
    (base / PROTOCOL_FILE).unlink()
    (base / PROTOCOL_FILE).write_text("{")
    arguments = command(place, tmp_path / "out")
    assert PROTOCOL_FILE in refusal(capsys, [str(base) if item == str(place / "base") else item for item in arguments])
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_go_on_with_another_protocol(place, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(command(place, out)) == 0
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1" / resume.STATE_FILE).write_text("{}")
    line = refusal(capsys, command(place, out, resume=True, protocol="none"))
    assert "--resume: the interrupted run had another protocol" in line


def test_the_script_trains_the_protocol_too(place, tmp_path) -> None:
    from test_finetune import script

    places = {"base": place / "base", "documents": place / "d.jsonl", "questions": place / "q.jsonl"}
    options = {**places, "output": tmp_path / "out", "steps": 1, "eval-questions": 0, "rank": 4}
    assert script().main([str(item) for name, value in options.items() for item in (f"--{name}", value)]) == 0
    assert PromptProtocol.from_pretrained(tmp_path / "out") == PROTOCOL
