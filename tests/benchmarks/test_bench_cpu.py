"""The benchmark of a question on a CPU, in the small."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_question_over_a_repeated_bank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_cpu
    import torch

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = "--bank-tokens 2000 --documents 4 --document-tokens 30 --question 8 --repeats 1"
    bench_cpu.main([str(ROOT / "model_cards" / "msa-hf-tiny"), *options.split()])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] == 4 * 30 * 17 and found["first_token_ms"] > 0
