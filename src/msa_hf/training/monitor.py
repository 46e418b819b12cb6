"""Watching the routers while they train, and stopping a run that has collapsed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.questions import Question
from ..evaluation.recall import RouterRecall, router_recall
from ..generation import PromptProtocol
from ..model.tokenizing_msa import tokenize


class Measurement(RouterRecall):
    """The recall that `router_recall` returned, and after how many steps."""

    step: int


Recalled = RouterRecall | Mapping[str, Any]  # of other measurements: k, questions, wanted, distinct and recall


class CollapsedError(RuntimeError):
    """A training run that will not recover; the message says what went wrong, with the figures."""


class CollapseGuard:
    """Judges successive measurements of one run. The first is the untrained router's, to which later ones are compared.

    Three things are judged per measurement, and each must be wrong `patience` times in a row: routers may get worse
    before they get better.

    * Distinct documents. A router that gives every question the same documents chooses k of them; one that finds
      what it should chooses at least as many as there are to find. Judged is how far of that way the best layer comes.
      Where there are no more than k to find, it cannot be judged: take more questions.
    * Recall, against that of the untrained router.
    * Empty answers, where they are measured.

    A loss that is no number ends a run at once.

    Args:
        patience: measurements in a row.
        distinct_share: lowest share of the way from k documents to as many as the questions need.
        recall_share: lowest share of the untrained router's recall. A fall within two standard errors never counts.
        empty_share: highest share of empty answers.

    Raises:
        ValueError: for a patience below 1 or a share outside 0 to 1.
    """

    def __init__(
        self,
        patience: int = 3,
        distinct_share: float = 0.25,
        recall_share: float = 0.5,
        empty_share: float = 0.5,
    ) -> None:
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {patience}.")
        shares = {"distinct_share": distinct_share, "recall_share": recall_share, "empty_share": empty_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {share}.")
        self.patience = patience
        self.distinct_share, self.recall_share, self.empty_share = distinct_share, recall_share, empty_share
        self.untrained: Recalled | None = None
        self._wrong: dict[str, int] = {}

    def check(
        self,
        router: Recalled | None = None,
        loss: float | None = None,
        empty: float | None = None,
        step: int | None = None,
    ) -> None:
        """Judge a measurement.

        Args:
            router: what `router_recall` returned, always of the same questions and k.
            loss: of training.
            empty: share of empty answers.
            step: named in the error.

        Raises:
            CollapsedError: where the run has collapsed.
        """
        at = "" if step is None else f" at step {step}"
        if loss is not None and math.isnan(loss):
            raise CollapsedError(f"The run has collapsed{at}: the loss is no number.")
        if router is not None:
            self._check_router(router, at)
        if empty is not None:
            wrong = f"{empty:.1%} of the answers are empty, above {self.empty_share:.1%}"
            self._count("empty", wrong if empty > self.empty_share else None, at)

    def _check_router(self, router: Recalled, at: str) -> None:
        most = max(router["distinct"].values())
        if self.untrained is None:
            self.untrained = router
            return
        needed, k = router["wanted"], router["k"]
        least = k + self.distinct_share * (needed - k)
        wrong = (
            f"the layer with the most distinct documents chose {most} for {router['questions']} questions, which need "
            f"{needed} and choose {k} each; at least {math.ceil(least)} are expected"
        )
        self._count("distinct", wrong if needed > k and most < least else None, at)
        before, now, count = self.untrained["recall"], router["recall"], router["questions"]
        error = math.sqrt((before * (1 - before) + now * (1 - now)) / count)
        fallen = now < self.recall_share * before and before - now > 2 * error
        wrong = f"recall@{k} is {now:.3f}, that of the untrained router was {before:.3f}"
        self._count("recall", wrong if fallen else None, at)

    def _count(self, what: str, wrong: str | None, at: str) -> None:
        self._wrong[what] = self._wrong.get(what, 0) + 1 if wrong else 0
        if self._wrong[what] >= self.patience:
            times = "" if self.patience == 1 else f", {self.patience} measurements in a row"
            raise CollapsedError(f"The run has collapsed{at}{times}: {wrong}.")


class RouterMonitor(TrainerCallback):
    """Measures the routers on a bank of held-out documents while a `Trainer` trains them.

    Before the first step (the untrained router) and every `every` steps it encodes the documents with the model as it
    is then and measures with `router_recall`. The figures go to the Trainer's `log_history`, and show beside the next
    line that it prints. Every process measures, so that all of them stop together.

    Set `log` to `trainer.log` to hand the figures to what else reports (TensorBoard, ...): callbacks that stand before
    this one cannot be reached from here.

    Args:
        tokenizer: of the model.
        documents: key -> text; thousands, or the figures flatter. Documents of the training pools may be among them.
        questions: with `question` and `positives`, keys of `documents`; held out.
        every: steps between measurements.
        guard: stops a collapsed run by raising `CollapsedError`, also where weights are no numbers; None: nothing
            does.
        protocol: that wraps documents and puts questions; None: plain, as `QuestionCollator` does.

    Attributes:
        measurements: what `router_recall` returned, each with its `step`.

    Raises:
        ValueError: for `every` < 1, no documents, no question with positives, and a positive that is no document.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Mapping[str, str],
        questions: Sequence[Question],
        every: int = 100,
        guard: CollapseGuard | None = None,
        protocol: PromptProtocol | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        if not documents:
            raise ValueError("`documents` is empty: routers need something to choose from.")
        self.questions = [question for question in questions if question["positives"]]
        if not self.questions:
            raise ValueError("`questions` holds none with positives, so nothing can be found.")
        if unknown := [key for question in self.questions for key in question["positives"] if key not in documents]:
            raise ValueError(f"`positives` names {unknown[0]!r}, which is the key of no document.")
        self.tokenizer, self.every, self.guard, self.protocol = tokenizer, every, guard, protocol
        rows = ({"key": key, "text": text} for key, text in documents.items())
        if protocol is not None:
            self._documents = [
                {"key": row["key"], "input_ids": row["input_ids"]} for row in protocol.encode_corpus(rows, tokenizer)
            ]
        else:
            self._documents = [{"key": row["key"], "input_ids": tokenize(tokenizer, row["text"])} for row in rows]
        self.measurements: list[Measurement] = []
        self.log: Callable[[dict[str, float]], None] | None = None
        self._unshown: dict[str, float] = {}

    def measure(self, model: PreTrainedModel, step: int = 0) -> RouterRecall:
        """The report of `router_recall` on `model` as it is; kept in `measurements`."""
        shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        bank = model.encode_documents(self._documents, show_progress=shown)
        found = router_recall(model, self.tokenizer, bank, self.questions, protocol=self.protocol)
        self.measurements.append({"step": step, **found})
        return found

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        # A run that goes on after an interruption keeps its baseline, where `measurements` has been given back.
        if state.global_step == 0 or not self.measurements:
            self._report(state, control, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        if state.global_step % self.every == 0:
            self._report(state, control, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if self.guard is not None and logs:
            # Trainer filters losses that are no numbers from its log, but not the gradient's norm. With a gradient
            # scaler such a step is skipped and harmless.
            norms = () if args.fp16 else (logs.get("grad_norm"),)
            for value in (logs.get("loss"), *norms):
                self.guard.check(loss=None if value is None else float(value), step=state.global_step)
        if logs is not None and self._unshown and "loss" in logs:
            logs.update(self._unshown)
            self._unshown = {}

    def _report(self, state: TrainerState, control: TrainerControl, model: PreTrainedModel) -> None:
        if self.guard is not None and not all(
            bool(weight.isfinite().all()) for weight in model.parameters() if weight.requires_grad
        ):
            raise CollapsedError(f"The run has collapsed at step {state.global_step}: weights are no numbers.")
        found = self.measure(model, state.global_step)
        figures = {
            f"router_recall@{found['k']}": found["recall"],
            "router_recall@1": found["recall_at_1"],
            "router_distinct": float(max(found["distinct"].values())),
            **{f"router_recall@{found['k']}/layer_{layer}": share for layer, share in found["layers"].items()},
        }
        if self.log is not None:
            wanted = control.should_log
            self.log(dict(figures))
            control.should_log = wanted  # Trainer takes its own line, due at this step too, for written
        else:
            state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})
            self._unshown = figures
        if self.guard is not None:
            self.guard.check(found, step=state.global_step)
