"""docs/performance.md: its tables are what the benchmark measured, every goal with its verdict."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return runpy.run_path(str(ROOT / "tools" / "make_performance.py"))


def test_document_is_what_was_measured(script: dict[str, Any]) -> None:
    assert script["main"](["--check"]) == 0


def test_a_changed_figure_is_found_and_written_again(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, text = tmp_path / "performance.md", (ROOT / "docs" / "performance.md").read_text()
    copy.write_text(text.replace("of copy (>= 0.93)", "of copy (>= 0.94)", 1))
    options = ["--document", str(copy)]
    assert script["main"]([*options, "--check"]) == 1 and "make_performance.py" in capsys.readouterr().err
    assert script["main"](options) == 0 and copy.read_text() == text


@pytest.mark.parametrize("machine", ["gpu", "cpu"])
def test_every_case_is_in_the_tables(script: dict[str, Any], machine: str) -> None:
    rows = json.loads(script["RESULTS"][machine].read_text())["rows"]
    for operation, make in (("pool_chunks", "pooling"), ("gather_documents", "gathering")):
        lines = script["TABLES"][f"{make} on the {machine}"]().splitlines()
        assert {line.split(" | ")[0][2:] for line in lines[2:]} == {
            row["case"] for row in rows if row["operation"] == operation
        }
    routed = {row["case"] for row in rows if row["operation"] == "route_documents" and row["case"].endswith(", bf16")}
    assert len(script["TABLES"][f"routing on the {machine}"]().splitlines()) == 2 + len(routed)


def test_a_missed_goal_is_said_and_a_time_is_that_of_the_graph(script: dict[str, Any]) -> None:
    row = {"call_ms": 2.0, "device_ms": 1.5, "share": 0.5, "ceiling": "copy", "goal": 0.9, "reached": False}
    assert script["with_goal"](row) == "1.5, 0.50 of copy (**missed** 0.9)"
    assert script["with_goal"]({**row, "device_ms": None, "reached": True}) == "2, 0.50 of copy (>= 0.9)"
    assert script["with_goal"]({**row, "ceiling": "times", "share": 1.7, "goal": None}) == "1.5, 1.70 x"
    assert script["shares"]({**row, "ceiling": "bus", "goal": 35.0}) == "0.50 of bus (**missed** 35 GB/s)"
    assert script["with_goal"](None) == script["shares"](None) == script["milliseconds"](None) == ""
