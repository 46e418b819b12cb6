"""Draw the figures of a checkpoint's results.json as PNG: accuracy against memory size, routing per layer, training.

    pip install "msa-hf[plots]"
    python tools/plot_results.py model_cards/msa-hf-tiny/results.json --out model_cards/msa-hf-tiny

    accuracy.png   exact match of each kind of question, recall and named ids, for every size of the bank
    routing.png    recall of each memory layer, and its scores of gold documents against the best other
    training.png   losses and recall seen while training, from the results or else from curve_*.jsonl beside them

What the results do not hold is left out, with a line on stderr; results that hold nothing to draw are an error.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

RESULTS = Path(__file__).parents[1] / "model_cards" / "msa-hf-tiny" / "results.json"
KINDS = {"one_hop": "One-hop questions", "two_hop": "Two-hop questions", "unanswerable": "Unanswerable questions"}
# Condition -> how it is called and drawn; all colors can be told apart by the color-blind.
CONDITIONS = {
    "routed": ("routed", "#0072B2", "-"),
    "forced_gold": ("gold documents forced", "#009E73", "--"),
    "gold_text": ("gold text in the prompt", "#56B4E9", ":"),
    "single_round": ("single round", "#E69F00", "-"),
    "bm25": ("BM25", "#CC79A7", "-"),
    "no_memory": ("no memory", "#666666", "-"),
}
RECALLS = {
    "@16": "Recall@16",
    "@1": "Recall@1",
    "second@16": "Recall@16, second document",
    "second@1": "Recall@1, second document",
}
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#666666")
# Columns of a training curve: "second_7@16", recall of second documents in layer 7, and those that are not drawn.
RECALL_COLUMN = re.compile(r"(?P<which>\w+)_(?P<layer>\d+)@(?P<k>\d+)")
NOT_DRAWN = re.compile(r"step|seconds|norm|rate|lr|tokens.*|.*distinct")
PANEL = (4.6, 3.1)  # inches


class NothingToDraw(Exception):
    """A part of the results is missing; the message says which."""


@dataclass
class Line:
    """A curve with its label."""

    label: str
    x: list[float]
    y: list[float]
    color: str
    style: str = "-"


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    lines: list[Line]
    x_label: str
    y_label: str
    prepare: Callable[[Axes], None]

    @property
    def drawn(self) -> bool:
        return any(line.y for line in self.lines)


def line(label: str, points: Iterable[tuple[float, Any]], color: str, style: str = "-") -> Line:
    """A curve through the points that are numbers."""
    numbers = [(x, float(y)) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    return Line(label, [x for x, _ in numbers], [y for _, y in numbers], color, style)


def at(values: Any, *names: str) -> Any:
    """The value under the names, or None if a part is missing."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def overall(values: Any) -> Any:
    """A figure that stands alone, or that of all kinds together."""
    return values.get("all") if isinstance(values, dict) else values


# Drawing --------------------------------------------------------------------------------------------------------------


def short(number: float) -> str:
    """1k, 1M, 100M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write every label at the right end of its line, moved apart where they would cover each other."""
    drawn = [item for item in lines if item.y]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(((to_axes.transform((item.x[-1], item.y[-1]))[1], item) for item in drawn), key=lambda end: end[0])
    distance = 0.075
    places: list[float] = []
    for height, _ in ends:
        places.append(max(height, places[-1] + distance) if places else height)
    if places:  # those that were pushed out at the top push the others down
        ceiling = 1.0
        for place in reversed(range(len(places))):
            places[place] = min(places[place], ceiling)
            ceiling = places[place] - distance
    for height, (_, item) in zip(places, ends, strict=True):
        axes.annotate(
            item.label,
            (1.0, height),
            xytext=(6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=item.color,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def draw(panels: Sequence[Panel], heading: str) -> Figure:
    """A figure of the panels that have something to show."""
    panels = [panel for panel in panels if panel.drawn]
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.4), squeeze=False, layout="constrained"
    )
    for panel, axes in zip(panels, grid.flat, strict=False):
        for item in panel.lines:
            if item.y:
                marker = "o" if len(item.y) <= 12 else ""
                axes.plot(item.x, item.y, item.style, color=item.color, marker=marker, markersize=3.5, linewidth=1.5)
        panel.prepare(axes)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel(panel.x_label, fontsize=8)
        axes.set_ylabel(panel.y_label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        label_ends(axes, panel.lines)
    if heading:
        figure.suptitle(heading, fontsize=8, color="#666666", x=0.01, ha="left")
    return figure


def over_shares(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)


def over_documents(axes: Axes) -> None:
    over_shares(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


# Figures --------------------------------------------------------------------------------------------------------------


def banks_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The banks with a size, smallest first."""
    banks = [bank for bank in results.get("banks") or [] if at(bank, "documents")]
    if not banks:
        raise NothingToDraw("the results hold no `banks`")
    return sorted(banks, key=lambda bank: bank["documents"])


def layers_of(bank: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Layer -> its recall, in order."""
    layers = at(bank, "recall", "layers") or {}
    return {layer: layers[str(layer)] for layer in sorted(map(int, layers))}


def hardware_of(banks: list[dict[str, Any]]) -> str:
    """The machine that the banks were measured on; with their sizes if it was not the same for all."""
    sizes: dict[str, list[str]] = {}
    for bank in banks:
        if bank.get("hardware"):
            sizes.setdefault(str(bank["hardware"]), []).append(short(bank["documents"]))
    if len(sizes) < 2:
        return "".join(sizes)
    return ", ".join(f"{name} ({', '.join(found)})" for name, found in sizes.items())


def accuracy(results: dict[str, Any]) -> Figure:
    """Exact match, recall and ids against the size of the bank."""
    banks = banks_of(results)

    def over_banks(label: str, values: Iterable[Any], color: str, style: str = "-") -> Line:
        return line(label, zip((bank["documents"] for bank in banks), values, strict=True), color, style)

    panels = [
        Panel(
            title,
            [
                over_banks(label, [at(bank, "conditions", name, kind, "exact_match") for bank in banks], color, style)
                for name, (label, color, style) in CONDITIONS.items()
            ],
            "documents in the bank",
            "exact match",
            over_documents,
        )
        for kind, title in KINDS.items()
    ]

    def extremes(name: str, choose: Callable[..., Any]) -> list[Any]:
        found = [[layer.get(name) for layer in layers_of(bank).values()] for bank in banks]
        return [choose((value for value in values if value is not None), default=None) for values in found]

    recalls = [
        over_banks("@16, best layer", extremes("@16", max), COLORS[0]),
        over_banks("@16, worst layer", extremes("@16", min), COLORS[0], ":"),
        over_banks("@1, best layer", extremes("@1", max), COLORS[1]),
        over_banks("second @16, best layer", extremes("second@16", max), COLORS[2]),
    ]
    panels.append(Panel("Routing", recalls, "documents in the bank", "recall of the gold document", over_documents))
    ids = [
        over_banks(label, [overall(at(bank, "ids", name)) for bank in banks], color)
        for name, label, color in (
            ("constrained", "over the routed ids", COLORS[0]),
            ("generate", "freely", COLORS[1]),
        )
    ]
    panels.append(Panel("Naming documents", ids, "documents in the bank", "right ids", over_documents))
    if not any(panel.drawn for panel in panels):
        raise NothingToDraw("no bank has `conditions`, `recall` or `ids`")
    notes = [hardware] if (hardware := hardware_of(banks)) else []
    if all(at(bank, "tokens") for bank in banks):
        notes.append(f"{short(banks[0]['tokens'])} to {short(banks[-1]['tokens'])} tokens")
    counts = sorted({bank["questions"] for bank in banks if at(bank, "questions")})
    if counts:
        notes.append(f"{' or '.join(map(str, counts))} questions of each kind")
    return draw(panels, ", ".join(notes))


def routing(results: dict[str, Any]) -> Figure:
    """Recall of every layer, one line per bank; scores of gold documents and of the best other."""
    banks = [bank for bank in banks_of(results) if layers_of(bank)]
    if not banks:
        raise NothingToDraw("no bank has `recall` by `layers`")
    layers = sorted({layer for bank in banks for layer in layers_of(bank)})
    shades = pyplot.get_cmap("viridis")
    colors = [matplotlib.colors.to_hex(shades(0.85 * place / max(len(banks) - 1, 1))) for place in range(len(banks))]

    def over_layers(axes: Axes) -> None:
        axes.set_xticks(layers)
        axes.margins(x=0.08)

    def over_recalls(axes: Axes) -> None:
        over_shares(axes)
        over_layers(axes)

    def by_bank(name: str, style: str = "-", ending: str = "") -> list[Line]:
        return [
            line(
                f"{short(bank['documents'])} documents{ending}",
                [(layer, values.get(name)) for layer, values in layers_of(bank).items()],
                color,
                style,
            )
            for bank, color in zip(banks, colors, strict=True)
        ]

    panels = [
        Panel(title, by_bank(name), "memory layer", "share of questions", over_recalls)
        for name, title in RECALLS.items()
    ]
    scores = by_bank("gold_score", ending=", gold") + by_bank("other_score", ":", ", best other")
    panels.append(Panel("Scores: gold and best other", scores, "memory layer", "score", over_layers))
    if not any(panel.drawn for panel in panels):
        raise NothingToDraw(f"no layer of a bank has any of {', '.join(RECALLS)}, gold_score, other_score")
    return draw(panels, hardware_of(banks))


def training(results: dict[str, Any]) -> Figure:
    """Losses and recall against the time of training, one row of panels after the other for every curve."""
    curves = results.get("curve") or []
    panels: list[Panel] = []
    for phase, curve in (curves if isinstance(curves, dict) else {"": curves}).items():
        panels += curve_panels(f"{phase}: " if phase else "", [row for row in curve if isinstance(row, dict)])
    if not any(panel.drawn for panel in panels):
        raise NothingToDraw("the results hold no `curve` with losses or recall")
    return draw(panels, str(at(results, "training", "hardware") or ""))


def curve_panels(phase: str, rows: list[dict[str, Any]]) -> list[Panel]:
    """Language-model losses, auxiliary losses, and recall by layer, of the fewest documents that it is known for."""
    by_time = all("seconds" in row for row in rows)
    times = [row["seconds"] / 60 if by_time else row.get("step", 0) for row in rows]
    groups: dict[str, list[Line]] = {"language-model loss": [], "auxiliary loss": []}
    names = list(dict.fromkeys(name for row in rows for name in row))
    recalls = [found for found in map(RECALL_COLUMN.fullmatch, names) if found is not None]
    strictest = min((int(found["k"]) for found in recalls), default=0)
    for name in names:
        recall = RECALL_COLUMN.fullmatch(name)
        if recall is not None:
            if int(recall["k"]) > strictest:
                continue
            title, label = f"recall@{recall['k']}, {recall['which']} documents", f"layer {recall['layer']}"
        elif NOT_DRAWN.fullmatch(name):
            continue
        elif name.startswith("aux_"):
            title, label = "auxiliary loss", name.removeprefix("aux_")
        else:
            title, label = "language-model loss", name
        group = groups.setdefault(title, [])
        points = zip(times, (row.get(name) for row in rows), strict=True)
        group.append(line(label, points, COLORS[len(group) % len(COLORS)]))

    def over_losses(axes: Axes) -> None:
        axes.set_ylim(bottom=0)

    panels = []
    for title, group in groups.items():
        shares = title.startswith("recall")
        titled = f"{phase}{title}" if phase else title[0].upper() + title[1:]
        unit, prepare = ("share of questions", over_shares) if shares else ("nats per token", over_losses)
        panels.append(Panel(titled, group, "minutes" if by_time else "steps", unit, prepare))
    return panels


def curves_beside(results: Path) -> dict[str, list[Any]]:
    """The curve_*.jsonl files in the directory of the results, the plain model's first."""
    paths = sorted(results.parent.glob("curve_*.jsonl"), key=lambda path: (path.stem != "curve_dense", path.stem))
    return {
        path.stem.removeprefix("curve_"): [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
        for path in paths
    }


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "accuracy": accuracy,
    "routing": routing,
    "training": training,
}


def main(arguments: list[str] | None = None) -> int:
    """Draw; the exit code is 2 where nothing can be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="default: the shipped checkpoint's")
    parser.add_argument("--out", type=Path, help="directory of the figures (default: that of the results)")
    args = parser.parse_args(arguments)
    try:
        results = json.loads(args.results.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise ValueError("not a JSON object")
        results["curve"] = results.get("curve") or curves_beside(args.results)
    except (OSError, ValueError) as error:
        print(f"error: {args.results}: {error}", file=sys.stderr)
        return 2
    out = args.out or args.results.parent
    out.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, make in FIGURES.items():
        try:
            figure = make(results)
        except NothingToDraw as missing:
            print(f"{name}.png is not drawn: {missing}", file=sys.stderr)
            continue
        figure.savefig(out / f"{name}.png", dpi=120)
        pyplot.close(figure)
        print(out / f"{name}.png")
        drawn += 1
    if not drawn:
        print(f"error: {args.results}: nothing to draw", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
