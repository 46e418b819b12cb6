"""The outputs of a forward with a memory."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .compat_msa import readable_by_both_names
from .routing_msa import LayerRouting


@readable_by_both_names
@dataclass
class MSACausalLMOutput(CausalLMOutputWithPast):
    """Output of a causal LM that attended to a memory.

    Attributes:
        loss: weighted sum of the losses below, where labels or positive documents were given.
        lm_loss: language-model loss.
        aux_loss: auxiliary loss of the routers.
        answer_loss: language-model loss over the labels that `answer_mask` marks.
        attentions: on `eager`, where asked for: each layer's weights [B, H, T, S] of the own tokens, as the base's.
            What the weights of a token lack to 1 went to the prefix and to the documents chosen.
        routing: memory layer -> `LayerRouting`; empty in a turn that does not route.
        router_logits: of the experts, where the base is a mixture and was asked for them.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    answer_loss: Tensor | None = None
    routing: dict[int, LayerRouting] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@readable_by_both_names
@dataclass
class MSAModelOutput(BaseModelOutputWithPast):
    """Output of a headless model that attended to a memory; the rest as in `MSACausalLMOutput`."""

    routing: dict[int, LayerRouting] | None = None
    router_logits: tuple[Tensor, ...] | None = None
