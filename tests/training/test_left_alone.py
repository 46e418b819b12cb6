"""What answers, encodes or measures leaves the user's model as it found it."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import COMPACT, TEXTS, bank_of, byte_tokenizer, memory_model

from msa_hf.generation import DirectAsker, MemoryInterleave, memory_interleave
from msa_hf.training import RouterMonitor, diagnose, router_recall

TOKENIZER = byte_tokenizer()
QUESTION = "Where is the amber?"
JUDGED = [{"question": QUESTION, "answer": "10 miles", "positives": ["0"]}]
INPUTS = TOKENIZER(QUESTION, return_tensors="pt")


class Failure(Exception):
    pass


@pytest.fixture(scope="module")
def model() -> Any:
    """In training mode, but for a layer in evaluation mode with one module in training mode; one layer is frozen, and a
    program around it has settings of its own."""
    model = memory_model(TOKENIZER, COMPACT)
    bank = bank_of(model, TOKENIZER, COMPACT, TEXTS[:6])
    model.train()
    model.model.layers[1].eval().requires_grad_(False)
    model.model.layers[1].mlp.train()
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=3, use_cache=False)
    model.config.use_cache = False
    return SimpleNamespace(model=model, bank=bank)


def state(model: Any) -> dict[str, Any]:
    """All that a caller can see of a model and of torch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "frozen": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "gradients": {name: weight.grad for name, weight in model.named_parameters()},
        "hooks": {name: [len(vars(module)[hook]) for hook in hooks] for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "attention": model.config._attn_implementation,
        "generation": json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str),
        "tensors": {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()},
        "random": torch.get_rng_state().tolist(),
        "torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }


def measured(model: Any) -> Any:
    monitor = RouterMonitor(TOKENIZER, dict(enumerate_texts()), JUDGED, protocol=COMPACT)
    trainer_state = SimpleNamespace(global_step=0, epoch=0.0, log_history=[])
    return monitor.on_train_begin(None, trainer_state, None, model=model.model)


def enumerate_texts() -> Any:
    return ((str(number), text) for number, text in enumerate(TEXTS[:6]))


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "encode": lambda it: it.model.encode_documents(TEXTS[:3], TOKENIZER, show_progress=False),
    "ask": lambda it: MemoryInterleave(it.model, TOKENIZER, it.bank, COMPACT, max_new_tokens=2).ask(
        [QUESTION, QUESTION + "?"], do_sample=False
    ),
    "custom_generate": lambda it: it.model.generate(
        **INPUTS,
        custom_generate=memory_interleave,
        tokenizer=TOKENIZER,
        memory=it.bank,
        protocol=COMPACT,
        do_sample=False,
        max_new_tokens=2,
    ),
    "generate": lambda it: it.model.generate(**INPUTS, memory=it.bank, do_sample=False, max_new_tokens=2),
    "direct": lambda it: DirectAsker(it.model, TOKENIZER, it.bank, 2).ask(QUESTION),
    "recall": lambda it: router_recall(it.model, TOKENIZER, it.bank, JUDGED, protocol=COMPACT),
    "monitor": measured,
    "diagnose": lambda it: diagnose(
        it.model, TOKENIZER, it.bank, JUDGED, COMPACT, conditions=["routed", "no_memory", "ids"], max_new_tokens=2
    ),
}
# Computes in the mode that the model is in, as `generate` of transformers does.
IN_ITS_OWN_MODE = ("generate",)


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_left_as_found(entry: str, fails: bool, model: Any) -> None:
    before, modes = state(model.model), set()

    def look(*_: Any) -> None:
        modes.update(module.training for module in model.model.modules())
        if fails:
            raise Failure

    hook = model.model.model.layers[2].register_forward_pre_hook(look)
    try:
        ENTRIES[entry](model)
    except Failure:
        assert fails
    finally:
        hook.remove()
    after = state(model.model)
    assert modes == {False} if entry not in IN_ITS_OWN_MODE else modes
    for name, value in before.items():
        assert after[name] == value, name
