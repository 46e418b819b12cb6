"""README's plot shows the figures of its file, and the file has those of the tables."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "model_cards" / "msa-hf-smollm2-135m" / "README.md", ROOT / "docs" / "real_text.md"


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import plot_recall

    yield plot_recall
    plot_recall.pyplot.close("all")


def test_lines_are_those_of_the_file(plots: Any, tmp_path: Path) -> None:
    assert plots.main(["--out", str(tmp_path / "recall.png")]) == 0
    assert image.imread(tmp_path / "recall.png").std() > 0.01
    banks = json.loads(plots.FIGURES.read_text())["banks"]
    for axes, kind in zip(plots.recall({"banks": banks}).axes, plots.PANELS, strict=True):
        drawn = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
        for system, (label, *_) in plots.SYSTEMS.items():
            assert drawn[label] == {bank["tokens"]: bank["recall"][kind][system][0] for bank in banks}


def test_the_file_has_the_figures_of_the_tables(plots: Any) -> None:
    figures = json.loads(plots.FIGURES.read_text())
    rows = [line for path in TABLES for line in path.read_text(encoding="utf-8").splitlines()]
    for bank in figures["banks"]:
        begin = f"| **{bank['tokens'] / 1e6:.1f}M tokens, {bank['passages']:,} passages**: "
        first = next(place for place, row in enumerate(rows) if row.startswith(begin))
        for row, (kind, systems) in zip(rows[first:], bank["recall"].items(), strict=False):
            shown = [[f"{value:.3f}".lstrip("0") for value in values] for values in systems.values()]
            assert [re.findall(r"\.\d+", cell) for cell in row.split(" | ")[1:]] == shown, (bank["tokens"], kind)


def test_readme_shows_the_plot(plots: Any) -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown == [str(plots.FIGURES.with_suffix(".png").relative_to(ROOT))]
