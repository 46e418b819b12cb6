"""Tables of docs/ are what tools/make_*.py compute: of benchmarks, and of the planner for models as published."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msa_hf.bench.result import Result

ROOT = Path(__file__).parents[2]
NAMES = ("performance", "scaling", "benchmarks")
# Parameters of the published checkpoints.
PUBLISHED = {
    "Llama 3.2 1B": 1_235_814_400,
    "Qwen3 4B": 4_022_468_096,
    "Qwen3 8B": 8_190_735_360,
    "Llama 3 70B": 70_553_706_496,
}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield {name: runpy.run_path(str(ROOT / "tools" / f"make_{name}.py")) for name in NAMES}


@pytest.mark.parametrize(
    ("name", "figure", "other"),
    [("performance", "0.93", "0.94"), ("scaling", "57.6 GB", "57.5 GB"), ("benchmarks", "0 of 3 ", "1 of 3 ")],
)
def test_documents_are_what_is_computed(
    scripts: dict[str, Any], name: str, figure: str, other: str, tmp_path: Path, capsys: Any
) -> None:
    main, text = scripts[name]["main"], (ROOT / "docs" / f"{name}.md").read_text()
    assert main(["--check"]) == 0
    copy = tmp_path / "copy.md"
    copy.write_text(text.replace(figure, other))
    assert copy.read_text() != text and main(["--document", str(copy), "--check"]) == 1
    assert f"make_{name}.py" in capsys.readouterr().err
    assert main(["--document", str(copy)]) == 0
    computed = [part.partition("<!-- end -->")[0] for part in copy.read_text().split("<!-- computed: ")[1:]]
    assert computed == [part.partition("<!-- end -->")[0] for part in text.split("<!-- computed: ")[1:]]
    copy.write_text("no tables")
    with pytest.raises(SystemExit, match="0 places for the table"):
        main(["--document", str(copy)])


def test_a_later_run_that_asked_nothing_is_not_how_it_was_measured(scripts: dict[str, Any]) -> None:
    runs = [
        {"hardware": name, "versions": {"torch": "2", "transformers": "5"}, "command": name, "seconds": seconds}
        for name, seconds in (("small part", 2.0), ("most", 60.0), ("page alone", 0.0))
    ]
    said = scripts["benchmarks"]["how"](Result("needles", {}, {"dtype": "bfloat16"}, runs))
    assert said.startswith("most, bfloat16, torch 2") and "62 s" in said and "```bash\nmost\n```" in said


def test_models_have_the_published_parameters(scripts: dict[str, Any]) -> None:
    models = scripts["scaling"]["models"]()
    assert {name: models[name].parameters for name in PUBLISHED} == PUBLISHED
    # By hand, what encodes in the 4B shape: 35 whole layers, keys and values of the last, router keys of 18.
    hidden, inner, queries, groups = 2560, 9728, 4096, 1024
    layer = hidden * (2 * queries + 2 * groups) + 3 * hidden * inner + 2 * hidden + 2 * 128
    assert models["Qwen3 4B"].encoding == 35 * layer + 2 * hidden * groups + 18 * hidden * groups


def test_a_missed_goal_is_said(scripts: dict[str, Any]) -> None:
    row = {"call_ms": 2.0, "device_ms": 1.5, "share": 0.5, "ceiling": "copy", "goal": 0.9, "reached": False}
    assert scripts["performance"]["with_goal"](row) == "1.5, 0.50 of copy (**missed** 0.9)"
