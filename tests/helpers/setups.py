"""Tiny models with a memory, each with the plain base it was made of, and batches of questions for them."""

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch
from families import FAMILIES, base_model
from reference import Reference
from torch import Tensor

from msa_hf import MemoryBank, MSAForCausalLM

# Families whose attention scaled_dot_product_attention cannot compute (softcap, sinks).
EAGER_ONLY = ("gemma2", "gpt_oss")
# Every family on one backend.
FAMILIES_ONCE = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for place, family in enumerate(FAMILIES)
    for attention in ["eager" if family in EAGER_ONLY or place % 4 == 0 else "sdpa"]
]
# And those with a mechanism of their own on the other one as well.
BACKENDS = [
    *FAMILIES_ONCE,
    *(
        pytest.param(family, attention, id=f"{family}-{attention}")
        for family, attention in (("llama", "sdpa"), ("qwen3", "eager"), ("gemma3_text", "eager"), ("gpt_neox", "sdpa"))
    ),
]
# One of each mechanism: plain, hybrid with softcap, hybrid with sinks.
FEW = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family, attention in (("qwen3", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager"))
]


def covered(choices: Sequence[Any], spare: Sequence[Any]) -> list[Any]:
    """Parameters `family, attention, choice`: every choice for those of `FEW`, the spare ones for others."""
    known = {param.values for param in FEW}
    return [
        pytest.param(*param.values, choice, id=f"{param.id}-{choice}")
        for param in [*FEW, *(param for param in FAMILIES_ONCE if param.values not in known)]
        for choice in (choices if param.values in known else spare)
    ]


# A softcap of 1 changes these models' logits; the default of 50 does not.
OVERRIDES: dict[str, dict[str, Any]] = {"gemma2": {"attn_logit_softcapping": 1.0}}
LENGTHS = (1, 3, 4, 7, 12)
CHUNK = 3
PREFIX = (5, 6, 7)
VOCABULARY = 128


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random sequences of token ids, without the special ones."""
    pick = random.Random(seed)
    return [[pick.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


@dataclass
class Setup:
    """A model with a memory.

    Attributes:
        kept_base: the plain model, never handed out.
        model: the same with a memory.
        documents: token ids.
        bank: `documents`, encoded by `model`.
    """

    kept_base: Any
    model: Any
    documents: list[list[int]]
    bank: MemoryBank

    @cached_property
    def base(self) -> Any:
        """A copy of the plain model."""
        return copy.deepcopy(self.kept_base)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.kept_base, self.model, self.documents)


def build(
    family: str = "qwen3",
    attention: str = "eager",
    documents: Sequence[Sequence[int]] | None = None,
    base: dict[str, Any] | None = None,
    **fields: Any,
) -> Setup:
    """A tiny model of `family` with random routers and documents of 1 to 12 tokens in chunks of 3, of which it takes 2.

    Args:
        documents: token ids; default random ones of `LENGTHS`.
        base: overrides of the base's configuration.
        fields: of the memory.
    """
    fields = {"chunk_size": CHUNK, "top_k": 2, "router_init": "random", "prefix_token_ids": list(PREFIX), **fields}
    plain: Any = base_model(family, **{"scale": 0.3, **OVERRIDES.get(family, {}), **(base or {})})
    plain.set_attn_implementation(attention)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("bias"):
                weight.mul_(0.1)  # else they drown what the tokens say
    model = MSAForCausalLM.from_base(copy.deepcopy(plain), **fields)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "router_" in name and weight.dim() > 1:
                weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
            elif "router_score_bias" in name:
                weight.fill_(0.7)
    documents = [list(document) for document in documents or tokens(*LENGTHS, seed=1)]
    return Setup(plain, model, documents, model.encode_documents(documents, show_progress=False))


@lru_cache(maxsize=64)
def _kept(arguments: str) -> tuple[Setup, Tensor]:
    """What `build` makes of `arguments`, never handed out, and the random state that it leaves."""
    family, attention, documents, base, fields = json.loads(arguments)
    return build(family, attention, documents, base, **fields), torch.get_rng_state()


def setup(
    family: str = "qwen3",
    attention: str = "eager",
    documents: Sequence[Sequence[int]] | None = None,
    base: dict[str, Any] | None = None,
    **fields: Any,
) -> Setup:
    """What `build` makes, as a copy: it was built for the first test of this process that asked for these arguments.

    A test that changes how models are built, or watches it, calls `build`. The random state is left as by `build`.
    """
    kept, state = _kept(json.dumps([family, attention, documents, base, fields]))
    torch.set_rng_state(state)
    model, documents, bank = copy.deepcopy((kept.model, kept.documents, kept.bank))
    return Setup(kept.kept_base, model, documents, bank)


def batch_of(
    questions: Sequence[Sequence[int]], routes: Sequence[Sequence[bool]] | None = None, side: str = "left"
) -> dict[str, Tensor]:
    """Questions as a padded batch: `input_ids`, `attention_mask`, and `routing_mask` where `routes` are given."""
    width = max(map(len, questions))

    def pad(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
        padding = [[0] * (width - len(row)) for row in rows]
        pairs = zip(padding, rows, strict=True) if side == "left" else zip(rows, padding, strict=True)
        return torch.tensor([[*first, *second] for first, second in pairs], dtype=dtype)

    batch = {"input_ids": pad(questions, torch.long)}
    batch["attention_mask"] = pad([[1] * len(question) for question in questions], torch.long)
    if routes is not None:
        batch["routing_mask"] = pad(routes, torch.bool)
    return batch


def samples_of(states: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    """[B, T, ...] -> the states of each sample's real tokens."""
    return [row[mask.bool()] for row, mask in zip(states, batch["attention_mask"], strict=True)]


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 2**8 * torch.finfo(torch.float32).eps) -> None:
    """Equal up to `tolerance` of the largest number (default: 3e-5, float32's error over a few layers)."""
    largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance * largest, rtol=0.0)


def differ(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
