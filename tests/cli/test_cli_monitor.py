"""`msa-hf monitor` on a tiny model with random weights: its report, its files, and what it refuses."""

import json
from pathlib import Path

import pytest
from commands import QUESTION, refusal

from msa_hf.cli import main

MORE = ["what is the sea", "where is tea grown", "who built a tower"]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"question": item}) + "\n" for item in [QUESTION, *MORE]))
    return tmp_path / "asked.jsonl"


def test_a_report_with_its_files(place: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client")
    arguments = ["monitor", str(place / "compact-bank"), str(place / "compact"), "--questions", str(asked)]
    arguments += ["--max-new-tokens", "3", "--good", str(asked), "--false-alarms", "0.4", "--confidence", "0"]
    arguments += ["--calibration", str(tmp_path / "calibration.json"), "--probes", "1"]
    files = {name: tmp_path / name for name in ("report.md", "monitor.prom", "dashboard.json")}
    for option, file in zip(("--out", "--metrics", "--dashboard"), files.values(), strict=True):
        arguments += [option, str(file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == files["report.md"].read_text() and "of 4 questions are to be looked at; 4 documents" in printed
    assert "at most 40.0% are flagged" in printed and "| texts |" in printed
    assert "msa_hf_monitor_checked_total 4.0" in files["monitor.prom"].read_text()
    assert json.loads(files["dashboard.json"].read_text())["panels"]
    again = ["monitor", str(place / "compact-bank"), str(place / "compact"), "--questions", str(asked), "--json"]
    again += ["--calibration", str(tmp_path / "calibration.json"), "--max-questions", "2", "--checks", ""]
    assert main(again) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["asked"], record["checked"], record["settings"]["checks"]) == (4, 2, [])
    assert record["calibration"]["false_alarms"] == 0.4
    assert all(0 < finding["p_value"] <= 1 for finding in record["findings"])


def test_without_a_protocol_and_a_calibration(
    place: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["monitor", str(place / "plain-bank"), str(place / "plain"), "--questions", str(asked)]
    out = tmp_path / "report.json"
    assert main([*arguments, "--max-new-tokens", "2", "--rate", "0.5", "--seed", "1", "--out", str(out)]) == 0
    assert "**Not calibrated**" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["calibration"] is None and 1 <= record["checked"] < 4


def test_mistakes_are_one_line(place: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ("monitor", place / "compact-bank", place / "compact")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "good.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "no such words"}) + "\n")
    assert "holds no questions" in refusal(capsys, *start, "--questions", tmp_path / "empty.jsonl")
    options = (*start, "--questions", asked, "--max-new-tokens", "2")
    assert "no check 'foo'; there are denser, hybrid, texts" in refusal(capsys, *options, "--checks", "foo")
    assert "This bank has no lexical index" in refusal(capsys, *options, "--checks", "hybrid")
    assert "--rate 0 leaves none of 4 questions" in refusal(capsys, *options, "--rate", "0")
    assert "must be a share from 0 to 1" in refusal(capsys, *options, "--rate", "2")
    assert "--confidence below 1" in refusal(capsys, *options, "--confidence", "1")
    assert "--false-alarms must lie between" in refusal(capsys, *options, "--false-alarms", "0")
    assert "not a file in a directory" in refusal(capsys, *options, "--out", tmp_path)
    assert "No such file" in refusal(capsys, *options, "--calibration", tmp_path / "none.json")
    assert "not a calibration" in refusal(capsys, *options, "--calibration", asked)
    good = ("--good", tmp_path / "good.jsonl", "--checks", "")
    assert "none of 1 questions is answered as it says" in refusal(capsys, *options, *good)
    assert "4 questions are too few" in refusal(capsys, *options, "--good", asked, "--checks", "")
