"""Draw README's plot: recall on real text against the size of the bank, from the figures of one file.

    pip install "msa-hf[plots]"
    python tools/plot_recall.py          # docs/real_text_recall.json -> docs/real_text_recall.png

The figures are those of the tables in the card of msa-hf-smollm2-135m and in docs/real_text.md; `scripts/eval_real.py
report` measures them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

FIGURES = Path(__file__).parents[1] / "docs" / "real_text_recall.json"
PANELS = {
    "nq": "Search queries (nq)",
    "squad11": "Questions about a text (squad11)",
    "squadshifts newwiki": "New articles (squadshifts)",
}
# System -> how it is called and drawn; all colors can be told apart by the color-blind.
SYSTEMS = {
    "routers and BM25, read": ("routers and words", "#0072B2", "o-"),
    "routers": ("routers of msa-hf-smollm2-135m", "#56B4E9", "o--"),
    "BM25": ("BM25", "#D55E00", "s-"),
    "MiniLM": ("all-MiniLM-L6-v2", "#666666", "^:"),
}


def recall(figures: dict[str, Any]) -> Figure:
    """The share of questions whose passage comes first, one panel per set of questions.

    Args:
        figures: what the file holds.
    """
    banks = figures["banks"]
    tokens = [bank["tokens"] for bank in banks]
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(9.6, 3.2), sharey=True, layout="constrained")
    for axes, (kind, title) in zip(panels, PANELS.items(), strict=True):
        for system, (label, color, style) in SYSTEMS.items():
            first = [bank["recall"][kind][system][0] for bank in banks]
            axes.plot(tokens, first, style, color=color, label=label, linewidth=2, markersize=5)
        axes.set(xscale="log", ylim=(0, 1), xlabel="tokens in the bank")
        axes.set_title(title, loc="left", fontsize=10)
        axes.xaxis.set_major_locator(FixedLocator(tokens))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count / 1e6:.3g}M"))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("right passage first")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SYSTEMS), frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES.with_suffix(".png"))
    given = parser.parse_args(arguments)
    figure = recall(json.loads(FIGURES.read_text(encoding="utf-8")))
    figure.savefig(given.out, dpi=130, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
