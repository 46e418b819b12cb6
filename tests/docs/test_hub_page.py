"""The examples of docs/hub.md run as they stand, one after the other, with a Hub on this machine."""

import re
from pathlib import Path

import pytest
from fake_hub import using_hub

ROOT = Path(__file__).parents[2]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(), flags=re.DOTALL)
    assert len(examples) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def run(example: str) -> str:
        source = example.replace("model_cards/", f"{ROOT}/model_cards/")
        exec(compile(source, "hub.md", "exec", dont_inherit=True), names)
        return capsys.readouterr().out

    with using_hub(tmp_path / "cache") as (hub, _):
        first, second, third = map(run, examples)
        assert first == "2 Krikutust Heights is known for its roses.\n"
        assert second == third == "True\n"
        notes = hub.dataset("user/notes")
        assert notes.private and set(notes.branches) == {"main", "draft"}
        assert b"- notes\n" in hub.model("user/my-msa").files()["README.md"]
        assert b"Lilies" in b"".join(data for name, data in notes.files().items() if name.endswith(".arrow"))
