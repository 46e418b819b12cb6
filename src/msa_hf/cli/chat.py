"""`msa-hf chat`: a conversation with a model about a bank, turn by turn."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported
from .answers import (
    add_asking_options,
    described_sources,
    described_trace,
    opened_asker,
    terminal_streamer,
)
from .characters import print_error, shown

if TYPE_CHECKING:
    from ..generation import Answer, Asker
    from ..hybrid.conversation import Conversation

NAME = "chat"
HELP = "Talk with a model about a bank; every turn looks into the bank anew."

SESSION = "chat"  # in the file of --history
NAMED_SOURCES = 3  # behind an answer
COMMANDS = {
    "/sources": "the documents behind the last answer",
    "/why": "what each round and layer chose for it, and what each stage took",
    "/reset": "begin a new conversation",
    "/help": "these commands",
    "/quit": "end; Ctrl-D too. Ctrl-C stops an answer",
}


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK", help="directory of the bank, or its name on the Hub")
    add_asking_options(made)
    made.add_argument("--history", metavar="FILE", help="keep the conversation here, and go on with the one it holds")


def run(args: argparse.Namespace) -> int:
    """`msa-hf chat`."""
    with _stored():  # before the model is loaded
        kept = None if args.history is None else _kept(args.history)
    asker = opened_asker(args)
    with _stored():
        talk = Talk(asker, kept)
    typed = sys.stdin.isatty()
    if typed:
        print(f"msa-hf: {asker.prompting.name} puts your questions; /help lists commands", file=sys.stderr)
    failed = False
    for line in _lines(typed):
        if line in ("/quit", "/exit"):
            break
        try:
            with _stored():
                _obey(line, talk) if line.startswith("/") else talk.answer(line)
        except UserError as error:
            print_error(error)  # the conversation goes on
            failed = not typed
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)
    return 2 if failed else 0


class Talk:
    """A conversation.

    Args:
        asker: that answers.
        kept: where its turns are kept as well, and of which it goes on.
    """

    def __init__(self, asker: Asker, kept: Conversation | None = None) -> None:
        self.asker, self.kept = asker, kept
        self.messages = (
            [] if kept is None else [{"role": turn.role, "content": turn.text or ""} for turn in kept.turns()]
        )
        self.last: Answer | None = None
        self._shortened = False

    def answer(self, question: str) -> None:
        """Print an answer while it is written, and remember both; one that is stopped counts as far as it came."""
        asked = {"role": "user", "content": question}
        said = [*self.messages, asked]
        while self.asker.room(said) < 0 and len(said) > 1:
            said = said[2:]
            if not self._shortened:
                self._shortened = True
                print("msa-hf: the oldest turns no longer fit and are left out from here on", file=sys.stderr)
        streamer = terminal_streamer(self.asker.tokenizer)
        try:
            self.last = self.asker.ask(said, streamer=streamer)
        except KeyboardInterrupt:
            self._remember(asked, streamer.text.strip())
            raise
        if not self.last.text:
            print("(no answer)")
        if keys := [shown(item.key) for item in self.last.documents[:NAMED_SOURCES]]:
            print(f"  from: {', '.join(keys)}", flush=True)
        self._remember(asked, self.last.text)

    def reset(self) -> None:
        """Forget all turns."""
        if self.kept is not None:
            for turn in self.kept.turns():
                self.kept.forget(turn.number)
        self.messages, self.last, self._shortened = [], None, False

    def _remember(self, asked: dict[str, str], text: str) -> None:
        """Keep a question with its answer; one without an answer is as if it had not been asked."""
        if not text:
            return
        for message in (asked, {"role": "assistant", "content": text}):
            self.messages.append(message)
            if self.kept is not None:
                self.kept.append(message["role"], message["content"])


def _obey(line: str, talk: Talk) -> None:
    """Do what a line that begins with / says."""
    if line == "/help":
        print("\n".join(f"{name:<9} {meaning}" for name, meaning in COMMANDS.items()))
    elif line == "/reset":
        talk.reset()
        print("(a new conversation)")
    elif line not in COMMANDS:
        raise UserError(f"{line.split()[0]}: no such command; there are {', '.join(COMMANDS)}")
    elif talk.last is None:
        print("(nothing was answered yet)")
    elif line == "/why":
        print(described_trace(talk.last))
    else:
        print("\n".join(described_sources(talk.last, talk.asker.bank, most=None)))
    sys.stdout.flush()


@contextlib.contextmanager
def _stored() -> Iterator[None]:
    """A block that may change what is kept."""
    from ..hybrid.store import StoreError

    try:
        with reported():
            yield
    except StoreError as error:
        raise UserError(str(error)) from error


def _kept(path: str) -> Conversation:
    from ..hybrid.conversation import Conversation
    from ..hybrid.store import SQLiteStore

    return Conversation(SQLiteStore(path), SESSION)


def _lines(typed: bool) -> Iterator[str]:
    """Lines that are typed or piped in, without blank ones; Ctrl-C takes one back that is being typed."""
    if not typed:
        from ..data.lines import input_lines

        yield from input_lines()
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() editing and a history
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not text ({error})") from error
        if line.strip():
            yield line.strip()
