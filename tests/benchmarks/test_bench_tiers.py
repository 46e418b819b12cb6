"""benchmarks/bench_tiers.py, rehearsed with a tiny bank on the CPU."""

import json
import runpy
from pathlib import Path

import pytest

MAIN = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bench_tiers.py"))["main"]
TINY = """
--chunks 50 --document-tokens 192 --layers 2 --heads 4 --groups 2 --head-dim 8 --hidden-size 32 --intermediate-size 32
--vocabulary 64 --top-k 2 --question-tokens 1 5 --repeats 1 --device cpu
"""


def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each set-up has its plan and its times, and chooses the documents of the first; the bank is removed."""
    options = ["--directory", str(tmp_path / "bank"), "--json", str(tmp_path / "figures.json"), "--host-memory", "20"]
    MAIN([*TINY.split(), *options])
    assert capsys.readouterr().out.count('"load_s"') == 4 and list((tmp_path / "bank").iterdir()) == []
    setups = json.loads((tmp_path / "figures.json").read_text())["setups"]
    expected = {name: (name, "device") for name in ("bf16", "fp8", "int8")} | {"24gb": ("fp8", "host")}
    assert list(setups) == list(expected)
    for name, figures in setups.items():
        (keys,) = (part for part in figures["plan"]["parts"] if part["part"] == "routing keys")
        assert (keys["format"], keys["tier"]) == expected[name]
        for length in (1, 5):
            row = figures[f"{length} tokens"]
            assert row["same_documents"] == 1.0 and row["routing_ms"]["median"] > 0


def test_no_set_up_is_begun_late(capsys: pytest.CaptureFixture[str]) -> None:
    MAIN([*TINY.split(), "--setups", "fp8", "bf16", "--seconds", "0"])
    printed = capsys.readouterr().out
    assert printed.count('"load_s"') == 1 and "bf16: left out" in printed and "--setups bf16" in printed
