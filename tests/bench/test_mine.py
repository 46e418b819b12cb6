"""`bench mine` on this repository's own documents: what it plants, what it leaves behind, and what it says."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import COMPACT, byte_tokenizer, memory_model
from whole_reader import Reader

from msa_hf import MemoryBank
from msa_hf.bank import BankStore
from msa_hf.bench import mine, planting
from msa_hf.bench.haystack import Haystack
from msa_hf.bench.invented import MOST_HOPS, Chains
from msa_hf.bench.mine import MineSettings, depths_apart, in_words, refuses, run_mine
from msa_hf.bench.result import Result, Trial
from msa_hf.bench.style import insert_in_style, own_terms, own_words
from msa_hf.cli import main

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("asking.md", "diagnosis.md", "hub.md")
PAGES = [(DOCS / name).read_text(encoding="utf-8") for name in NAMES]
SETTINGS = MineSettings(depths=2, repeats=1, hops=2, distances=(0.1, 0.5), document_tokens=400, max_new_tokens=2)


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    return memory_model(tokenizer, COMPACT), tokenizer


def run(
    model: tuple[Any, Any], documents: Any = PAGES, settings: MineSettings = SETTINGS, path: Path | None = None
) -> Result:
    return run_mine(settings, *model, COMPACT, documents, path, show_progress=False)


def pieces_of(model: tuple[Any, Any]) -> list[str]:
    return Haystack(PAGES, model[1], None, SETTINGS.document_tokens, least_tokens=1).texts


def state(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_facts_chains_and_twins_are_planted_in_copies_of_the_documents(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planting, "put", reader := Reader())
    result = run(model)
    sizes = result.settings["sizes"]
    kinds = {cell.values[0]: cell.asked for cell in result.cells("kind")}
    each = 2 * len(sizes)
    assert len(sizes) >= 2 and kinds == {
        **{kind: each for kind in ("term", "term, unanswerable", "fact", "fact, unanswerable")},
        **{kind: 2 * each for kind in ("chain", "chain, unanswerable")},
    }
    assert all(trial.right for trial in result.trials), [item.id for item in result.trials if not item.right]
    # A chain has its facts in documents of their own, as far apart as was asked for.
    for trial in result.trials:
        if trial.kind == "chain" and trial.axes["tokens"] == sizes[-1]:
            first, second = trial.detail["gold"]
            texts = next(item for item in reader.banks if len(item) > second and trial.expected[0] in item[second])
            apart = sum(map(len, texts[min(first, second) : max(first, second)])) / sum(map(len, texts))
            assert apart == pytest.approx(trial.axes["distance"] / trial.axes["tokens"], abs=0.15)  # type: ignore[operator]
    # What the banks have is the documents, and in a quarter of them at most something else.
    pieces = set(pieces_of(model))
    for texts in reader.banks:
        changed = [text for text in texts if text not in pieces]
        assert 0 < len(changed) <= 0.25 * len(texts)
    assert not any(trial.expected[0] in page for trial in result.trials if trial.kind == "term" for page in PAGES)
    # The same questions at every size.
    by_size = [sorted(item.question for item in result.trials if item.axes["tokens"] == size) for size in sizes]
    assert all(item == by_size[0] for item in by_size)


def test_a_bar_moves_with_every_batch_and_begins_where_the_run_goes_on(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps: list[int] = []

    class Bar(contextlib.AbstractContextManager[Any]):
        def __init__(self, total: int, **options: Any) -> None:
            self.total = total

        def __exit__(self, *error: object) -> None:
            assert sum(steps) == self.total

        def set_description(self, text: str) -> None: ...

        def update(self, count: int) -> None:
            steps.append(count)

    monkeypatch.setattr(mine, "tqdm", Bar)
    monkeypatch.setattr(planting, "put", Reader())
    settings = MineSettings(sizes=(6000,), hops=1, depths=4, repeats=2, max_new_tokens=2)
    texts = [f"Page {number} tells of the weather, and of little besides it." for number in range(150)]
    run_mine(settings, *model, COMPACT, texts, tmp_path / "r.json", show_progress=False)
    assert max(steps) == 1  # the stand-in answers one at a time
    record = json.loads((tmp_path / "r.json").read_text())
    record["trials"] = record["trials"][:5]
    (tmp_path / "r.json").write_text(json.dumps(record))
    steps.clear()
    run_mine(settings, *model, COMPACT, texts, tmp_path / "r.json", show_progress=False)
    assert steps[0] == 5 and max(steps[1:]) == 1


def test_chains_lie_as_far_apart_as_is_said_though_many_share_a_small_bank(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the documents has a sentence: where a depth is taken, the distance from fact to fact stays."""
    monkeypatch.setattr(planting, "put", Reader())
    texts = [f"Page {number} tells of the weather, and of little besides it." for number in range(150)]
    settings = MineSettings(sizes=(6000,), hops=4, depths=3, repeats=2, distances=(0.05, 0.4), max_new_tokens=2)
    result = run(model, texts, settings)
    chains = [item for item in result.trials if item.kind == "chain"]
    assert len(chains) == 2 * 3 * 3 * 2
    for trial in chains:
        far = float(trial.axes["distance"])
        assert all(0.7 * far < apart < 1.35 * far for apart in trial.detail["tokens_apart"]), trial
    for trial in result.trials:
        if trial.detail["gold"]:
            assert abs(trial.detail["gold"][0] / 107 - float(trial.axes["depth"])) < 0.1, trial


def test_nothing_is_left_behind_in_a_bank_nor_in_its_files(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, tokenizer = model
    pieces = pieces_of(model)[:40]
    with BankStore(made, tmp_path / "bank", tokenizer) as opened:
        opened.add(list(COMPACT.encode_corpus(pieces, tokenizer)))
        opened.delete("3")
    monkeypatch.setattr(planting, "put", reader := Reader())
    before = state(tmp_path)
    bank = MemoryBank.from_pretrained(tmp_path / "bank", made, tokenizer)
    kept = {layer: (memory.routing_keys.clone(), memory.pooled_kv.clone()) for layer, memory in bank.layers.items()}
    told = [(item.key, item.text, item.id) for item in bank.documents]
    result = run(model, bank, MineSettings(depths=1, repeats=1, hops=2, distances=(0.5,)), tmp_path / "r.json")
    assert result.trials and all(trial.right for trial in result.trials)
    # Documents keep their keys and ids while sentences are planted in them.
    assert all(len(texts) <= 39 and pieces[3] not in texts for texts in reader.banks)
    assert [(item.key, item.text, item.id) for item in bank.documents] == told
    for layer, (keys, pooled) in kept.items():
        assert torch.equal(bank.layers[layer].routing_keys, keys) and torch.equal(bank.layers[layer].pooled_kv, pooled)
    after = state(tmp_path)
    del after["r.json"], after[".r.json.lock"]
    assert after == before


def test_the_command_on_a_folder_of_documentation(
    model: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for saved in (*model, COMPACT):
        saved.save_pretrained(tmp_path / "model")
    (tmp_path / "docs").mkdir()
    for name in NAMES[:2]:
        (tmp_path / "docs" / name).write_text((DOCS / name).read_text(encoding="utf-8"), encoding="utf-8")
    before = state(tmp_path / "docs")
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    command = ["bench", "mine", str(tmp_path / "model"), str(tmp_path / "docs"), "--depths", "1", "--repeats", "1"]
    command += ["--hops", "2", "--distances", "0.5", "--document-tokens", "400", "--max-new-tokens", "2", "--quiet"]
    command += ["--device", "cpu", "--sizes", "6K"]
    assert main([*command, "--out", str(out), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "fact: 0 of 1 right" in said and "What broke in" in said and "By hops" in said
    assert state(tmp_path / "docs") == before and "<h2>By kind, hops</h2>" in page.read_text()
    assert main(["bench", "compare", str(out), str(out)]) == 0
    assert main([*command[:4], "--sizes", "9M", "--quiet", "--device", "cpu"]) == 2
    assert "fewer than the 9,000,000" in capsys.readouterr().err
    assert main(["bench", "mine", str(tmp_path / "model"), str(tmp_path / "none")]) == 2
    assert "no such file, folder or bank" in capsys.readouterr().err


LIST = "# Head\n\nSome prose here. More prose.\n\n* one item\n* two items\n\n```\ncode. Here.\n```\n| a. | b. |\n"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (0.0, "\n\nNEW. Some prose here. More prose.\n"),
        (0.25, "\n\nSome prose here. NEW. More prose.\n"),
        (0.5, "\n* one item\n* NEW.\n* two items\n"),
        (1.0, "\n* one item\n* two items\n* NEW.\n"),
    ],
)
def test_a_sentence_takes_the_shape_of_what_is_around_it(place: float, expected: str) -> None:
    found = insert_in_style(LIST, "NEW.", place)
    assert expected in found and "```\ncode. Here.\n```\n| a. | b. |\n" in found


@pytest.mark.parametrize(
    "text", [*PAGES, "```\nall code\n```", "| a | b |", "no end", "1. first\n2. second", "Windows.\r\nLines.\r\n"]
)
def test_nothing_but_the_sentence_is_new(text: str) -> None:
    for place in (0.0, 0.3, 0.7, 1.0):
        found = insert_in_style(text, "NEW SENTENCE.", place)
        before, _, after = found.partition("NEW SENTENCE.")
        rest = re.sub(r"\s", "", before + after)
        mark = re.search(r"(?:[-*+]|\d+[.)])\s+$", before)
        whole = re.sub(r"\s", "", text)
        assert whole in (rest, re.sub(r"\s", "", before[: mark.start()] + after) if mark else rest)


def test_terms_are_made_of_the_corpus_words_and_new_to_it() -> None:
    found = own_terms(own_words(PAGES * 2), PAGES, 12, 0)
    assert len(found) == 12 and len({term for pair in found for term in pair}) == 24
    whole = "\n".join(PAGES).lower()
    for pair in found:
        assert all(word in whole for term in pair for word in term.split("-")) and not any(
            term in whole for term in pair
        )
    assert own_terms(own_words(["One text."]), ["One text."], 4, 0) == []


def test_facts_lie_as_far_apart_as_the_result_says(model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From three quarters on, half of the size farther is back at a quarter, not at the other side of the end."""
    assert depths_apart(0.75, 0.5, 4) == [0.75, 0.25, 0.75, 0.25] and depths_apart(0.0, 0.4, 4) == [0.0, 0.4, 0.8, 0.4]
    assert depths_apart(0.95, 0.05, 3) == [0.95, 1.0, 0.95] and depths_apart(0.6, 0.7, 3) == [0.6, 0.0, 0.7]
    monkeypatch.setattr(planting, "put", Reader())
    settings = MineSettings((50_000,), 2, 5, (0.3, 0.5), 1, document_tokens=400, max_new_tokens=2)
    result = run(model, PAGES * 4, settings)
    chains = [trial for trial in result.trials if trial.kind == "chain"]
    assert len(chains) == 10 and len({trial.axes["depth"] for trial in chains}) == 5
    for trial in chains:
        (apart,) = trial.detail["tokens_apart"]
        assert apart == pytest.approx(trial.axes["distance"], abs=6000), trial.id  # type: ignore[arg-type]


def test_names_of_the_documents_are_not_planted(model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of an earlier run, kept among the documents, hold its questions and their answers."""
    monkeypatch.setattr(planting, "put", Reader())
    asked = [trial.question for trial in run(model).trials]
    pages = [*PAGES, "\n".join(f"Earlier it was asked: {question}" for question in asked)]
    again = run(model, pages)
    assert not set(asked) & {trial.question for trial in again.trials} and len(again.trials) >= len(asked)
    monkeypatch.setattr(mine, "CHAINS", 10)
    with pytest.raises(ValueError, match="name nearly all entities of seed 0; take another `seed`"):
        run(model, pages)


@pytest.mark.parametrize("hops", range(1, MOST_HOPS + 1))
def test_every_fact_of_a_chain_is_about_what_the_one_before_names(hops: int) -> None:
    chains = Chains(5)
    for number in range(40):
        chain = chains.chain(number, hops)
        assert chain == Chains(5).chain(number, hops) and len(chain.sentences) == hops
        assert chain.answer in chain.sentences[-1] and chain.twin != chain.question
        assert not re.search(r"[{}]|the the", " ".join((*chain.sentences, chain.question, chain.twin)))
        # Names are two words of which one at least is invented: the last of each fact comes again in the next.
        for one, other in zip(chain.sentences, chain.sentences[1:], strict=False):
            assert set(re.findall(r"[A-Z]\w{4,}", one)) & set(re.findall(r"[A-Z]\w{4,}", other))
        first = set(re.findall(r"[A-Z]\w{4,}", chain.question)) & set(re.findall(r"[A-Z]\w{4,}", chain.sentences[0]))
        assert first and all(not (first & set(re.findall(r"[A-Z]\w{4,}", text))) for text in chain.sentences[2:])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hops": 5}, "`hops` must be 1 to 4"),
        ({"depths": 0}, "at least one"),
        ({"distances": (2.0,)}, "0 to 1"),
        ({"distances": (0.5, 0.5)}, "has one twice"),
        ({"sizes": (100,)}, "are too few to plant"),
        ({"repeats": 5000}, "names for"),
        ({"refusal": " "}, "`refusal` is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], named: str, model: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=named):
        run(model, settings=MineSettings(**{"document_tokens": 400, **settings}))
    with pytest.raises(ValueError, match=r"too few|have 0 tokens|have \d tokens"):
        run(model, ["Short."])


def alike(documents: int) -> list[str]:
    """Texts of as many tokens each."""
    return [
        f"Page {chr(ord('a') + number // 26)}{chr(ord('a') + number % 26)} is short." for number in range(documents)
    ]


def no_encoding(*given: Any, **options: Any) -> Any:
    raise AssertionError("encodes")


def test_a_distance_below_one_document_is_refused_before_anything_is_encoded(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planting, "put", Reader())
    texts = alike(64)
    tokens = len(model[1](texts[0])["input_ids"])
    options: dict[str, Any] = {"depths": 1, "repeats": 1, "hops": 2, "max_new_tokens": 2}
    for sizes, far, documents, least in (
        ((), 0.01, 64, "0.016"),
        ((16 * tokens,), 0.05, 16, "0.063"),
        ((16 * tokens, 64 * tokens), 0.05, 16, "0.063"),
        ((), 0.0, 64, "0.016"),
        ((50 * tokens,), 0.0199, 50, "0.02"),
    ):
        said = (
            rf"{far:g} is less than one of the {documents} documents .* smallest possible is {least}\. Ask for larger"
        )
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=said):
            patch.setattr(type(model[0]), "encode_documents", no_encoding)
            run(model, texts, MineSettings(sizes, distances=(far, 0.5), **options), tmp_path / "r.json")
        assert not (tmp_path / "r.json").exists()
        made = run(model, texts, MineSettings(sizes, distances=(float(least), 0.5), **options))
        for trial in made.trials:
            if trial.kind == "chain":
                assert trial.detail["tokens_apart"][0] == pytest.approx(trial.axes["distance"], abs=tokens)
    # One fact has no distance to another.
    assert run(model, texts, MineSettings(distances=(0.0,), **{**options, "hops": 1})).trials


@pytest.mark.parametrize(
    ("documents", "sizes", "given", "taken", "distances"),
    [
        # Of sizes that nobody asked for, those remain that have the room; one of 16 and of 64 documents.
        (64, (), (), (64,), (0.05, 0.5)),
        (64, (), (0.05,), (64,), (0.05,)),
        (64, (), (0.5,), (16, 64), (0.5,)),
        (80, (), (), (20, 80), (0.05, 0.5)),
        # Of distances that nobody asked for as well.
        (16, (), (), (16,), (0.5,)),
        (64, (16, 64), (), (16, 64), (0.5,)),
        (64, (20, 64), (), (20, 64), (0.05, 0.5)),
    ],
)
def test_what_was_not_asked_for_gives_way_to_distances_of_a_document(
    documents: int,
    sizes: tuple[int, ...],
    given: tuple[float, ...],
    taken: tuple[int, ...],
    distances: tuple[float, ...],
    model: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planting, "put", Reader())
    texts = alike(documents)
    tokens = len(model[1](texts[0])["input_ids"])
    settings = MineSettings([size * tokens for size in sizes], 2, 1, given, 1, max_new_tokens=2)
    made = run(model, texts, settings).settings
    assert made["sizes"] == [size * tokens for size in taken] and made["distances"] == list(distances)


def test_it_says_in_words_where_the_memory_is_blind() -> None:
    def trials(hops: int, tokens: int, right: int, broke: str) -> list[Trial]:
        kind = "fact" if hops == 1 else "chain"
        axes = {"tokens": tokens, "hops": hops, "depth": 0.5}
        return [
            Trial(
                f"{hops} {tokens} {number}",
                kind,
                axes,
                "?",
                ("a",),
                "",
                number < right,
                {"broke": "" if number < right else broke},
            )
            for number in range(40)
        ]

    made = Result(
        "mine",
        {},
        {},
        trials=[
            *trials(1, 1000, 40, ""),
            *trials(2, 1000, 4, "routing"),
            *trials(1, 4000, 40, ""),
            *trials(2, 4000, 5, "routing"),
        ],
    )
    said = "\n".join(in_words(made))
    assert "fact: 80 of 80 right" in said and "sees well" in said
    assert re.search(r"chain: 9 of 80 right.*: blind\.", said)
    # One question says nothing: of a kind that sees nine of ten, one in ten is wrong.
    for asked, state in ((1, "too few questions to tell"), (2, "blind")):
        few = Result("mine", {}, {}, trials=trials(2, 1000, 0, "routing")[:asked])
        assert in_words(few)[1].startswith(f"chain: 0 of {asked} right") and state in in_words(few)[1]
    assert (
        re.search(r"By hops: best at 1 hops.*worst at 2 hops", said)
        and "By tokens: no difference beyond chance" in said
    )
    assert "What broke in 71 of 71 wrong answers: routing" in said


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("The memory does not hold the answer.", True),
        ("I don't know.", True),
        ("It is not mentioned in the text.", True),
        ("Not known here", False),
        ("1234", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_its_words(answer: str, refused: bool) -> None:
    assert refuses(answer, "The memory does not hold the answer.") is refused


def test_the_result_is_json(model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planting, "put", Reader())
    run(model, path=tmp_path / "r.json")
    again = run(model, path=tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert len(record["trials"]) == len(again.trials) and len(record["runs"]) == 2


def test_terms_are_made_of_words_of_any_alphabet_with_small_letters() -> None:
    words = "дорога камень мост стена größe über θάλασσα"
    found = own_words([words, words, *("else", "other", "Большой 委员会委员会") * 2])
    assert set(found) >= {"дорога", "größe", "θάλασσα"}
    assert own_words(["委员会委员会 Großes ABCDE"] * 3) == []


@pytest.mark.parametrize("distance", [0.05, 0.5, 0.8])
def test_a_distance_without_room_is_told_as_it_is(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, distance: float
) -> None:
    monkeypatch.setattr(planting, "put", Reader())
    texts = [f"Item {number} of the list. It is short." for number in range(300)]
    settings = MineSettings(depths=5, repeats=1, hops=4, distances=(distance,), document_tokens=400)
    result = run(model, texts, settings)
    size = max(result.settings["sizes"])
    chains = [trial for trial in result.trials if trial.kind == "chain" and trial.axes["tokens"] == size]
    assert len(chains) == 5 * 3
    for trial in chains:
        said = int(trial.axes["distance"])
        assert said == round(distance * size) or distance > 0.5
        # From end to end, sentences of many questions take turns at the ends.
        assert all(apart >= said - 0.15 * size for apart in trial.detail["tokens_apart"])


def test_terms_that_were_wanted_and_not_made_are_told() -> None:
    for terms, said in ((0, "No terms were asked for, of 4 wanted"), (3, "3 terms were asked for, of 4 wanted")):
        made = Result("mine", {}, {}, notes={"terms": terms, "terms wanted": 4})
        assert in_words(made)[-1].startswith(said)
    assert not any("terms" in line for line in in_words(Result("mine", {}, {}, notes={"terms": 4, "terms wanted": 4})))
