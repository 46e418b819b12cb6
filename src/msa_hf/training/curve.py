"""The course of a training run: a file of JSON lines while it runs, a table when it is over."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .monitor import Measurement, RouterMonitor

SHOWN = 5  # rows of losses in the table, about
BY_LAYER = {"layers", "distinct", "first_layers", "layers_at_1", "first_layers_at_1"}


class Curve(TrainerCallback):
    """Writes what a Trainer logs, and the measurements of a `RouterMonitor`, as one JSON object a line.

    Lines of a measurement have `recall`, the others `loss`; all have `step`.

    Args:
        path: of the file; written anew when a run begins.
        monitor: whose measurements these are.
    """

    def __init__(self, path: Path, monitor: RouterMonitor | None = None) -> None:
        self.path, self.monitor = path, monitor
        self.rows: list[Mapping[str, object]] = []
        self._measured = 0

    def resume(self, step: int) -> None:
        """Read the curve of an interrupted run up to a step, and give monitor and guard what they knew then."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the last line, cut short
                break
            if row["step"] > step:
                continue
            for name in BY_LAYER & row.keys():
                row[name] = {int(layer): item for layer, item in row[name].items()}
            self.rows.append(row)
            if self.monitor is not None and "recall" in row:
                self.monitor.measurements.append(row)
                if self.monitor.guard is not None:
                    self.monitor.guard.check(row, step=row["step"])
        if self.monitor is not None:
            self._measured = len(self.monitor.measurements)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs and "loss" in logs:
            self.rows.append({"step": state.global_step, **logs})
        if state.is_world_process_zero:
            self.write(state)

    def write(self, state: TrainerState) -> None:
        """Bring the file up to date."""
        if self.monitor is not None:
            self.rows += self.monitor.measurements[self._measured :]
            self._measured = len(self.monitor.measurements)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text("".join(json.dumps(_finite(row)) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(new, self.path)


def _finite(value: object) -> object:
    """A JSON value; null where a number is none."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(rows: Sequence[Mapping[str, object]], measurements: Sequence[Measurement], documents: int) -> str:
    """Losses over the run, and the routers' recall before and after it, by layer."""
    lines = [f"{'steps':>9} {'phase':>8} {'language loss':>14} {'router loss':>12}"]
    shown = [row for row in rows if "loss" in row]
    every = max(1, len(shown) // SHOWN)
    for row in shown[::-1][::every][::-1]:  # the last among them
        lines.append(f"{row['step']:>9} {row['phase']:>8} {row['lm_loss']:>14.3f} {row['aux_loss']:>12.3f}")
    if measurements:
        before, after = measurements[0], measurements[-1]
        lines += [
            f"router recall@{after['k']}: {after['questions']} held-out questions, bank of {documents} documents",
            f"{'layer':>9} {'before':>8} {'after':>8} {'distinct documents':>20}",
        ]
        for layer, recall in after["layers"].items():
            distinct = f"{before['distinct'][layer]} -> {after['distinct'][layer]}"
            lines.append(f"{layer:>9} {before['layers'][layer]:>8.3f} {recall:>8.3f} {distinct:>20}")
        lines.append(f"{'any layer':>9} {before['recall']:>8.3f} {after['recall']:>8.3f}")
    return "\n".join(lines)
