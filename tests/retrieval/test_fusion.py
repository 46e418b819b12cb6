"""Rankings put together: reciprocal ranks as written down, and learned weights that are worth their fitting."""

import random
from pathlib import Path

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
    for broken in (
        "{",
        "[]",
        text.replace('"version": 1', '"version": 2'),
        text.replace('"method": "', '"method": "x'),
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
        fuse({"dense": lists[0]["dense"]}, FusionWeights(("lexical", "dense"), LEARNED, ((1, 0, 0, 0), (1, 0, 0, 0))))
