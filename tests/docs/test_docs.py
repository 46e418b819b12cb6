"""Documents say what is there: the tutorial prints what it shows, links and paths lead somewhere."""

import importlib
import os
import re
import runpy
from pathlib import Path

import pytest
from forking import ended, forked

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "csrc", "docs", "examples/*", "model_cards", "model_cards/*")
PAGES = [page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/*.md".lstrip("/")))]
PAGES.append(ROOT / "docs" / "tutorial.ipynb")
PATH = re.compile(r"(?<![\w/.-])(?:src|tests|tools|scripts|benchmarks|csrc)/[\w/.-]+\.(?:py|sh|cpp|cuh?)\b")
HISTORY = {"CHANGELOG.md", "experiments.md"}  # these tell of what was
PACKAGES = (
    "bank",
    "evaluation",
    "generation",
    "hybrid.chains",
    "hybrid.chat",
    "hybrid.conversation",
    "hybrid.monitoring",
    "hybrid.store",
    "hybrid.streams",
    "hybrid.synthesis",
    "ops",
    "retrieval",
    "training",
)


def test_the_tutorial_prints_what_it_shows(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "tools" / "run_notebook.py"))["main"]

    def work() -> None:
        assert main([str(ROOT / "docs" / "tutorial.ipynb"), "--check"]) == 0

    with open(os.devnull) as none, open(tmp_path / "said", "w") as said:
        (code,) = ended(forked(work, [none.fileno(), said.fileno(), said.fileno()]))
    assert code == 0, (tmp_path / "said").read_text()[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)\s]*)?\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    if page.name not in HISTORY:
        missing += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("name", ["msa_hf", *(f"msa_hf.{package}" for package in PACKAGES)])
def test_every_export_has_a_docstring(name: str) -> None:
    package = importlib.import_module(name)
    exported = {item: getattr(package, item) for item in package.__all__}
    assert [item for item, value in exported.items() if callable(value) and not (value.__doc__ or "").strip()] == []


def test_the_reference_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pdoc")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_reference

    assert {"msa_hf", "msa_hf.bank", "msa_hf.model.inference_msa"} <= set(make_reference.all_modules())
    assert make_reference.main([str(tmp_path), "msa_hf.generation"]) == 0
    assert "layer_scores" in (tmp_path / "msa_hf" / "generation.html").read_text(encoding="utf-8")


def test_the_example_of_scaling_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("model_cards/", f"{ROOT}/model_cards/"), "scaling.md", "exec"), names := {})
    printed = capsys.readouterr().out
    assert printed.endswith("\nroses\n") and re.search(r"routing keys +bf16 +host", printed)
    plan = names["memory"].plan
    assert (plan.keys, plan.content, plan.content_on) == ("fp8", "bf16", "disk")
