"""Needles lie where they should, in the banks of their size alone, and a run goes on where it stopped."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import COMPACT, byte_tokenizer, memory_model
from whole_reader import Reader

from msa_hf.bench import planting
from msa_hf.bench.haystack import Haystack
from msa_hf.bench.needles import NeedleSettings, in_words, needle_tasks, run_needles, score
from msa_hf.bench.result import Result
from msa_hf.cli import main
from msa_hf.retrieval import FusionWeights
from msa_hf.synthetic.needle_wordings import ADJECTIVES, NOUNS, WORDINGS
from msa_hf.synthetic.needles import TASKS, VALUES, NeedleTasks

TEXTS = [
    f"The {number} ships left the harbor in May. They came back in June, all but {number}." for number in range(400)
]
SETTINGS = NeedleSettings(sizes=(3000, 6000), depths=2, repeats=1, document_tokens=200, max_new_tokens=2)


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    return memory_model(tokenizer, COMPACT), tokenizer


def run(model: tuple[Any, Any], path: Path | None = None, settings: NeedleSettings = SETTINGS) -> Result:
    return run_needles(settings, *model, COMPACT, iter(TEXTS), path, batch_tokens=4096, show_progress=False)


def planted(texts: list[str]) -> set[str]:
    """What the documents of a bank hold that those of the haystack do not."""
    return {
        sentence for text in texts for sentence in re.split(r"(?<=[.]) ", text) if not re.search("ships|They", sentence)
    }


def test_every_needle_lies_in_its_bank_and_in_no_other(model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    monkeypatch.setattr(planting, "put", reader)
    result = run(model)
    assert len(result.trials) == 2 * 5 * 3 * 2 and all(trial.right for trial in result.trials)
    tasks = NeedleTasks(0)
    wanted = {
        needle.sentence
        for number, (_, values, name) in enumerate(itertools.product(range(2), VALUES, TASKS))
        for needle in tasks.task(name, values, number).needles
    }
    sizes = {
        3000: [texts for texts in reader.banks if len(texts) < 50],
        6000: [texts for texts in reader.banks if len(texts) > 50],
    }
    for tokens, banks in sizes.items():
        found = [planted(texts) for texts in {tuple(texts): texts for texts in banks}.values()]
        assert set().union(*found) == wanted and sum(map(len, found)) == len(wanted), tokens
        assert all(len(item) <= 0.25 * len(texts) for item, texts in zip(found, banks, strict=False))
    # The same questions at every size, at the same depths.
    by_size = [
        [(item.question, item.axes["depth"]) for item in result.trials if item.axes["tokens"] == size] for size in sizes
    ]
    assert sorted(by_size[0]) == sorted(by_size[1])
    for trial in result.trials:
        documents = 36 if trial.axes["tokens"] == 3000 else 71
        assert abs(trial.detail["gold"][0] / documents - trial.axes["depth"]) < 0.3, trial.id
    assert score(result) == 1.0 and score(result, kind="single", tokens=3000) == 1.0
    assert "3,000 tokens: 30 of 30" in in_words(result)[0]


def test_an_interrupted_run_asks_the_rest_and_ends_as_one_that_was_not(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planting, "put", whole := Reader())
    expected = run(model)
    monkeypatch.setattr(planting, "put", Reader(fail_after=35))
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "r.json")
    monkeypatch.setattr(planting, "put", rest := Reader())
    result = run(model, tmp_path / "r.json")
    assert rest.asked == whole.asked - 35 and len(result.runs) == 2
    assert {item.id: item for item in Result.load(tmp_path / "r.json").trials} == {
        item.id: item for item in expected.trials
    }
    monkeypatch.setattr(planting, "put", again := Reader())
    run(model, tmp_path / "r.json")
    assert again.asked == 0
    with pytest.raises(ValueError, match=r"haystack: .* there"):
        run_needles(SETTINGS, *model, COMPACT, iter(TEXTS[1:]), tmp_path / "r.json", show_progress=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sizes": (300,)}, "too few for 4 sentences"),
        ({"sizes": (10**6,)}, "Name more texts"),
        ({"repeats": 100}, "7500 tasks were asked for"),
        ({"repeats": 0}, "at least one"),
        ({"tasks": ("triple",)}, "no needles 'triple'"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], named: str, model: tuple[Any, Any]) -> None:
    settings = NeedleSettings(**{"document_tokens": 200, "sizes": (4000,), "repeats": 1, **changes})
    with pytest.raises(ValueError, match=named):
        run(model, settings=settings)


def test_no_key_stands_in_the_haystack(model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planting, "put", Reader())
    tasks = NeedleTasks(0)
    one, other = tasks.keys(0)[0], tasks.keys(4)[3].replace("-", " ").title()
    texts = [*TEXTS[:30], f"She called it {one}.", f"We came to {other} at noon.", *TEXTS[30:]]
    assert tasks.keys_in(texts) == {one, other.lower().replace(" ", "-")}
    settings = replace(SETTINGS, sizes=(6000,))
    result = run_needles(settings, *model, COMPACT, texts, batch_tokens=4096, show_progress=False)
    asked = " ".join(trial.question for trial in result.trials)
    assert not any(key in asked for number in (0, 4) for key in tasks.keys(number))
    assert all(any(key in asked for key in tasks.keys(number)) for number in (1, 2, 3, 5, 30, 31))
    keys = [key for number in range(len(tasks)) for key in tasks.keys(number)]
    with pytest.raises(ValueError, match="keys stand in the texts"):
        list(needle_tasks(settings, 6000, keys))


def test_training_and_testing_share_no_word_and_no_wording() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS)
    words = []
    for split in ("train", "test"):
        tasks = NeedleTasks(0, split)  # type: ignore[arg-type]
        keys = [key for number in range(len(tasks)) for key in tasks.keys(number)]
        assert len(set(keys)) == len(keys) == 4 * len(tasks)
        found = [tasks.task(name, "words", number) for number, name in enumerate(TASKS * 20)]
        words.append(
            {part for task in found for needle in task.needles for part in (needle.key + "-" + needle.value).split("-")}
        )
    assert not words[0] & words[1]
    sentences = [
        {text for wording in WORDINGS[split] for text in (*wording.sentences, *wording.questions)}
        for split in ("train", "test")
    ]  # type: ignore[index]
    assert not sentences[0] & sentences[1]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", TASKS)
def test_a_task_asks_for_what_its_sentences_say(name: str, values: str) -> None:
    tasks = NeedleTasks(3)
    for number in range(30):
        task = tasks.task(name, values, number)
        assert task == NeedleTasks(3).task(name, values, number)
        assert len({needle.value for needle in task.needles}) == len(task.needles)
        assert all(needle.key in needle.sentence and needle.value in needle.sentence for needle in task.needles)
        assert {needle.key for needle in task.gold} == {key for key in tasks.keys(number) if key in task.question}
        assert tuple(needle.value for needle in task.gold) == task.answers
        shape = {"words": r"[a-z]+-[a-z]+", "numbers": r"\d{7}", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
        assert all(re.fullmatch(shape[values], value) for value in task.answers)
        assert "{" not in task.question + "".join(needle.sentence for needle in task.needles)
    with pytest.raises(IndexError, match="task 930 of"):
        tasks.task(name, values, len(tasks))


def test_the_command_measures_and_compares(
    model: tuple[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, tokenizer = model
    for saved in (made, tokenizer, COMPACT):
        saved.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    command = ["bench", "needles", str(tmp_path / "model"), "--sizes", "2K,3K", "--text", str(tmp_path / "texts.txt")]
    command += ["--tasks", "single,multi_key_2", "--values", "numbers", "--depths", "2", "--repeats", "1", "--quiet"]
    command += ["--max-new-tokens", "2", "--device", "cpu", "--document-tokens", "150"]
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    assert main([*command, "--out", str(out), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "2,000 tokens: 0 of 4" in said and "does not read such sentences" in said
    assert page.read_text().count("<svg") == 2
    result = Result.load(out)
    assert len(result.trials) == 8 and result.settings["source"].endswith("texts.txt")
    assert {tuple(sorted(item.detail)) for item in result.trials} >= {
        ("broke", "forced_gold", "found", "gold", "gold_read", "gold_text", "of", "read", "tokens_apart")
    }
    assert main([*command, "--json"]) == 0
    assert [item["id"] for item in json.loads(capsys.readouterr().out)["trials"]] == [item.id for item in result.trials]
    assert main(["bench", "compare", str(out), str(out), "--by", "tokens"]) == 0
    assert "+0.000" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "no" / "r.json")]) == 2
    # By the words of the texts as well, over the same documents in a bank.
    texts = Haystack(TEXTS, tokenizer, 3000, 150).texts
    encoded = made.encode_documents(COMPACT.encode_corpus(texts, tokenizer), tokenizer, show_progress=False)
    encoded.save_pretrained(tmp_path / "bank")
    FusionWeights(("router", "lexical"), "lexical").save_pretrained(tmp_path / "model")
    hybrid = [*command, "--text", str(tmp_path / "bank"), "--select", "hybrid", "--max-rounds", "1"]
    hybrid.remove(str(tmp_path / "texts.txt"))
    hybrid.remove("--text")
    assert main(hybrid) == 2
    assert f"--document-tokens 150: {tmp_path / 'bank'} is a bank" in capsys.readouterr().err
    del hybrid[(place := hybrid.index("--document-tokens")) : place + 2]
    assert main([*hybrid, "--out", str(tmp_path / "hybrid.json")]) == 0
    found = Result.load(tmp_path / "hybrid.json")
    assert found.settings["rounds"] == {"select": "hybrid", "max_rounds": 1} and "lexical" in found.model["fusion"]
    assert found.settings["source"].endswith("bank") and len(found.trials) == 8
    assert all(item.detail["gold_read"] == 1 for item in found.trials if item.kind == "single")
    assert main(["bench", "compare", str(out), str(tmp_path / "hybrid.json")]) == 0
    said = capsys.readouterr().out
    assert "differs: rounds: {} there, {'select': 'hybrid'" in said and "differs: fusion: None there" in said
    # What a hybrid lacks is said before the model is loaded.
    assert main([*hybrid, "--protocol", "none"]) == 2
    assert "need a protocol" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tantivy", None)
    assert main(hybrid) == 2
    assert "--select hybrid: A lexical index needs tantivy: pip install" in capsys.readouterr().err
    assert main([*command, "--tasks", "double"]) == 2
    assert "must be among single" in capsys.readouterr().err
