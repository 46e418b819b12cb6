"""The SDK's own client, driven from tests that are not asynchronous."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import CallToolResult

ROOT = Path(__file__).parents[2]
CARD = ROOT / "model_cards" / "msa-hf-tiny"
ROWS = [json.loads(line) for line in (ROOT / "examples/quickstart/documents.jsonl").read_text().splitlines()]
PROSE = " ".join([row["text"] for row in ROWS if row["key"].startswith("prose")][:9])  # as the model has seen
TEXTS = {
    "crossing": "The Jethefux Crossing is held at Krikutust Heights.",
    "heights/main hall?": "Krikutust Heights is known for its roses.",
    "long": PROSE,
}
COMMAND = "import sys; from msa_hf.cli import main; sys.exit(main(sys.argv[1:]))"


class Assistant:
    """A client that is connected."""

    def __init__(self, portal: BlockingPortal, client: Client) -> None:
        self.portal, self.client = portal, client
        self.strays: list[Exception] = []  # what the server wrote that is no message

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.portal.call(functools.partial(getattr(self.client, name), *given, **named))

    def tell(self, name: str, **arguments: Any) -> dict[str, Any]:
        """What a tool gives, which it must."""
        result: CallToolResult = self.call_tool(name, arguments)
        assert not result.is_error, result
        (content,) = result.content
        assert json.loads(content.text) == result.structured_content
        return result.structured_content

    def refusal(self, name: str, **arguments: Any) -> str:
        """Why a tool gives nothing, which it must not."""
        result: CallToolResult = self.call_tool(name, arguments)
        assert result.is_error and result.structured_content is None, result
        return result.content[0].text


@contextlib.contextmanager
def connected(to: Any) -> Iterator[Assistant]:
    """A client of a server: a URL, a transport, or a server in this process."""
    strays: list[Exception] = []

    async def note(message: object) -> None:
        if isinstance(message, Exception):
            strays.append(message)

    with start_blocking_portal() as portal:
        client = Client(to, message_handler=note, read_timeout_seconds=60)
        with portal.wrap_async_context_manager(client):
            assistant = Assistant(portal, client)
            assistant.strays = strays
            yield assistant


def over_stdio(log: Path, *arguments: object) -> Any:
    """A transport to `msa-hf mcp` in a process of its own, whose stderr goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = StdioServerParameters(
        command=sys.executable, args=["-c", COMMAND, "mcp", *map(str, arguments)], env=environment
    )
    return stdio_client(server, errlog=log.open("w"))
