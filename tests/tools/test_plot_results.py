"""tools/plot_results.py draws the shipped results, and says what it cannot draw."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "msa-hf-tiny" / "results.json"


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import plot_results

    yield plot_results
    plot_results.pyplot.close("all")


def test_figures_are_pictures_of_the_results(plots: Any, tmp_path: Path) -> None:
    assert plots.main([str(RESULTS), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.png", "routing.png", "training.png"}
    assert all(image.imread(path).std() > 0.01 for path in tmp_path.iterdir())
    results = json.loads(RESULTS.read_text())
    panel = next(axes for axes in plots.accuracy(results).axes if axes.get_title(loc="left") == plots.KINDS["one_hop"])
    exact = {bank["documents"]: bank["conditions"]["routed"]["one_hop"]["exact_match"] for bank in results["banks"]}
    assert exact in [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in panel.lines]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [('{"curve": [{"step": 1}]}', 2, "nothing to draw"), ("[]", 2, "not a JSON object"), (None, 2, "results.json")],
)
def test_what_cannot_be_drawn_is_an_error(
    plots: Any, tmp_path: Path, capsys: Any, text: Any, code: int, said: str
) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert plots.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "figures")]) == code
    assert said in capsys.readouterr().err
