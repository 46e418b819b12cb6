"""The examples of docs/hybrid.md about external memory and event streams run as they stand, one after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from servers import redis_server

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hybrid.md").read_text(encoding="utf-8")
EVENT = re.compile(r"event '(.*)'")


def section(name: str) -> str:
    return PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(
        r"```python\n(.*?)```", section("External memory") + section("Event streams"), flags=re.DOTALL
    )
    assert len(examples) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    def run(example: str) -> str:
        source = example.replace("model_cards/", f"{ROOT}/model_cards/")
        exec(compile(source, "hybrid.md", "exec", dont_inherit=True), names)
        return capsys.readouterr().out

    assert run(examples[0]) == "['order#0002', 'order#0001']\nTrue\n"
    assert run(examples[1]) == "[4, 5] [1] True\ndiet: no nuts, ever\n"
    assert run(examples[2]) == "roses\n"
    out = run(examples[3]).splitlines()
    assert out[0] == "The roses are cut back in March. 1 2 1" and out[1].startswith("not JSON in UTF-8")
    with redis_server(tmp_path, None, "--save", "") as url:
        import redis

        (event,) = EVENT.findall(section("Event streams"))
        assert json.loads(event)["version"] == 3
        redis.Redis.from_url(url).xadd("notes", {"event": event})
        assert run(examples[4].replace("redis://localhost:6379", url)) == "3\n"
