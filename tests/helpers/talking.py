"""A tiny model that is put questions by a chat template, and its bank."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from scripted import COMPACT, TEXTS, bank_of, byte_tokenizer, memory_model

CHAT = (
    "{% for item in messages %}<|im_start|>{{ item['role'] }}\n{{ item['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST = [{"role": "user", "content": "Where is the amber?"}]
TURNS = [*FIRST, {"role": "assistant", "content": "By the rebma."}, {"role": "user", "content": "and how far is it?"}]


def chat_tokenizer(template: str | None = CHAT) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@cache
def talking(way: str = "chat") -> SimpleNamespace:
    """A model with its tokenizer, protocol and bank, whose questions are put in a `way`: chat, plain or protocol."""
    tokenizer = chat_tokenizer(None if way == "plain" else CHAT)
    model = memory_model(tokenizer, COMPACT)
    protocol = COMPACT if way == "protocol" else None
    if protocol is not None:
        bank = bank_of(model, tokenizer, protocol)
    else:
        bank = model.encode_documents(TEXTS, tokenizer, show_progress=False)
    return SimpleNamespace(model=model, tokenizer=tokenizer, protocol=protocol, bank=bank)


class Seen:
    """What a model is given, of the forwards that route: real tokens of each row, and which of them route."""

    def __init__(self, model: Any) -> None:
        self.model, self.rows = model, []

    def __enter__(self) -> "Seen":
        self.hook = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def _keep(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        routes = kwargs.get("routing_mask")
        if routes is None or not bool(routes.any()):
            return
        ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        for row, real, chosen in zip(ids, mask[:, -ids.shape[1] :].bool(), routes, strict=True):
            self.rows.append((row[real].tolist(), chosen[real].bool().tolist()))
