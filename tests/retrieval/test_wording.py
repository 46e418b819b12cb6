"""The best of a ranking, read for their wording."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_hf.retrieval import FusionWeights, fit_fusion, fit_wording, rank_by_wording, wording
from msa_hf.retrieval.wording import ABOUT, FEATURES, READ, Wording, features_of


class PlainWords:
    """Words between spaces, of which longer ones are rarer."""

    def terms(self, text: str) -> list[str]:
        return [word.strip(".?!,").lower() for word in text.split() if word.strip(".?!,")]

    def rarity(self, term: str) -> float:
        return float(len(term))


WORDS = PlainWords()
AS_IT_IS = [[1.0, 0, 0, 0], *([0.0] * 4 for _ in FEATURES[1:])]


def only(feature: str) -> list[list[float]]:
    return [[float(name == feature), 0, 0, 0] for name in FEATURES]


def of(question: str, text: str) -> dict[str, float]:
    return dict(zip(FEATURES[1:], Wording(question, WORDS).features(text), strict=True))


def test_what_is_read_off_a_text() -> None:
    found = of("Who built Elm Bridge in 1890?", "Elm Bridge\nIt was opened in 1890. Elm wood was built upon.\nThe end.")
    total = sum(map(len, ("built", "elm", "bridge", "in", "1890")))  # who asks
    assert found["coverage"] == found["square"] == 1
    assert found["title"] == pytest.approx(9 / total) and found["titled"] == 1
    assert found["sentence"] == pytest.approx(8 / total)  # elm, built
    assert found["two"] == pytest.approx(14 / total)  # in 1890, elm built
    assert found["under"] == pytest.approx(15 / total)  # the title with in 1890
    assert found["pairs"] == pytest.approx(2 / (3 + 3 + 2 + 2))  # in 1890
    assert found["names"] == 1 and found["rarest"] == 1
    assert found["length"] == pytest.approx(math.log(1 + 12) - 4.5)
    assert found["entitled"] == 1 and found["focus"] == pytest.approx(6 / (6 + 2 + 3 + 6))  # in 1890; it was opened
    assert found["run"] == pytest.approx(2 / 5)  # in 1890, and no more of the five


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("How many arches has Elm Bridge?", "Elm Bridge has seven arches.", "Elm Bridge has arches."),
        ("how long is elm bridge", "Elm Bridge is 1,204 m long.", "Elm Bridge is long."),
        ("When was Elm Bridge built?", "Elm Bridge was built in May.", "Elm Bridge was built late."),
        ("What year was Elm Bridge built in, not 1890?", "Elm Bridge: 1903.", "Elm Bridge was not built in 1890."),
        ("Where does Elm Bridge stand?", "Elm Bridge stands near Tolland.", "Elm Bridge stands near water."),
        ("which city has elm bridge", "Elm Bridge: in Oskel.", "Elm Bridge: in a city."),
        ("Who built Elm Bridge?", "Elm Bridge was built by Mira Tolland.", "Elm Bridge was built by masons."),
        ("whose is Elm Bridge", "It is the bridge of Mira.", "Nobody says whose Elm Bridge is."),
    ],
)
def test_what_is_asked_for_is_looked_for(question: str, right: str, wrong: str) -> None:
    assert (of(question, right)["wanted"], of(question, wrong)["wanted"]) == (1, 0)
    # Only in the sentence that says most of the question, and only where something is asked for.
    assert of(question, f"Nothing of it. {wrong} On 3 May 1777 Ann came to Ulm.")["wanted"] == 0
    assert of("Elm Bridge?", right)["wanted"] == 0


@pytest.mark.parametrize("seed", range(8))
def test_runs_are_those_of_all_stretches(seed: int) -> None:
    pick = random.Random(seed)
    asked, told = ([f"w{pick.randint(0, 4)}" for _ in range(count)] for count in (pick.randint(1, 9), 30))
    stretches = [asked[start : start + size] for size in range(1, 10) for start in range(len(asked) - size + 1)]
    there = {tuple(told[start : start + size]) for size in range(1, 10) for start in range(30)}
    longest = max((len(stretch) for stretch in stretches if tuple(stretch) in there), default=0)
    assert of(" ".join(asked), " ".join(told))["run"] == pytest.approx(longest / len(asked))


@pytest.mark.parametrize(
    "text", ["", "\n", "nothing of it", "\n\n  \n", "x" * 300 + "\nElm", "Elm " + "x" * 300 + "\nrest", "Elm\n"]
)
def test_texts_of_no_form(text: str) -> None:
    found = of("Elm?", text)
    assert found["title"] == 0 and all(math.isfinite(value) for value in found.values())
    assert found["coverage"] == float("Elm" in text)
    assert of("???", text)["coverage"] == of("What is which?", text)["coverage"] == 0
    assert of("Elm, oak?", "An elm.")["square"] == pytest.approx(0.25)


@pytest.mark.parametrize("seed", range(8))
def test_shares_are_those_of_sets(seed: int) -> None:
    """Random texts, against the same things said with sets."""
    pick = random.Random(seed)
    draw = [f"{'w' * pick.randint(1, 5)}{n}" for n in range(12)]
    question = " ".join(pick.choices(draw, k=pick.randint(1, 9)))
    sentences = [" ".join(pick.choices(draw, k=pick.randint(1, 14))) + "." for _ in range(pick.randint(1, 5))]
    title = " ".join(pick.choices(draw, k=2))
    found = of(question, f"{title}\n{' '.join(sentences)}")
    asked = WORDS.terms(question)

    def share(words: set[str]) -> float:
        return sum(len(word) for word in set(asked) & words) / sum(map(len, set(asked)))

    sets = [set(WORDS.terms(sentence)) for sentence in sentences]
    head, everything = set(WORDS.terms(title)), set().union(*sets)
    order = [word for sentence in sentences for word in WORDS.terms(sentence)]
    near = {(one, other) for n, one in enumerate(order) for other in order[n + 1 : n + 1 + wording.NEAR]}
    pairs = set(pairwise(asked))
    least = {pair: min(map(len, pair)) for pair in pairs}
    assert found["coverage"] == pytest.approx(share(everything | head)) and found["title"] == pytest.approx(share(head))
    assert found["sentence"] == pytest.approx(max(map(share, sets)))
    assert found["two"] == pytest.approx(max(share(a | b) for a, b in zip(sets, [*sets[1:], set()], strict=True)))
    assert found["under"] == pytest.approx(max(share(one | head) for one in sets))
    best = max(sets, key=lambda one: share(one | head))
    for name, words in (("focus", best), ("entitled", head)):
        assert found[name] == pytest.approx(sum(len(w) for w in words if w in asked) / sum(map(len, words)))
    wanted = sum(least[pair] for pair in pairs & near) / (sum(least.values()) or 1)
    assert found["pairs"] == pytest.approx(wanted)


def test_what_stands_behind_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wording, "READ", 3)
    ranking = [(7, 0.9), (2, 0.8), (5, 0.8), (1, 0.4), (3, 0.1)]
    texts: list[str | None] = ["no", "elm bridge", None]
    found = rank_by_wording(ranking, texts, "elm bridge", WORDS, AS_IT_IS)
    assert [document for document, _ in found] == [document for document, _ in ranking]
    assert [score for _, score in found] == pytest.approx([0.0, -0.1, -0.1, -0.5, -0.8])
    found = rank_by_wording(ranking, texts, "elm bridge", WORDS, only("coverage"))
    assert [document for document, _ in found] == [2, 5, 7, 1, 3]  # a text that is not there counts as the others do
    assert dict(found)[5] == 0.5 and [score for _, score in found] == sorted(
        (score for _, score in found), reverse=True
    )
    assert rank_by_wording([], [], "elm", WORDS, AS_IT_IS) == []
    nothing = rank_by_wording(ranking[:2], [None, None], "elm", WORDS, only("coverage"))
    assert nothing == [(7, 0.0), (2, 0.0)]


def known(count: int, tells: bool, seed: int = 0) -> tuple[Any, ...]:
    """Questions whose right text is the one that has their words side by side, or any."""
    pick = random.Random(seed)
    rankings, texts, gold, questions = [], [], [], []
    for _ in range(count):
        pair = [f"{pick.choice('abcdef') * 3}{pick.randint(0, 99)}" for _ in range(2)]
        made = [f"{pair[0]} is far away from what is called {pair[1]}" for _ in range(6)]
        right = pick.randrange(6)
        if tells:
            made[right] = f"it is far away and what is called {' '.join(pair)}"
        rankings.append([(n, 1.0 - n / 10) for n in range(6)])
        texts.append(made)
        gold.append({right})
        questions.append(" ".join(pair))
    return rankings, texts, gold, questions


def test_weights_are_learned_where_reading_helps() -> None:
    given = known(60, tells=True)
    weights = fit_wording(*given, WORDS)
    assert weights == fit_wording(*given, WORDS)
    for ranking, texts, gold, question in zip(*known(20, tells=True, seed=1), strict=True):
        assert rank_by_wording(ranking, texts, question, WORDS, weights)[0][0] in gold
    assert fit_wording(*known(60, tells=False), WORDS) == ()
    assert fit_wording([[(0, 1.0)]], [["text"]], [{3}], ["text"], WORDS) == ()
    with pytest.raises(ValueError, match="shorter"):
        fit_wording([[(0, 1.0)]], [], [{0}], ["text"], WORDS)


def test_lists_count_where_they_are_given() -> None:
    """Texts say nothing; the second of two ways knows. Its scores stand in another order than the ranking."""
    pick, rankings, lists, gold = random.Random(0), [], [], []
    for _ in range(60):
        right = pick.randrange(6)
        rankings.append([(n, 1.0 - n / 10) for n in range(6)])
        others = [(n, pick.random()) for n in range(5)]
        tells = sorted([(n, float(n == right) + pick.random() / 2) for n in range(6)], key=lambda pair: -pair[1])[:4]
        lists.append({"router": sorted(others, key=lambda pair: -pair[1]), "lexical": tells})
        gold.append({right})
    given = (rankings, [["text"] * 6] * 60, gold, ["elm bridge"] * 60, WORDS)
    assert fit_wording(*given) == ()
    weights = fit_wording(*given, lists=lists)
    assert len(weights) == len(FEATURES) + 2
    for ranking, item, right in zip(rankings, lists, gold, strict=True):
        assert rank_by_wording(ranking, ["text"] * 6, "elm bridge", WORDS, weights, item)[0][0] in right
    found = features_of(rankings[0], ["text"] * 6, "elm", WORDS, {"lexical": [(2, 5.0), (0, 3.0)]})
    assert found[:, -1].tolist() == [-1.0, -2.0, 1.0, -2.0, -2.0, -2.0]  # not on the list: the lowest, less one
    with pytest.raises(ValueError, match="same ways in the same order"):
        fit_wording(*given, lists=[*lists[:-1], dict(reversed(lists[-1].items()))])


def test_they_lie_with_the_weights_of_a_fusion(tmp_path: Path) -> None:
    weights = fit_fusion([{"router": [(0, 2.0), (1, 1.0)], "lexical": [(1, 3.0)]}] * 3, [{1}] * 3, ["a b"] * 3)
    weights.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "fusion.json").read_text())
    assert record["version"] == 1 and "wording" not in record  # earlier releases read it
    more = replace(weights, wording=tuple(map(tuple, [*AS_IT_IS, [0.0] * 4, [0.5] * 4])))
    with pytest.raises(ValueError, match="not those of its features"):  # no row for each of the ways
        replace(weights, wording=tuple(map(tuple, AS_IT_IS)))
    more.save_pretrained(tmp_path)
    assert FusionWeights.from_pretrained(tmp_path) == more
    record = json.loads((tmp_path / "fusion.json").read_text())
    assert record["version"] == 2 and record["wording_features"] == [list(FEATURES), list(ABOUT)]
    spoiled: list[dict[str, Any]] = [
        {"wording": record["wording"][:-1]},
        {"wording": [row[:-1] for row in record["wording"]]},
        {"wording": None},
        {"wording_features": [["other"], list(ABOUT)]},
        {"ways": ["router", "dense"]},
        {"version": 3},
    ]
    for change in spoiled:
        (tmp_path / "fusion.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(ValueError, match="fit them again"):
            FusionWeights.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lexical index"):
        FusionWeights(("router", "dense"), wording=more.wording)


def test_fused_scores_far_down_count_the_same() -> None:
    ranking = [(0, 0.0), (1, -1e9), (2, -2e9)]
    found = features_of(ranking, ["a", "a", "a"], "a", WORDS)
    assert found[:, 0].tolist() == [0.0, wording.LOWEST, wording.LOWEST] and bool(torch.isfinite(found).all())
    assert READ >= 10  # what recall at 10 can gain from
