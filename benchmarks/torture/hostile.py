"""Files made up by somebody hostile: refused in words, in little memory and time, and never a crash.

Checksums are put right, so that only the content is wrong. Nothing here knows what a file means: numbers and names in
any JSON object are replaced, and of files that an object names with `bytes` and `sha256` the content.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attack import Outcome, Settings, Wrong
from .children import ChildFailed, call
from .faults import Bases, round_robin, shuffled

SPARE = 64 * 2**20  # bytes of memory that reading may take beyond the size of the files
ALLOWED = 2 * 2**30  # of address space, so that the machine lives
SECONDS = 30.0
NUMBERS = (-1, 0, 2**20, 2**31, 2**40, 2**62, 2**63, 2**70, 0.5, 1e300, True, None, "1", [])
NAMES = ("../x", "/etc/passwd", "a/b", "", ".", "..", "manifest.json", ".lock", "x" * 5000, "a\0b", "/dev/zero")
BIG = 24 * 2**20  # bytes of JSON

DOCUMENTS: dict[str, Callable[[], str]] = {
    "deep lists": lambda: "[" * 200_000 + "]" * 200_000,
    "deep objects": lambda: '{"a":' * 200_000 + "1" + "}" * 200_000,
    "many objects": lambda: "[" + "{}," * (BIG // 3) + "{}]",
    "many lists": lambda: '{"segments": [' + "[]," * (BIG // 3) + "[]]}",
    "many numbers": lambda: "[" + "1," * (BIG // 2) + "1]",
    "many keys": lambda: "{" + ",".join(f'"{number}":0' for number in range(BIG // 12)) + "}",
    "a long number": lambda: "1" * 2**20,
    "a long string": lambda: '"' + "x" * BIG + '"',
    "escapes": lambda: '"' + "\\u0000" * (BIG // 6) + '"',
    "null": lambda: "null",
    "a list": lambda: "[]",
    "an empty object": lambda: "{}",
    "NaN": lambda: '{"format": NaN}',
    "half a character": lambda: '"\\ud800"',
    "nothing": lambda: "",
    "blanks": lambda: " " * BIG,
}
CODECS, HEADERS = ("zstd", "lz4"), (2**63, 2**40, 99 * 10**6, 0)  # of tables; bytes of a safetensors header
PLACES = ("fifo", "directory", "link outside", "link to /dev/zero", "link to itself", "no right to read", "sparse")


class Hostile:
    """A made-up file in the place of one of a bank's."""

    name = "hostile"
    title = "hostile files"
    seconds = 0.0

    def __init__(self, settings: Settings, bases: Bases) -> None:
        self._settings, self._bases = settings, bases

    def cases(self) -> Iterator[str]:
        place = self._bases.place / "looked-at"
        directory = self._bases.copy("mixed", place)
        numbers = [f"number:{at}:{value}" for at in range(len(_found(directory, int))) for value in range(len(NUMBERS))]
        names = [
            f"name:{at}:{value}" for at in range(len(_found(directory, str, "file"))) for value in range(len(NAMES))
        ]
        records = _records(directory)
        files = range(len(records))
        kinds = [_path(record).suffix for record in records]
        lists = [
            numbers,
            names,
            [f"document:{at}:{name}" for at in range(len(_documents(directory))) for name in DOCUMENTS],
            [f"place:{at}:{name}" for at in range(len(_files(directory))) for name in PLACES],
            [f"compressed:{at}:{kind}" for at in files if kinds[at] == ".arrow" for kind in CODECS],
            [f"header:{at}:{value}" for at in files if kinds[at] == ".safetensors" for value in range(len(HEADERS))],
        ]
        fuzz = (f"signed:{at}:{number}" for number in itertools.count(self._settings.seed * 1000) for at in files)
        for case in round_robin(*(shuffled(items, self._settings.seed) for items in lists)):
            yield case
            yield next(fuzz)
        yield from fuzz

    def run(self, case: str, place: Path) -> Outcome:
        kind, at, detail = case.split(":", 2)
        directory = self._bases.copy("mixed", place)
        said = call(make, kind, int(at), detail, directory, place)
        size = sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
        if detail == "sparse":
            size = 0
        try:
            refused = call(ask, directory, size + SPARE, timeout=SECONDS)
        except (Wrong, ChildFailed) as error:
            raise Wrong(f"{said}: {error}") from error
        return Outcome("refused in words" if any(refused) else "read")


# What lies there ------------------------------------------------------------------------------------------------------


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name != ".lock")


def _documents(directory: Path) -> list[Path]:
    return [path for path in _files(directory) if path.suffix == ".json"]


def _walk(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield at, node
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for step, value in inner:
        yield from _walk(value, (*at, step))


def _read(path: Path) -> Any:
    """What a JSON file says; one that says it more than once, in a line each, says it in the first."""
    text = path.read_text()
    return json.loads(text if text.startswith("{\n") else text.splitlines()[0])


def _found(directory: Path, kind: type, name: str | None = None) -> list[tuple[Path, tuple[Any, ...]]]:
    """Where values of a type lie, in any JSON file; with `name`, those of that name alone."""
    return [
        (path, at)
        for path in _documents(directory)
        for at, value in _walk(_read(path))
        if type(value) is kind and at and (name is None or at[-1] == name)
    ]


def _records(directory: Path) -> list[tuple[Path, tuple[Any, ...]]]:
    """Where a data file is named."""
    return [
        (path, at)
        for path in _documents(directory)
        for at, value in _walk(_read(path))
        if isinstance(value, dict) and {"file", "bytes", "sha256"} <= value.keys()
    ]


def _at(path: Path, at: tuple[Any, ...]) -> Any:
    value = _read(path)
    for step in at:
        value = value[step]
    return value


def _set(path: Path, at: tuple[Any, ...], value: object) -> None:
    """Replace a value in a JSON file, and sign it, and whatever refers to it by its signature."""
    whole, lines = _read(path), path.read_text()
    node = whole
    for step in at[:-1]:
        node = node[step]
    node[at[-1]] = value
    before, after = whole.get("checksum"), None
    if before is not None:
        rest = {name: part for name, part in whole.items() if name != "checksum"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        after = whole["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text((1 if lines.startswith("{\n") else max(lines.count("\n"), 1)) * (json.dumps(whole) + "\n"))
    for other in _documents(path.parent):
        for place, said in _walk(_read(other)) if after is not None else ():
            if said == before and place != ("checksum",):
                _set(other, place, after)


def _replace(record: tuple[Path, tuple[Any, ...]], data: bytes) -> str:
    """Replace the content of a data file, and put what is said of it right."""
    path, at = record
    entry = _at(path, at)
    path.with_name(entry["file"]).write_bytes(data)
    entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    _set(path, at, entry)
    return str(entry["file"])


# In a child -----------------------------------------------------------------------------------------------------------


def make(kind: str, at: int, detail: str, directory: Path, place: Path) -> str:
    """Make a file up; returns which."""
    if kind in ("number", "name"):
        found, values = (
            (_found(directory, int), NUMBERS) if kind == "number" else (_found(directory, str, "file"), NAMES)
        )
        path, steps = found[at]
        _set(path, steps, values[int(detail)])
        return f"{path.name}: {'.'.join(map(str, steps))} is {str(values[int(detail)])[:40]!r}"
    if kind == "document":
        path = _documents(directory)[at]
        path.write_text(DOCUMENTS[detail]())
        return f"{path.name} is {detail}"
    if kind == "place":
        path = _files(directory)[at]
        _misplace(path, detail, place)
        return f"{path.name} is a {detail}"
    record = _records(directory)[at]
    path = _path(record)
    if kind == "signed":
        pick, data = random.Random(f"{at}/{detail}"), bytearray(path.read_bytes())
        for _ in range(pick.choice([1, 1, 3, 20])):
            start = pick.randrange(len(data))
            data[start : start + pick.choice([1, 4, 8])] = pick.choice(
                [pick.randbytes(1), bytes(8), b"\xff" * 8, (2 ** pick.randrange(63)).to_bytes(8, "little")]
            )
        return f"{_replace(record, bytes(data))}, changed and signed"
    if kind == "header":
        data, length = path.read_bytes(), HEADERS[int(detail)]
        return f"{_replace(record, length.to_bytes(8, 'little') + data[8:])}: its header has {length} bytes"
    return f"{_replace(record, _compressed(path, detail))}, compressed with {detail}"


def _path(record: tuple[Path, tuple[Any, ...]]) -> Path:
    path, at = record
    entry = _at(path, at)
    return path.with_name(entry["file"])


def _misplace(path: Path, detail: str, place: Path) -> None:
    if detail == "sparse":
        os.truncate(path, 2**40)
        return
    if detail == "no right to read":
        path.chmod(0)
        return
    data = path.read_bytes()
    path.unlink()
    if detail == "fifo":
        os.mkfifo(path)
    elif detail == "directory":
        path.mkdir()
    elif detail == "link outside":
        (place / "outside").write_bytes(data)
        path.symlink_to(place / "outside")
    else:
        path.symlink_to("/dev/zero" if "zero" in detail else path.name)


def _compressed(path: Path, codec: str) -> bytes:
    """The table with a text of 256 MiB in each row, compressed to little."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
    place = table.column_names.index("text")
    text = "x" * (256 * 2**20 // max(len(table), 1))
    table = table.set_column(place, table.schema.field("text"), pa.array([text] * len(table), pa.large_string()))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def ask(directory: Path, most: int) -> list[bool]:
    """Open and ask a bank in each way, in at most so many bytes of memory; returns which refused it."""
    import resource

    # What is far too much fails instead of taking the machine along.
    size = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size + ALLOWED, size + ALLOWED))
    refused = []
    for name in ("read", "load", "write"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        try:
            refused.append(_is_refused(name, directory))
        except Exception as error:
            raise Wrong(f"{name}: {type(error).__name__}: {str(error)[:200]}") from error
        if (peak := _status("VmHWM") - before) > most:
            raise Wrong(f"{name}: {peak / 2**20:,.0f} MiB, of {most / 2**20:,.0f} allowed")
    return refused


def _is_refused(name: str, directory: Path) -> bool:
    from msa_hf.bank import BankError

    from .check import contents

    try:
        for bank in _open(name, directory):
            contents(bank)
    except BankError:
        return True
    except Wrong:
        pass  # who signs a bank may say in it what they like
    except ValueError as error:
        if "model" not in str(error):  # of another model, it seems
            raise
        return True
    return False


def _open(name: str, directory: Path) -> Iterator[Any]:
    from msa_hf.model.memory_msa import MemoryBank

    from .stub import open_bank

    if name == "load":
        yield MemoryBank.from_pretrained(directory)
        return
    with open_bank(directory, read_only=name == "read") as bank:
        yield bank.snapshot()
        bank.verify()
        yield bank.snapshot()
        if name == "write":
            bank.upsert("k0", "another text")
            bank.delete("k3")
            bank.add(["further"])
            bank.compact()
            yield bank.snapshot()


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
