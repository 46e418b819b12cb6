"""docs/scaling.md: its tables are what the planner computes, from models of the published sizes."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Parameters of the published checkpoints.
PUBLISHED = {
    "Llama 3.2 1B": 1_235_814_400,
    "Qwen3 4B": 4_022_468_096,
    "Qwen3 8B": 8_190_735_360,
    "Llama 3 70B": 70_553_706_496,
}


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield runpy.run_path(str(ROOT / "tools" / "make_scaling.py"))


def test_document_is_what_the_planner_computes(script: dict[str, Any]) -> None:
    assert script["main"](["--check"]) == 0


def test_a_changed_figure_is_found_and_written_again(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, text = tmp_path / "scaling.md", (ROOT / "docs" / "scaling.md").read_text()
    assert text.count("57.6 GB") >= 2
    copy.write_text(text.replace("57.6 GB", "57.5 GB"))
    options = ["--document", str(copy)]
    assert script["main"]([*options, "--check"]) == 1 and "57.5 GB" in copy.read_text()
    assert "make_scaling.py" in capsys.readouterr().err
    assert script["main"](options) == 0 and copy.read_text() == text


def test_a_missing_table_is_refused(script: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "scaling.md"
    path.write_text("no tables")
    with pytest.raises(SystemExit, match="0 places for the table 'shapes'"):
        script["main"](["--document", str(path)])


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_parameters(script: dict[str, Any], name: str) -> None:
    assert script["models"]()[name].parameters == PUBLISHED[name]


def test_parameters_that_encode(script: dict[str, Any]) -> None:
    """By hand for the 4B shape: 35 whole layers, keys and values of the last, router keys of 18."""
    hidden, inner, queries, groups = 2560, 9728, 4096, 1024
    layer = hidden * (2 * queries + 2 * groups) + 3 * hidden * inner + 2 * hidden + 2 * 128
    assert script["models"]()["Qwen3 4B"].encoding == 35 * layer + 2 * hidden * groups + 18 * hidden * groups


def test_largest_corpora_fit_and_a_million_more_does_not(script: dict[str, Any]) -> None:
    model, device = script["models"]()["Qwen3 8B"], 80 * 10**9
    most = script["largest"](model, "fp8", device)
    fits = [script["planned"](model, model.shape((most + more) * 10**6), "fp8", device) for more in (0, 1)]
    assert fits[0] is not None and fits[1] is None


def test_fewest_gpus_fit_and_fewer_do_not(script: dict[str, Any]) -> None:
    """Also where a pair holds the weights: the shares of 20 GPUs fit, those of 18 do not."""
    model = script["models"]()["Llama 3 70B"]
    shape = model.shape(10**9)
    gpus = script["fewest"](model, shape, "bf16").gpus
    assert gpus % 2 == 0
    assert script["planned"](model, shape, "bf16", 141 * 10**9, gpus - 2) is None
