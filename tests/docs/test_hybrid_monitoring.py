"""The examples of docs/hybrid.md about monitoring run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

from msa_hf.hybrid.monitoring import SIGNALS

ROOT = Path(__file__).parents[2]
pytest.importorskip("tantivy")


def section() -> str:
    page = (ROOT / "docs" / "hybrid.md").read_text(encoding="utf-8")
    return page.partition("\n## Monitoring\n")[2].partition("\n## ")[0]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", section(), flags=re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def run(example: str) -> str:
        source = example.replace("model_cards/", f"{ROOT}/model_cards/")
        exec(compile(source, "hybrid.md", "exec", dont_inherit=True), names)
        return capsys.readouterr().out

    first, second = map(run, examples)
    missed, found, title = first.splitlines()[:3]
    assert missed.startswith("True | The memory does not hold the answer. | ") and missed.endswith(
        names["missed"].answer
    )
    assert found.startswith(f"False | {names['found'].answer} | ")
    assert title == "# Blind spots" and "1 of 2 questions are to be looked at" in first
    seen, sampled, dropped, checked = map(int, second.split())
    assert (seen, dropped) == (6, 0) and sampled == checked > 0


def test_every_signal_is_explained() -> None:
    table = section().partition("| signal |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(SIGNALS)
