"""Checks of what a file of results holds, so that a run can go on with it and reports can count with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

LARGEST = 10**18  # of a number: nothing that is counted is larger, and figures are drawn of what is not
DEEPEST = 64  # lists and objects in each other: many times what results have, few for who writes them again
ARMS = ("store", "bank", "lexical", "none", "gold")  # as msa_hf.bench.conversations has them


@dataclass(frozen=True)
class Kind:
    """A kind of JSON value.

    Attributes:
        words: for it, as in "... is not a text".
        holds: tells whether a value is one.
    """

    words: str
    holds: Callable[[object], bool]


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value <= LARGEST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_list(value: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: _is_list(value, TEXT.holds))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number, 0 to 10^18", _is_count)
SIZE = Kind("a whole number, 1 to 10^18", lambda value: _is_count(value, 1))
AXIS = Kind("a text or a number to 10^18", lambda value: TEXT.holds(value) or _is_number(value))
PLACES = Kind("a list of positions", lambda value: _is_list(value, COUNT.holds))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
OBJECTS = Kind("a list of objects", lambda value: _is_list(value, OBJECT.holds))
ARM = Kind(f"among {', '.join(ARMS)}", lambda value: value in ARMS)

HEAD = {"benchmark": TEXT, "settings": OBJECT, "model": OBJECT, "runs": OBJECTS, "notes": OBJECT, "trials": OBJECTS}
TRIAL = {
    **{"id": TEXT, "kind": TEXT, "axes": OBJECT, "question": TEXT, "expected": TEXTS, "answer": TEXT, "right": FLAG},
    "detail": OBJECT,
}
# What reports count with, where it is there.
NOTES = {"terms": COUNT, "terms wanted": COUNT}
TALK = {"tokens": COUNT}  # of the notes on a conversation
AXES = {"tokens": SIZE, "hops": COUNT, "distance": COUNT}
DETAIL = {
    **{"broke": TEXT, "found": COUNT, "of": SIZE, "gold": PLACES, "gold_read": COUNT, "read": PLACES},
    **{"hop": COUNT, "stopped": FLAG, "evidence": COUNT},
}
# Of some benchmarks another kind.
AXES_OF: Mapping[str, Mapping[str, Kind]] = {"conversations": {**AXES, "arm": ARM}}
DETAIL_OF: Mapping[str, Mapping[str, Kind]] = {"scaling": {**DETAIL, "gold": COUNT}}


def fault_in(record: object) -> str | None:
    """The first thing in a file's content that no result has, in words; None where all is well."""
    if _is_deep(record):
        return f"its lists and objects are nested more than {DEEPEST} deep"
    if not isinstance(record, dict):
        return "it is no object"
    if fault := _missing("it", record, HEAD) or _wrong("it", record, HEAD) or _in_notes(record["notes"]):
        return fault
    seen = set[str]()
    for number, trial in enumerate(record["trials"], 1):
        if fault := _in_trial(record["benchmark"], number, trial):
            return fault
        if trial["id"] in seen:
            return f"trial {trial['id']!r} is there twice"
        seen.add(trial["id"])
    return None


def _is_deep(value: object) -> bool:
    """Tell whether a value is nested too deep, without a call for each level."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    return any(isinstance(item, dict | list) for item in level)


def _in_notes(notes: Mapping[str, object]) -> str | None:
    if fault := _wrong("`notes`", notes, NOTES):
        return fault
    for name, talk in notes.items():
        if name.startswith("conversation of "):
            if not isinstance(talk, dict):
                return _said("`notes`", name, talk, OBJECT)
            if fault := _wrong(f"`notes`, `{name}`", talk, TALK):
                return fault
    return None


def _in_trial(benchmark: str, number: int, trial: Mapping[str, object]) -> str | None:
    name = f"trial {trial['id']!r:.80}" if "id" in trial else f"trial number {number}"
    if fault := _missing(name, trial, TRIAL) or _wrong(name, trial, TRIAL):
        return fault
    if unknown := sorted(trial.keys() - TRIAL.keys()):
        return f"{name} has {unknown[0]!r:.60}, which no trial has"
    axes, detail = trial["axes"], trial["detail"]
    assert isinstance(axes, dict) and isinstance(detail, dict)
    return (
        _wrong(f"{name}, `axes`", axes, dict.fromkeys(axes, AXIS))
        or _wrong(f"{name}, `axes`", axes, AXES_OF.get(benchmark, AXES))
        or _wrong(f"{name}, `detail`", detail, DETAIL_OF.get(benchmark, DETAIL))
    )


def _missing(name: str, values: Mapping[str, object], wanted: Mapping[str, Kind]) -> str | None:
    lacking = next((field for field in wanted if field not in values), None)
    return None if lacking is None else f"{name} has no `{lacking}`"


def _wrong(name: str, values: Mapping[str, object], kinds: Mapping[str, Kind]) -> str | None:
    """The first of some values that is not of its kind, in words; those that are not there are none."""
    for field, kind in kinds.items():
        if field in values and not kind.holds(values[field]):
            return _said(name, field, values[field], kind)
    return None


def _said(name: str, field: str, value: object, kind: Kind) -> str:
    return f"{name}: `{field:.60}` is {value!r:.60}, not {kind.words}"
