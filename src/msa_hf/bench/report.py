"""Results for people: tables for the terminal, and a page of HTML that needs nothing but itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType

from ..tables import table_lines
from .asking import RUNGS
from .result import Axis, Cell, Result

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr + tr { border-top: 1px solid #ddd } svg { max-width: 100% }
table.text th, table.text td { text-align: left; vertical-align: top; overflow-wrap: anywhere }
details { margin: 1rem 0; overflow-x: auto }
"""
CELL = 64, 30  # width and height in a heat map
LETTER = 8  # the width of a letter of its labels at most, about
MOST_FAILURES = 200  # that a page lists
COLLAPSED = 0.5  # of the wrong answers for which one document was read in vain: more is no chance


def short(value: Axis) -> str:
    """A value of an axis in few characters: 65536 is 65.5K, 1000000 is 1M."""
    if isinstance(value, int) and value >= 1000:
        for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
            if value >= 0.9995 * size:  # 999,999 is 1M, not 1000K
                return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def cell_table(result: Result, *axes: str, kind: str | None = None) -> list[list[str]]:
    """Rows of a table of shares by some axes, the header first."""
    rows = [[*axes, "right", "asked", "share", "95 %"]]
    for cell in result.cells(*axes, kind=kind):
        shares = [f"{cell.share:.3f}", f"{cell.low:.3f} to {cell.high:.3f}"]
        rows.append([*map(short, cell.values), str(cell.right), str(cell.asked), *shares])
    return rows


def broken(result: Result, reasons: Mapping[str, str] = RUNGS) -> list[list[str]]:
    """Rows of a table of what broke, by kind of question, with the reasons in words; the header alone where nothing
    did."""
    counts = Counter((trial.kind, str(trial.detail.get("broke") or "")) for trial in result.trials if not trial.right)
    rows = [["kind", "wrong", "broke", ""]]
    return rows + [[kind, str(count), broke, reasons.get(broke, "")] for (kind, broke), count in sorted(counts.items())]


def broken_in_words(result: Result) -> list[str]:
    """A sentence for each rung that broke, the most frequent first, and how many had not read what they should."""
    wrong = [trial for trial in result.trials if not trial.right]
    lines = []
    for rung, count in Counter(str(trial.detail.get("broke") or "") for trial in wrong).most_common():
        unread = sum(
            trial.detail.get("broke") == rung and trial.detail.get("gold_read", 0) < len(trial.detail.get("gold", ()))
            for trial in wrong
        )
        line = f"What broke in {count} of {len(wrong)} wrong answers: {rung} ({RUNGS.get(rung, 'not known')})."
        lines.append(line + f" {unread} of them had not read all that they needed." * bool(unread))
    astray = [set(trial.detail.get("read", ())) - set(trial.detail.get("gold", ())) for trial in wrong]
    for document, count in Counter(place for read in astray for place in read).most_common(1):
        if count >= COLLAPSED * len(wrong) and count > 2:
            lines.append(
                f"Document {document} was read in vain for {count} of them: the routers choose it for anything."
            )
    return lines


def text_report(
    result: Result, tables: Sequence[Sequence[str]] = (("kind",),), reasons: Mapping[str, str] = RUNGS
) -> str:
    """Tables of shares by the axes of each, and what broke with the reasons in words, as text."""
    lines = [title(result)]
    for axes in tables:
        rows = cell_table(result, *axes)
        if len(rows) > 1:
            lines += ["", *table_lines(rows, left=len(axes))]
    if len(rows := broken(result, reasons)) > 1:
        lines += ["", *table_lines(rows, left=4)]
    return "\n".join(lines)


def title(result: Result) -> str:
    """A line that says what a result is of."""
    right = sum(trial.right for trial in result.trials)
    return f"{result.benchmark}: {right} of {len(result.trials)} right, {result.model.get('name', '')}"


def heat_map(cells: Sequence[Cell], across: str, down: str) -> str:
    """A heat map as SVG of cells with two values each: the first across, the second down."""
    columns, rows = (sorted({cell.values[place] for cell in cells}, key=_rank) for place in (0, 1))
    width, height = CELL
    names = [across, down, *map(short, rows)]
    left, top = max(80, LETTER * max(map(len, names)) + 16), 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width * len(columns) + 10}" '
        f'height="{top + height * len(rows) + 10}" font-family="system-ui, sans-serif" font-size="12">',
        f'<text x="{left - 8}" y="{top - 24}" text-anchor="end">{escape(across)}</text>',
        f'<text x="{left - 8}" y="{top - 8}" text-anchor="end">{escape(down)}</text>',
    ]
    for number, value in enumerate(columns):
        x = left + width * number + width // 2
        parts.append(f'<text x="{x}" y="{top - 8}" text-anchor="middle">{escape(short(value))}</text>')
    for number, value in enumerate(rows):
        y = top + height * number + height // 2 + 4
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{escape(short(value))}</text>')
    for cell in cells:
        x, y = left + width * columns.index(cell.values[0]), top + height * rows.index(cell.values[1])
        told = f"{short(cell.values[0])}, {short(cell.values[1])}: {cell.right} of {cell.asked}, {cell}"
        parts.append(
            f'<g><title>{escape(told)}</title><rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" '
            f'fill="{color(cell.share)}"/><text x="{x + width // 2 - 1}" y="{y + height // 2 + 3}" '
            f'text-anchor="middle" fill="{"#fff" if cell.share < 0.35 else "#222"}">{cell.share:.2f}</text></g>'
        )
    return "\n".join([*parts, "</svg>"])


def color(share: float) -> str:
    """From dark red (0) through yellow to green (1)."""
    stops = ((0.0, (150, 20, 40)), (0.5, (250, 220, 120)), (1.0, (60, 170, 90)))
    (low, first), (high, last) = stops[:2] if share <= 0.5 else stops[1:]
    part = (share - low) / (high - low)
    return "#" + "".join(f"{round(one + part * (other - one)):02x}" for one, other in zip(first, last, strict=True))


def html_report(
    result: Result,
    tables: Sequence[Sequence[str]] = (("kind",),),
    maps: Sequence[tuple[str, str]] = (),
    words: Sequence[str] = (),
    figures: Sequence[str] = (),
    more: Mapping[str, Sequence[Sequence[str]]] = MappingProxyType({}),
    reasons: Mapping[str, str] = RUNGS,
) -> str:
    """A page with what was found: sentences, heat maps, tables, the failures and all that repeats the run.

    Args:
        tables: axes of each.
        maps: axes across and down of each heat map, drawn for every kind of question that has both.
        words: what it comes to, a sentence each.
        figures: SVG, which comes first.
        more: rows of further tables by their titles, the header first; one without other rows is left out.
        reasons: in words, by what broke.
    """
    body = [f"<h1>{escape(title(result))}</h1>", *(f"<p>{escape(sentence)}</p>" for sentence in words), *figures]
    for across, down in maps:
        for kind in dict.fromkeys(trial.kind for trial in result.trials):
            if cells := result.cells(across, down, kind=kind):
                body += [f"<h2>{escape(kind)}: {escape(down)} by {escape(across)}</h2>", heat_map(cells, across, down)]
    for axes in tables:
        if len(rows := cell_table(result, *axes)) > 1:
            body += [f"<h2>By {escape(', '.join(axes))}</h2>", _table(rows)]
    for name, listed in {"What broke": broken(result, reasons), **more}.items():
        if len(listed) > 1:
            body += [f"<h2>{escape(name)}</h2>", _table(listed, text=True)]
    failures = [trial for trial in result.trials if not trial.right]
    if failures:
        listed = [["id", "question", "expected", "answer", "broke"]]
        listed += [
            [item.id, item.question, "; ".join(item.expected), item.answer, str(item.detail.get("broke") or "")]
            for item in failures[:MOST_FAILURES]
        ]
        named = f"{len(failures)} wrong answers" + (f", the first {MOST_FAILURES}" * (len(failures) > MOST_FAILURES))
        body.append(f"<details><summary>{named}</summary>{_table(listed, text=True)}</details>")
    facts = {"Settings": result.settings, "Model": result.model, "Notes": result.notes}
    facts |= {f"Run {number}": run for number, run in enumerate(result.runs, 1)}
    body.append("<h2>How it was measured</h2>")
    for name, fact in facts.items():
        if fact:
            listed = [[key, value if isinstance(value, str) else _plain(value)] for key, value in fact.items()]
            body += [f"<h3>{name}</h3>", _table([["", ""], *listed], text=True)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title(result))}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def _table(rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """A table; of text rather than numbers, it stands to the left. A header without words is left out."""
    head, *rest = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if any(head) else []
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest]
    return f"<table{' class=text' * text}>" + "\n".join(lines) + "</table>"


def _plain(value: object) -> str:
    """A JSON value in a line; the marks of JSON stand around nested text alone that could not be seen without them."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, str) and (not value or value != " ".join(value.split())):
        return json.dumps(value, ensure_ascii=False)
    return "none" if value is None else str(value)


def _rank(value: Axis) -> tuple[bool, Axis]:
    return isinstance(value, str), value
