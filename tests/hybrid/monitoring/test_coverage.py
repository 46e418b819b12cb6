"""Coverage and drift against plain loops."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from findings import finding

from msa_hf.hybrid.monitoring import Probe, never_routed, probe_documents, score_drift


def test_never_routed_is_what_is_left() -> None:
    found = [finding(routed=[0, 3]), finding(routed=[3, 5])]
    assert never_routed(found, 7) == [1, 2, 4, 6]
    assert never_routed([], 3) == [0, 1, 2] and never_routed([finding(routed=range(4))], 4) == []


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (20, 7), (50, 200)])
def test_distance_is_the_largest_between_the_distributions(sizes: tuple[int, int]) -> None:
    pick = random.Random(sum(sizes))
    before, now = ([round(pick.random(), 1) for _ in range(size)] for size in sizes)  # with ties
    found = score_drift(before, now)
    largest = max(
        abs(sum(a <= value for a in before) / len(before) - sum(b <= value for b in now) / len(now))
        for value in before + now
    )
    assert found.distance == pytest.approx(largest)


def test_drift_is_told_from_chance() -> None:
    pick = random.Random(0)
    alike = sum(
        score_drift([pick.gauss(0, 1) for _ in range(80)], [pick.gauss(0, 1) for _ in range(120)]).drifted
        for _ in range(200)
    )
    assert alike <= 22  # of 200, at a level of 5 %
    moved = score_drift([pick.gauss(0, 1) for _ in range(80)], [pick.gauss(-1, 1) for _ in range(120)])
    assert moved.drifted and -1.5 < moved.shift < -0.5
    with pytest.raises(ValueError, match="one of them is empty"):
        score_drift([], [1.0])


@dataclass
class FakeSearcher:
    """Routers that know documents by the sentences that they were encoded with."""

    texts: list[str]
    encoded: list[str]
    model: Any = field(default_factory=lambda: SimpleNamespace(config=SimpleNamespace(top_k=2)))

    @property
    def bank(self) -> Any:
        return SimpleNamespace(
            documents=[SimpleNamespace(key=f"d{place}", text=text) for place, text in enumerate(self.texts)]
        )

    def rankings(self, way: str, queries: list[str], k: int) -> list[list[tuple[int, float]]]:
        assert way == "router"
        ranked = [
            sorted(range(len(self.encoded)), key=lambda place: query not in self.encoded[place]) for query in queries
        ]
        return [[(place, 0.0) for place in found[:k]] for found in ranked]


def test_documents_are_asked_for_with_their_own_sentences() -> None:
    long = "One ends. Two follows! Three is last?"
    texts = [long, "Four stands alone.", "", long.replace("e", "a")]
    searcher = FakeSearcher(texts, [texts[0], texts[1], "", "Ona ands."])  # the last one was cut short
    found = probe_documents(searcher, [0, 1, 2, 3], k=1)
    assert found == [
        Probe("d0", "first", "One ends.", 1),
        Probe("d0", "last", "Three is last?", 1),
        Probe("d1", "first", "Four stands alone.", 1),
        Probe("d3", "first", "Ona ands.", 1),
        Probe("d3", "last", "Thraa is last?", None),
    ]
    assert len(probe_documents(searcher, [0] * 20)) == 40 and probe_documents(searcher, [2]) == []
    searcher.model = None
    with pytest.raises(ValueError, match="needs the `model`"):
        probe_documents(searcher, [0])
