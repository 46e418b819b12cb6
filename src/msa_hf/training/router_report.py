"""The course of a run that trains routers: a file, a picture, and TensorBoard or wandb."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..json_object import JsonObject
from ..model.modeling_msa import MSAForCausalLM
from .curve import _finite


class Reporter:
    """Hands figures to the callbacks by which `transformers.Trainer` reports to TensorBoard or wandb.

    Args:
        kind: as `TrainingArguments(report_to=...)` names them; `"none"`: nothing is reported.
        output: directory of the run.
        model: that is trained.
        steps: of the run.

    Raises:
        ImportError: where what they need is missing.
    """

    def __init__(self, kind: str, output: Path, model: MSAForCausalLM, steps: int) -> None:
        self.callbacks: list[Any] = []
        if kind == "none":
            return
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.integrations import get_reporting_integration_callbacks

        self.arguments = TrainingArguments(output_dir=str(output), report_to=kind, max_steps=steps, use_cpu=True)
        self.state = TrainerState(max_steps=steps, is_local_process_zero=True, is_world_process_zero=True)
        self.control, self.model = TrainerControl(), model
        try:
            self.callbacks = [make() for make in get_reporting_integration_callbacks([kind])]
        except RuntimeError as error:
            raise ImportError(f"Reporting needs {kind}: pip install {kind}") from error
        self._tell("on_train_begin")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Report figures of a step."""
        if self.callbacks:
            self.state.global_step = step
            self._tell("on_log", logs=dict(figures))

    def close(self) -> None:
        """End the report."""
        self._tell("on_train_end")
        self.callbacks = []

    def _tell(self, event: str, **what: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.arguments, self.state, self.control, model=self.model, **what)


def write_curve(path: Path, rows: Sequence[JsonObject]) -> None:
    """Write one JSON object a line, so that who reads meanwhile sees the file whole."""
    new = path.with_name(path.name + ".new")
    new.write_text("".join(json.dumps(_finite(dict(row))) + "\n" for row in rows), encoding="utf-8")
    os.replace(new, path)


def read_curve(path: Path, step: int) -> list[JsonObject]:
    """The lines of an interrupted run up to a step."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [row for row in map(json.loads, lines) if row["step"] <= step]


def plot_curve(path: Path, rows: Sequence[JsonObject]) -> bool:
    """Draw losses and recall, beside what the latter is compared to; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [row for row in rows if "loss" in row]
    left.plot([row["step"] for row in losses], [row["loss"] for row in losses])
    left.set(xlabel="step", ylabel="loss on pools")
    measured = [row for row in rows if "recall" in row]
    if measured:
        last = measured[-1]
        course = [row for row in measured if not row.get("as_given")]
        right.plot([row["step"] for row in course], [row["recall"] for row in course], marker="o", label="router")
        others = {"untrained": measured[0]["recall"], **last["others"], "chance": last["chance"]}
        for number, (name, value) in enumerate(others.items(), 1):
            right.axhline(value, color=f"C{number}", linestyle="--", label=name)
        right.set(xlabel="step", ylabel=f"recall@{last['k']} of {last['passages']} passages", ylim=(0, 1.02))
        right.legend(fontsize="small")
    figure.savefig(path)
    return True
