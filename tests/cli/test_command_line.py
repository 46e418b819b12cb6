"""What holds for every command."""

import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands import QUESTION, refusal

from msa_hf import MSAForCausalLM
from msa_hf.cli import main
from msa_hf.cli.command_line import parser


def test_wrong_commands_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND" in refusal(capsys)
    assert "invalid choice: 'frobnicate'" in refusal(capsys, "frobnicate")
    assert "unrecognized arguments: --colour" in refusal(capsys, "inspect", "bank", "--colour")


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("ask model bank --json One?", ["One?"]),
        ("ask --json model bank One? Two?", ["One?", "Two?"]),
        ("ask model bank One? --max-rounds 1 Two? --json Three?", ["One?", "Two?", "Three?"]),
        ("ask model bank --json -", ["-"]),
        ("ask model bank One? --json -- --really?", ["One?", "--really?"]),
        ("search bank one --json two", ["one", "two"]),
        ("bank delete bank --missing-ok tea coffee", ["tea", "coffee"]),
        ("bank delete bank tea --missing-ok coffee", ["tea", "coffee"]),
        ("refresh one two", ["one", "two"]),
    ],
)
def test_lists_may_stand_before_and_behind_options(line: str, wanted: list[str]) -> None:
    arguments = line.split()
    found = vars(parser(arguments).parse_args(arguments))
    (listed,) = (found[name] for name in ("questions", "queries", "keys", "checkpoints") if name in found)
    assert listed == wanted


@pytest.mark.parametrize(
    "line, named",
    [
        ("ask model bank One? --jsn Two?", "unrecognized arguments: --jsn"),
        ("inspect bank --json other", "unrecognized arguments: other"),
        ("search bank --json", "required: QUERY"),
    ],
)
def test_what_no_list_takes_is_refused(capsys: pytest.CaptureFixture[str], line: str, named: str) -> None:
    assert named in refusal(capsys, *line.split())


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("retrofit", "encode", "ask", "inspect"))


def test_an_interrupt_exits_with_130(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("msa_hf.cli.answers.load", interrupt)
    assert main(["ask", str(place / "plain"), str(place / "plain-bank"), QUESTION]) == 130


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_faults_keep_their_traceback(place: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Also a ValueError that no check of this package raised."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise error("a fault")

    monkeypatch.setattr(MSAForCausalLM, "generate", fail)
    with pytest.raises(error, match="a fault"):
        main(["ask", str(place / "plain"), str(place / "plain-bank"), QUESTION])


def test_the_package_declares_the_command() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entry = importlib.metadata.EntryPoint("msa-hf", project["scripts"]["msa-hf"], "console_scripts")
    assert entry.load() is main
