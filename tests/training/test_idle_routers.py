"""Training that leaves the routers as they are says so once and names the remedy; other training says nothing."""

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import COMPACT, byte_tokenizer, memory_model
from transformers import Trainer, TrainingArguments

from msa_hf.training import QuestionCollator, peft_config

TOKENIZER = byte_tokenizer()
QUESTIONS = [{"question": "Where is it?", "answer": "here", "positives": ["a"]}] * 4
LOGGER = "transformers"
SAID = "The routers get no gradient"


def fresh(**fields: Any) -> Any:
    return memory_model(TOKENIZER, COMPACT, **fields).train()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The warnings so far."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name in ("transformers", "msa_hf"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if SAID in record.getMessage()]


def collator() -> QuestionCollator:
    return QuestionCollator(TOKENIZER, {"a": "It is here.", "b": "It is there."}, pool=2)


def trained(model: Any, directory: Path, rows: Any, **options: Any) -> None:
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, **options).train()


def plain_rows() -> list[dict[str, list[int]]]:
    ids = TOKENIZER("It is here.")["input_ids"]
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 4


def test_trainer_on_texts_alone_is_warned_once(tmp_path: Path, said: Any) -> None:
    model = fresh()
    for _ in range(2):
        trained(model, tmp_path, plain_rows())
    (message,) = said()
    assert "no `documents`" in message and "QuestionCollator" in message and "msa-hf train" in message
    assert "frozen" not in message


def test_trainer_on_questions_is_not(tmp_path: Path, said: Any) -> None:
    model = fresh()
    trained(model, tmp_path, QUESTIONS, data_collator=collator())
    routers = [weight for name, weight in model.named_parameters() if "router_q_proj" in name]
    assert said() == [] and routers


def test_documents_that_nobody_calls_right_are_named(said: Any) -> None:
    batch = collator()(QUESTIONS)
    batch.pop("positive_docs")
    model = fresh()
    model(**batch).loss.backward()
    routers = [weight.grad for name, weight in model.named_parameters() if "router_" in name]
    assert routers and all(grad is None or not grad.any() for grad in routers)
    (message,) = said()
    assert "no `positive_docs`" in message


@pytest.mark.parametrize("ours", [True, False])
def test_routers_that_peft_freezes_are_named(said: Any, ours: bool) -> None:
    peft = pytest.importorskip("peft")
    model = fresh()
    config = peft_config(model, r=2) if ours else peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(model, config)
    model(**collator()(QUESTIONS)).loss.backward()
    messages = said()
    assert len(messages) == (0 if ours else 1)
    assert ours or ("frozen" in messages[0] and "peft_config(model)" in messages[0])


def test_what_trains_nothing_says_nothing(said: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    model = fresh()
    model.eval()(input_ids=ids, labels=ids)
    with torch.no_grad():
        model.train()(input_ids=ids, labels=ids)
    shared = fresh(shared_router=True)
    shared(input_ids=ids, labels=ids)
    model.requires_grad_(False)(input_ids=ids, labels=ids)
    assert said() == []


def test_the_trainer_of_trl_is_warned(tmp_path: Path, said: Any) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["It is here.", "It is there."] * 2})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", max_length=32, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    model = fresh()
    trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=TOKENIZER).train()
    (message,) = said()
    assert "takes no `documents`" in message and "msa-hf train" in message


def test_a_forward_that_is_only_wrapped_is_not_taken_for_another(said: Any) -> None:
    model = fresh()
    own = model.forward
    model.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    model.train()
    assert said() == []
    model.forward = lambda *args, **kwargs: None
    model.train().train()
    (message,) = said()
    assert __name__ in message and "QuestionCollator" in message
