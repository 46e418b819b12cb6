"""The answer stage: what `generate` is told, and what is made of the tokens that it returns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..model.compat_msa import CACHE, CACHE_NAMES
from ..model.memory_msa import Memory
from ..model.modeling_msa import MSAForCausalLM
from .prompting import prompting_of
from .protocol import PromptProtocol
from .streaming import AnswerStreamer

GenerateOptions = dict[str, Any]  # of `generate`, which takes what each of its versions knows


@dataclass(frozen=True)
class Written:
    """An answer: its text without opening and end marker, and its tokens with both."""

    text: str
    token_ids: list[int]


class Answering:
    """Generates answers behind prompts.

    Args:
        model: `MSAForCausalLM`.
        tokenizer: of the model.
        protocol: whose marker ends an answer; None: what `prompting_of` says of the tokenizer.
    """

    def __init__(
        self, model: MSAForCausalLM, tokenizer: PreTrainedTokenizerBase, protocol: PromptProtocol | None
    ) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self._ends = prompting_of(tokenizer, protocol).ends
        # A marker of several tokens is looked for in the text.
        self._end_text = None if protocol is None or self._ends else protocol.answer_end

    @property
    def pad_id(self) -> int:
        """Token of padding: the tokenizer's, or one of those that end a text."""
        pad = self.tokenizer.pad_token_id
        known = pad is not None and 0 <= pad < self.model.config.vocab_size  # else it has no row in the embedding
        return pad if known else next(iter(sorted(self.stop_ids())), 0)

    def stop_ids(self, given: int | Sequence[int] | None = None) -> set[int]:
        """Tokens that end a text: those given or the model's, and what ends an answer."""
        given = self.model.generation_config.eos_token_id if given is None else given
        stops = set(given if isinstance(given, list | tuple) else [] if given is None else [given])
        return stops | set(self._ends)

    def options(
        self, generation_config: GenerationConfig | None, given: GenerateOptions, max_new_tokens: int
    ) -> GenerateOptions:
        """Options of `generate`.

        Args:
            generation_config: default: the model's, but greedy unless `given` has `do_sample`.
            given: further options.
            max_new_tokens: unless one of these says otherwise.

        Raises:
            ValueError: for options that the rounds set, or that make no sense here.
        """
        for name in ("memory", "routing_mask", "force_documents", "input_ids", "attention_mask", *CACHE_NAMES):
            if given.get(name) is not None:
                raise ValueError(f"`{name}` is set by the rounds; it cannot be passed to ask().")
        if given.get("max_length") is not None:
            raise ValueError("`max_length` would count the transcript; pass `max_new_tokens`.")
        config = copy.deepcopy(self.model.generation_config if generation_config is None else generation_config)
        if generation_config is None and "do_sample" not in given:
            config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        if generation_config is None:
            config.max_new_tokens = None  # the model's own knows nothing of answers
        config.max_length = None
        options = config.update(**given)
        config.use_cache = True  # the rounds hand theirs on; Trainer saves models that say False
        config.max_new_tokens = config.max_new_tokens or max_new_tokens
        if (config.num_return_sequences or 1) > 1:
            raise ValueError("`num_return_sequences` must be 1: a question has one answer; ask it several times.")
        config.return_dict_in_generate = False
        config.eos_token_id = sorted(self.stop_ids(config.eos_token_id)) or None
        config.pad_token_id = self.pad_id if config.pad_token_id is None else config.pad_token_id
        if self._end_text is not None:
            stops = config.stop_strings or []
            config.stop_strings = [*([stops] if isinstance(stops, str) else stops), self._end_text]
        if config.stop_strings:
            options["tokenizer"] = self.tokenizer
        return {**options, "generation_config": config}

    def write(
        self, inputs: dict[str, Tensor | Cache], memory: Memory, streamer: BaseStreamer | None, options: GenerateOptions
    ) -> list[Written]:
        """Generate the answers.

        Args:
            inputs: transcripts, as `TranscriptFeeder.turn` makes them.
            memory: that they read.
            streamer: gets the tokens of the answer and nothing else.
            options: as `options` made them.
        """
        config = options["generation_config"]
        stops = config.eos_token_id or []
        if streamer is not None:
            opening = "" if self.protocol is None else self.protocol.answer_opening
            streamer = AnswerStreamer(streamer, self.tokenizer, opening, stops)
        width = inputs["input_ids"].shape[1]
        if isinstance(cache := inputs.get(CACHE), Cache) and (beams := config.num_beams or 1) > 1:
            cache.batch_repeat_interleave(beams)  # generate() expands all inputs but a cache
        if cache is not None and self.model.generation_config.cache_implementation is not None:
            options = {**options, "cache_implementation": None}  # the model's own would make another cache
        output: Tensor = self.model.generate(**inputs, memory=memory, streamer=streamer, **options)
        return [self.cut(row, stops) for row in output[:, width:].tolist()]

    def cut(self, tokens: list[int], stops: Sequence[int]) -> Written:
        """Cut what `generate` wrote where the answer ends, by one of these tokens or the protocol's marker."""
        stop = self._end_of(tokens, stops)
        shown = tokens[:stop] if self._end_text is None else tokens[: stop + 1]
        text = self._decode(shown, skip_special_tokens=True)
        text = text.strip() if self.protocol is None else self.protocol.answer_text(text)
        return Written(text, tokens[: stop + 1])

    def _end_of(self, tokens: list[int], stops: Sequence[int]) -> int:
        """The place of an answer's end marker, or the number of its tokens."""
        for place, token in enumerate(tokens):
            by_text = self._end_text is not None and self._end_text in self._decode(tokens[: place + 1])
            if token in stops or by_text:
                return place
        return len(tokens)

    def _decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
