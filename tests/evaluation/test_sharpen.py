"""The factor of the score biases is the smallest that serves about best, and nothing but the biases changes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import COMPACT, bank_of, byte_tokenizer, memory_model

from msa_hf.evaluation import sharpen
from msa_hf.model.attention_msa import ScoreBias
from msa_hf.model.memory_msa import model_fingerprint
from msa_hf.training import sharpen_score_bias

QUESTIONS = [{"question": "How far is the amber?", "answer": "10 miles", "positives": ["0"]}]


def biased_model(score_bias: bool = True) -> Any:
    model = memory_model(byte_tokenizer(), COMPACT, score_bias=score_bias)
    for number, module in enumerate(biases(model)):
        module.weight.data.fill_(0.5 + number)
    return model


def biases(model: Any) -> list[ScoreBias]:
    return [module for module in model.modules() if isinstance(module, ScoreBias)]


def measured(monkeypatch: pytest.MonkeyPatch, shares: dict[float, tuple[float, float, float]]) -> list[float]:
    """Let a diagnosis find these shares (free, constrained, answers) by factor; returns what factors were asked for."""
    asked: list[float] = []

    def diagnose(model: Any, *_: Any, **options: Any) -> Any:
        assert options["conditions"] == ["routed", "ids"] and options["batch_size"] == 3
        factors = {module.weight.item() / (0.5 + number) for number, module in enumerate(biases(model))}
        (factor,) = factors
        asked.append(factor)
        freely, constrained, answers = shares[factor]
        ids = {"generate": {"all": freely}, "constrained": {"all": constrained}}
        return SimpleNamespace(ids=ids, answers={"routed": {"all": SimpleNamespace(exact=answers)}})

    monkeypatch.setattr(sharpen, "diagnose", diagnose)
    return asked


@pytest.mark.parametrize(
    "shares, slack, kept",
    [
        ({1: (0.0, 0.9, 1.0), 2: (0.3, 1.0, 1.0), 4: (0.99, 1.0, 0.98)}, 0.005, 4),
        ({1: (1.0, 1.0, 0.99), 2: (1.0, 1.0, 1.0), 4: (1.0, 1.0, 1.0)}, 0.005, 1),  # no more than needed
        ({1: (1.0, 1.0, 0.99), 2: (1.0, 1.0, 1.0), 4: (1.0, 1.0, 1.0)}, 0.0, 2),
        ({1: (1.0, 1.0, 1.0), 2: (1.0, 1.0, 0.5), 4: (0.0, 0.0, 0.0)}, 0.0, 1),  # answers count as much as ids
    ],
)
def test_the_smallest_factor_that_serves_about_best_is_kept(
    monkeypatch: pytest.MonkeyPatch, shares: dict[float, tuple[float, float, float]], slack: float, kept: float
) -> None:
    model = biased_model()
    before, fingerprint = {name: weight.clone() for name, weight in model.named_parameters()}, model_fingerprint(model)
    asked = measured(monkeypatch, shares)
    rows = sharpen_score_bias(model, None, None, QUESTIONS, COMPACT, (4.0, 1.0, 2.0), slack, batch_size=3)
    assert asked == [1, 2, 4] and [row["factor"] for row in rows] == [1, 2, 4]
    assert [row["factor"] for row in rows if row["kept"]] == [kept]
    assert [row["mean"] for row in rows] == pytest.approx([sum(shares[factor]) / 3 for factor in (1, 2, 4)])
    changed = 0
    for name, weight in model.named_parameters():
        factor = kept if "score_bias" in name else 1.0
        torch.testing.assert_close(weight.detach(), before[name] * factor, rtol=0, atol=0)
        changed += "score_bias" in name
    assert changed == len(biases(model)) > 0
    assert model_fingerprint(model) == fingerprint, "banks do not depend on the biases"


def test_biases_stay_as_they_were_where_a_measurement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = biased_model()
    measured(monkeypatch, {2: (1.0, 1.0, 1.0)})
    with pytest.raises(KeyError):
        sharpen_score_bias(model, None, None, QUESTIONS, COMPACT, factors=(2.0, 4.0), batch_size=3)
    assert [module.weight.item() for module in biases(model)] == [0.5 + n for n in range(len(biases(model)))]


def test_what_cannot_be_sharpened_is_refused() -> None:
    with pytest.raises(ValueError, match="score_bias=True"):
        sharpen_score_bias(biased_model(False), None, None, QUESTIONS, COMPACT)
    for factors in ((), (1.0, 0.0), (-1.0,)):
        with pytest.raises(ValueError, match="factors"):
            sharpen_score_bias(biased_model(), None, None, QUESTIONS, COMPACT, factors=factors)


def test_measures_the_model_as_it_is_sharpened() -> None:
    model, tokenizer = biased_model(), byte_tokenizer()
    bank = bank_of(model, tokenizer, COMPACT)
    options = {"show_progress": False, "max_new_tokens": 4, "interleave": {"max_id_tokens": 8}}
    rows = sharpen_score_bias(model, tokenizer, bank, QUESTIONS, COMPACT, factors=(1.0, 3.0), **options)
    assert all(0 <= row[name] <= 1 for row in rows for name in ("generate", "constrained", "routed", "mean"))
