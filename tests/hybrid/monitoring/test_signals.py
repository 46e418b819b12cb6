"""The signals of routing, against values computed by hand."""

import math

import pytest

from msa_hf.hybrid.monitoring.second_reading import standing
from msa_hf.hybrid.monitoring.signals import CHECKS, SIGNALS, RoutedRound, entropy, routing_signals, signal_named


def test_signals_of_one_round() -> None:
    item = RoutedRound([(3, 0.9), (1, 0.7), (4, 0.2)], {4: 3, 5: 3, 6: 1, 7: 9}, frozenset({3}))
    found = routing_signals([item], unanswered=False, k=2)
    assert found["low_score"] == -0.9 and found["small_margin"] == pytest.approx(-0.2)
    assert found["crowded"] == 0.7  # the second of k = 2
    assert found["layers_disagree"] == 0.5 and found["unanswered"] == 0.0
    weights = [1.0, math.exp(-2.0), math.exp(-7.0)]
    shares = [weight / sum(weights) for weight in weights]
    expected = -sum(share * math.log(share) for share in shares) / math.log(3)
    assert found["router_entropy"] == pytest.approx(expected)


def test_the_worst_round_counts() -> None:
    good = RoutedRound([(0, 0.9), (1, 0.1)], {0: 0, 1: 0}, frozenset({0}))
    bad = RoutedRound([(2, 0.4), (3, 0.39)], {0: 2, 1: 3}, frozenset({2}))
    found = routing_signals([good, bad], unanswered=True, k=16)
    assert (found["low_score"], found["crowded"], found["layers_disagree"]) == (-0.4, 0.39, 0.5)
    assert found["small_margin"] == pytest.approx(-0.01) and found["unanswered"] == 1.0


def test_what_is_not_there_is_no_signal() -> None:
    assert routing_signals([], unanswered=False, k=4) == {"unanswered": 0.0}
    alone = routing_signals([RoutedRound([(0, 0.5)], {0: 0}, frozenset({0}))], unanswered=False, k=4)
    assert "small_margin" not in alone and "layers_disagree" not in alone and alone["router_entropy"] == 0.0


@pytest.mark.parametrize("count", [2, 3, 17])
def test_entropy_lies_between_its_bounds(count: int) -> None:
    assert entropy([0.3] * count) == pytest.approx(1.0)
    assert entropy([100.0] + [0.0] * (count - 1)) == pytest.approx(0.0)
    scores = [1 / (place + 2) for place in range(count)]
    assert entropy(scores) == pytest.approx(entropy([score - 7 for score in scores]))


def test_every_signal_says_what_to_do() -> None:
    assert {f"{check}_{end}" for check in CHECKS for end in ("disagree", "recover")} <= set(SIGNALS)
    for signal in SIGNALS.values():
        assert signal.weight > 0 and signal.unit > 0 and signal.meaning and signal.remedy
    with pytest.raises(ValueError, match="no signal 'foo'; there are texts_disagree"):
        signal_named("foo")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"denser": "1924", "hybrid": "1924", "texts": "1885"}, set()),  # outvoted
        ({"denser": "1994", "hybrid": "1885", "texts": "1887"}, set()),  # each alone
        ({"denser": "1924", "hybrid": "The 1885.", "texts": "1885"}, {"hybrid", "texts"}),
        ({"denser": "1885", "hybrid": "1885", "texts": "1887"}, {"denser", "hybrid"}),
        ({"denser": "1924", "hybrid": "1885"}, set()),
        ({"denser": "1885", "hybrid": "1885"}, {"denser", "hybrid"}),
        ({"texts": "1885"}, {"texts"}),  # nothing else was asked
        ({"texts": "1924"}, set()),
        ({}, set()),
    ],
)
def test_disagreements_stand_if_another_check_says_the_same(seconds: dict[str, str], expected: set[str]) -> None:
    assert standing("1924", seconds) == expected
