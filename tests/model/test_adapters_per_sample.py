"""Batches whose samples have adapters of their own, or adapt from a token of their own on."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from setups import assert_same, setup, tokens
from steps import Question, Step, assert_same_gradients, gradients, step

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter name .a. should not be contained"),
]

CALL = [9, 11]  # from here on aLoRA adapts
ROUTERS = ["router_q_proj", "router_k_proj"]


def with_two_adapters() -> Any:
    """A tiny model with the adapters "a" and "b", each with routers of its own."""
    model, config = setup(score_bias=True).model, {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**config, modules_to_save=ROUTERS), adapter_name="a")
    wrapped.add_adapter("b", LoraConfig(**config, modules_to_save=ROUTERS))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if ".modules_to_save.b." in name:
                weight.normal_(0.0, 0.3)
    return wrapped.eval()


def test_packed_rows_have_each_an_adapter() -> None:
    """Prefix, documents and question of a row go through its adapter, and through its routers."""
    model, made = with_two_adapters(), step()
    names = ["b", "a", "__base__"]
    with torch.no_grad():
        mixed = model(**made.packed(), adapter_names=names)
        for row, name in enumerate(names):
            batch = made.only(row).packed()
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**batch)
            else:
                model.set_adapter(name)
                alone = model(**batch)
                model.set_adapter("a")
            width = batch["input_ids"].shape[1]
            assert_same(mixed.logits[row, :width], alone.logits[0])
            for layer, found in alone.routing.items():
                assert_same(mixed.routing[layer].document_scores[row], found.document_scores[0])


def test_a_pool_is_encoded_with_the_one_adapter_of_its_batch() -> None:
    """That of `adapter_names`, not the active one; several are refused, as many samples as documents or not."""
    model, made = with_two_adapters(), step()
    with torch.no_grad():
        named = model(**made.pool(), adapter_names=["b"] * 3)
        model.set_adapter("b")
        alone = model(**made.pool())
        model.set_adapter("a")
        assert_same(named.logits, alone.logits)
        assert_same(named.loss, alone.loss)
        for documents in (made.documents, made.documents[:3]):
            batch = {**made.pool(), "documents": documents, "positive_docs": torch.zeros(3, 1, dtype=torch.long)}
            with pytest.raises(ValueError, match=r"\['a', 'b'\].*Make a batch for each"):
                model(**batch, adapter_names=["a", "b", "a"])


def test_a_bank_is_read_with_the_adapter_that_made_it() -> None:
    """Samples with another adapter are refused: its keys are not the bank's."""
    model, made = with_two_adapters(), step()
    bank = model.encode_documents(made.documents, show_progress=False)
    batch = {name: made.pool("left")[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert_same(model(**batch, memory=bank, adapter_names=["a"] * 3).logits, model(**batch, memory=bank).logits)
        for name in ("b", "__base__"):
            with pytest.raises(ValueError, match=rf"\['{name}'\], but the bank was made with \['a'\]"):
                model(**batch, memory=bank, adapter_names=["a", name, "a"])
    with pytest.raises(ValueError, match="set_adapter"):
        model.generate(**batch, memory=bank, adapter_names=["a", "b", "a"], max_new_tokens=2, pad_token_id=0)


def activated() -> tuple[Any, Step]:
    """A model with aLoRA, and questions of which the first two name it; as many documents as questions."""
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, alora_invocation_tokens=CALL, modules_to_save=ROUTERS
    )
    parts = tokens(4, 6, 5, seed=3)
    texts = [parts[0] + CALL, parts[1][:2] + CALL + parts[1][2:], parts[2]]
    documents = [CALL + tokens(5, seed=1)[0], *tokens(3, 7, seed=2)]
    questions = [
        Question(text, [7, 8], [12 + number, 13, 14][: 2 + number % 2], [number]) for number, text in enumerate(texts)
    ]
    return get_peft_model(setup(score_bias=True).model, config), Step(documents, questions)


def test_activated_adapters_train_on_both_forms() -> None:
    """Documents, also one with the tokens of the call, are the base's; losses and gradients of both forms agree."""
    model, made = activated()
    model.train()
    outputs = [model(**made.form(form)) for form in ("pool", "packed")]
    found = [gradients(model, output.loss) for output in outputs]
    assert_same(outputs[1].loss, outputs[0].loss)
    assert_same_gradients(found[1], found[0])
    assert all(bool(gradient.any()) for name, gradient in found[0].items() if "lora_" in name)
    alone = [model(**made.only(number).pool()) for number in range(3)]
    for number, output in enumerate(alone):
        length = output.logits.shape[1]
        assert_same(outputs[0].logits[number, :length], output.logits[0])
    with model.disable_adapter():
        plain = model(**made.pool())
    length = len(made.questions[2].ids)
    assert_same(outputs[0].logits[2, :length], plain.logits[2, :length])  # with the same routers, which are copies
    assert not torch.allclose(outputs[0].logits[0, :8], plain.logits[0, :8], atol=1e-3)


@pytest.mark.parametrize("form", ["pool", "packed"])
def test_activated_adapters_under_gradient_checkpointing_are_refused(form) -> None:
    """PEFT would take the offsets of the questions for the documents."""
    model, made = activated()
    base = model.train().get_base_model()
    (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)()
    with pytest.raises(ValueError, match="Turn gradient checkpointing off"):
        model(**made.form(form))
