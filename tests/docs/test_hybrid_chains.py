"""The examples of docs/hybrid.md about chains run as they stand, one after the other."""

import re
from pathlib import Path

import pytest
import yaml

from msa_hf.hybrid.chains import chain_from_dict

ROOT = Path(__file__).parents[2]
pytest.importorskip("tantivy")
PAGE = (ROOT / "docs" / "hybrid.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Prompt chains\n")[2].partition("\n## ")[0]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def run(example: str) -> str:
        source = example.replace("model_cards/", f"{ROOT}/model_cards/")
        exec(compile(source, "hybrid.md", "exec", dont_inherit=True), names)
        return capsys.readouterr().out

    first, second = map(run, examples)
    assert first == "roses Krikutust Heights ['trial', 'heights']\n"
    assert second == "['Where is the Jethefux Crossing held?', 'What is {hop1} known for?']\nroses\n"
    assert len(Path("run.jsonl").read_text().splitlines()) == 3


def test_chains_in_yaml_can_run() -> None:
    whole, loop = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", SECTION, flags=re.DOTALL))
    assert len(chain_from_dict(whole).steps) == 2
    assert chain_from_dict({"name": "hops", "steps": loop}).steps[0].loop is not None
