"""The examples of docs/asking.md print what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_examples_of_asking_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "asking.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        capsys.readouterr()
        exec(compile(example.replace("model_cards/", f"{ROOT}/model_cards/"), "asking.md", "exec"), names)
        told = re.findall(r"^print\(.*\)  # (.*)$", example, flags=re.MULTILINE)
        assert told and capsys.readouterr().out.splitlines() == told
