"""Schedules of a training run: the weights of the losses, and a learning rate of the routers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput, ModelOutput
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import TrainOutput

from ..model.configuration_msa import MSAConfig
from ..model.retrofit_msa import ROUTER_MODULES

WARMUP, MAIN = "warm-up", "main"
PARTS = ("lm_loss", "aux_loss")


class RouterWarmup(TrainerCallback):
    """The two phases of the paper: first the routers, by a large weight of the auxiliary loss, then everything.

    In the main phase the weights are the configuration's own. Those of the warm-up stand there only while one of its
    steps is computed, so that whatever is saved, a checkpoint in between included, carries the configuration's own.

    Args:
        steps: of the warm-up; 0 for none.
        lm_loss_weight, aux_loss_weight: of the warm-up; the paper's by default.
    """

    def __init__(self, steps: int, lm_loss_weight: float = 0.1, aux_loss_weight: float = 1.0) -> None:
        self.steps = steps
        self.weights = (lm_loss_weight, aux_loss_weight)
        self._own: tuple[MSAConfig, tuple[float, float]] | None = None

    def phase(self, step: int) -> str:
        """The phase of a step, counted from 0."""
        return WARMUP if step < self.steps else MAIN

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        if self.phase(state.global_step) == WARMUP:
            config: MSAConfig = model.config
            self._own = config, (config.lm_loss_weight, config.aux_loss_weight)
            config.lm_loss_weight, config.aux_loss_weight = self.weights

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the configuration its weights back; needed only after an error in the middle of a step."""
        if self._own is not None:
            config, weights = self._own
            config.lm_loss_weight, config.aux_loss_weight = weights
            self._own = None


def _has_documents(inputs: Mapping[str, object]) -> bool:
    return any(inputs.get(name) is not None for name in ("documents", "doc_ids"))


class MemoryTrainer(Trainer):
    """A Trainer whose routers have a learning rate of their own, and which logs the parts of the loss and the phase.

    `label_smoothing_factor` and `compute_loss_func` take the place of the language loss in a step with documents, with
    the same weights and beside the auxiliary loss; the function is given the logits alone.

    Args:
        router_learning_rate: follows the same schedule as `args.learning_rate`; default the same.
        warmup: its phases are named in the log; default none.
        args, kwargs: as `transformers.Trainer` takes them.
    """

    optimizer: Optimizer | None
    label_smoother: LabelSmoother | None
    compute_loss_func: Callable[..., Tensor] | None

    def __init__(
        self,
        *args: Any,
        router_learning_rate: float | None = None,
        warmup: RouterWarmup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.router_learning_rate = self.args.learning_rate if router_learning_rate is None else router_learning_rate
        self.warmup = RouterWarmup(0) if warmup is None else warmup
        self.add_callback(self.warmup)
        self._parts: dict[str, torch.Tensor] = {}  # sums since the last log
        self._steps = 0.0  # since then; the last of an epoch may have fewer batches than the others
        self._router_rate: list[float] = []

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """`transformers.Trainer.train`; what a run before had not logged yet does not count."""
        self._parts, self._steps = {}, 0.0
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> Optimizer:
        """The groups: everything but the routers, and the routers, marked `routers`; those that there are."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups: dict[bool, list[Parameter]] = {False: [], True: []}
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    groups[not set(ROUTER_MODULES).isdisjoint(name.split("."))].append(weight)
            rates = {False: self.args.learning_rate, True: self.router_learning_rate}
            make, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            options = {**options, "weight_decay": self.args.weight_decay}
            self.optimizer = make(
                [
                    {"params": weights, "lr": rates[routers], "routers": routers}
                    for routers, weights in groups.items()
                    if weights
                ],
                **options,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        with self._model_sees_labels(model) if _has_documents(inputs) else nullcontext():
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
            )
        if model.training:
            self._note(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _model_sees_labels(self, model: PreTrainedModel) -> Iterator[None]:
        """A time in which the model computes with the labels what Trainer would compute without the model."""
        smoother, function = self.label_smoother, self.compute_loss_func
        compute: Callable[..., Tensor]
        if function is not None:
            compute = function
        elif smoother is not None:
            compute = partial(smoother, shift_labels=True)
        else:
            yield
            return
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base

        def language_loss(
            logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: object
        ) -> Tensor:
            return compute(CausalLMOutput(logits=logits), labels, num_items_in_batch=num_items_in_batch)

        own = base.loss_function
        base.loss_function = language_loss
        self.label_smoother = self.compute_loss_func = None
        try:
            yield
        finally:
            base.loss_function = own
            self.label_smoother, self.compute_loss_func = smoother, function

    def _note(self, outputs: ModelOutput, num_items_in_batch: Tensor | int | None) -> None:
        """Keep of a batch what the next line of the log will say."""
        batches = self.current_gradient_accumulation_steps
        self._steps += 1 / batches
        # By the time of the log the schedule has moved on.
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        self._router_rate = [group["lr"] for group in groups if group.get("routers")]
        # Losses are shares of a sum where they were divided by the labels of a whole step, of all processes or of each
        # alone, and means of a batch where they were not; logged is the mean over steps and processes.
        scale = 1 / batches
        if num_items_in_batch is not None:
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        for name in PARTS:
            if outputs.get(name) is not None:
                part = outputs[name].detach().float().to(self.accelerator.device) * scale
                self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name in sorted(self._parts, key=PARTS.index):
                logs[name] = self.accelerator.reduce(self._parts[name], "mean").item() / self._steps
            self._parts, self._steps = {}, 0.0
            if self._router_rate:
                logs["router_learning_rate"] = self._router_rate[0]
            logs["phase"] = self.warmup.phase(self.state.global_step - 1)
        super().log(logs, *args, **kwargs)
