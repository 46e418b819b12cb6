"""A curve of shares by size as SVG, with the intervals of its points."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from .report import LETTER, short
from .result import Cell, Result

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 320, 48, 16, 36  # of all, without the names of the lines
COLORS = ("#222222", "#1f6fb4", "#c2511b", "#2f8a4a", "#8a4fa3", "#a3862f")


def curve(result: Result, axis: str = "tokens") -> str:
    """Shares of right answers by an axis of numbers, which is logarithmic: all questions, and each kind."""
    kinds = list(dict.fromkeys(trial.kind for trial in result.trials))
    lines = [("all", result.cells(axis)), *((kind, result.cells(axis, kind=kind)) for kind in kinds if len(kinds) > 1)]
    values = sorted({float(cell.values[0]) for cell in lines[0][1]})
    if not values:
        return ""
    names = max(150, LETTER * max(len(name) for name, _ in lines) + 24)
    width, right = WIDTH - 150 + names, names
    low = min(cell.low for _, cells in lines for cell in cells)
    bottom = math.floor(10 * low) / 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12">'
    ]

    def across(value: float) -> float:
        first, last = math.log(values[0]), math.log(values[-1])
        share = (math.log(value) - first) / (last - first) if last > first else 0.5
        return LEFT + 12 + share * (width - LEFT - right - 24)

    def down(share: float) -> float:
        return TOP + (1 - share) / (1 - bottom) * (HEIGHT - TOP - BOTTOM)

    steps = round((1 - bottom) * 10)
    for step in range(steps + 1):
        share = bottom + step / 10
        y = down(share)
        parts.append(f'<line x1="{LEFT}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.1f}</text>')
    for value in values:
        place = f'x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text {place} text-anchor="middle">{short(int(value))}</text>')
    for number, (name, cells) in enumerate(lines):
        shift = 3 * (number - len(lines) / 2)
        parts += _line(
            name, cells, COLORS[number % len(COLORS)], [across(float(c.values[0])) + shift for c in cells], down
        )
        y = TOP + 18 * number + 10
        parts.append(
            f'<text x="{width - right + 14}" y="{y}" fill="{COLORS[number % len(COLORS)]}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def _line(name: str, cells: list[Cell], color: str, xs: list[float], down: Callable[[float], float]) -> list[str]:
    points = " ".join(f"{x:.1f},{down(cell.share):.1f}" for x, cell in zip(xs, cells, strict=True))
    parts = [f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>']
    for x, cell in zip(xs, cells, strict=True):
        told = escape(f"{name}, {short(cell.values[0])}: {cell.right} of {cell.asked}, {cell}")
        parts.append(
            f'<g stroke="{color}"><title>{told}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{down(cell.low):.1f}" y2="{down(cell.high):.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{down(cell.share):.1f}" r="3" fill="{color}"/></g>'
        )
    return parts
