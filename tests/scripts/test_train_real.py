"""`scripts/train_real.py` from a directory of data to an adapter, on a tiny base."""

import json
import lzma
import random
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import base_model
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from msa_hf import MSAForCausalLM
from msa_hf.training.contrastive import TokenRows, encode_rows
from msa_hf.training.weights import linear_ranks

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SCRIPTS = Path(__file__).parents[2] / "scripts"
END = "<|im_end|>"
WORDS = ["[PAD]", "[UNK]", END, *"?:.[]-|", "---", "Query", "Question", "Answer", *(f"w{n}" for n in range(90))]


def save_tokenizer(directory: Path) -> None:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token=END, additional_special_tokens=[END]
    ).save_pretrained(directory)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, a teacher, two sets with questions and a part of further text."""
    base_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS), **shape)).save_pretrained(tmp_path / "teacher")
    for name in ("base", "teacher"):
        save_tokenizer(tmp_path / name)
    pick = random.Random(0)

    def write(path: Path, rows: list[dict[str, object]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lzma.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def text() -> str:
        return " ".join(pick.choices(WORDS[-90:], k=34)) + " ."

    for name in ("nq", "squad11"):
        documents = [{"key": f"{name}{n}", "title": f"w{n}", "article": f"{n // 3}", "text": text()} for n in range(18)]
        write(tmp_path / "data" / name / "documents.jsonl.xz", documents)
        for split, part in (("train", documents[:12]), ("dev", documents[12:])):
            questions = []
            for row in part:
                words = row["text"].split()
                asked = " ".join(words[3:7])
                questions.append({"question": asked, "answers": [words[8]], "gold": [row["key"]], "kind": "span"})
            write(tmp_path / "data" / name / f"questions.{split}.jsonl.xz", questions)
    filler = [{"key": f"f{n}", "title": "", "text": text()} for n in range(40)]
    write(tmp_path / "data" / "wikipedia" / "part-00.jsonl.xz", filler)
    return tmp_path


def test_queries_cut_out_of_passages(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_real

    def run(command: str, *options: str) -> None:
        given = ["train_real.py", command, "--work", str(place / "work"), "--parts", "0", *options]
        monkeypatch.setattr(sys, "argv", given)
        train_real.main()

    base = ("--base", str(place / "base"))
    run("prepare", *base, "--data", str(place / "data"))
    run("spans", *base, "--passages", "30", "--turns", "3")
    made = torch.load(place / "work" / "spans.pt", weights_only=True)
    texts = torch.load(place / "work" / "part00.texts", weights_only=True)
    assert made["names"] == ["part00"] and not made["sources"].any() and 30 < len(made["texts"]) <= 90
    assert len(set(made["places"].tolist())) == 30
    for query, number in zip(made["texts"], made["places"].tolist(), strict=True):
        assert set(query.split()) <= set(texts[number].split())
    assert len(made["tokens"]) == int(made["lengths"].sum()) and len(made["lengths"]) == len(made["texts"])


def test_what_is_asked_begins_with_its_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import real_questions
    import train_real

    taught = []
    written = real_questions.question_row

    def question_row(passage: list[int], tag: list[int], question: list[int], end: int) -> tuple[list[int], list[int]]:
        taught.append((passage, tag, question))
        return written(passage, tag, question, end)

    def sample(model: object, rows: torch.Tensor, tags: list[list[int]], end: int, longest: int) -> torch.Tensor:
        ids = PreTrainedTokenizerFast.from_pretrained(place / "base").convert_tokens_to_ids
        found = torch.full((len(rows), len(tags), longest), end)
        for row, passage in enumerate(rows.tolist()):
            for tag, text in enumerate((["w1", "|", "w2", "w3"], [None, "w4", "|", "w5", "?"])):
                found[row, tag, : len(text)] = torch.tensor(
                    [passage[5] if word is None else ids(word) for word in text]
                )
        return found

    monkeypatch.setattr(real_questions, "question_row", question_row)
    monkeypatch.setattr(real_questions, "sample_questions", sample)
    common = ["--work", str(place / "work"), "--parts", "0", "--base", str(place / "base")]
    small = ["--minutes", "1", "--ask-batch", "8", "--ask-steps", "1", "--no-compile"]
    for command in (["prepare", "--data", str(place / "data")], ["questions", *small]):
        monkeypatch.setattr(sys, "argv", ["train_real.py", *command, *common])
        train_real.main()

    decode = PreTrainedTokenizerFast.from_pretrained(place / "base").decode
    for passage, tag, text in taught:
        answer, question = decode(text).split(" | ")
        words = decode(passage).split()
        # As the fixture asks, but for the last token, which is a line break to other tokenizers.
        assert answer == words[-27] and question == " ".join(words[-32:-29])
        assert decode(tag) in ("Query :", "Question :")
    made = torch.load(place / "work" / "asked0.pt", weights_only=True)
    texts = torch.load(place / "work" / "part00.texts", weights_only=True)
    count = len(made["texts"]) // 2
    for text, answer, number in zip(made["texts"], made["answers"], made["places"].tolist(), strict=True):
        assert (text, answer) in (("w2 w3", "w1"), ("w5 ?", f"{texts[number].split()[5]} w4"))
    assert count == len(texts) and made["texts"].count("w5 ?") == count


def assert_reading_in_parts(place: Path) -> None:
    """Rows read in parts give the loss and the gradients of all rows at once."""
    from real_model import load_start
    from real_reading import Reader

    model = load_start(str(place / "adapter"), str(place / "base"), torch.device("cpu")).requires_grad_(True)
    documents = TokenRows(torch.randint(3, len(WORDS), (4, 9)), torch.tensor([9, 9, 9, 9]))
    with torch.no_grad():
        pool = encode_rows(model, documents)
    found = []
    for tokens in (10**6, 100):
        options = {"read": 10, "read_weight": 0.7, "read_asked": 0.4, "read_tokens": tokens, "shards": 1}
        reader = Reader(Namespace(**options), place / "work", torch.device("cpu"))
        torch.manual_seed(3)
        rows = reader.draw(1000)
        assert int((rows < reader.labeled).sum()) == 600 and len(rows.unique()) == len(reader.routes)
        model.zero_grad()
        torch.manual_seed(3)
        loss = reader.step(model, Namespace(pool=pool, lengths=documents.lengths))
        gradients = [item.grad.clone() for item in model.parameters() if item.grad is not None]
        found.append((torch.tensor(loss), gradients))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "processes, shards, read",
    [(1, 1, [[0]]), (2, 2, [[0], [1]]), (1, 2, [[0, 1]]), (2, 3, [[0, 2], [1]]), (3, 2, [[0], [1], [0]])],
)
def test_every_shard_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, shards: int, read: list[list[int]]
) -> None:
    """Rows made in more shards than processes train are all drawn from, asked ones apart from labeled ones."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from real_reading import Reader, ReadingRow, write_rows

    for shard in range(shards):
        for offset, name in ((0, "reading"), (10, "answers")):
            number = shard + offset
            rows = [ReadingRow([number] * 3, [-100, number, number], [True, False, False])] * (2 + number)
            write_rows(tmp_path / f"{name}{shard}.pt", rows)
    options = {"read": 4, "read_weight": 1.0, "read_asked": 0.5, "read_tokens": 64, "shards": shards}
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for rank, expected in enumerate(read):
        monkeypatch.setenv("RANK", str(rank))
        reader = Reader(Namespace(**options), tmp_path, torch.device("cpu"))
        drawn = reader.draw(2000)
        for rows, offset in ((drawn[:1000], 0), (drawn[1000:], 10)):
            found = reader.ids.at(rows).tokens.view(-1, 3)[:, 0]
            assert found.unique().tolist() == [shard + offset for shard in expected]


def test_sets_of_other_people(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Sets of any name; one document, no development questions, questions without answers or documents: all of these
    together, and few passages."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import eval_real
    import real_lexical
    import real_model
    import train_real

    data, work = place / "data", place / "work"
    own = data / "übung"
    (data / "nq").rename(own)
    (data / "squad11").rename(data / "b")
    (data / "b" / "questions.dev.jsonl.xz").unlink()

    def write(path: Path, rows: list[dict[str, object]]) -> None:
        path.parent.mkdir(exist_ok=True)
        with lzma.open(path, "at", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    write(data / "one" / "documents.jsonl.xz", [{"key": "one", "title": "", "text": "w1 w2 w3 ."}])
    write(own / "documents.jsonl.xz", [{"key": "blank", "title": "w1", "text": " "}])
    odd = [([], ["nq1"]), ([" "], ["nq1"]), (["w1"], []), (["w1"], ["nowhere"]), (["w1"], ["blank"])]
    for split in ("train", "dev"):
        rows = [{"question": "w1 w2", "answers": answers, "gold": gold} for answers, gold in odd]
        write(own / f"questions.{split}.jsonl.xz", rows)

    def run(script: Any, *options: object) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, options[0], "--work", str(work), *map(str, options[1:])])
        script.main()

    base = ("--base", place / "base")
    run(train_real, "prepare", *base, "--data", data, "--parts", 0)
    assert capsys.readouterr().out.count("questions left out: 2 of documents that are not there, 1 of none") == 2
    run(train_real, "teach", "--teacher", place / "teacher", "--parts", 0)
    run(train_real, "reading", *base, "--reading", 12)
    read = torch.load(work / "reading0.pt", weights_only=True)
    assert len(read["routes"]) == 12
    run(real_lexical, "rank", "--parts", 0, "--sizes", "5,10")
    lexical, prepared = np.load(work / "lexical.npz"), torch.load(work / "sets.pt", weights_only=True)
    count = len(prepared["lengths"])
    assert count < real_lexical.KEPT
    assert all((row[:count] >= 0).all() and (row[count:] == -1).all() for row in lexical["5M places"])
    questions = eval_real.asked_questions(prepared)
    assert eval_real.sets_read(questions) == ["übung"] and {item["split"] for item in questions} == {"dev", "fit"}
    model = real_model.MSAForCausalLM.from_base(place / "base", memory_layers=[1])
    flat = train_real.Flat(prepared["tokens"], prepared["lengths"])
    assert set(real_model.measure(model, flat, prepared["dev"], 800)) == {"übung"}
    unfit = [{**item, "split": "dev"} for item in questions]
    lists = {"5M": [{"router": [(0, 1.0)], "lexical": [(1, 1.0)]}] * len(unfit)}
    weights = eval_real.fit_on(lists, unfit)
    assert weights.method == "reciprocal ranks" and "fused by reciprocal ranks" in capsys.readouterr().out
    assert eval_real.with_wording(weights, lists, unfit, [], None) == weights
    for path in data.glob("*/questions.dev.jsonl.xz"):
        path.unlink()
    (work / "sets.pt").unlink()
    with pytest.raises(SystemExit, match=r"no set has a question in its questions\.dev\.jsonl\.xz"):
        run(train_real, "prepare", *base, "--data", data, "--parts", 0)


def test_the_whole_way_from_data_to_an_adapter(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_real

    monkeypatch.setattr(train_real, "BASE_NAME", str(place / "base"))  # or PEFT asks the Hub about it

    def run(command: str, options: str, base: bool = True) -> None:
        given = [
            "--work",
            place / "work",
            "--parts",
            "0",
            *(["--base", place / "base"] if base else []),
            *options.split(),
        ]
        monkeypatch.setattr(sys, "argv", ["train_real.py", command, *map(str, given)])
        train_real.main()

    run("prepare", f"--data {place / 'data'}")
    run("questions", "--minutes 1 --ask-batch 8 --ask-steps 2 --batch-tokens 2000 --largest 16 --no-compile")
    run("teach", f"--teacher {place / 'teacher'} --asked", base=False)
    run("reading", "--reading 12")
    with pytest.raises(SystemExit, match=r"words\.pt is missing: run real_lexical\.py words"):
        run("routers", "--layers 1 --no-compile --read 0")
    import real_lexical

    for command in (["words", "--parts", "0"], ["asked"]):
        monkeypatch.setattr(sys, "argv", ["real_lexical.py", *command, "--work", str(place / "work")])
        real_lexical.main()
    sizes = "--pool 24 --labeled 6 --group 4 --near 5 --read 4 --ranked 4"
    sizes += " --part-tokens 800 --question-tokens 60 --mine 0"
    run("routers", f"--layers 1 --steps 3 --rank 4 --upper-rank 2 --no-compile --log-every 1 {sizes}")
    run("adapter", f"--out {place / 'adapter'}")
    # Every other question gets an answer that its passage says.
    asked = torch.load(place / "work" / "asked0.pt", weights_only=True)
    texts = torch.load(place / "work" / "part00.texts", weights_only=True)
    assert len(asked["answers"]) == len(asked["texts"]) == len(asked["places"]) > 3
    asked["answers"] = [
        texts[number].split()[3] if row % 2 else "elsewhere" for row, number in enumerate(asked["places"].tolist())
    ]
    torch.save(asked, place / "work" / "asked0.pt")
    counts = []
    for start, likely in (("adapter", 1e9), ("work/routers.pt", 1e9), ("work/routers.pt", 1e-9)):
        (place / "work" / "answers0.pt").unlink(missing_ok=True)
        run("answers", f"--initial {place / start} --likely {likely} --workers 2 --unanswerable 0 --no-compile")
        read = torch.load(place / "work" / "answers0.pt", weights_only=True)
        counts.append(len(read["routes"]))
        written = read["labels"][read["labels"] >= 0]
        if len(written):
            words = PreTrainedTokenizerFast.from_pretrained(place / "base").decode(written).split()
            assert sorted(words) == sorted([*asked["answers"][1::2], *[END] * counts[0]])
    assert counts == [len(asked["texts"]) // 2] * 2 + [0]
    run("answers", f"--initial {place / 'adapter'} --likely 1e9 --workers 2 --no-compile")
    assert_reading_in_parts(place)
    run("routers", f"--name read --layers 1 --steps 2 --rank 4 --no-compile --read-asked 0.5 {sizes}")
    run("spans", "--passages 30 --turns 3")
    run("teach", f"--teacher {place / 'teacher'} --spans", base=False)
    with pytest.raises(SystemExit, match="give --no-words with --spans"):
        run("routers", "--layers 1 --no-compile --read 0 --spans")
    run("routers", f"--name cut --layers 1 --steps 2 --rank 4 --no-words --no-compile --spans {sizes}")
    import real_corpus

    finish = (
        f"--base {place / 'base'} --work {place / 'work'} --initial {place / 'work' / 'routers.pt'} --layers 1 --rank 4"
    )
    finish += " --upper-rank 2 --spans --steps 2 --step-questions 12 --candidates 9 --near 3 --log-every 1 --no-compile"
    finish += " --blends 0.5"
    monkeypatch.setattr(sys, "argv", ["real_corpus.py", *finish.split()])
    real_corpus.main()
    before, after = (torch.load(place / "work" / f"{name}.pt", weights_only=True) for name in ("routers", "finished"))
    differ = {name for name, value in before["weights"].items() if not value.equal(after["weights"][name])}
    assert len(differ) == 2 and all("router_" in name for name in differ)
    finished = [json.loads(line) for line in (place / "work" / "finished.curve.jsonl").read_text().splitlines()]
    measured = [row for row in finished if "recall" in row]
    assert [sorted(row["recall"]) for row in measured] == [["all", "sets"]] * 3
    assert [row["blend"] for row in measured] == [1, 0.5, 1]
    half = torch.load(place / "work" / "finished-0.5.pt", weights_only=True)["weights"]
    for name in differ:
        middle = (before["weights"][name].float() + after["weights"][name].float()) / 2
        torch.testing.assert_close(half[name].float(), middle, atol=2e-3, rtol=2e-2)

    rows = [json.loads(line) for line in (place / "work" / "routers.curve.jsonl").read_text().splitlines()]
    measured = [row["recall"] for row in rows if "recall" in row]
    assert len(measured) == 2 and set(measured[0]) == {"nq", "squad11"}
    answered = [(row["step"], row["answered"]) for row in rows if "answered" in row]
    assert [step for step, _ in answered] == [0, 3] and all(set(shares) == {"nq", "squad11"} for _, shares in answered)
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3] and all(row["read"] > 0 and row["ranked"] > 0 for row in losses)

    fields = json.loads((place / "adapter" / "memory.json").read_text())
    assert fields["routers_trained"]
    model = MSAForCausalLM.from_base(place / "base", **fields)
    first = model.model.layers[1].self_attn.router_k_proj.weight.clone()
    tuned = PeftModel.from_pretrained(model, place / "adapter")
    state = torch.load(place / "work" / "routers.pt", weights_only=True)["weights"]
    wanted = next(value for name, value in state.items() if "router_k_proj" in name)
    found = next(value for name, value in tuned.named_parameters() if "router_k_proj.modules_to_save" in name)
    torch.testing.assert_close(found.float(), wanted.float(), atol=1e-2, rtol=1e-2)
    assert not torch.allclose(found.float(), first.float())
    assert any(bool(value.any()) for name, value in tuned.named_parameters() if "lora_B" in name)
    assert (place / "adapter" / "memory_protocol.json").exists()

    # Training goes on from an adapter; what `adapter` wrote is what it starts from.
    started = train_real.weights_of_adapter(place / "adapter")
    assert started.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(started[name], value.float(), atol=1e-2, rtol=1e-2)

    # With another rank, and a memory layer more, which begins like the one that was trained.
    data = torch.load(place / "work" / "sets.pt", weights_only=True)
    texts = [train_real.Flat(part["tokens"], part["lengths"]) for part in (data, data["train"])]

    def changes(rank: int, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
        more = MSAForCausalLM.from_base(place / "base", **{**fields, "memory_layers": list(layers)})
        names = [name for name, _ in more.named_parameters() if "router_" in name]
        weights = train_real.TrainedWeights(more, linear_ranks(more, dict.fromkeys(range(3), rank)), names)
        train_real.start_from(weights, dict(started))
        train_real.begin_further_layers(more, weights, [1], *texts)
        return {name: item.up @ item.down for name, item in weights.low_rank.items()} | {
            name: master for name, (_, master) in weights.whole.items()
        }

    whole, cut = changes(4, (1,)), changes(1, (1, 2))
    assert cut.keys() - whole.keys() == {name.replace("layers.1", "layers.2") for name in whole if "router_" in name}
    for name, value in whole.items():
        if "router_" in name:
            torch.testing.assert_close(cut[name], value)
            continue
        sizes = torch.linalg.svdvals(value)
        torch.testing.assert_close((cut[name] - value).norm(), sizes[1:].norm(), atol=1e-6, rtol=1e-4)
    own = MSAForCausalLM.from_base(place / "base", **{**fields, "memory_layers": [2]}).model.layers[2].self_attn
    for name in ("router_q_proj", "router_k_proj"):
        fitted = cut[f"model.layers.2.self_attn.{name}.weight"]
        assert (fitted - own.get_submodule(name).weight).norm() > 0.5 * fitted.norm()
    with pytest.raises(SystemExit, match="not trained here"):
        changes(4, (2,))

    # Everything is measured.
    import eval_real
    from real_systems import asked_questions

    asked = len(asked_questions(data))
    passages = len(data["lengths"])
    drawn = np.stack([np.random.default_rng(row).permutation(passages)[:10] for row in range(asked)]).astype(np.int32)
    scores = np.tile(np.linspace(9, 1, 10, dtype=np.float32), (asked, 1))
    sizes = ("5M", "99M")
    lists = {f"{size} {name}": item for size in sizes for name, item in (("places", drawn), ("scores", scores))}
    np.savez(place / "work" / "lexical.npz", **lists)
    for command, options in {
        "search": f"--sizes 5,99 --no-compile --parts 0 --base {place / 'base'}",
        "rerank": f"--parts 0 --base {place / 'base'} --batch-tokens 900",
        "fuse": "--parts 0",
        "read": f"--parts 0 --base {place / 'base'} --limit 2",
        "report": "",
    }.items():
        given = ["--work", str(place / "work"), "--out", str(place / "out"), *options.split()]
        monkeypatch.setattr(sys, "argv", ["eval_real.py", command, *given])
        eval_real.main()
    table = (place / "out" / "report.md").read_text()
    assert "router + reader" in table and "hybrid with minilm + reader" in table
    assert "| gold text, pressed |" in table
    again = np.load(place / "out" / "read_again_99M.npz")
    assert ((again["places"] >= 0) == np.isfinite(again["scores"])).all() and (again["scores"][:, 0] < 0).all()
