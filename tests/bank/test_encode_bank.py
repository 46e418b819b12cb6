"""A corpus becomes the same bank whoever encodes it and however often that is interrupted; nothing is encoded twice."""

import json
import os
import random
import runpy
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.ipc
import pytest
import torch
from connected import FORK, together
from fake_model import CHUNK, ORIGIN, FakeModel
from scripted import COMPACT, byte_tokenizer, memory_model
from test_durability import fast_directory, files_of, named  # noqa: F401

from msa_hf.bank import BankLocked, BankNotWritable, BankStore, RankFailed
from msa_hf.bank.encode_corpus import FOLDER, Encoded, connected, encode_bank
from msa_hf.cli import main
from msa_hf.data.documents import Corpus
from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.bank_writer_msa import BankWriter
from msa_hf.model.inference_msa import MemoryMixin
from msa_hf.model.memory_msa import BankOrigin, MemoryBank
from msa_hf.user_errors import UserError

LONGEST = 60  # tokens
PART = 120  # bytes of text
TIMEOUT = timedelta(seconds=30)
KILLS = 5


class Model(FakeModel):
    """Appends the key of every document that it encodes to a file, which outlives the process."""

    config = SimpleNamespace(max_position_embeddings=LONGEST, chunk_size=CHUNK, vocab_size=1000)

    def __init__(self, log: Path, origin: BankOrigin = ORIGIN, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.log, self.origin = log, origin

    def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
        return self.origin

    def encode_documents(self, documents: Any, tokenizer: Any = None, **options: Any) -> MemoryBank:
        def logged() -> Iterator[Any]:
            for item in documents:
                if not isinstance(item, dict):  # of what the tensors look like
                    yield item
                    continue
                with open(self.log, "a") as file:
                    file.write(f"{item['key']}\n")
                event()
                yield item

        return super().encode_documents(logged(), tokenizer, **options)


class Bytes:
    """A tokenizer with a token for every byte."""

    is_fast = False

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


def rows_of(seed: int, count: int) -> list[dict[str, Any]]:
    pick = random.Random(seed)
    letters = "abc def"
    return [
        {"key": f"key {number}", "text": f"{number} " + "".join(pick.choices(letters, k=pick.randint(1, 50)))}
        | ({"year": number} if pick.random() < 0.3 else {})
        for number in range(count)
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode(source: Path, directory: Path, log: Path, **options: Any) -> Encoded:
    """What one process does; with options of the model or of `encode_bank`."""
    with connected(TIMEOUT) as ranks:
        corpus = Corpus(str(source))
        model = Model(log, **{name: options.pop(name) for name in ("origin", "dtype") if name in options})
        options = {"tokenizer": Bytes(), "part_size": PART, "show_progress": False, **options}
        return encode_bank(corpus, model, directory, ranks=ranks, **options)


def keys_in(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def kept_keys(directory: Path) -> set[str]:
    """Keys of the documents in parts that are there, complete bank or not."""
    found: set[str] = set()
    records = [json.loads(path.read_text()) for path in (directory / FOLDER).glob("*.json")]
    if (directory / "manifest.json").exists():
        records += json.loads((directory / "manifest.json").read_text())["segments"]
    for record in records:
        name = record["table"]["file"]
        place = next(place for place in (directory / FOLDER / name, directory / name) if place.exists())
        with pyarrow.ipc.open_stream(place) as reader:
            found.update(reader.read_all()["key"].to_pylist())
    return found


def assert_bank(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Documents in the order of the corpus, with the tensors of their texts, and no file besides."""
    bank = MemoryBank.from_pretrained(directory)
    expected = [(row["key"], row["text"], {"year": row["year"]} if "year" in row else None) for row in rows]
    assert [(item.key, item.text, item.metadata) for item in bank.documents] == expected
    assert [item.id for item in bank.documents] == list(range(len(rows)))
    memory = FakeModel().encode_documents([{"input_ids": list(row["text"].encode())} for row in rows])
    for layer, wanted in memory.layers.items():
        assert torch.equal(bank.layers[layer].routing_keys, wanted.routing_keys)
        assert torch.equal(bank.layers[layer].pooled_kv, wanted.pooled_kv)
    assert all(torch.equal(bank.prefix[layer][0], keys) for layer, (keys, _) in memory.prefix.items())
    assert set(files_of(directory)) == named(directory)


def content_of(directory: Path) -> dict[str, bytes]:
    """The bank's own files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name != ".lock"}


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 23])
def test_the_bank_does_not_depend_on_the_number_of_processes(tmp_path: Path, count: int) -> None:
    """To the byte; also where there are fewer parts than processes."""
    rows = rows_of(count, count)
    source = written(tmp_path / "rows.jsonl", rows)
    done = encode(source, tmp_path / "alone", tmp_path / "log")
    assert_bank(tmp_path / "alone", rows)
    bytes_of_text = sum(len(row["text"]) for row in rows)
    assert (done.documents, done.tokens, done.own, done.found) == (count, bytes_of_text, count, 0)
    assert max(bytes_of_text // (PART + LONGEST), 1) <= done.parts <= bytes_of_text // PART + 3
    for size in (2, 3, 4):
        directory, log = tmp_path / str(size), tmp_path / f"log {size}"
        results = together(size, partial(lambda directory, log, rank: encode(source, directory, log), directory, log))
        assert content_of(directory) == content_of(tmp_path / "alone")
        assert Counter(keys_in(log)) == dict.fromkeys((row["key"] for row in rows), 1)
        assert sum(result.own for result in results) == count
        assert sum(result.own > 0 for result in results) == min(done.parts, size)
        assert {(result.documents, result.parts, result.found) for result in results} == {(count, done.parts, 0)}


def test_processes_with_other_documents_or_directories_are_refused(tmp_path: Path) -> None:
    sources = [written(tmp_path / f"{seed}.jsonl", rows_of(seed, 5)) for seed in range(2)]
    bank, log = tmp_path / "bank", tmp_path / "log"
    for error in together(2, lambda rank: caught(lambda: encode(sources[rank], bank, log))):
        assert error.kind is ValueError and "do not have the same documents, model and settings" in error.text
    errors = together(2, lambda rank: caught(lambda: encode(sources[0], tmp_path / f"bank {rank}", log)))
    assert errors[0].kind is RankFailed and errors[0].text == f"Process 1 failed: ValueError: {errors[1].text}"
    assert errors[1].kind is ValueError and "on a file system that all machines share" in errors[1].text
    assert not keys_in(log)


@dataclass
class Raised:
    """An error, for processes to return."""

    kind: type
    text: str


def caught(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the error that it raises."""
    try:
        return work()
    except (ValueError, RankFailed) as error:
        return Raised(type(error), str(error))


def test_an_error_in_one_document_ends_all_processes_and_costs_only_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that only encoding finds, as of a tokenizer with more tokens than bytes. With the length of the last document
    the places change where the end is cut."""
    monkeypatch.setattr("msa_hf.bank.encode_corpus.check_lengths", lambda *given: None)
    rows = rows_of(5, 40)
    wrong = {"key": "the wrong one", "text": "x" * (LONGEST + 1)}
    source = written(tmp_path / "rows.jsonl", [*rows, wrong])
    log, bank = tmp_path / "log", tmp_path / "bank"
    errors = together(3, lambda rank: caught(lambda: encode(source, bank, log)))
    (own,) = (error for error in errors if error.kind is ValueError)
    text = f"Document 40 (key 'the wrong one') has {LONGEST + 1} tokens"
    assert own.text.startswith(text)
    for error in errors:
        assert error is own or error == Raised(
            RankFailed, f"Process {errors.index(own)} failed: ValueError: {own.text}"
        )
    assert not (bank / "manifest.json").exists()
    kept = kept_keys(bank)
    assert len(kept) > 10
    log.unlink()
    rows.append({"key": "the wrong one", "text": "mended"})
    done = encode(written(source, rows), bank, log)
    beside = {row["key"] for place, row in enumerate(rows) if sum(len(row["text"]) for row in rows[place:]) <= 2 * PART}
    assert done.found > done.parts // 2 and kept & set(keys_in(log)) <= beside
    assert_bank(bank, rows)


def test_a_process_that_hangs_is_given_up(tmp_path: Path) -> None:
    """After the timeout; what others encoded meanwhile stays."""
    source, bank, given_up = written(tmp_path / "rows.jsonl", rows_of(9, 10)), tmp_path / "bank", tmp_path / "given up"

    class Hanging(Model):
        def encode_documents(self, *arguments: Any, **options: Any) -> MemoryBank:
            while not given_up.exists():
                time.sleep(0.05)
            return super().encode_documents(*arguments, **options)

    def work(rank: int) -> Any:
        model = (Model, Hanging)[rank](tmp_path / f"log {rank}")
        with connected(timedelta(seconds=2)) as ranks:
            result = caught(
                lambda: encode_bank(
                    Corpus(str(source)), model, bank, Bytes(), ranks=ranks, part_size=PART, show_progress=False
                )
            )
        given_up.touch()
        return result

    for result in together(2, work):
        assert result.kind is RankFailed and "Process 1 of this shared memory is alive, but did not" in result.text
    assert kept_keys(bank) >= set(keys_in(tmp_path / "log 0")) > set()


# --- interruptions ----------------------------------------------------------------------------------------------------

countdown = [-1]  # events until this process dies


def event() -> None:
    """A moment at which a process may be killed."""
    countdown[0] -= 1
    if countdown[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def dying(work: Callable[..., Any], after: int) -> Any:
    """Run `work`, and die at the event numbered `after`, if it comes to that; else the number of events."""

    def marked(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            event()
            return function(*arguments)

        return run

    os.fsync, os.replace = marked(os.fsync), marked(os.replace)
    countdown[0] = after
    result = caught(work)
    return result, after - countdown[0]


def test_killed_processes_lose_only_what_they_had_in_hand(fast_directory: Path) -> None:  # noqa: F811
    """Killed before any flush, rename or document, and gone on with by another number of processes."""
    pick = random.Random(0)
    rows = rows_of(0, 30)
    source = written(fast_directory / "rows.jsonl", rows)
    whole, number = fast_directory / "whole", 0
    ((_, events),) = together(1, lambda rank: dying(lambda: encode(source, whole, fast_directory / "log"), 10**6))
    resumed, deaths, complete = 0, 0, False
    while deaths < KILLS or not complete:
        size = pick.randint(1, 3)
        moments = [pick.randint(1, events // size) for _ in range(size)] if deaths < KILLS else [10**6] * size
        bank, log = fast_directory / str(number), fast_directory / "log of this run"
        kept = kept_keys(bank)
        log.unlink(missing_ok=True)

        def work(rank: int, bank: Path = bank, log: Path = log, moments: list[int] = moments) -> Any:
            return dying(lambda: encode(source, bank, log), moments[rank])

        results = together(size, work, dead=tuple(range(size)))
        encoded = Counter(keys_in(log))
        assert not kept & set(encoded), "what was kept is encoded again"
        assert all(times == 1 for times in encoded.values())
        ended = [result[0] for result in results if result is not None]
        assert all(isinstance(result, Encoded) or result.kind is RankFailed for result in ended), ended
        resumed, deaths = resumed + bool(kept), deaths + results.count(None)
        if complete := len(ended) == size and all(isinstance(result, Encoded) for result in ended):
            assert content_of(bank) == content_of(whole)
            assert_bank(bank, rows)
            number += 1
    assert number > 1 and resumed > KILLS // 5


def test_what_is_left_of_a_killed_process_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(1, 9)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    (death,) = together(1, lambda rank: dying(lambda: encode(source, bank, log), 13), dead=(0,))
    assert death is None and list((bank / FOLDER).glob(".*.tmp"))
    encode(source, bank, log)
    assert "files of parts that an interrupted run did not complete" in caplog.text
    assert_bank(bank, rows)


def test_compacting_erases_what_a_killed_process_left(tmp_path: Path) -> None:
    rows = [{"key": f"key {number}", "text": f"{number:03} " + "z" * 36} for number in range(12)]
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    encode(source, bank, log)
    later = [{"key": row["key"], "text": row["text"].upper()} for row in rows]
    (death,) = together(1, lambda rank: dying(lambda: encode(written(source, later), bank, log), 13), dead=(0,))
    assert death is None and list((bank / FOLDER).glob("*.json"))

    def holds(text: str) -> bool:
        return any(text.encode() in path.read_bytes() for path in bank.rglob("*") if path.is_file())

    assert holds(later[0]["text"]) and holds(rows[0]["text"])
    with BankStore(None, bank) as writer:
        writer.delete("key 0")
        writer.compact()
    assert not holds(later[0]["text"]) and not holds(rows[0]["text"]) and holds(rows[1]["text"])
    encode(source, bank, log)
    assert_bank(bank, later)


def test_what_cannot_be_removed_of_the_bank_before_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(3, 6)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    encode(source, bank, log)
    old, unlink = next(path.name for path in bank.glob("documents-*")), os.unlink

    def refusing(path: Any, *arguments: Any, **options: Any) -> None:
        if os.path.basename(os.fspath(path)) == old:
            raise PermissionError(13, "Permission denied")
        unlink(path, *arguments, **options)

    monkeypatch.setattr(os, "unlink", refusing)
    encode(written(source, rows[::-1]), bank, log)
    assert f"what is no part of it stays: {old} (Permission denied)" in caplog.text
    monkeypatch.undo()
    (bank / old).unlink()
    bank_now = MemoryBank.from_pretrained(bank)
    assert [item.key for item in bank_now.documents] == [row["key"] for row in rows[::-1]]


def test_all_parts_are_encoded_with_the_same_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in 8-bit floats are made once, not for every part; not at all where all parts are there."""
    made, given = [], []
    whole = Model.encode_rows

    def encoding_layers(self: Model, *options: bool) -> object:
        made.append(options)
        return made[-1]

    def encode_rows(self: Model, *rows: Any, layers: object, **options: Any) -> Any:
        given.append(layers)
        return whole(self, *rows, **options)

    monkeypatch.setattr(Model, "encoding_layers", encoding_layers)
    monkeypatch.setattr(Model, "encode_rows", encode_rows)
    source = written(tmp_path / "rows.jsonl", rows_of(2, 20))
    for _ in range(2):
        parts = encode(source, tmp_path / "bank", tmp_path / "log", compile_layers=True, fp8_projections=True).parts
        assert made == [(True, True)] and given == made * parts and parts > 2


def test_a_complete_bank_is_taken_over_as_far_as_it_is_the_same(tmp_path: Path) -> None:
    rows = rows_of(2, 40)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    first = encode(source, bank, log)
    before = content_of(bank)
    assert encode(source, bank, log) == Encoded(40, first.tokens, first.chunks, first.parts, first.parts, 0)
    assert content_of(bank) == before and len(keys_in(log)) == 40
    assert encode(source, bank, log, fp8_projections=True).found == 0  # what was projected otherwise is not the same
    assert encode(source, bank, log).found == 0
    log.unlink()
    rows[9]["text"] = rows[9]["text"][::-1]
    rows += [{"key": "one more", "text": "y" * 30}]
    done = encode(written(source, rows), bank, log)
    assert done.parts - 6 <= done.found < done.parts and {"key 9", "one more"} <= set(keys_in(log))
    assert_bank(bank, rows)


def test_documents_that_get_other_numbers_are_encoded_again(tmp_path: Path) -> None:
    """A protocol would put the numbers into what is encoded."""
    rows = [{"key": f"key {number}", "text": f"{number:03} " + "z" * 36} for number in range(12)]
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    assert encode(source, bank, log).parts == 6  # one, two, three, three, one, two
    assert encode(written(source, rows[3:]), bank, log).found == 0
    assert_bank(bank, rows[3:])


def interrupted(source: Path, bank: Path, log: Path, **options: Any) -> None:
    """Encode the corpus up to some document in its second half."""
    (result,) = together(1, lambda rank: dying(lambda: encode(source, bank, log, **options), 40), dead=(0,))
    assert result is None and kept_keys(bank)


OTHERS = {
    "model": {"origin": replace(ORIGIN, model_fingerprint="0" * 64)},
    "dtype": {"dtype": torch.bfloat16},
    "settings": {"too_long": "split"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_parts_of_another_model_are_left_alone_and_removed_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    rows = rows_of(3, 20)
    source, bank = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank"
    interrupted(source, bank, tmp_path / "first")
    kept = kept_keys(bank)
    interrupted(source, bank, tmp_path / "second", **other)
    assert set(keys_in(tmp_path / "second")) >= kept_keys(bank) >= kept
    done = encode(source, bank, tmp_path / "third")
    assert done.found and not kept & set(keys_in(tmp_path / "third"))
    assert "are of other documents, another model or other settings" in caplog.text
    assert_bank(bank, rows)


@pytest.mark.parametrize("place", [".", FOLDER])
@pytest.mark.parametrize("files", ["chunks-*", "documents-*", "index-*", "*.json"])
def test_a_damaged_part_is_encoded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: str, place: str
) -> None:
    """In the bank or among the parts of an interrupted run."""
    rows = rows_of(4, 20)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    if place == FOLDER:
        interrupted(source, bank, log)
    elif files == "*.json":
        return  # a damaged manifest is refused
    else:
        encode(source, bank, log)
    kept, parts = kept_keys(bank), len(list((bank / place).glob("*.json" if place == FOLDER else "index-*")))
    path = min((bank / place).glob(files))
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    done = encode(source, bank, tmp_path / "again")
    assert done.found == parts - 1 and 0 < len(kept & set(keys_in(tmp_path / "again"))) < 10
    assert "other documents" not in caplog.text
    assert_bank(bank, rows)


def test_the_bank_that_was_there_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    old, rows = rows_of(6, 4), rows_of(7, 20)
    source, bank, log = written(tmp_path / "rows.jsonl", old), tmp_path / "bank", tmp_path / "log"
    encode(source, bank, log)
    before = content_of(bank)
    interrupted(written(source, rows), bank, log)
    assert content_of(bank) == before
    with BankStore(Model(log), bank) as writer:
        assert [document.key for document in writer.snapshot().documents] == [row["key"] for row in old]
        with pytest.raises(BankLocked, match="is open for writing in process"):
            encode(source, bank, log)
        writer.delete("key 0")
    encode(source, bank, log)
    assert_bank(bank, rows)
    (bank / "manifest.json").write_text("{")
    with pytest.raises(BankFormatError, match="not valid JSON"):
        encode(source, bank, log)


@pytest.mark.parametrize("sole_writer", [False, True])
def test_a_bank_is_not_replaced_once_the_lock_file_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sole_writer: bool
) -> None:
    rows = rows_of(6, 4)
    source, bank, log = written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log"
    encode(source, bank, log)
    before, prefix = content_of(bank), BankWriter.prefix

    def removing(*arguments: Any) -> Any:
        (bank / ".lock").unlink()
        return prefix(*arguments)

    monkeypatch.setattr(BankWriter, "prefix", removing)
    written(source, rows[::-1])
    if sole_writer:  # no lock is asked for
        encode(source, bank, log, sole_writer=True)
        (bank / ".lock").touch()  # for the comparison
    else:
        with pytest.raises(BankNotWritable, match="was removed since"):
            encode(source, bank, log)
        assert content_of(bank).items() >= before.items()
        monkeypatch.undo()
        encode(source, bank, log)
    assert_bank(bank, rows[::-1])


def test_a_corpus_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    rows = rows_of(8, 10)
    corpus = Corpus(str(written(tmp_path / "rows.jsonl", rows)))
    written(tmp_path / "rows.jsonl", [*rows[:7], {**rows[7], "text": rows[7]["text"].swapcase()}, *rows[8:]])
    with connected() as ranks, pytest.raises(UserError, match="line 8: changed while it was encoded"):
        encode_bank(corpus, Model(tmp_path / "log"), tmp_path / "bank", Bytes(), ranks=ranks, show_progress=False)


def cut(tmp_path: Path, lengths: list[int], size: int) -> list[int]:
    """The places behind the parts of a corpus."""
    rows = [{"key": f"key {number}", "text": "x" * length} for number, length in enumerate(lengths)]
    encode(written(tmp_path / "rows.jsonl", rows), tmp_path / "bank", tmp_path / "log", part_size=size)
    segments = json.loads((tmp_path / "bank" / "manifest.json").read_text())["segments"]
    return [segment["documents"][1] for segment in segments]


@pytest.mark.parametrize(
    "lengths, ends",
    [
        ([60], [1]),
        ([1, 60, 1], [2, 3]),
        ([5, 9, 1, 25, 1, 60, 39, 1], [1, 2, 4, 6, 7, 8]),  # 5, 9, 26, then 61 and 39, behind which little is left
        ([1] * 3, [3]),  # as much as the first piece has
        ([1] * 5, [3, 5]),
        ([1] * 42, [3, 10, 32, 40, 42]),  # no piece of two before the last 30
        ([1] * 43, [3, 10, 13, 33, 41, 43]),  # first pieces of 3 and 7, last ones of 20, 8 and 2
        ([1] * 97, [3, 10, 40, 67, 87, 95, 97]),
        ([1] * 140, [3, 10, 40, 80, 110, 130, 138, 140]),
    ],
    ids=lambda given: str(len(given)),
)
def test_the_corpus_is_cut_further_at_both_ends(tmp_path: Path, lengths: list[int], ends: list[int]) -> None:
    assert cut(tmp_path, lengths, 40) == ends


@pytest.mark.parametrize("seed", range(6))
def test_little_is_left_to_be_written_at_the_end(tmp_path: Path, seed: int) -> None:
    """So that the disk keeps no model waiting at the beginning, nor whoever waits for the bank at the end."""
    pick, size = random.Random(seed), 400
    lengths = [pick.randint(1, 40) for _ in range(pick.randint(60, 120))]
    ends = cut(tmp_path, lengths, size)
    pieces = [sum(lengths[first:end]) for first, end in zip([0, *ends], ends, strict=False)]
    assert sum(pieces) == sum(lengths)
    assert pieces[0] < size / 16 + 40 and pieces[1] < size / 4 + 40
    assert pieces[-1] <= size / 8 + 40 and pieces[-2] < size / 2 + size / 16 + 40
    assert all(size / 16 <= piece < size + 40 for piece in pieces[:-1])
    assert sum(piece < size for piece in pieces) <= 8


# --- what is encoded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [None, COMPACT], ids=["plain", "compact"])
def test_pieces_have_ids_that_do_not_depend_on_other_documents(tmp_path: Path, protocol: Any) -> None:
    """Of what is too long; whoever opens the bank finds every text unchanged."""
    pick = random.Random(11)
    rows = [{**row, "text": row["text"] * pick.choice([1, 1, 5])} for row in rows_of(11, 12)]
    source, tokenizer = written(tmp_path / "rows.jsonl", rows), byte_tokenizer()
    options = {"tokenizer": tokenizer, "protocol": protocol, "too_long": "split"}
    for size in (1, 2, 3):
        bank, log = tmp_path / str(size), tmp_path / f"log {size}"
        work = partial(lambda bank, log, rank: encode(source, bank, log, **options), bank, log)
        together(size, work) if size > 1 else work(0)
        assert content_of(bank) == content_of(tmp_path / "1")
    documents = list(MemoryBank.from_pretrained(tmp_path / "1").documents)
    found = {number: [item for item in documents if item.id % 12 == number] for number in range(12)}
    assert sum(len(pieces) > 1 for pieces in found.values()) > 2 and max(map(len, found.values())) > 2
    for number, (row, pieces) in enumerate(zip(rows, found.values(), strict=True)):
        assert "".join(piece.text for piece in pieces) == row["text"]
        keys = [row["key"]] if len(pieces) == 1 else [f"{row['key']}#{part}" for part in range(len(pieces))]
        assert [piece.key for piece in pieces] == keys
        assert [piece.id for piece in pieces] == [number + 12 * part for part in range(len(pieces))]
    assert [item for pieces in found.values() for item in pieces] == documents
    wrapped = [
        tokenizer(item.text)["input_ids"]
        if protocol is None
        else protocol.document_row(item.id, item.text, tokenizer)["input_ids"]
        for item in documents
    ]
    assert [len(ids) for ids in wrapped] == [item.tokens for item in documents] and max(map(len, wrapped)) <= LONGEST
    expected = FakeModel().encode_documents([{"input_ids": ids} for ids in wrapped])
    assert torch.equal(MemoryBank.from_pretrained(tmp_path / "1").layers[1].pooled_kv, expected.layers[1].pooled_kv)
    with BankStore(Model(tmp_path / "log"), tmp_path / "1", tokenizer, protocol) as opened:
        assert not any(opened.upsert(item.key, item.text, metadata=item.metadata) for item in documents)
        assert opened.add(["a new one"]) == [max(item.id for item in documents) + 1]


def test_keys_of_pieces_must_be_free(tmp_path: Path) -> None:
    rows = [{"key": "a#1", "text": "b"}, {"key": "a", "text": "a" * 200}]
    source = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"Document 1 \(key 'a'\) .* gets the key 'a#1', .*line 1; rename one of them"):
        encode(source, tmp_path / "bank", tmp_path / "log", too_long="split")


def test_a_run_of_documents_is_read_without_those_before(tmp_path: Path) -> None:
    """From each kind of source."""
    datasets = pytest.importorskip("datasets")
    rows = rows_of(12, 9)
    written(tmp_path / "rows.jsonl", rows[:4])
    with (tmp_path / "rows.jsonl").open("a", newline="") as file:
        file.write("\r\n \n" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows[4:]))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "dataset")
    for row in rows:
        (tmp_path / "folder" / row["key"][-1]).mkdir(parents=True)
        (tmp_path / "folder" / row["key"][-1] / "text.md").write_text(row["text"])
        (tmp_path / "folder" / row["key"][-1] / "empty.md").write_text("")
    for source in ("rows.jsonl", "dataset", "folder"):
        corpus = Corpus(str(tmp_path / source))
        assert [row["text"] for row in corpus] == [row["text"] for row in rows]
        assert list(corpus.sizes) == [len(row["text"]) for row in rows]
        for first in range(9):
            for end in range(first + 1, 10):
                assert list(corpus.read(first, end)) == list(corpus)[first:end]


# --- the command ------------------------------------------------------------------------------------------------------


def launch(size: int, directory: Path, *arguments: object) -> list[tuple[int, str, str]]:
    """Run `python -m msa_hf.encode` as a launcher does; exit code, output and errors of every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["msa_hf.encode", *map(str, arguments)]
        with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as errors:
            try:
                runpy.run_module("msa_hf.encode", run_name="__main__")
            except SystemExit as exit:
                (directory / f"said {rank}").write_text(json.dumps([exit.code, printed.getvalue(), errors.getvalue()]))
        os._exit(0)

    processes = [FORK.Process(target=work, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [tuple(json.loads((directory / f"said {rank}").read_text())) for rank in range(size)]


def test_the_command_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process encodes, and the library; a mistake is told by every process."""
    tokenizer, prefixes = byte_tokenizer(), []
    model, encode_prefix = memory_model(tokenizer, COMPACT), MemoryMixin.encode_prefix
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    COMPACT.save_pretrained(tmp_path / "model")
    rows = rows_of(13, 12)
    source = written(tmp_path / "rows.jsonl", rows)
    command = (tmp_path / "model", source, tmp_path / "bank", "--part-size", PART)
    monkeypatch.setattr(MemoryMixin, "encode_prefix", lambda self: (prefixes.append(1), encode_prefix(self))[1])
    assert main(["encode", *map(str, command[:2]), str(tmp_path / "alone"), "--part-size", str(PART)]) == 0
    assert prefixes == [1], "of all parts together"
    alone, expected = (
        MemoryBank.from_pretrained(tmp_path / "alone"),
        model.encode_documents(COMPACT.encode_corpus(rows, tokenizer), show_progress=False),
    )
    for layer, memory in expected.layers.items():
        torch.testing.assert_close(alone.layer(layer).pooled_kv, memory.pooled_kv)
        torch.testing.assert_close(alone.layer(layer).routing_keys, memory.routing_keys)
    said = launch(2, tmp_path, *command)
    assert [code for code, *_ in said] == [0, 0] and [bool(out) for _, out, _ in said] == [True, False], said
    assert said[0][1].startswith(f"{tmp_path / 'bank'}: 12 documents, ") and "parts were there" not in said[0][1]
    assert content_of(tmp_path / "bank") == content_of(tmp_path / "alone")
    assert MemoryBank.from_pretrained(tmp_path / "bank").documents[3].text == rows[3]["text"]
    written(source, [*rows, {"key": "endless", "text": "e" * 5000}])
    told = []
    for code, out, errors in launch(2, tmp_path, *command):
        (line,) = (line for line in errors.splitlines() if line.startswith("msa-hf: error: "))
        assert code == 2 and not out and "(key 'endless') has" in line
        told.append("Process " in line)
    assert sorted(told) == [False, True], "the one that found it, and the one that was told"
    (found,) = {
        line.split(", ")[3]
        for _, line, _ in launch(2, tmp_path, *command[:1], written(source, rows), *command[2:])
        if line
    }
    assert found.endswith(" parts were there") and found.split()[0] == found.split()[2]
