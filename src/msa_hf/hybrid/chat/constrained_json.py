"""Decoding JSON that a schema describes: llguidance says which tokens may follow, and no others are."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .json_schema import strict

_vocabularies: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[object, ...], Any]] = (
    weakref.WeakKeyDictionary()
)


def require_llguidance() -> Any:
    """The package llguidance.

    Raises:
        ImportError: naming the extra.
    """
    try:
        importlib.import_module("llguidance.torch")
        importlib.import_module("llguidance.hf")
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ImportError(
            "JSON by constrained decoding needs llguidance: pip install 'msa-hf[structured]'. Without it pass "
            "`constrained=False`: then the model is asked for JSON, and its answer is checked."
        ) from error


class JsonProcessor(LogitsProcessor):
    """Lets a model write nothing but a JSON value of a schema, and then end. Takes one sequence.

    Args:
        tokenizer: a fast one.
        schema: of `check_schema`; objects get all their properties, in order.
        stops: tokens that end a text.

    Raises:
        ImportError: where llguidance is missing.
        ValueError: for a schema that llguidance refuses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, schema: Mapping[str, Any], stops: Sequence[int]) -> None:
        package = require_llguidance()
        grammar = package.LLMatcher.grammar_from_json_schema(strict(schema), {"whitespace_flexible": False})
        self._stops = sorted(stops)
        self._matcher = package.LLMatcher(_vocabulary(package, tokenizer, self._stops), grammar)
        self._masks = package.torch
        self._width = len(tokenizer)
        self._read: int | None = None  # tokens of the sequence that the matcher knows or that stood before the answer
        if error := self._matcher.get_error():
            raise ValueError(f"This schema cannot be decoded: {error}")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[1, V] scores of what may follow, -inf elsewhere."""
        if len(input_ids) != 1:
            raise ValueError(f"JSON is decoded for one sequence at a time, got {len(input_ids)}.")
        if self._read is None:
            self._read = input_ids.shape[1]
        for token in input_ids[0, self._read :].tolist():
            self._matcher.consume_token(token)
        self._read = input_ids.shape[1]
        found = torch.full((1, scores.shape[1]), float("-inf"), dtype=scores.dtype)
        if self._matcher.is_stopped():
            found[0, self._stops] = 0.0
        else:
            bitmask = self._masks.allocate_token_bitmask(1, self._width)
            self._masks.fill_next_token_bitmask(self._matcher, bitmask)
            numbers = torch.arange(min(self._width, scores.shape[1]))  # an embedding may have rows of no token
            follow = (bitmask[0, numbers // 32] >> (numbers % 32)) & 1
            found[0, numbers[follow.bool()]] = 0.0
        return scores + found.to(scores.device)


def _vocabulary(package: Any, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> Any:
    """The tokenizer as llguidance has it, kept, as making it takes a second for a large vocabulary."""
    made_of: tuple[object, ...] = (len(tokenizer), tuple(stops))
    found = _vocabularies.get(tokenizer)
    if found is None or found[0] != made_of:
        # All tokens that end a text end a value as well.
        ends = list(stops) or None
        found = (made_of, package.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=ends))
        _vocabularies[tokenizer] = found
    return found[1]
