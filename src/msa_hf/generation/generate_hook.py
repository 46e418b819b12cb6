"""Memory Interleave as a decoding method of `generate`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import (
    BaseStreamer,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
)

from ..model.memory_msa import Memory, Snapshots
from ..model.modeling_msa import MSAForCausalLM
from .interleave import MemoryInterleave
from .protocol import PUBLISHED, PromptProtocol


def _belongs_to_caller(item: object) -> bool:
    return not type(item).__module__.startswith("transformers.") or isinstance(item, PrefixConstrainedLogitsProcessor)


def memory_interleave(
    model: MSAForCausalLM,
    input_ids: Tensor,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    memory: Memory | Snapshots | None = None,
    protocol: PromptProtocol = PUBLISHED,
    max_rounds: int = 3,
    select: str = "router",
    documents_per_round: int | None = None,
    max_id_tokens: int = 128,
    exclude_read: bool = True,
    layer_scores: str = "mean",
    router_may_end: bool = True,
    reuse_cache: bool = False,
    max_context_tokens: int | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Memory Interleave for `generate`:
    `model.generate(**inputs, custom_generate=memory_interleave, tokenizer=tokenizer, memory=bank)`.

    The prompt is the question alone, in tokens; the protocol puts it into its own words. Options of `generate` apply to
    the answer, and so do logits processors and stopping criteria of classes of your own and `prefix_allowed_tokens_fn`.
    The rounds make their own masks, positions and caches. Further options: `MemoryInterleave`.

    Returns:
        [B, T + A] the prompt and behind it the answer's tokens, opening and end included, padded on the right.

    Raises:
        ValueError: where tokenizer or memory are missing, and where `MemoryInterleave` or its `ask` raise.
    """
    if tokenizer is None or memory is None:
        missing = "tokenizer" if tokenizer is None else "memory"
        raise ValueError(f"memory_interleave needs `{missing}`: pass it to generate().")
    config = copy.deepcopy(generation_config if generation_config is not None else model.generation_config)
    if config.return_dict_in_generate:
        raise ValueError("memory_interleave returns token ids alone; set return_dict_in_generate=False.")
    beams, several = config.num_beams or 1, config.num_return_sequences or 1
    if beams > 1 and several > 1:
        raise ValueError("memory_interleave returns one sequence per question with beams; set num_return_sequences=1.")
    new_tokens = config.max_new_tokens or max((config.max_length or 0) - input_ids.shape[1], 0) or None
    config.num_return_sequences, config.max_new_tokens, config.max_length = 1, new_tokens, None
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    # One row per beam comes in; one per sequence to return goes out.
    prompts, mask = input_ids[::beams], mask[::beams]
    questions = [
        tokenizer.decode(row[real.bool()].tolist(), skip_special_tokens=True)
        for row, real in zip(prompts, mask, strict=True)
    ]
    interleave = MemoryInterleave(
        model,
        tokenizer,
        memory,
        protocol,
        max_rounds=max_rounds,
        select=select,
        documents_per_round=documents_per_round,
        max_id_tokens=max_id_tokens,
        exclude_read=exclude_read,
        layer_scores=layer_scores,
        router_may_end=router_may_end,
        reuse_cache=reuse_cache,
        max_context_tokens=max_context_tokens,
    )
    # Those of transformers' own are made again from the configuration, for the answer stage.
    own: dict[str, Any] = {
        name: [item for item in items or [] if _belongs_to_caller(item)]
        for name, items in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria))
    }
    answers = interleave.ask(
        questions,
        streamer=streamer,
        generation_config=config,
        batch_size=max(len(questions), 1),
        **{name: items for name, items in own.items() if items},
    )
    width = max(len(answer.token_ids) for answer in answers)
    padding = interleave.answering.pad_id if config.pad_token_id is None else config.pad_token_id
    rows = [answer.token_ids + [padding] * (width - len(answer.token_ids)) for answer in answers]
    return torch.cat([prompts, torch.tensor(rows, dtype=torch.long, device=prompts.device)], 1)
