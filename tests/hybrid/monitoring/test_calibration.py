"""Calibration against oracles: ranks by counting, the guarantee by simulation."""

import math
import random
from pathlib import Path

import pytest

from msa_hf.hybrid.monitoring import Calibration, calibrate
from msa_hf.hybrid.monitoring.calibration import allowed_alarms


def signals(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Well answered questions: a continuous signal, one with many ties, and a constant."""
    pick = random.Random(seed)
    return [
        {
            "texts_disagree": pick.expovariate(0.5) if pick.random() < 0.1 else 0.0,
            "low_score": -pick.random(),
            "unanswered": float(pick.random() < 0.3),
        }
        for _ in range(count)
    ]


def test_shares_count_those_at_least_as_bad() -> None:
    made = calibrate(signals(300))
    for name, reference in made.references.items():
        assert list(reference) == sorted(reference) and len(reference) == 300
        for value in (reference[0], reference[150], reference[-1], (reference[120] + reference[180]) / 2):
            at_least = sum(other >= value for other in reference)
            assert made.share(name, value) == pytest.approx((1 + at_least) / 301)


def test_beyond_the_largest_the_tail_falls_with_its_mean_excess() -> None:
    made = calibrate(signals(300))
    reference = made.references["texts_disagree"]
    top = reference[-30:]
    scale = max(sum(value - top[0] for value in top) / 30, 3.0)
    for beyond in (0.5, 3.0, 20.0):
        expected = math.exp(-beyond / scale) / 301
        assert made.share("texts_disagree", reference[-1] + beyond) == pytest.approx(expected)
    assert made.share("texts_disagree", 1e9) > 0


def test_a_question_of_the_calibration_is_compared_with_the_others() -> None:
    """As if each had been left out: also the largest value of a signal, and values that come more than once."""
    good = [*signals(70), {"texts_disagree": 40.0, "low_score": 0.0, "unanswered": 1.0}]
    made = calibrate(good, 0.05, confidence=0)
    expected = [
        calibrate(good[:place] + good[place + 1 :], 0.05, confidence=0).suspicion(item)
        for place, item in enumerate(good)
    ]
    assert made.suspicions == pytest.approx(sorted(expected))


@pytest.mark.parametrize("outliers", [1, 2, 3])
def test_a_few_outliers_do_not_set_the_threshold(outliers: int) -> None:
    """Two of them in one half of the questions used to: what was found then depended on how they were halved."""
    good = signals(180)
    outlying = {"texts_disagree": 50.0, "low_score": 0.0, "unanswered": 1.0}
    made = calibrate([*good[:-outliers], *[outlying] * outliers])
    assert made.threshold < calibrate(good).threshold + 1.0
    assert made.reasons({"texts_disagree": 30.0, "low_score": -0.01, "unanswered": 1.0})


def test_flagged_is_what_lies_above_the_threshold() -> None:
    made = calibrate(signals(400), false_alarms=0.1, confidence=0)
    flagged = 0
    for item in [*signals(200, seed=5), {"texts_disagree": 99.0, "low_score": -0.5, "unanswered": 0.0}]:
        shares = {name: made.share(name, value) for name, value in item.items()}
        counts = {name: made.weights[name] * min(-math.log(share), math.log(401) + 4) for name, share in shares.items()}
        assert made.shares(item) == shares and made.suspicion(item) == pytest.approx(sum(counts.values()))
        above = sum(other >= made.suspicion(item) for other in made.suspicions)
        assert made.p_value(item) == pytest.approx((1 + above) / (len(made.suspicions) + 1))
        reasons = made.reasons(item)
        assert bool(reasons) == (made.suspicion(item) > made.threshold) == (made.p_value(item) <= 0.1)
        if reasons:
            flagged += 1
            assert reasons[0] == max(counts, key=lambda name: counts[name])
            assert set(reasons[1:]) <= {name for name, share in shares.items() if share <= 0.1}
    assert flagged > 1 and "texts_disagree" in reasons


def test_fewer_signals_are_never_more_suspicious() -> None:
    made = calibrate(signals(200))
    for item in signals(50, seed=9):
        assert made.suspicion({"low_score": item["low_score"]}) <= made.suspicion(item)


@pytest.mark.parametrize("count", [19, 40, 100, 333])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_allowed_alarms(count: int, rate: float) -> None:
    assert allowed_alarms(count, rate) == math.floor(rate * (count + 1) + 1e-9)
    # The largest m for which a binomial of the rate reaches m with the confidence.
    exact = [math.comb(count, hits) * rate**hits * (1 - rate) ** (count - hits) for hits in range(count + 1)]
    enough = [m for m in range(1, count + 1) if sum(exact[m:]) >= 0.9]
    assert allowed_alarms(count, rate, 0.9) == max(enough, default=0)
    assert allowed_alarms(20_000, rate, 0.9) > 0.9 * rate * 20_000


def test_false_alarms_are_kept_in_simulation() -> None:
    """On average without confidence; with one, in nine of ten calibrations."""
    fresh = signals(1000, seed=10_000)
    rates: dict[float, list[float]] = {0.0: [], 0.9: []}
    for confidence, found in rates.items():
        for seed in range(40):
            made = calibrate(signals(80, seed), 0.1, confidence)
            found.append(sum(bool(made.reasons(item)) for item in fresh) / len(fresh))
    assert sum(rates[0.0]) / 40 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 80 / 40)
    assert sum(rate > 0.1 for rate in rates[0.9]) <= 9  # of 40; more than nine have a probability of 1 %
    assert sum(rates[0.0]) / 40 > 0.04, "and nothing is given away"


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    made = calibrate(signals(200), documents=7)
    made.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == made
    for damaged in ("{", "[]", '{"version": 9}', '{"version": 1}', '{"version": 1, "references": {"foo": [1]}}'):
        (tmp_path / "bad.json").write_text(damaged)
        with pytest.raises(ValueError, match="not a calibration of a monitor"):
            Calibration.load(tmp_path / "bad.json")


def test_mistakes_are_named() -> None:
    good = signals(200)
    with pytest.raises(ValueError, match="`questions` is empty"):
        calibrate([])
    with pytest.raises(ValueError, match=r"20 questions are too few .* 45 are needed"):
        calibrate(good[:20])
    assert calibrate(good[:45]).threshold
    with pytest.raises(ValueError, match="Question 1 has the signals"):
        calibrate([good[0], {"low_score": 1.0}])
    with pytest.raises(ValueError, match="no signal 'foo'"):
        calibrate([{"foo": 1.0}] * 200)
    with pytest.raises(ValueError, match="weight of 'low_score' must be positive"):
        calibrate(good, weights={"low_score": 0.0})
    with pytest.raises(ValueError, match="`false_alarms` must lie"):
        calibrate(good, false_alarms=1.5)
    with pytest.raises(ValueError, match="None of the signals"):
        calibrate(good).suspicion({"crowded": 1.0})
