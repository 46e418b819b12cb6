"""benchmarks/bench_tiers.py, rehearsed with a tiny bank on the CPU; and the example of docs/scaling.md."""

import json
import re
import runpy
from pathlib import Path

import pytest

from msa_hf.bank.tiered.shapes import BankShape

ROOT = Path(__file__).parents[2]
TINY = """
--chunks 50 --document-tokens 192 --layers 2 --heads 4 --groups 2 --head-dim 8 --hidden-size 32 --intermediate-size 32
--vocabulary 64 --top-k 2 --question-tokens 1 5 --repeats 1 --device cpu
"""


@pytest.mark.parametrize("own", [False, True])
def test_rehearsal(own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each set-up has its plan, its bytes and its times, and chooses the documents of the first."""
    main = runpy.run_path(str(ROOT / "benchmarks" / "bench_tiers.py"))["main"]
    options = ["--directory", str(tmp_path / "bank"), "--json", str(tmp_path / "figures.json"), "--host-memory", "20"]
    main([*TINY.split(), *options, *(["--own-exact-keys"] if own else [])])
    assert capsys.readouterr().out.count('"load_s"') == 4
    assert list((tmp_path / "bank").iterdir()) == [], "the bank is removed"
    record = json.loads((tmp_path / "figures.json").read_text())
    shape = BankShape(17, 50, ((2, 8),) * 2)
    expected = {name: (name, "device") for name in ("bf16", "fp8", "int8")} | {"24gb": ("fp8", "host")}
    assert list(record["setups"]) == list(expected)
    for name, figures in record["setups"].items():
        parts = {part["part"]: part for part in figures["plan"]["parts"]}
        keys, content = parts["routing keys"], parts["content"]
        assert ("exact keys" in parts) == (own and name in ("fp8", "int8"))
        assert figures["plan"]["tiers"]["host"]["capacity"] < 20 * 10**9
        assert (keys["format"], keys["tier"]) == expected[name] and keys["bytes"] == shape.key_bytes(keys["format"])
        assert (content["format"], content["tier"]) == ("fp8", "host") and figures["load_s"] >= 0
        for length in (1, 5):
            row = figures[f"{length} tokens"]
            assert row["same_documents"] == 1.0 and "documents" not in row
            kinds = "routing", "routing_with_half_the_candidates", "routing_without_rescoring"
            for what in (*kinds, "fetching", "first_token"):
                assert row[f"{what}_ms"]["first"] > 0 and row[f"{what}_ms"]["median"] > 0
    assert record["setups"]["24gb"]["plan"]["tiers"]["device"]["capacity"] <= 24 * 10**9
    assert record["written_bytes"] > shape.saved_bytes / 2  # one of two layers


def test_no_set_up_is_begun_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks" / "bench_tiers.py"))["main"]
    main([*TINY.split(), "--setups", "fp8", "bf16", "--seconds", "0"])
    printed = capsys.readouterr().out
    assert printed.count('"load_s"') == 1 and "bf16: left out" in printed and "--setups bf16" in printed


def test_what_does_not_fit_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = runpy.run_path(str(ROOT / "benchmarks" / "bench_tiers.py"))
    monkeypatch.setitem(names["measure"].__globals__, "LIMITS", {"bf16": 10})
    with pytest.raises(SystemExit, match="enough memory for bf16"):
        names["main"]([*TINY.split(), "--json", str(tmp_path / "figures.json")])
    assert "bf16 FAILED: 50 chunks" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "figures.json").read_text())["setups"]) == ["fp8", "int8", "24gb"]


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("model_cards/", f"{ROOT}/model_cards/"), "scaling.md", "exec"), names := {})
    printed = capsys.readouterr().out
    assert printed.endswith("\nroses\n") and re.search(r"routing keys +bf16 +host", printed)
    plan = names["memory"].plan
    assert (plan.keys, plan.content, plan.content_on) == ("fp8", "bf16", "disk")
