"""The examples of docs/retrieval.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("tantivy")


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "retrieval.md").read_text(), flags=re.DOTALL)
    assert len(examples) == 8
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def run(example: str) -> str:
        source = example.replace("model_cards/", f"{ROOT}/model_cards/")
        exec(compile(source, "retrieval.md", "exec", dont_inherit=True), names)
        return capsys.readouterr().out

    first, metadata, second, third, fourth, worded, again, fifth = map(run, examples)
    assert metadata == "['b']\n['a']\n"
    assert re.match(r"1 move [\d.]+ \('floor', 'office'\)\ngarden \d 1 reciprocal ranks\n", first)
    assert second == "1\n"
    assert third == "['garden'] ['dense', 'lexical']\ninvoice 1 1\n"
    assert fourth == "learned weights garden\n"
    assert worded == "False learned weights\n"  # three questions, of which one judges: it was found already
    assert again == "[('1', 1)]\n"
    assert fifth == "['invoice']\n"
