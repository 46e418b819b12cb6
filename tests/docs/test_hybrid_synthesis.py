"""The examples of docs/hybrid.md about synthesis run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("tantivy")


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "hybrid.md").read_text(encoding="utf-8")
    section = page.partition("\n## Second-stage synthesis\n")[2].partition("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def run(example: str) -> str:
        source = example.replace("model_cards/", f"{ROOT}/model_cards/")
        exec(compile(source, "hybrid.md", "exec", dont_inherit=True), names)
        return capsys.readouterr().out

    first, second = map(run, examples)
    assert first == (
        "roses | Krikutust Heights is known for its roses. | guide\n"
        "onions | Krikutust Heights is known for its onions. | atlas\n"
        "Krikutust Heights is known for roses [guide] or onions [atlas], some say lace [unknown source: S7].\n\n"
        "Sources disagree:\n- What is Krikutust Heights known for?: 'roses' [guide]; 'onions' [atlas]\n"
        "('guide', 'atlas') ('S7',) 1\n"
    )
    assert second.startswith("Stay (")
    assert second.endswith("# Stay\nThe inn has nine rooms. Dogs are welcome there.\n")
