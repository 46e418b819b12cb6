"""How long a run on a CPU takes: told before it begins, with sizes that take less where it is long."""

import time
from dataclasses import replace

import torch
from families import base_model

from msa_hf import MSAForCausalLM
from msa_hf.training.router_time import Work, describe_time, seconds_per_token

TOKENS = {"passage_tokens": 250.0, "question_tokens": 40.0}
WORK = Work(steps=300, every=100, pool=64, corpus=620, sample=0, measured=120, mined=9_999, **TOKENS)


def test_a_short_run_needs_no_line() -> None:
    assert describe_time(WORK, 1e-7) is None


def test_a_run_of_minutes_has_its_time_and_no_advice() -> None:
    assert describe_time(WORK, 2e-5) == (
        "about 7 min on this CPU: 300 steps of 64 texts, and 620 texts encoded every 100 steps"
    )


def test_a_run_of_hours_names_sizes_that_take_less() -> None:
    line = describe_time(WORK, 5e-4)
    assert line is not None and line.startswith("about 3.1 h on this CPU: 300 steps")
    assert "; about 11 min with --steps 30 --pool 32 --corpus 500." in line and line.endswith("small part of it")


def test_small_sizes_are_not_named_again() -> None:
    line = describe_time(replace(WORK, steps=30, pool=32, corpus=500), 1.0)
    assert line is not None and "--" not in line


def test_sizes_that_a_run_has_not_are_not_named() -> None:
    line = describe_time(replace(WORK, corpus=0), 5e-4, ["steps", "pool"])
    assert line is not None and "encoded" not in line and "with --steps 30 --pool 32." in line


def test_whitening_and_its_measurement_count() -> None:
    whitened = replace(WORK, sample=4_000)
    assert whitened.tokens - WORK.tokens == 4_000 * 250 + 620 * 250 + 120 * 40


def test_a_token_has_the_time_of_a_forward() -> None:
    model = MSAForCausalLM.from_base(base_model("qwen3"), memory_layers=[1]).eval()
    begun = time.perf_counter()
    measured = seconds_per_token(model, [200, 300])
    assert 0 < measured * 250 * 4 < time.perf_counter() - begun
    assert torch.is_grad_enabled()
