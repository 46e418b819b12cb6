"""The scaling curve: nested banks, the same questions at every size, and what is lost between them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from msa_hf.bench.curve import curve
from msa_hf.bench.haystack import HaystackTooSmall
from msa_hf.bench.nested import (
    BLOCK,
    GivenTexts,
    InventedTexts,
    NestedDocuments,
    documents_of,
    encode_nested,
    first_documents,
)
from msa_hf.bench.result import Result, ResultError, Trial
from msa_hf.bench.scaling import (
    ScalingSettings,
    given_questions,
    in_words,
    invented_questions,
    loss,
    run_scaling,
)
from msa_hf.cli import main
from msa_hf.synthetic import make_corpus

TINY = "model_cards/msa-hf-tiny"
QUICK = ["--quiet", "--dtype", "float32", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_corpus(60, seed=5, split="test").texts()


def documents(tiny: Any, wanted: list[str], filler: list[str], tokens: int, seed: int = 0) -> NestedDocuments:
    return NestedDocuments(tiny[1], tiny[2], wanted, GivenTexts(filler), tokens, seed)


def test_the_beginning_of_a_bank_is_the_bank_of_the_beginning(tiny: Any, texts: list[str]) -> None:
    whole = encode_nested(*tiny[:2], documents(tiny, texts[:3], texts[3:], 1500))
    part = first_documents(whole, documents_of(whole, 600))
    alone = tiny[0].encode_documents(list(documents(tiny, texts[:3], texts[3:], 1500).rows())[: len(part)], tiny[1])
    assert 600 <= part.num_tokens == alone.num_tokens < 600 + 130
    assert [item.text for item in part.documents] == texts[: len(part)]
    assert [item.metadata for item in part.documents] == [item.metadata for item in alone.documents]
    for layer, memory in part.layers.items():
        torch.testing.assert_close(memory.routing_keys, alone.layers[layer].routing_keys)
        torch.testing.assert_close(memory.pooled_kv, alone.layers[layer].pooled_kv)
    assert first_documents(whole, len(whole)) is whole


def test_numbers_are_each_given_once_and_do_not_tell_what_is_asked_about(tiny: Any, texts: list[str]) -> None:
    rows = list(documents(tiny, texts[:20], texts[20:], 5000).rows())
    ids = [row["metadata"]["id"] for row in rows]  # type: ignore[index]
    assert len(set(ids)) == len(ids)
    assert ids != sorted(ids) and max(ids[:20]) > 40  # not the first numbers
    assert [row["metadata"]["id"] for row in documents(tiny, texts[:20], texts[20:], 5000, 1).rows()] != ids  # type: ignore[index]


def test_invented_filler_leaves_out_whoever_is_asked_about() -> None:
    free = InventedTexts(3, [])
    first, second = free.block(0), free.block(1)
    assert len(first) == BLOCK and len(set(first) | set(second)) > 1.9 * BLOCK
    assert InventedTexts(3, []).block(1) == second  # whatever was made before
    named = [text for text in first if text.split()[0] == "The"][:2]
    left = InventedTexts(3, named).block(0)  # each of them has its own name in it
    assert not set(named) & set(left) and len(left) >= BLOCK - 20


def test_filler_that_ends_too_early_is_refused(tiny: Any, texts: list[str]) -> None:
    with pytest.raises(HaystackTooSmall, match=r"the largest bank is to have 90,000\. Name more texts"):
        list(documents(tiny, texts[:3], texts[3:], 90_000).rows())


def result_of(pairs: list[tuple[bool, bool]], kinds: str = "ab") -> Result:
    result = Result("scaling", {}, {})
    for number, rights in enumerate(pairs):
        for size, right in zip((16_000, 1_000_000), rights, strict=True):
            kind = kinds[number % len(kinds)]
            result.add([Trial(f"{size} {number}", kind, {"tokens": size}, "?", ("x",), "y", right, {"broke": ""})])
    return result


def test_the_loss_is_that_of_pairs() -> None:
    found = loss(result_of([(True, True)] * 80 + [(True, False)] * 15 + [(False, True)] * 5))
    assert found is not None and (found.first, found.last, found.asked) == (0.95, 0.85, 100)
    assert found.relative == pytest.approx(0.1 / 0.95)
    # Of 100 pairs 20 changed: the variance of the difference is (20 - 10²/100) / 100², half a pair added to each side.
    half = 1.96 * math.sqrt(20 + 1 - 1) / 100
    assert (found.low, found.high) == (pytest.approx(0.1 - half, abs=1e-4), pytest.approx(0.1 + half, abs=1e-4))
    assert found.p == pytest.approx(0.0414, abs=1e-4)  # 5 or fewer of 20, twice
    gained = loss(result_of([(False, True)] * 4 + [(True, True)] * 6))
    assert gained is not None and gained.relative == pytest.approx(-4 / 6)
    same = loss(result_of([(True, True)] * 10))
    assert same is not None and same.low < 0 < same.high and same.p == 1


def test_a_loss_takes_two_sizes_and_questions_that_both_have() -> None:
    assert loss(Result("scaling", {}, {})) is None
    one = result_of([(True, True)])
    one.trials.pop()
    assert loss(one) is None and in_words(one) == []
    nothing = loss(result_of([(False, False)]))
    assert nothing is not None and nothing.relative == 0 and "0.000 became 0.000" in str(nothing)
    assert [line.partition(":")[0] for line in in_words(result_of([(True, True), (True, False)]))][1:3] == ["a", "b"]


def test_the_curve_is_svg_with_a_point_for_every_size_and_kind() -> None:
    drawn = ElementTree.fromstring(curve(result_of([(True, False), (True, True), (False, False)], "<&")))
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f".//{space}circle")) == 6 and len(drawn.findall(f".//{space}polyline")) == 3
    ys = [float(item.get("cy") or 0) for item in drawn.findall(f".//{space}circle")][:2]
    assert ys[0] < ys[1]  # 2 of 3, then 1 of 3: down
    assert curve(Result("scaling", {}, {})) == ""


def test_questions_of_a_user_come_with_their_documents() -> None:
    asked = given_questions(
        [
            {"question": "a?", "answer": "x", "rounds": [["d2"], ["d0"]]},
            {"question": "b?", "answer": "y", "positives": ["d0"], "kind": "easy"},
            {"question": "c?"},
        ],
        {f"d{number}": f"text {number}" for number in range(3)},
    )
    assert asked.texts == ("text 2", "text 0")  # what nobody asks about is left to the filler
    assert [(item.kind, item.rounds) for item in asked.questions] == [
        ("answerable", ((0,), (1,))),
        ("easy", ((1,),)),
        ("unanswerable", ()),
    ]
    with pytest.raises(ValueError, match=r"Question 0 is about the document 'gone'"):
        given_questions([{"question": "a?", "answer": "x", "positives": ["gone"]}], {})
    with pytest.raises(ValueError, match=r"Question 0 \('a\?'\) has documents but no `answer`"):
        given_questions([{"question": "a?", "positives": ["d"]}], {"d": "text"})


def test_all_documents_asked_about_are_in_the_smallest_bank(tiny: Any, texts: list[str]) -> None:
    asked = given_questions(
        [{"question": "?", "answer": "x", "positives": [str(place) for place in range(9)]}],
        {str(place): text for place, text in enumerate(texts)},
    )

    class Unread(GivenTexts):
        def block(self, number: int) -> list[str]:
            raise AssertionError("The largest bank is begun.")

    with pytest.raises(ValueError, match="9 documents asked about have more than 300 tokens, the smallest size"):
        run_scaling(ScalingSettings((300, 2000)), *tiny, asked, Unread(texts[9:]))
    with pytest.raises(ValueError, match="at least 2200 tokens"):
        invented_questions(1000, 3)
    with pytest.raises(ValueError, match=r"has 20 documents, .* ask fewer \(--asked\)"):
        invented_questions(2200, 5000)
    with pytest.raises(ValueError, match="ascend"):
        ScalingSettings((2000, 300))


@pytest.mark.parametrize(("tokens", "asked"), [(2200, 100), (4000, 100), (16_000, 1000)])
def test_no_invented_question_counts_twice(tokens: int, asked: int) -> None:
    """Small corpora have few entities, whose turns come again."""
    found = invented_questions(tokens, asked).questions
    assert len({item.text for item in found}) == len(found) == 3 * asked


def test_the_command_asks_the_same_of_every_size_and_goes_on(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out, page = tmp_path / "curve.json", tmp_path / "curve.html"
    options = [
        "--sizes",
        "2300,3K",
        "--asked",
        "1",
        "--text",
        str(tmp_path / "texts.jsonl"),
        *QUICK,
        "--out",
        str(out),
        "--html",
        str(page),
    ]
    assert main(["bench", "scaling", TINY, *options]) == 0
    assert "From 2.3K to 3K tokens" in capsys.readouterr().out and "<svg" in page.read_text(encoding="utf-8")
    result = Result.load(out)
    questions = [[item.question for item in result.trials if item.axes["tokens"] == size] for size in (2300, 3000)]
    assert questions[0] == questions[1] and len(questions[0]) == 3
    assert [2300 <= result.notes["bank of 2300"]["tokens"] < 2500, result.notes["bank of 3000"]["tokens"] >= 3000] == [
        True
    ] * 2
    record = json.loads(out.read_text())
    record["trials"] = record["trials"][:4]
    out.write_text(json.dumps(record))
    assert main(["bench", "scaling", TINY, *options]) == 0
    assert Result.load(out).trials == result.trials


def test_a_file_of_other_questions_or_texts_is_refused(tiny: Any, texts: list[str], tmp_path: Path) -> None:
    """As many questions about as many documents, under the same names."""
    path, settings = tmp_path / "curve.json", ScalingSettings((150,), max_new_tokens=1, rounds={"max_rounds": 1})

    def run(question: str, text: str, filler: list[str]) -> Result:
        asked = given_questions([{"question": question, "answer": "x", "positives": ["d"]}], {"d": text})
        return run_scaling(settings, *tiny, asked, GivenTexts(filler), path)

    done = run("Who?", texts[0], texts[1:9])
    assert run("Who?", texts[0], texts[1:9]).trials == done.trials
    for other in (("What?", texts[0], texts[1:9]), ("Who?", texts[30], texts[1:9])):
        with pytest.raises(ResultError, match=r"cannot go on with .asked: "):
            run(*other)
    with pytest.raises(ResultError, match=r"cannot go on with .filler_texts: "):
        run("Who?", texts[0], texts[11:19])
    assert invented_questions(3000, 2, 0, ["one_hop"]).digest != invented_questions(3000, 2, 0, ["two_hop"]).digest
    assert InventedTexts(0, ["a"]).digest != InventedTexts(1, ["a"]).digest


def test_questions_without_their_documents_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", TINY, "--questions", "q.jsonl"]) == 2
    assert "--questions and --documents belong together" in capsys.readouterr().err


def test_no_more_than_all_is_lost_and_nothing_where_nothing_was_right() -> None:
    one = loss(result_of([(True, True)]))
    assert one is not None and (one.low, one.high) == (-1.0, 1.0) and "(95 %: -100.0 to 100.0;" in str(one)
    none = loss(result_of([(False, False), (False, True)]))
    assert none is not None and "none was right at first" in str(none) and "% lost" not in str(none)
