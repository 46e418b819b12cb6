"""Two results of one benchmark beside each other, and which differences are more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..tables import table_lines
from .intervals import fisher_test, sign_test
from .result import Axis, Cell, Result, ResultError, Trial, differences, in_order

LEVEL = 0.05  # of all differences of a comparison together (Holm)
ALL = "all"  # the row of all questions
NONE = "-"  # stands for an axis that a kind of question does not have


@dataclass(frozen=True)
class Difference:
    """One cell of two results.

    Attributes:
        before, after: None where a result has no such trials.
        p: the chance of such a difference, were there none; None where there is nothing to compare.
        beyond_chance: whether it still counts, given how many cells were compared.
    """

    values: tuple[Axis, ...]
    before: Cell | None
    after: Cell | None
    p: float | None
    beyond_chance: bool


@dataclass(frozen=True)
class Comparison:
    """Two results, cell by cell.

    Attributes:
        axes: of the cells.
        whole: all trials of the cells that both results have; its value is `ALL`.
        changed: settings, facts of the models, versions, hardware and numbers of trials that are not the same,
            in words.
        cells: in order.
    """

    axes: tuple[str, ...]
    whole: Difference
    changed: tuple[str, ...]
    cells: tuple[Difference, ...]

    def __str__(self) -> str:
        rows = [[*self.axes, "before", "after", "difference", "p", ""]]
        for cell in (self.whole, *self.cells):
            known = cell.before is not None and cell.after is not None
            gain = f"{cell.after.share - cell.before.share:+.3f}" if cell.before and cell.after else "-"
            mark = ("better" if gain.startswith("+") else "WORSE") if cell.beyond_chance else ""
            shown = [str(item) if item else "-" for item in (cell.before, cell.after)]
            named = [*map(str, cell.values), *[""] * (len(self.axes) - len(cell.values))]
            rows.append([*named, *shown, gain, f"{cell.p:.4f}" if known else "-", mark])
        lines = [f"differs: {item}" for item in self.changed]
        return "\n".join([*lines, *([""] if lines else []), *table_lines(rows, left=len(self.axes))])


def compare(before: Result, after: Result, *axes: str) -> Comparison:
    """Compare two results of one benchmark.

    Cells whose trials are the same questions are compared question by question (sign test), others by their shares
    (Fisher's), and so are all of them together, which tells most where cells have few questions. Of all these, 5 % of
    comparisons without a difference mark one (Holm's correction).

    Args:
        axes: of the cells, which leave out trials without one of them; default: the kind of question and all axes that
            both results have, for all trials: a kind without an axis, such as facts without a distance, has "-" there.

    Raises:
        ResultError: for results of different benchmarks, an axis that they do not have, and where they have no cell in
            common.
    """
    if before.benchmark != after.benchmark:
        raise ResultError(f"These are results of different benchmarks: {before.benchmark} and {after.benchmark}.")
    if empty := [item for item in (before, after) if not item.trials]:
        raise ResultError(f"{empty[0].path or 'A result'}: has no trials yet; let its run go on.")
    known = [{"kind", *(name for trial in item.trials for name in trial.axes)} for item in (before, after)]
    both = ["kind", *sorted(known[0] & known[1] - {"kind"})]
    if unknown := [axis for axis in axes if axis not in both]:
        raise ResultError(f"No axis {unknown[0]!r} is in both results; those in both are {', '.join(both)}.")
    named, axes = bool(axes), axes or tuple(both)
    trials = [_by_values(item, axes, named) for item in (before, after)]
    sides = [
        {values: Cell(values, sum(one.right for one in group), len(group)) for values, group in item.items()}
        for item in trials
    ]
    if not sides[0].keys() & sides[1].keys():
        raise ResultError(_apart(before, after, axes, both))
    values = list(sides[0]) + [item for item in sides[1] if item not in sides[0]]
    chances = {
        item: _chance(trials[0][item], trials[1][item]) for item in values if item in sides[0] and item in sides[1]
    }
    shared = [[trial for item in chances for trial in side[item]] for side in trials]
    chances[()] = _chance(*shared)
    beyond, left = set[tuple[Axis, ...]](), len(chances)
    for item, p in sorted(chances.items(), key=lambda found: found[1]):
        if p > LEVEL / left:
            break
        beyond.add(item)
        left -= 1
    changed = differences(before.settings, after.settings) + differences(before.model, after.model)
    changed += differences(*map(_circumstances, (before, after)))
    # Under the same settings, one of them has not been finished.
    changed += differences(*({"trials": len(item.trials)} for item in (before, after)))
    cells = (
        Difference(item, sides[0].get(item), sides[1].get(item), chances.get(item), item in beyond) for item in values
    )
    sums = [Cell((ALL,), sum(trial.right for trial in side), len(side)) for side in shared]
    whole = Difference((ALL,), sums[0], sums[1], chances[()], () in beyond)
    return Comparison(axes, whole, tuple(changed), tuple(cells))


def _circumstances(result: Result) -> dict[str, str]:
    """Versions and hardware by name; those of several runs, where they differ, one after the other."""
    found: dict[str, dict[str, None]] = {}
    for run in result.runs:
        versions = run.get("versions")
        facts = {**(versions if isinstance(versions, dict) else {}), "hardware": run.get("hardware")}
        for name, value in facts.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _apart(before: Result, after: Result, axes: Sequence[str], known: Sequence[str]) -> str:
    """Words about two results without a cell in common, and by what they can be compared."""
    values = [{axis: {cell.values for cell in item.cells(axis)} for axis in known} for item in (before, after)]
    common = [axis for axis in known if values[0][axis] & values[1][axis]]
    remedy = f"compare by {', '.join(common)} (--by {common[0]})" if common else "put the same questions to both"
    return f"These results have no trials in common by {', '.join(axes)}: {remedy}."


def _by_values(result: Result, axes: tuple[str, ...], only_with_all: bool) -> dict[tuple[Axis, ...], list[Trial]]:
    groups: dict[tuple[Axis, ...], list[Trial]] = {}
    for trial in result.trials:
        found: Mapping[str, Axis] = {**trial.axes, "kind": trial.kind}
        if not only_with_all or all(axis in found for axis in axes):
            groups.setdefault(tuple(found.get(axis, NONE) for axis in axes), []).append(trial)
    return dict(sorted(groups.items(), key=lambda group: in_order(group[0])))


def _chance(before: list[Trial], after: list[Trial]) -> float:
    ours, theirs = (
        {(trial.id, trial.question, trial.expected): trial.right for trial in item} for item in (before, after)
    )
    if ours.keys() == theirs.keys():
        gained = sum(theirs[item] and not ours[item] for item in ours)
        lost = sum(ours[item] and not theirs[item] for item in ours)
        return sign_test(gained, lost)
    return fisher_test(sum(ours.values()), len(ours), sum(theirs.values()), len(theirs))
