"""The examples of docs/integrations.md run as they stand, one after the other, with the real libraries."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
for name in ("tantivy", "langchain_core", "llama_index.core"):
    pytest.importorskip(name)


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def run(example: str) -> str:
        source = example.replace("model_cards/", f"{ROOT}/model_cards/")
        exec(compile(source, "integrations.md", "exec", dont_inherit=True), names)
        return capsys.readouterr().out

    retriever, history, llamaindex = map(run, examples)
    assert retriever == "heights 7 1\ncrossing 3 2\n1 1\n"
    assert history == "['At Krikutust Heights.']\n"
    assert llamaindex == "heights 7 True\nKrikutust Heights is known for its roses.\n"
