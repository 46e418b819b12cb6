"""Documents are read ahead by other processes and parts written behind by a thread: the bank, errors and what stays are
those of one after the other."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from forking import ended, forked
from scripted import COMPACT, byte_tokenizer
from test_encode_bank import FOLDER, Bytes, Model, assert_bank, content_of, encode, kept_keys, keys_in, rows_of, written

from msa_hf.bank import encode_corpus
from msa_hf.bank.part_pipeline import BEHIND, WritingBehind
from msa_hf.data.documents import Corpus
from msa_hf.model.memory_msa import MemoryBank
from msa_hf.user_errors import UserError


def stat_of(process: object) -> list[str]:
    """State, parent and more of a process, as Linux tells; state Z for one that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", "0"]


def children_of(parent: int) -> list[int]:
    """Processes that a process started and that are still there."""
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [process for process in processes if stat_of(process)[1] == str(parent) and stat_of(process)[0] != "Z"]


# --- reading ahead ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [None, COMPACT], ids=["plain", "compact"])
@pytest.mark.parametrize("too_long", ["error", "split"])
def test_the_bank_does_not_depend_on_who_reads(tmp_path: Path, protocol: Any, too_long: str) -> None:
    """To the byte, whatever kind of file each document lies in: those of the parent are open in all."""
    folder = tmp_path / "documents"
    rows = [{**row, "text": row["text"][:40]} for row in rows_of(0, 40)]
    folder.mkdir()
    written(folder / "a.jsonl", rows[:15])
    for number, row in enumerate(rows[15:25]):
        (folder / f"b{number}.html").write_text(f"<p>{row['text']}</p>")  # converted once, kept in one open file
        (folder / f"c{number}.txt").write_text(row["text"])
    longest = 7 if too_long == "split" else 1
    written(folder / "d.jsonl", [{**row, "key": f"d{row['key']}", "text": row["text"] * longest} for row in rows[25:]])
    options = {"tokenizer": byte_tokenizer(), "protocol": protocol, "too_long": too_long}
    done = encode(folder, tmp_path / "0", tmp_path / "log 0", **options, workers=0)
    for workers in (1, 3):
        bank, log = tmp_path / str(workers), tmp_path / f"log {workers}"
        assert encode(folder, bank, log, **options, workers=workers) == done
        assert content_of(bank) == content_of(tmp_path / "0")
        assert keys_in(log) == keys_in(tmp_path / "log 0")
    assert done.parts > 5 and not children_of(os.getpid())


def test_an_error_about_a_document_comes_as_from_one_process(tmp_path: Path) -> None:
    """In its turn: what lies before it is encoded and kept, and nothing behind it."""
    rows = rows_of(5, 20)
    wrong = {"key": "the wrong one", "text": "x", "input_ids": [5000]}
    source = written(tmp_path / "rows.jsonl", [*rows[:12], wrong, *rows[12:]])
    said = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"Document 12 \(key 'the wrong one'\) has token ids") as error:
            encode(source, tmp_path / str(workers), tmp_path / f"log {workers}", workers=workers)
        said.append((type(error.value), str(error.value), kept_keys(tmp_path / str(workers))))
    assert said[0] == said[1] and 3 < len(said[0][2]) <= 12
    corpus = Corpus(str(source))
    written(source, rows)
    with encode_corpus.connected() as ranks, pytest.raises(UserError, match="line 13: changed while it was encoded"):
        encode_corpus.encode_bank(
            corpus, Model(tmp_path / "log"), tmp_path / "2", Bytes(), ranks=ranks, show_progress=False, workers=1
        )


def test_a_reader_that_dies_is_named_and_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, parent, read = rows_of(6, 20), os.getpid(), Corpus.read

    def dying(self: Corpus, first: int, end: int) -> Any:
        if first > 8 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, first, end)

    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    monkeypatch.setattr(Corpus, "read", dying)
    with pytest.raises(UserError, match=r"ended unasked; .* What was encoded is kept: .*--workers 1"):
        encode(source, bank, log, workers=1)
    monkeypatch.undo()
    kept = kept_keys(bank)
    encode(source, bank, tmp_path / "again", workers=1)
    assert not kept & set(keys_in(tmp_path / "again"))
    assert_bank(bank, rows)


def test_readers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    rows = rows_of(7, 20)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"

    class Waiting(Model):
        def encode_documents(self, *arguments: Any, **options: Any) -> MemoryBank:
            time.sleep(60)
            raise AssertionError("nobody killed it")

    def work() -> None:
        with encode_corpus.connected() as ranks:
            encode_corpus.encode_bank(
                Corpus(str(source)),
                Waiting(log),
                bank,
                Bytes(),
                ranks=ranks,
                show_progress=False,
                workers=2,
                part_size=99,
            )

    child = forked(work)
    until = time.monotonic() + 30
    while len(readers := children_of(child)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(readers) == 2
    os.kill(child, signal.SIGKILL)
    assert ended(child) == [-signal.SIGKILL]

    while (left := [reader for reader in readers if stat_of(reader)[0] != "Z"]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


# --- writing behind ---------------------------------------------------------------------------------------------------


def test_parts_are_written_while_the_next_ones_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may wait; no more are held in memory."""
    rows = rows_of(1, 30)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    go_on, write, seen = threading.Event(), encode_corpus.write_part, []
    prepared, encode_documents = threading.Event(), Model.encode_documents

    def preparing(self: Model, documents: Any, *arguments: Any, **options: Any) -> MemoryBank:
        if documents == [[0]]:  # for the manifest
            prepared.set()
        return encode_documents(self, documents, *arguments, **options)

    def waiting(*arguments: Any) -> Any:
        if not seen:  # of the first part: what is encoded meanwhile?
            before = -1
            while before != len(keys_in(log)):
                before = len(keys_in(log))
                go_on.wait(0.5)
            seen.append(before)
        assert arguments[1].end < 30 or prepared.wait(5), "what the manifest needs is computed once all is written"
        return write(*arguments)

    monkeypatch.setattr(Model, "encode_documents", preparing)
    monkeypatch.setattr(encode_corpus, "write_part", waiting)
    done = encode(source, bank, log, workers=1)
    per_part = 30 / done.parts
    assert BEHIND * per_part - per_part < seen[0] < (BEHIND + 2) * per_part
    assert_bank(bank, rows)


def test_an_error_of_writing_ends_the_run_and_costs_no_part_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, parts = rows_of(2, 30), []
    source, bank, log, write = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log", os.fsync

    def full(descriptor: int) -> None:
        parts.append(descriptor)
        if len(parts) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        encode(source, bank, log, workers=2)
    monkeypatch.undo()
    kept = kept_keys(bank)
    assert kept and not list((bank / FOLDER).glob(".chunks*")) and not (bank / "manifest.json").exists()
    assert len(keys_in(log)) < 30, "nothing is encoded for long that cannot be written"
    encode(source, bank, tmp_path / "again", workers=2)
    assert not kept & set(keys_in(tmp_path / "again"))
    assert_bank(bank, rows)


def test_an_error_of_the_model_costs_nothing_that_waits_to_be_written(tmp_path: Path) -> None:
    rows = rows_of(3, 30)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"

    class Failing(Model):
        def encode_documents(self, documents: Any, *arguments: Any, **options: Any) -> MemoryBank:
            if len(keys_in(self.log)) > 15:
                raise RuntimeError("CUDA out of memory")
            return super().encode_documents(documents, *arguments, **options)

    with encode_corpus.connected() as ranks, pytest.raises(RuntimeError, match="CUDA out of memory"):
        encode_corpus.encode_bank(
            Corpus(str(source)), Failing(log), bank, Bytes(), ranks=ranks, show_progress=False, workers=1, part_size=99
        )
    assert kept_keys(bank) == set(keys_in(log))


def test_the_writer_gives_records_in_order_and_errors_once() -> None:
    def write(number: int) -> Any:
        if number == 3:
            raise OSError("full")
        return {"part": str(number)}

    with WritingBehind(write, 1) as writing:
        for number in range(3):
            writing.put(number)
        assert [record["part"] for record in writing.written(all=True)] == ["0", "1", "2"]
        assert writing.written() == []
        writing.put(3)
        with pytest.raises(OSError, match="full"):
            writing.written(all=True)
    with pytest.raises(ZeroDivisionError), WritingBehind(write, 1) as writing:
        writing.put(3)
        raise ZeroDivisionError


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """With everything at once: readers, the model, the writer."""
    rows, moments = rows_of(4, 30), [15, 25, 12]
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    for moment in moments:
        kept, lock, events = kept_keys(bank), threading.Lock(), [0]
        log.unlink(missing_ok=True)

        def work(moment: int = moment, lock: Any = lock, events: list[int] = events) -> None:
            def marked(function: Any) -> Any:
                def run(*arguments: Any) -> Any:
                    with lock:
                        events[0] += 1
                        if events[0] == moment:
                            os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments)

                return run

            os.fsync, os.replace = marked(os.fsync), marked(os.replace)
            encode(source, bank, log, workers=2)

        assert ended(forked(work)) == [-signal.SIGKILL]
        assert not kept & set(keys_in(log))
        assert kept_keys(bank) >= kept
    kept = kept_keys(bank)
    encode(source, bank, tmp_path / "last", workers=2)
    assert 0 < len(keys_in(tmp_path / "last")) == 30 - len(kept)
    assert_bank(bank, rows)


# --- what is told -----------------------------------------------------------------------------------------------------


def test_progress_tells_documents_and_tokens_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(8, 12)
    source = written(tmp_path / "rows.jsonl", rows)
    done = encode(source, tmp_path / "bank", tmp_path / "log", show_progress=True, workers=1)
    text = capsys.readouterr().err
    assert "12/12" in text and f"{done.tokens:,} tokens, " in text and "/s" in text
