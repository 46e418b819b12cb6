"""`MSAForCausalLM` and `MSAModel`: any decoder of transformers with a Memory Sparse Attention memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from .checkpoint_msa import CheckpointMixin
from .configuration_msa import MSAConfig
from .generating_msa import GeneratingMixin
from .idle_routers_msa import warn_of_idle_routers, warn_of_replaced_forward
from .inference_msa import MEMORY_ARGUMENTS, MemoryMixin, attends
from .memory_msa import Memory
from .outputs_msa import MSACausalLMOutput, MSAModelOutput
from .retrofit_msa import renumber_memory_layers
from .training_msa import TRAINING_ARGUMENTS, TrainingMixin


class MSAModel(MemoryMixin, CheckpointMixin, PreTrainedModel):
    """A decoder without head, with a memory. `AutoModel` loads it; see `MSAForCausalLM`."""

    base_mapping = MODEL_MAPPING
    class_names = MODEL_MAPPING_NAMES
    config_class = MSAConfig
    output_class = MSAModelOutput
    forward_arguments = MEMORY_ARGUMENTS

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        memory: Memory | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        output_document_scores: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[object, ...]:
        """The base's forward; with `memory`, `routing_mask`, `force_documents`, `output_document_scores` it attends."""
        kwargs["input_ids"] = input_ids
        renumber_memory_layers(self)
        if kwargs.get("memory_pass") is not None:
            return self.run_base(**kwargs)
        if not attends(memory, routing_mask, force_documents, kwargs):
            return super().forward(**kwargs)
        return self.memory_forward(memory, routing_mask, force_documents, bool(output_document_scores), **kwargs)


class MSAForCausalLM(GeneratingMixin, TrainingMixin, CheckpointMixin, PreTrainedModel, GenerationMixin):
    """A causal LM with a Memory Sparse Attention memory (arXiv 2603.23516).

    `from_base` retrofits a plain model, `from_pretrained` loads a checkpoint. Without a memory it computes what the
    base computes, to the bit.
    """

    base_mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    class_names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    config_class = MSAConfig
    output_class = MSACausalLMOutput
    forward_arguments = (*MEMORY_ARGUMENTS, *TRAINING_ARGUMENTS)

    def train(self, mode: bool = True) -> PreTrainedModel:
        """`torch.nn.Module.train`, which trainers call before every step."""
        if mode:
            warn_of_replaced_forward(self)
        return super().train(mode)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        memory: Memory | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        output_document_scores: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[object, ...]:
        """The base's forward, and with a memory or documents the following.

        Inference:
            memory: `MemoryBank` to draw on. `input_ids` then hold the active tokens, without the prefix.
            routing_mask: [B, T] bool, the tokens that route. Default: all non-padding tokens where nothing is cached;
                with a cache a turn routes anew where it has routing tokens, else it keeps its documents.
            force_documents: [B, n] int64 positions in the bank to attend to instead, -1 for none.
            output_document_scores: also report the scores of all documents, [B, N] per layer.

        Training (paper, 3.4), on either form:
            doc_ids: [B, T] int64 for packed rows: 1, 2, ... documents; 0 routing tokens; -1 other active tokens; -2
                template tokens, those that open the row being the prefix. `position_ids` default to their rule.
            documents: a pool shared by all questions: token id lists, or a mapping with padded `input_ids` and
                `attention_mask`. `input_ids` then hold question, tail and answer; tokens before the first label route
                unless `routing_mask` says which.
            positive_docs: [B, P] int64 document numbers (of the row or the pool, from 0), -1 for none.
            labels: [B, T], -100 for none.
            answer_mask: [B, T] bool, labels that count a second time, with `answer_loss_weight`.
            num_items_in_batch: labeled tokens of all micro-batches together.

        Returns:
            The base's output without a memory, else `MSACausalLMOutput`.
        """
        kwargs["input_ids"] = input_ids
        renumber_memory_layers(self)
        if kwargs.get("memory_pass") is not None:  # from `run_from_outside`
            return self.run_base(**kwargs)
        if kwargs.get("doc_ids") is not None or kwargs.get("documents") is not None:
            if memory is not None:
                raise ValueError("A training step brings its own documents; leave `memory` out.")
            warn_of_idle_routers(self, True, kwargs.get("positive_docs") is not None)
            return self.training_forward(routing_mask=routing_mask, force_documents=force_documents, **kwargs)
        if given := [name for name in TRAINING_ARGUMENTS if kwargs.pop(name, None) is not None]:
            raise ValueError(f"`{given[0]}` belongs to a training step: pass `documents` or `doc_ids` with it.")
        if not attends(memory, routing_mask, force_documents, kwargs):
            warn_of_idle_routers(self, False, False)
            return super().forward(**kwargs)
        output = self.memory_forward(memory, routing_mask, force_documents, bool(output_document_scores), **kwargs)
        if isinstance(output, MSACausalLMOutput):
            output.lm_loss = output.loss
        return output
