"""The results of benchmarks: every trial with what it takes to repeat it, in a file that grows while they run."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checking import fault_in
from .intervals import wilson

logger = logging.getLogger(__name__)
FORMAT = 1
SAVED_EVERY = 2.0  # seconds between two writes of a file

Axis = str | int | float


class ResultError(ValueError):
    """A file of results that cannot be taken: which, why, and the remedy."""


@dataclass(frozen=True)
class Trial:
    """One question that was put, and what came of it.

    Attributes:
        id: names it within its benchmark and settings, such as "single words 65536 0.5 3"; what has been answered is
            not asked again.
        kind: of the question.
        axes: where it stands among the others, such as {"tokens": 65536, "depth": 0.5, "hops": 2}.
        question, answer: texts.
        expected: what the answer should hold; of several, all.
        right: whether it did.
        detail: JSON values for those who ask why, such as the rung that broke.
    """

    id: str
    kind: str
    axes: Mapping[str, Axis]
    question: str
    expected: tuple[str, ...]
    answer: str
    right: bool
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """The trials that agree on some axes.

    Attributes:
        values: of these axes.
        right, asked: numbers of trials.
        low, high: the 95 % interval of the share (Wilson).
    """

    values: tuple[Axis, ...]
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def low(self) -> float:
        return wilson(self.right, self.asked)[0]

    @property
    def high(self) -> float:
        return wilson(self.right, self.asked)[1]

    def __str__(self) -> str:
        return f"{self.share:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass
class Result:
    """The findings of a benchmark.

    Attributes:
        benchmark: its name.
        settings: all that the questions and documents depend on, seeds among them; JSON values.
        model: facts that tell the model from others, its fingerprint among them (`facts.model_facts`).
        runs: each time that the benchmark ran: `facts.run_facts`, and the `seconds` it took.
        notes: facts found on the way, such as tokens of a bank; JSON values.
        trials: in the order in which they were made.
        path: the file that grows; None: none does. Through a symbolic link it is the file that this points to.
    """

    benchmark: str
    settings: dict[str, Any]
    model: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    path: Path | None = None

    def __post_init__(self) -> None:
        self._known = {trial.id: trial for trial in self.trials}
        self._saved = self._begun = time.monotonic()
        self._file = None if self.path is None else Path(os.path.realpath(self.path))

    @classmethod
    @contextmanager
    def begin(
        cls,
        benchmark: str,
        settings: Mapping[str, Any],
        model: Mapping[str, Any],
        run: Mapping[str, Any],
        path: str | Path | None = None,
        needed: Sequence[str] = (),
    ) -> Iterator[Result]:
        """A new result, or the one in the file, which a run that ended early left there; for a `with` block.

        Until the block ends the file is this run's alone. It is written at the end, also where an interruption or a
        fault is the end: no answer is lost.

        Args:
            path: of the file; None: there is none, and nothing to keep others from.
            needed: axes and details that every trial of this benchmark has.

        Raises:
            ResultError: where the file is of another benchmark, other settings or another model, naming what differs;
                where another run writes to it; and for what no file can be written to, such as a directory.
        """
        path = None if path is None else Path(path)
        with nullcontext() if path is None else claimed(path):
            result = cls._found(benchmark, _as_json(settings), _as_json(model), path, needed)
            result.runs.append({**_as_json(run), "seconds": 0.0})
            result.save()
            try:
                yield result
            finally:
                result.save()

    @classmethod
    def _found(
        cls,
        benchmark: str,
        settings: dict[str, Any],
        model: dict[str, Any],
        path: Path | None,
        needed: Sequence[str],
    ) -> Result:
        """The result in the file that a run of these settings can go on with, or a new one where there is no file."""
        if path is None or not path.exists():
            return cls(benchmark, settings, model, path=path)
        found = cls.load(path)
        differ = [f"its benchmark is {found.benchmark}"] if found.benchmark != benchmark else []
        differ += differences(found.settings, settings)
        differ += [item for item in differences(found.model, model) if not item.startswith("name: ")]
        if differ:
            raise ResultError(
                f"{path}: holds a result that this run cannot go on with ({'; '.join(differ[:4])}). Name another file, "
                "or remove this one to begin anew."
            )
        for trial in found.trials:
            if lacking := [name for name in needed if name not in {**trial.axes, **trial.detail}]:
                raise _damaged(path, f"trial {trial.id!r} has no {lacking[0]!r}")
        return found

    def done(self, id: str, question: str | None = None, expected: Sequence[str] | None = None) -> bool:
        """Tell whether a trial of that name is among those made.

        Args:
            question, expected: what the run that goes on would ask; None: whatever it was.

        Raises:
            ResultError: where that trial asked something else, as another release may have.
        """
        found = self._known.get(id)
        if found is None:
            return False
        for name, there, here in (
            ("question", found.question, found.question if question is None else question),
            ("expected", list(found.expected), list(found.expected if expected is None else expected)),
        ):
            if there != here:
                raise ResultError(
                    f"{self.path}: holds a result that this run cannot go on with (its trial {id!r} has another "
                    f"`{name}`, of another release or by hand: {there!r} there, {here!r} here). Name another file, or "
                    "remove this one to begin anew."
                )
        return True

    def add(self, trials: Iterable[Trial]) -> None:
        """Keep trials; the file is written where it is more than two seconds old.

        Raises:
            ValueError: for one whose name another has.
        """
        for trial in trials:
            if trial.id in self._known:
                raise ValueError(f"Trial {trial.id!r} was made already.")
            self._known[trial.id] = trial
            self.trials.append(trial)
        if time.monotonic() - self._saved > SAVED_EVERY:
            self.save()

    def cells(self, *axes: str, kind: str | None = None) -> list[Cell]:
        """Shares of right answers by these axes, ascending; an axis "kind" is the kind of question.

        Args:
            axes: trials without one of them are left out; with none of them all trials are one cell.
            kind: count trials of this kind alone.
        """
        groups: dict[tuple[Axis, ...], list[bool]] = {}
        for trial in self.trials:
            found = {**trial.axes, "kind": trial.kind}
            if (kind is None or trial.kind == kind) and all(axis in found for axis in axes):
                groups.setdefault(tuple(found[axis] for axis in axes), []).append(trial.right)
        return [
            Cell(values, sum(right), len(right))
            for values, right in sorted(groups.items(), key=lambda group: in_order(group[0]))
        ]

    def shares(self) -> Iterator[dict[str, Any]]:
        """The shares of right answers with their 95 % intervals: of all, by kind, by each axis, and by it and kind."""
        axes = sorted({name for trial in self.trials for name in trial.axes})
        for by in ((), ("kind",), *((axis,) for axis in axes), *(("kind", axis) for axis in axes)):
            for cell in self.cells(*by):
                counts = {"right": cell.right, "asked": cell.asked}
                interval = {name: round(getattr(cell, name), 6) for name in ("share", "low", "high")}
                yield {"by": dict(zip(by, cell.values, strict=True)), **counts, **interval}

    def save(self) -> None:
        """Write the file as a whole, or leave the one that is there."""
        now = time.monotonic()
        if self.runs:
            self.runs[-1]["seconds"] = round(now - self._begun, 1)
        if self._file is None:
            return
        new = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            # A file's name need not be UTF-8: its other bytes are escaped as JSON has them.
            new.write_text(self.to_json(), encoding="utf-8", errors="backslashreplace")
            os.replace(new, self._file)
        finally:
            new.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def to_json(self) -> str:
        """All of it as JSON text, a line for each share and each trial. The shares are there for whoever reads the
        file; `load` counts them anew."""
        head = {name: getattr(self, name) for name in ("benchmark", "settings", "model", "runs", "notes")}
        opening = json.dumps({"format": FORMAT, **head}, ensure_ascii=False, allow_nan=False, indent=1)
        lists = {"shares": self.shares(), "trials": map(asdict, self.trials)}
        for name, items in lists.items():
            lines = ",\n".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in items)
            opening = f'{opening[:-2]},\n "{name}": [\n{lines}\n]\n}}'
        return f"{opening}\n"

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """A result from its file.

        Raises:
            ResultError: for a file that is none, naming what is wrong.
            OSError: where it cannot be read.
        """
        path = Path(path)
        try:
            # Editors may put a mark of UTF-8 in front.
            text = path.read_text(encoding="utf-8-sig")
            if not text.strip():
                raise ResultError(f"{path}: empty, no result of a benchmark; remove it, or name another file")
            record = json.loads(
                text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_duplicates
            )
        except ResultError:
            raise
        except RecursionError as error:
            raise ResultError(f"{path}: no result of a benchmark (nested too deep); name another file") from error
        except ValueError as error:
            raise ResultError(f"{path}: no result of a benchmark ({error}); name another file") from error
        if not isinstance(record, dict) or type(record.get("format")) is not int:
            raise ResultError(f"{path}: no result of a benchmark; name another file")
        if record["format"] != FORMAT:
            raise ResultError(f"{path}: its format is {record['format']}, this release reads {FORMAT}; measure again")
        if fault := fault_in(record):
            raise _damaged(path, fault)
        kept = {name: record[name] for name in ("benchmark", "settings", "model", "runs", "notes")}
        trials = [Trial(**{**item, "expected": tuple(item["expected"])}) for item in record["trials"]]
        return cls(**kept, trials=trials, path=path)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep other runs from a file, which need not be there yet, for a `with` block.

    A lock beside it does, which the operating system frees if the run is killed. The lock stays there: removing it
    would let two runs lock two files of that name.

    Raises:
        ResultError: where another run has it, and for what no file can be written to.
    """
    lock = FileLock(lock_of(path), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ResultError(
            f"{path}: another run writes to it. Wait until that has ended, or name another file."
        ) from error
    except NotImplementedError:
        logger.warning("%s: its file system has no locks. Let no other run write to it.", path)
    try:
        yield
    finally:
        lock.release()


def lock_of(path: Path) -> Path:
    """The file that a run locks while it writes to another one, beside it."""
    file = file_at(path)
    return file.with_name(f".{file.name}.lock")


def file_at(path: Path) -> Path:
    """The file that a path leads to, through symbolic links; it need not be there yet.

    Raises:
        ResultError: for what no file can be written to, such as a directory.
    """
    file = Path(os.path.realpath(path))
    if file.is_dir():
        raise ResultError(f"{path}: a directory, not a file; name a file in it, such as {path / 'result.json'}")
    if file.is_symlink():
        raise ResultError(f"{path}: a link that leads back to itself; name a file")
    if file.exists() and not file.is_file():
        raise ResultError(f"{path}: not an ordinary file, but such as a device; name another file")
    return file


def _damaged(path: Path, what: str) -> ResultError:
    return ResultError(f"{path}: damaged, or made by hand ({what}); measure again into another file")


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The entries on which two mappings differ, in words."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name)!r} there, {after.get(name)!r} here" for name in names]


def _refuse(number: str) -> float:
    """Refuse what Python reads as a number and JSON does not have, such as NaN."""
    raise ValueError(f"{number} is no number of JSON")


def _finite(number: str) -> float:
    """A number; one too large for Python would be infinite, which no file can hold."""
    found = float(number)
    if math.isinf(found):
        raise ValueError(f"{number:.60} is too large a number")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are there once each: of two, one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r:.60} is there twice in one object")
    return found


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file, so that equal ones are equal."""
    return json.loads(json.dumps(dict(values), allow_nan=False))


def in_order(values: Sequence[Axis]) -> tuple[tuple[bool, Axis], ...]:
    """A key that sorts values of axes: numbers before words."""
    return tuple((isinstance(value, str), value) for value in values)
