"""A causal LM of transformers as a chat model, with its tokenizer's chat template where it has one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ...generation.prompting import ChatPrompting
from ...model.modes_msa import evaluating
from ...model.tokenizing_msa import tokenize
from .chat_model import Completion, Message, require_room
from .constrained_json import JsonProcessor, require_llguidance


class TransformersChat:
    """Any causal LM with its tokenizer.

    Contents of messages are tokenized apart from the template's words, so that a document that spells a marker of the
    template stays text. Without a chat template the contents stand one after the other, with blank lines between.

    Args:
        model: a causal LM.
        tokenizer: of the model; a fast one.
        name: for traces. Default: the model's.
        context_tokens: of prompt and answer together. Default: the model's `max_position_embeddings`.
        constrained: hold the model to a schema where one is asked for, which needs llguidance.
        template_options: further arguments of the chat template, such as `enable_thinking=False`.

    Raises:
        ImportError: where `constrained` lacks its package, once a schema is asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        context_tokens: int | None = None,
        constrained: bool = True,
        template_options: Mapping[str, object] | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("TransformersChat needs a fast tokenizer; this one is written in Python.")
        self.model, self.tokenizer, self.constrained = model, tokenizer, constrained
        self.name = name or str(model.config.name_or_path or model.config.model_type)
        limit = getattr(model.config, "max_position_embeddings", None)
        self.context_tokens = limit if context_tokens is None else context_tokens
        self.template_options = dict(template_options or {})

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids(messages))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt.

        Raises:
            ValueError: for no messages, or a chat template that does not show them.
        """
        if not messages:
            raise ValueError("A chat model needs at least one message.")
        if not self.tokenizer.chat_template:
            text = "\n\n".join(message.content for message in messages)
            return tokenize(self.tokenizer, text, add_special_tokens=True)
        chat = ChatPrompting(self.tokenizer, self.template_options, self.name)
        return chat.message_ids([message.to_dict() for message in messages]).input_ids

    def _stops(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        found = set(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends])
        return sorted(found or ({self.tokenizer.eos_token_id} - {None}))

    def complete(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        *,
        schema: Mapping[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Completion:
        """Write the next turn; see `ChatModel.complete`."""
        ids, stops = self.prompt_ids(messages), self._stops()
        require_room(self, len(ids), max_new_tokens)
        config = copy.deepcopy(self.model.generation_config)
        # Of `generate`: None leaves out what the checkpoint recommends, which would make an answer depend on it.
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        config.update(max_length=None, max_new_tokens=max_new_tokens, return_dict_in_generate=False, num_beams=1)
        if temperature > 0:
            config.update(do_sample=True, temperature=temperature)
        config.eos_token_id = stops or None
        pads = (config.pad_token_id, self.tokenizer.pad_token_id, *stops, 0)
        config.pad_token_id = next(pad for pad in pads if pad is not None)
        processors = LogitsProcessorList()
        if schema is not None and self.constrained:
            require_llguidance()
            processors.append(JsonProcessor(self.tokenizer, schema, stops))
        inputs = torch.tensor([ids], device=self.model.device)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with evaluating(self.model), torch.random.fork_rng(devices=devices, enabled=temperature > 0):
            if temperature > 0:
                torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                logits_processor=processors,
            )
        written = output[0, len(ids) :].tolist()
        ended = bool(written) and written[-1] in stops
        text = self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        return Completion(text, cut=not ended, prompt_tokens=len(ids), new_tokens=len(written))
