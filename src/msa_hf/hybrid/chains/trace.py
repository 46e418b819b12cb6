"""Traces of chains: a file of JSON lines, one per step that was done, from which a chain goes on after a kill."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ...json_object import JsonObject
from .errors import TraceError

FORMAT, VERSION = "msa_hf-chain-trace", 1


class TraceFile:
    """The records of one run, in memory and, where there is a path, in a file.

    A record is on the disk when `add` returns. A line that a kill cut short is taken off when the file is opened again.

    Args:
        path: of the file; None: records are kept in memory alone.
        header: what the run is of: the chain, the question, the models.

    Raises:
        TraceError: for a file that is of another run, damaged, or in use.
    """

    def __init__(self, path: str | Path | None, header: JsonObject) -> None:
        self.path = None if path is None else Path(path)
        self.header: JsonObject = {"format": FORMAT, "version": VERSION, **header}
        self.done: dict[str, JsonObject] = {}
        self.records: list[JsonObject] = []
        self._file: BinaryIO | None = None
        if self.path is not None:
            self._open(self.path)

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        file = path.open("a+b")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TraceError(
                    f"{path}: another run is writing this trace; wait for it, or name another file"
                ) from error
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                if not whole and not b'{"format"'.startswith(content[:9]):
                    raise TraceError(f"{path}: not a trace of a chain")
                file.truncate(len(whole))
            lines = whole.splitlines()
            if not lines:
                self._file = file
                self._write(self.header)
                return
            self._take(path, [self._read(path, number, line) for number, line in enumerate(lines, 1)])
        except BaseException:
            file.close()
            raise
        self._file = file

    def _read(self, path: Path, number: int, line: bytes) -> JsonObject:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: damaged ({error}); remove the file to begin anew") from error
        if not isinstance(record, dict):
            raise TraceError(f"{path}, line {number}: not a record; remove the file to begin anew")
        return record

    def _take(self, path: Path, records: list[JsonObject]) -> None:
        head, *rest = records
        if head.get("format") != FORMAT:
            raise TraceError(f"{path}: not a trace of a chain")
        if head.get("version") != VERSION:
            raise TraceError(f"{path}: its version is {head.get('version')!r}, this release reads {VERSION}")
        for name, value in self.header.items():
            if head.get(name) != value:
                raise TraceError(
                    f"{path}: it is of another run: its {name} is {_short(head.get(name))}, now it is {_short(value)}. "
                    "Name another file, or remove this one to begin anew"
                )
        for record in rest:
            if not isinstance(step := record.get("step"), str) or "value" not in record or step in self.done:
                raise TraceError(f"{path}: a record is damaged: {_short(record)}; remove the file to begin anew")
            self.done[step] = record
            self.records.append(record)

    def add(self, record: JsonObject) -> None:
        """Keep the record of a step."""
        self.done[record["step"]] = record
        self.records.append(record)
        self._write(record)

    def _write(self, record: JsonObject) -> None:
        if self._file is not None:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
            self._file.write(line.encode("utf-8", "backslashreplace"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:120]}..."
