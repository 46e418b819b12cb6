"""`msa-hf chat`: turns over one conversation, piped in and typed."""

import io
import itertools
import os
import pty
import select
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import QUESTION, loaded, refusal
from forking import ended, forked

from msa_hf.cli import main
from msa_hf.generation import COMPACT, asker_of
from msa_hf.generation.direct import DirectAsker

TEMPLATE = "{% for item in messages %}{{ item['role'] }} {{ item['content'] }} <eos> {% endfor %}"


@pytest.fixture(scope="module")
def talking(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without a protocol, with a chat template."""
    out = tmp_path_factory.mktemp("talking")
    model, tokenizer = loaded(place / "plain")
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(out)
    return out


def chatted(monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str, *arguments: object) -> tuple[int, list[str], str]:
    """What a piped chat returns and prints."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    capsys.readouterr()
    code = main(["chat", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


@pytest.mark.parametrize("way", ["plain", "compact", "template"])
def test_every_turn_is_asked_with_those_before(place: Path, talking: Path, monkeypatch, capsys, way: str) -> None:
    bank = place / ("compact-bank" if way == "compact" else "plain-bank")
    directory = talking if way == "template" else place / way
    text = f"{QUESTION}\n\nand the tea\n/sources\n/why\n/reset\nand the tea\n/quit\nnever asked\n"
    code, lines, _ = chatted(monkeypatch, capsys, text, directory, bank, "--max-new-tokens", 4)
    model, tokenizer = loaded(directory)
    protocol = COMPACT if way == "compact" else None
    asker = asker_of(model, tokenizer, model.load_memory(bank, tokenizer), protocol, max_new_tokens=4)
    said: list[dict[str, str]] = []
    answers = []
    for question in (QUESTION, "and the tea"):
        said.append({"role": "user", "content": question})
        answers.append(asker.ask(said))
        said.append({"role": "assistant", "content": answers[-1].text})
    answers.append(asker.ask("and the tea"))
    assert all(answer.text for answer in answers)
    shown = [line for line, after in itertools.pairwise(lines) if after.startswith("  from: ")]
    assert code == 0 and shown == [answer.text for answer in answers]
    froms = [line for line in lines if line.startswith("  from: ")]
    assert froms == ["  from: " + ", ".join(item.key for item in answer.documents[:3]) for answer in answers]
    second = answers[1]
    listed = lines[lines.index("Sources:") + 1 :][: len(second.documents)]
    assert [line.split()[:2] for line in listed] == [[f"{n}.", item.key] for n, item in enumerate(second.documents, 1)]
    asked = second.trace.question.splitlines()
    start = lines.index(f"Question: {asked[0]}")
    assert lines[start + 1 : start + len(asked)] == asked[1:] and asked[-1] == "and the tea"
    assert any(line.startswith("  layer 2 chose [") for line in lines)


def test_mistakes_do_not_end_a_chat(place: Path, monkeypatch, capsys) -> None:
    text = f"/sources\n/nonsense\n{'sea ' * 400}\n{QUESTION}\n/help\n"
    command = (place / "compact", place / "compact-bank", "--max-new-tokens", 2)
    code, lines, error = chatted(monkeypatch, capsys, text, *command)
    assert code == 2 and lines[0] == "(nothing was answered yet)" and "/reset    begin a new conversation" in lines
    assert "/nonsense: no such command" in error and "is too long" in error and error.count("error: ") == 2
    assert sum(line.startswith("  from: ") for line in lines) == 1


def test_turns_that_no_longer_fit_are_left_out_and_said_once(talking: Path, place: Path, monkeypatch, capsys) -> None:
    questions = "".join(f"{'sea ' * 40}{word}\n" for word in ["tea", "sea", "town", "hills", "old", "deep"] * 2)
    code, lines, error = chatted(monkeypatch, capsys, questions, talking, place / "plain-bank", "--max-new-tokens", 3)
    assert code == 0 and sum(line.startswith("  from: ") for line in lines) == 12
    assert error.count("left out from here on") == 1 and "error" not in error


def test_a_conversation_goes_on_where_its_history_is_kept(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    command = (place / "plain", place / "plain-bank", "--max-new-tokens", 3)
    _, whole, _ = chatted(monkeypatch, capsys, f"{QUESTION}\nand the tea\n", *command)
    kept = ("--history", tmp_path / "talk.sqlite")
    parts = [chatted(monkeypatch, capsys, f"{line}\n", *command, *kept)[1] for line in (QUESTION, "and the tea")]
    assert [*parts[0], *parts[1]] == whole
    chatted(monkeypatch, capsys, "/reset\n", *command, *kept)
    _, alone, _ = chatted(monkeypatch, capsys, "and the tea\n", *command)
    assert chatted(monkeypatch, capsys, "and the tea\n", *command, *kept)[1] == alone
    (tmp_path / "text").write_text("no database, but long enough to be looked at as one" * 40)
    assert chatted(monkeypatch, capsys, "x\n", *command, "--history", tmp_path / "text")[0] == 2
    for name in (tmp_path, tmp_path / "no folder" / "talk.sqlite"):
        assert "unable to open" in refusal(capsys, "chat", *command, "--history", name)


def chat_slowly(*arguments: object) -> None:
    """Chat, in a process of its own; the answer to "slow" takes a minute."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever runs this in the background has ignored
    whole = DirectAsker.ask

    def ask(self: Any, said: Any, streamer: Any = None, **options: Any) -> Any:
        if said[-1]["content"] == "slow":
            try:
                streamer.put(self.tokenizer(["sea tea"], return_tensors="pt")["input_ids"][0][:1])
                streamer.put(self.tokenizer(["sea tea"], return_tensors="pt")["input_ids"][0][1:])
                print("[writing]", flush=True)
                time.sleep(60)
            finally:
                streamer.end()
        return whole(self, said, streamer, **options)

    DirectAsker.ask = ask  # type: ignore[method-assign]
    os.environ["TERM"] = "dumb"
    if code := main(["chat", *map(str, arguments)]):
        sys.exit(code)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of its own")
def test_a_terminal_stops_answers_and_ends(place: Path) -> None:
    """Ctrl-C stops an answer and takes back a line, Ctrl-D ends; in a real terminal."""
    leader, follower = pty.openpty()
    work = partial(chat_slowly, place / "plain", place / "plain-bank", "--max-new-tokens", 2)
    process = forked(work, [follower, follower, follower])
    os.close(follower)
    seen = ""

    def comes(text: str, seconds: float) -> bool:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            if not select.select([leader], [], [], max(end - time.monotonic(), 0))[0]:
                return False
            seen += os.read(leader, 4096).decode()
        seen = seen.partition(text)[2]
        return True

    def wait_for(text: str) -> None:
        assert comes(text, 120), f"no {text!r} within two minutes; {seen!r}"

    def interrupt_until(text: str) -> None:
        """Ctrl-C again, as a person would: between its prompt and its wait for a line, Python notes a signal
        without ending the wait, and a loaded machine may stop there.
        """
        for _ in range(6):
            os.kill(process, signal.SIGINT)
            if comes(text, 20):
                return
        raise AssertionError(f"no {text!r} within two minutes; {seen!r}")

    try:
        wait_for("puts your questions")
        wait_for("> ")
        os.write(leader, b"slow\n")
        wait_for("[writing]")
        interrupt_until("(stopped)")
        wait_for("> ")
        os.write(leader, QUESTION.encode() + b"\n")
        wait_for("  from: ")
        wait_for("> ")
        os.write(leader, b"half a li")
        wait_for("half a li")
        interrupt_until("> ")
        os.write(leader, b"\x04")
        assert ended(process) == [0]
        process = 0
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(leader)
