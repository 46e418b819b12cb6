"""Hidden states that routers read: those that come into memory layers while token rows are encoded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..model.attention_msa import EncodingPass
from ..model.configuration_msa import MSAConfig
from ..model.modeling_msa import MSAForCausalLM
from .contrastive import TokenRows, run_rows, training_similarity


class _InputsPass(EncodingPass):
    """An encoding that keeps something of what the routers read: layer -> what `keep` made of it."""

    def __init__(self, config: MSAConfig, lengths: Tensor, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__(config, lengths, training_similarity(config), stop=True)
        self.keep = keep
        self.inputs: dict[int, Tensor] = {}

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        super().enter(module, hidden_states)
        self.inputs[int(module.layer_idx)] = self.keep(hidden_states)


def router_inputs(model: MSAForCausalLM, rows: TokenRows, keep: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Memory layer -> what `keep` makes of the hidden states [N, L, hidden] that its routers read of the rows."""
    encoding = _InputsPass(model.config, rows.lengths, keep)
    run_rows(model, rows, torch.arange(rows.ids.shape[1], device=rows.ids.device), encoding)
    return encoding.inputs
