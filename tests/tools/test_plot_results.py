"""The plots of results.json: every figure shows what the results hold, and says what they do not."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from matplotlib.figure import Figure

SIZES = (1_000, 10_000, 1_000_000)


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import plot_results

    yield plot_results
    plot_results.pyplot.close("all")


def condition(place: int, number: int) -> dict[str, Any]:
    """Exact matches that differ by condition (of 7), kind and size."""
    return {
        kind: {"exact_match": 0.9 - 0.1 * number - 0.01 * step - 0.003 * place, "empty": 0.0}
        for step, kind in enumerate(("one_hop", "two_hop", "unanswerable"))
    }


def bank(place: int) -> dict[str, Any]:
    names = ("routed", "single_round", "forced_gold", "gold_text", "bm25", "no_memory")
    layers = {
        str(layer): {
            "@16": 1 - 0.01 * layer - 0.1 * place,
            "@1": 0.9 - 0.01 * layer - 0.1 * place,
            "second@16": 0.8 - 0.01 * layer - 0.1 * place,
            "second@1": 0.7 - 0.01 * layer - 0.1 * place,
            "gold_score": 0.9,
            "other_score": 0.5,
        }
        for layer in (10, 9)
    }
    return {
        "documents": SIZES[place],
        "hardware": "one big machine",
        "tokens": 97 * SIZES[place],
        "questions": 300,
        "recall": {"layers": layers},
        "conditions": {name: condition(place, number) for number, name in enumerate(names)},
        "ids": {"generate": {"one_hop": 0.7, "all": 0.5 - 0.25 * place}, "constrained": 0.75},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    curve = [
        {
            "step": 50 * step,
            "seconds": 30.0 * step,
            "norm": 7.0,
            "reading": 3.0 - step,
            "aux_first": 2.0 - step,
            "second_9@16": 0.5 * step,
            "second_9@20": 1.0,
            "second_9_distinct": 40,
        }
        for step in range(3)
    ]
    banks = [bank(place) for place in (2, 0, 1)]
    return {"training": {"hardware": "a machine for training"}, "banks": banks, "curve": curve}


def shown(figure: Figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of each panel -> label of each line -> its points; labels are matched to lines by colour and height."""
    figure.draw_without_rendering()
    panels = {}
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        labels = [text for text in axes.texts if text.get_text()]
        lines = sorted(axes.lines, key=lambda line: axes.transData.transform((0, line.get_ydata()[-1]))[1])
        labels.sort(key=lambda text: text.xy[1])
        assert [text.get_color() for text in labels] == [line.get_color() for line in lines]
        heights = [text.xy[1] for text in labels]
        assert all(above - below > 0.07 for below, above in itertools.pairwise(heights)), "labels overlap"
        panels[axes.get_title(loc="left")] = {
            text.get_text(): list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
            for text, line in zip(labels, lines, strict=True)
        }
    return panels


def test_accuracy_shows_every_condition_and_kind_by_size(plots: Any, results: dict[str, Any]) -> None:
    figure = plots.accuracy(results)
    panels = shown(figure)
    assert list(panels) == [*plots.KINDS.values(), "Routing", "Naming documents"]
    for kind, title in plots.KINDS.items():
        assert set(panels[title]) == {label for label, _, _ in plots.CONDITIONS.values()}
        for name, (label, _, _) in plots.CONDITIONS.items():
            values = [bank(place)["conditions"][name][kind]["exact_match"] for place in range(3)]
            assert panels[title][label] == list(zip(SIZES, values, strict=True))
    assert panels["Routing"]["@16, best layer"] == [(size, 0.91 - 0.1 * place) for place, size in enumerate(SIZES)]
    assert panels["Routing"]["@16, worst layer"] == [(size, 0.9 - 0.1 * place) for place, size in enumerate(SIZES)]
    assert panels["Naming documents"]["freely"] == list(zip(SIZES, (0.5, 0.25, 0.0), strict=True))
    assert panels["Naming documents"]["over the routed ids"] == [(size, 0.75) for size in SIZES]
    assert all(axes.get_xscale() == "log" for axes in figure.axes if axes.get_visible())
    assert figure.get_suptitle() == "one big machine, 97k to 97M tokens, 300 questions of each kind"
    results["banks"][0]["hardware"] = "a small one"
    title = plots.accuracy(results).get_suptitle()
    assert title.startswith("one big machine (1k, 10k), a small one (1M), 97k")


def test_routing_shows_every_layer_by_size(plots: Any, results: dict[str, Any]) -> None:
    panels = shown(plots.routing(results))
    assert list(panels) == [*plots.RECALLS.values(), "Scores: gold and best other"]
    for name, title in plots.RECALLS.items():
        for place, label in enumerate(("1k documents", "10k documents", "1M documents")):
            layers = bank(place)["recall"]["layers"]
            assert panels[title][label] == [(9, layers["9"][name]), (10, layers["10"][name])]


def test_training_shows_losses_and_recall_apart(plots: Any, results: dict[str, Any]) -> None:
    figure = plots.training(results)
    assert figure.get_suptitle() == "a machine for training"
    assert shown(figure) == {
        "Language-model loss": {"reading": [(0, 3.0), (0.5, 2.0), (1, 1.0)]},
        "Auxiliary loss": {"first": [(0, 2.0), (0.5, 1.0), (1, 0.0)]},
        "Recall@16, second documents": {"layer 9": [(0, 0.0), (0.5, 0.5), (1, 1.0)]},
    }


def test_curves_beside_the_results_are_drawn_where_these_have_none(
    plots: Any, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curve_dense.jsonl").write_text('{"step": 1, "answer": 2.5}\n{"step": 2, "answer": 2.0}\n')
    (tmp_path / "curve_after.jsonl").write_text('{"step": 1, "naming": 1.0}\n')
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, path, **_: figures.append(shown(figure)))
    for curve in (None, results["curve"]):
        (tmp_path / "results.json").write_text(json.dumps({"curve": curve}))
        assert plots.main([str(tmp_path / "results.json")]) == 0
    assert figures[0] == {
        "dense: language-model loss": {"answer": [(1, 2.5), (2, 2.0)]},
        "after: language-model loss": {"naming": [(1, 1.0)]},
    }
    assert "Language-model loss" in figures[1]


def test_values_that_are_missing_leave_gaps(plots: Any, results: dict[str, Any]) -> None:
    """No panel without a line, no point without a number."""
    for item in results["banks"]:
        del item["ids"], item["conditions"]["bm25"], item["conditions"]["routed"]["two_hop"]
    results["banks"][0]["conditions"]["routed"]["one_hop"]["exact_match"] = float("nan")
    results["banks"][1]["conditions"]["no_memory"] = None
    del results["banks"][2]["recall"]["layers"]["9"]["@16"]
    results["curve"][1].pop("reading")
    panels = shown(plots.accuracy(results))
    assert "Naming documents" not in panels and "BM25" not in panels["One-hop questions"]
    assert [x for x, _ in panels["One-hop questions"]["routed"]] == [1_000, 10_000]
    assert [x for x, _ in panels["One-hop questions"]["no memory"]] == [10_000, 1_000_000]
    assert "routed" not in panels["Two-hop questions"] and "routed" in panels["Unanswerable questions"]
    assert shown(plots.routing(results))["Recall@16"]["10k documents"] == [(10, 0.8)]
    assert shown(plots.training(results))["Language-model loss"] == {"reading": [(0, 3.0), (1, 1.0)]}


def run(plots: Any, tmp_path: Path, results: Any) -> tuple[int, list[str]]:
    """Exit code, and the figures that were written."""
    (tmp_path / "results.json").write_text(json.dumps(results))
    code = plots.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "figures")])
    return code, sorted(path.name for path in (tmp_path / "figures").iterdir())


def test_figures_are_pictures(plots: Any, results: dict[str, Any], tmp_path: Path) -> None:
    assert run(plots, tmp_path, results) == (0, ["accuracy.png", "routing.png", "training.png"])
    for path in (tmp_path / "figures").iterdir():
        picture = image.imread(path)
        assert picture.shape[0] > 300 and picture.shape[1] > 500 and picture.std() > 0.01


@pytest.mark.parametrize(
    ("kept", "figures", "missing"),
    [("banks", ["accuracy.png", "routing.png"], "`curve`"), ("curve", ["training.png"], "`banks`")],
)
def test_a_figure_without_data_is_left_out_and_named(
    plots: Any,
    results: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kept: str,
    figures: list[str],
    missing: str,
) -> None:
    assert run(plots, tmp_path, {kept: results[kept]}) == (0, figures)
    assert missing in capsys.readouterr().err


@pytest.mark.parametrize(
    "empty", [{}, {"banks": [], "curve": None}, {"banks": [{"documents": 5}], "curve": [{"step": 1}]}]
)
def test_nothing_to_draw_is_an_error(
    plots: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], empty: Any
) -> None:
    assert run(plots, tmp_path, empty) == (2, [])
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {tmp_path}/results.json: nothing to draw"


def test_unreadable_results_are_an_error(plots: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plots.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[]")
    assert plots.main([str(tmp_path / "list.json")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/list.json: not a JSON object\n"


def test_labels_of_crowded_lines_stay_beside_their_axes(plots: Any) -> None:
    """Moved up at the bottom and down at the top, in the order of the lines."""
    ends = [0.0, 0.01, 0.02, 0.5, 0.98, 0.99, 1.0]
    figure, axes = plots.pyplot.subplots()
    axes.set_ylim(0, 1)
    plots.label_ends(axes, [plots.Line(str(end), [0.0, 1.0], [0.5, end], "black") for end in ends])
    heights = {float(text.get_text()): text.xy[1] for text in axes.texts}
    assert sorted(heights, key=heights.__getitem__) == ends
    assert min(heights.values()) == pytest.approx(0) and max(heights.values()) == pytest.approx(1)
    assert heights[0.5] == pytest.approx(0.5)
    assert all(above - below > 0.07 for below, above in itertools.pairwise(sorted(heights.values())))
