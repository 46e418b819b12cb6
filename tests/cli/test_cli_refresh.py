"""`msa-hf refresh`: checkpoints of an earlier release get the code of this one, and nothing else is touched."""

import json
import shutil
from pathlib import Path

import pytest
from families import base_model

from msa_hf import MSAForCausalLM
from msa_hf.cli import main
from msa_hf.model.checkpoint_msa import REMOTE_FILES

PACKAGE = Path(__file__).parents[2] / "src" / "msa_hf" / "model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("refresh") / "checkpoint"
    MSAForCausalLM.from_base(base_model("qwen3")).save_pretrained(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def outdated(saved: Path, directory: Path) -> Path:
    """A copy as an earlier release left it: one file with other code, one that was not there yet."""
    shutil.copytree(saved, directory)
    (directory / "inference_msa.py").write_text("# of an earlier release\n")
    (directory / "compat_msa.py").unlink()
    return directory


def test_the_code_becomes_the_package_s(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = outdated(saved, tmp_path / "old")
    before = contents(old)
    assert main(["refresh", str(old), str(saved)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{old}: 2 files changed", f"{saved}: up to date"]
    after = contents(old)
    assert all(after[name] == (PACKAGE / name).read_bytes() for name in REMOTE_FILES)
    assert {name for name in after if after[name] != before.get(name)} == {"inference_msa.py", "compat_msa.py"}


@pytest.mark.parametrize(
    "config, reason",
    [
        (None, "no checkpoint"),
        ("{", "not JSON"),
        ("[]", "not a checkpoint with a memory"),
        ({"model_type": "qwen3"}, "not a checkpoint with a memory"),
        ({"model_type": "msa"}, "carries no code"),
    ],
)
def test_other_directories_are_refused(saved: Path, tmp_path: Path, capsys, config, reason) -> None:
    """In one line, and before any other is changed."""
    old, wrong = outdated(saved, tmp_path / "old"), tmp_path / "wrong"
    wrong.mkdir()
    if config is not None:
        (wrong / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    before = contents(old), contents(wrong)
    assert main(["refresh", str(old), str(wrong)]) == 2
    printed = capsys.readouterr()
    assert reason in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert (contents(old), contents(wrong)) == before
