"""Rankings put together: reciprocal ranks as written down, and learned weights that are worth their fitting."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from msa_hf.retrieval import FusionWeights, fit_fusion, fuse
from msa_hf.retrieval.fusion import LEARNED, RECIPROCAL, _recall

Lists = list[dict[str, list[tuple[int, float]]]]


def questions(seed: int, count: int, quality: dict[str, float], documents: int = 60) -> tuple[Lists, list[set[int]]]:
    """Each way scores documents by noise, and the right one higher by its quality; it lists its best twenty."""
    chance = random.Random(seed)
    lists, gold = [], []
    for _ in range(count):
        right = chance.randrange(documents)
        found = {}
        for way, gain in quality.items():
            scores = [chance.gauss(0, 1) + gain * (document == right) for document in range(documents)]
            found[way] = sorted(enumerate(scores), key=lambda pair: -pair[1])[:20]
        lists.append(found)
        gold.append({right})
    return lists, gold


def recall(lists: Lists, gold: list[set[int]], weights: FusionWeights | None) -> float:
    return sum(_recall(fuse(found, weights), right) for found, right in zip(lists, gold, strict=True)) / len(gold)


def alone(lists: Lists, gold: list[set[int]], way: str) -> float:
    return recall([{way: found[way]} for found in lists], gold, None)


def test_reciprocal_ranks_are_those_of_the_paper() -> None:
    found = {"a": [(5, 9.0), (3, 8.0), (7, 1.0)], "b": [(3, 0.2), (9, 0.1)]}
    expected = {3: 1 / 62 + 1 / 61, 5: 1 / 61, 9: 1 / 62, 7: 1 / 63}
    ranked = fuse(found)
    assert [document for document, _ in ranked] == [3, 5, 9, 7]
    assert [score / 61 for _, score in ranked] == pytest.approx(list(expected.values()))
    assert fuse({"a": [(2, 1.0)], "b": [(1, 1.0)]})[0][0] == 1  # equal: the lower document
    assert fuse({"a": [], "b": []}) == []


def test_learned_weights_beat_every_way_and_reciprocal_ranks() -> None:
    quality = {"router": 3.2, "lexical": 2.8, "dense": 0.3}  # one is next to worthless, which equal votes do not know
    weights = fit_fusion(*questions(0, 240, quality))
    assert (
        weights.method == LEARNED
        and weights.questions == 240
        and set(weights.recall) == {LEARNED, RECIPROCAL, *quality}
    )
    lists, gold = questions(1, 600, quality)
    found = recall(lists, gold, weights)
    assert found > max(alone(lists, gold, way) for way in quality) + 0.05
    assert found > recall(lists, gold, None) + 0.02
    assert fit_fusion(*questions(0, 240, quality)) == weights


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_never_worse_on_what_it_was_fitted_on(seed: int, count: int) -> None:
    chance = random.Random(seed)
    quality = {way: chance.choice([0.0, 1.0, 3.0]) for way in ("lexical", "dense")}
    lists, gold = questions(seed, count, quality)
    weights = fit_fusion(lists, gold)
    found = recall(lists, gold, weights)
    assert found >= recall(lists, gold, None) - 1e-12
    assert all(found >= alone(lists, gold, way) - 1e-12 for way in quality)


def test_one_way_is_kept_where_the_others_only_disturb() -> None:
    lists, gold = questions(4, 40, {"lexical": 0.0, "router": 9.0})
    kept = FusionWeights(("lexical", "router"), "router")
    assert recall(lists, gold, kept) == alone(lists, gold, "router") == 1.0 > recall(lists, gold, None)
    ranked = [document for document, _ in fuse(lists[0], kept)]
    assert ranked[:20] == [document for document, _ in lists[0]["router"]] and len(ranked) > 20


def test_weights_are_saved_and_read(tmp_path: Path) -> None:
    weights = fit_fusion(*questions(0, 30, {"lexical": 2.0, "dense": 2.0}))
    weights.save_pretrained(tmp_path)
    assert FusionWeights.from_pretrained(tmp_path) == weights
    text = (tmp_path / "fusion.json").read_text()
    record = json.loads(text)
    learned, about = record | {"method": LEARNED, "units": [[1.0, 0.5]] * 2}, [0.1] * 12
    spoiled: list[dict[str, Any]] = [
        *(learned | {"weights": [about] * 11 + [[*about[:-1], value]]} for value in (math.nan, math.inf, 10**400)),
        *(learned | {"weights": [about] * 12, "units": [[1.0, 0.5], unit]} for unit in ([0.0, 1.0], [-1.0, 1.0])),
        {"ways": ["lexical", "lexical"]},
        {"questions": math.inf},
    ]
    for broken in (
        "{",
        "[]",
        text.replace('"version": 1', '"version": 2'),
        text.replace('"method": "', '"method": "x'),
        text.replace('"level"', '"other"'),
        *(json.dumps(record | change) for change in spoiled),
    ):
        (tmp_path / "fusion.json").write_text(broken)
        with pytest.raises(ValueError, match=r"fusion\.json: not weights of a fusion"):
            FusionWeights.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    lists, gold = questions(0, 3, {"lexical": 2.0, "dense": 2.0})
    with pytest.raises(ValueError, match="at least one each"):
        fit_fusion([], [])
    with pytest.raises(ValueError, match="Question 1 has no document"):
        fit_fusion(lists, [gold[0], set(), gold[2]])
    with pytest.raises(ValueError, match=r"Question 2 has lists of \['dense'\]"):
        fit_fusion([*lists[:2], {"dense": lists[2]["dense"]}], gold)
    with pytest.raises(ValueError, match="weights are for lexical, dense, but dense were asked"):
        fuse({"dense": lists[0]["dense"]}, FusionWeights(("lexical", "dense"), LEARNED))
    huge = FusionWeights(("lexical", "dense"), LEARNED, ((1e308,) * 12,) * 12, ((1.0, 0.5),) * 2)
    with pytest.raises(ValueError, match="not finite: fit others"):
        fuse(lists[0], huge)


def test_weights_depend_on_the_question() -> None:
    """One way is right about what is typed into a search box, another about whole questions; the text says which."""
    typed, typed_gold = questions(0, 200, {"lexical": 0.0, "dense": 2.5})
    whole, whole_gold = questions(1, 200, {"lexical": 2.5, "dense": 0.0})
    texts = ["river longest europe"] * 200 + ["Which river is the longest?"] * 200
    lists, gold = [*typed, *whole], [*typed_gold, *whole_gold]
    order = random.Random(0).sample(range(400), 400)
    fitted = [[item[number] for number in order] for item in (lists, gold, texts)]
    told, untold = fit_fusion(*fitted), fit_fusion(*fitted[:2])
    assert told.method == LEARNED

    def found(weights: FusionWeights, asked: bool) -> float:
        ranked = (fuse(item, weights, text if asked else None) for item, text in zip(lists, texts, strict=True))
        return sum(_recall(ranking, right) for ranking, right in zip(ranked, gold, strict=True)) / len(gold)

    assert found(told, True) > found(untold, False) + 0.03
    with pytest.raises(ValueError, match="`questions` has 3 entries for 400"):
        fit_fusion(lists, gold, texts[:3])


def test_importance_moves_the_weights() -> None:
    quality = {"lexical": 3.0, "dense": 0.0}
    lists, gold = questions(0, 60, quality)
    other, other_gold = questions(1, 60, {"lexical": 0.0, "dense": 3.0})
    both, right = [*lists, *other], [*gold, *other_gold]
    few = fit_fusion(both, right, importance=[9.0] * 60 + [0.1] * 60)
    many = fit_fusion(both, right, importance=[0.1] * 60 + [9.0] * 60)
    assert recall(lists, gold, few) > recall(lists, gold, many) + 0.2
    with pytest.raises(ValueError, match="positive"):
        fit_fusion(both, right, importance=[0.0] * 120)
