"""The commands and the configuration of docs/mcp.md are such as `msa-hf mcp` takes."""

import json
import re
import shlex
from pathlib import Path

from msa_hf.cli.command_line import parser

PAGE = (Path(__file__).parents[2] / "docs" / "mcp.md").read_text(encoding="utf-8")


def test_commands_and_configuration_are_taken() -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("msa-hf ")]
    (configuration,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    commands.append(json.loads(configuration)["mcpServers"]["memory"]["args"])
    assert len(commands) == 4
    for command in commands:
        parser(command).parse_args(command)


def test_options_are_those_of_the_command() -> None:
    known = parser(["mcp"])._subparsers._group_actions[0].choices["mcp"].format_help()
    assert [option for option in set(re.findall(r"--[a-z][a-z-]+", PAGE)) if option not in known] == []
