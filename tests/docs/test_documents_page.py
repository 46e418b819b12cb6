"""The example of docs/documents.md runs as it stands, and its table names every kind of file."""

import re
from pathlib import Path

import pytest

from msa_hf.data.files import KINDS, NAMED, Rows
from msa_hf.data.files import TEXT as PLAIN

PAGE = (Path(__file__).parents[2] / "docs" / "documents.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "documents.md", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out == "tea {'year': 2020}\ntower.md {}\n[]\n"


def test_every_kind_of_file_is_named() -> None:
    kinds = {suffix for suffix, kind in KINDS.items() if kind is not PLAIN and suffix not in (".htm", ".xhtml")}
    assert [suffix for suffix in sorted(kinds) if f"`{suffix}`" not in PAGE] == []
    assert [suffix for suffix in sorted(kinds - {".ndjson"}) if suffix not in NAMED] == []
    assert {suffix for suffix in kinds if isinstance(KINDS[suffix], Rows)} >= {".csv", ".jsonl"}
