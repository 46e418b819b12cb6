"""The training forward under transformers.Trainer: steps, accumulation, evaluation, checkpoints, adapters."""

import itertools
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from setups import assert_same, setup
from steps import assert_same_gradients, four, pad
from torch import Tensor
from transformers import Trainer, TrainingArguments

from msa_hf import MSAForCausalLM
from msa_hf.training import MemoryTrainer, peft_config

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FORMS = ("pool", "packed")
FAMILIES = [("qwen3", "sdpa"), ("gemma2", "eager")]
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100, "doc_ids": -1, "positive_docs": -1}


def arguments(directory: Path, **kwargs: Any) -> TrainingArguments:
    """Quiet arguments for the CPU."""
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "seed": 0,
    }
    return TrainingArguments(**{**defaults, **kwargs})


def checkpointing() -> dict[str, bool]:
    """The argument that turns gradient checkpointing on, by the name that is not deprecated."""
    names = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": True}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# A toy task -----------------------------------------------------------------------------------------------------------


def rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Questions that name two tokens, each with the document that opens with them and holds the answer.

    The columns are named as arguments of the forward, as `remove_unused_columns` wants them, but for one.
    """
    pick = random.Random(seed)
    made = []
    for number, pair in enumerate(pick.sample(list(itertools.permutations(range(10, 40), 2)), count)):
        answer = pick.randrange(60, 90)
        filler = [pick.randrange(90, 128) for _ in range(1 + number % 4)]
        question = [4] * (number % 3) + [*pair]
        made.append(
            {
                "input_ids": [*question, answer],
                "labels": [-100] * len(question) + [answer],
                "documents": [*pair, answer, *filler],
                "source": f"row {number}",
            }
        )
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """A pool of the batch's documents for all of its questions."""
    return {
        "input_ids": pad([row["input_ids"] for row in batch], 0),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in batch], 0),
        "labels": pad([row["labels"] for row in batch], -100),
        "documents": [row["documents"] for row in batch],
        "positive_docs": torch.arange(len(batch))[:, None],
    }


def toy(family: str = "qwen3", attention: str = "sdpa", **kwargs: Any) -> Any:
    """A tiny model for the toy task, whose routers matter most."""
    return setup(family, attention, **{"aux_loss_weight": 1.0, "lm_loss_weight": 0.1, **kwargs}).model


@torch.no_grad()
def losses(model: Any, data: list[dict[str, Any]]) -> tuple[float, float]:
    """Auxiliary and language loss."""
    model.eval()
    output = model(**collate(data))
    return float(output.aux_loss), float(output.lm_loss)


@pytest.mark.parametrize("family, attention", FAMILIES)
def test_a_run_teaches_the_routers(family, attention, tmp_path) -> None:
    """Twenty steps on a pool of 16 documents take the auxiliary loss from chance, ln 16, to a fifth and the language
    loss down too."""
    model, data = toy(family, attention), rows(16)
    before = losses(model, data)
    Trainer(
        model,
        arguments(tmp_path, max_steps=20, per_device_train_batch_size=16),
        train_dataset=data,
        data_collator=collate,
    ).train()
    after = losses(model, data)
    assert before[0] > 2.0 and after[0] < 0.2 * before[0]
    assert after[1] < 0.8 * before[1]


@pytest.mark.parametrize("form", ["list", "dataset"])
def test_only_the_columns_of_the_forward_reach_the_collator(form, tmp_path) -> None:
    """The forward's signature names all our arguments, so `remove_unused_columns` keeps them and drops the rest."""
    seen: list[set[str]] = []

    def collator(batch: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(set(row) for row in batch)
        return collate(batch)

    data = rows(4)
    Trainer(
        toy(),
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=4),
        train_dataset=data if form == "list" else datasets.Dataset.from_list(data),
        data_collator=collator,
    ).train()
    assert seen and all(columns == {"input_ids", "labels", "documents"} for columns in seen)


# Steps and accumulation -----------------------------------------------------------------------------------------------


def samples_of_four(form: str) -> list[dict[str, Any]]:
    """The questions of `four`, unpadded, one row each."""
    made = four()
    batches = [made.only(number).form(form) for number in range(4)]
    names = [name for name in FILL | {"routing_mask": 0, "answer_mask": 0} if name in batches[0]]
    return [{name: batch[name][0].tolist() for name in names} for batch in batches]


class Padder:
    """Pads rows to a batch; on a pool all batches share the same documents."""

    def __init__(self, form: str) -> None:
        self.documents = {"documents": four().documents} if form == "pool" else {}

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: pad([row[name] for row in batch], FILL.get(name, False)) for name in batch[0]}
        return {**columns, **self.documents}


def one_step(directory: Path, form: str, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    """How one step of plain gradient descent with learning rate 1 changes the weights."""
    model = model or setup(answer_loss_weight=0.5, score_bias=True).model
    before = weights(model)
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **kwargs}
    Trainer(
        model,
        arguments(directory, **settings),
        train_dataset=samples_of_four(form),
        data_collator=Padder(form),
    ).train()
    return {name: weight.detach() - before[name] for name, weight in model.named_parameters()}


def expected_step(form: str) -> dict[str, Tensor]:
    """The same by hand: the gradient of all four samples' loss."""
    model = setup(answer_loss_weight=0.5, score_bias=True).model.train()
    batch = Padder(form)(samples_of_four(form))
    loss = model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss
    loss.backward()
    return {name: -weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("size, accumulation", [(4, 1), (3, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_accumulated_steps_are_one_step(form, size, accumulation, tmp_path) -> None:
    """Four samples, with 2 to 5 labels and one of them without positives, make the same step in any micro-batches."""
    ours = one_step(tmp_path, form, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    assert_same_gradients(ours, expected_step(form))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_makes_the_same_step(form, tmp_path) -> None:
    """Turned on by Trainer's own argument."""
    ours = one_step(tmp_path, form, per_device_train_batch_size=4, **checkpointing())
    assert_same_gradients(ours, expected_step(form))


def test_bf16_trains_and_evaluates(tmp_path) -> None:
    """Under Trainer's autocast the loss is near that in float32 and falls, and the weights stay float32."""
    model, data = toy(), rows(16)
    sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    options = {"train_dataset": data, "eval_dataset": data, "data_collator": collate}
    with torch.no_grad():
        exact = float(model.eval()(**collate(data)).loss)
    trainer = Trainer(model, arguments(tmp_path, bf16=True, max_steps=5, **sizes), **options)
    rough = trainer.evaluate()["eval_loss"]
    assert rough != exact and rough == pytest.approx(exact, rel=2**-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * rough
    assert all(weight.dtype == torch.float32 and bool(weight.isfinite().all()) for weight in model.parameters())


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluator(directory: Path, model: Any, **kwargs: Any) -> Trainer:
    """Batches of 2, 2 and 1."""
    return Trainer(
        model,
        arguments(directory, per_device_eval_batch_size=2),
        eval_dataset=rows(5),
        data_collator=collate,
        **kwargs,
    )


def expected_evaluation(model: Any) -> tuple[float, list[Tensor]]:
    """Loss per sample and logits of the same batches, by hand."""
    data, total, logits = rows(5), 0.0, []
    model.eval()
    with torch.no_grad():
        for start in (0, 2, 4):
            output = model(**collate(data[start : start + 2]))
            total += float(output.loss) * len(output.logits)
            logits.append(output.logits)
    return total / 5, logits


@pytest.mark.parametrize("adapters", [False, True], ids=["model", "adapters"])
def test_evaluation_of_the_loss(adapters, tmp_path) -> None:
    """`evaluate()` with labels and no metrics finds the loss, though not every argument of the forward is given."""
    model = toy()
    wrapped = get_peft_model(model, peft_config(model)) if adapters else model
    metrics = evaluator(tmp_path, wrapped).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected_evaluation(wrapped)[0], rel=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["model", "adapters"])
def test_evaluation_of_predictions(adapters, tmp_path) -> None:
    """Metrics are given logits and labels alone; what the output holds besides them does not reach the gathering."""
    model = toy()
    wrapped = get_peft_model(model, peft_config(model)) if adapters else model
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"samples": float(len(prediction.predictions))}

    trainer = evaluator(tmp_path, wrapped, compute_metrics=metrics)
    found = trainer.evaluate()
    loss, logits = expected_evaluation(wrapped)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5) and found["eval_samples"] == 5.0
    (prediction,) = seen
    labels = collate(rows(5))["labels"].numpy()
    assert isinstance(prediction.predictions, np.ndarray)
    assert np.array_equal(prediction.label_ids, labels)
    for number, expected in enumerate(row for batch in logits for row in batch):
        assert_same(torch.tensor(prediction.predictions[number, : len(expected)]), expected)
    again = trainer.predict(rows(5))
    assert np.array_equal(again.predictions, prediction.predictions)


def test_evaluation_of_packed_rows(tmp_path) -> None:
    """The same for packed rows, with an answer loss."""
    model = setup(answer_loss_weight=0.5).model
    data = samples_of_four("packed")
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=data,
        data_collator=Padder("packed"),
        compute_metrics=lambda prediction: {"width": prediction.predictions.shape[1]},
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        batch = Padder("packed")(data)
        items = (batch["labels"][:, 1:] != -100).sum()
        allowed = [float(model(**batch).loss), float(model(**batch, num_items_in_batch=items).loss)]
    # Whether the auxiliary loss is weighed by labels here is the Trainer's choice, which differs between versions.
    assert any(metrics["eval_loss"] == pytest.approx(loss, rel=1e-5) for loss in allowed)
    assert metrics["eval_width"] == batch["input_ids"].shape[1]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def run(directory: Path, model: Any, resume: Path | None = None, **kwargs: Any) -> Trainer:
    """Four steps of AdamW, saved after each second; or the rest of them."""
    trainer = Trainer(
        model,
        arguments(directory, max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2, **kwargs),
        train_dataset=rows(8),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.state.global_step == 4
    return trainer


@pytest.mark.parametrize("family, attention", FAMILIES[1:])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(family, attention, tmp_path) -> None:
    """Weights and optimizer come back from a checkpoint, which is a model of its own as well."""
    model = toy(family, attention, score_bias=True)
    start = weights(model)
    run(tmp_path / "whole", model)
    finished = weights(model)
    assert all(not torch.equal(finished[name], start[name]) for name in start if "router_" in name)
    saved = tmp_path / "whole" / "checkpoint-2"
    resumed = toy(family, attention, score_bias=True)
    run(tmp_path / "rest", resumed, resume=saved)
    for name, weight in weights(resumed).items():
        assert_same(weight, finished[name], tolerance=1e-6)
    halfway = weights(MSAForCausalLM.from_pretrained(saved))
    assert halfway.keys() == finished.keys()
    assert not any(torch.equal(halfway[name], finished[name]) for name in finished if "router_" in name)


@pytest.mark.parametrize("gradient_checkpointing", [True])
def test_adapters_train_save_and_resume(gradient_checkpointing, tmp_path) -> None:
    """Under Trainer only adapters and routers move; a resumed run ends where an uninterrupted one does, and the saved
    adapter loads onto a fresh model."""
    extra = checkpointing() if gradient_checkpointing else {}

    def adapted() -> Any:
        torch.manual_seed(0)
        model = toy(score_bias=True)
        return get_peft_model(model, peft_config(model, r=4, init_lora_weights=False))

    model = adapted()
    start = weights(model)
    run(tmp_path / "whole", model, **extra)
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, start[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    resumed = adapted()
    run(tmp_path / "rest", resumed, resume=tmp_path / "whole" / "checkpoint-2", **extra)
    for name, weight in weights(resumed).items():
        assert_same(weight, weights(model)[name], tolerance=1e-6)
    loaded = PeftModel.from_pretrained(toy(score_bias=True), str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(loaded, rows(8)) == losses(model, rows(8))


def test_adapters_with_and_without_checkpointing_end_alike(tmp_path) -> None:
    """Four steps of adapters and routers, with Trainer's gradient checkpointing and without."""
    found = []
    for number, extra in enumerate(({}, checkpointing())):
        torch.manual_seed(0)
        model = toy(score_bias=True)
        wrapped = get_peft_model(model, peft_config(model, r=4, init_lora_weights=False))
        run(tmp_path / str(number), wrapped, **extra)
        found.append(weights(wrapped))
    for name, weight in found[0].items():
        assert_same(found[1][name], weight)


# Options of Trainer that reach into the loss --------------------------------------------------------------------------


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's: twice the usual one."""
    logits, labels = outputs["logits"][:, :-1], labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return 2.0 * total / num_items_in_batch


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smoothing": ({"label_smoothing_factor": 0.3}, {}),
    "function": ({}, {"compute_loss_func": cross_entropy}),
}


def language_loss(option: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What an option makes of the language loss, by its definition."""
    if option == "function":
        return cross_entropy({"logits": logits}, labels, (labels[:, 1:] != -100).sum())
    seen = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(logits[:, :-1][seen], labels[:, 1:][seen], label_smoothing=0.3)


@pytest.mark.parametrize(("form", "option"), zip(FORMS, OPTIONS, strict=True))
def test_a_loss_of_trainers_own_beside_documents_is_refused(form, option, tmp_path) -> None:
    """Trainer would compute it without the model, and no router would learn; the message says what computes both."""
    settings, extra = OPTIONS[option]
    trainer = Trainer(
        setup().model,
        arguments(tmp_path, max_steps=1, **settings),
        train_dataset=samples_of_four(form),
        eval_dataset=samples_of_four(form),
        data_collator=Padder(form),
        **extra,
    )
    with pytest.raises(ValueError, match=r"trains no router.*MemoryTrainer"):
        trainer.train()
    with pytest.raises(ValueError, match=r"trains no router.*MemoryTrainer"):
        trainer.evaluate()


@pytest.mark.parametrize("size, accumulation", [(3, 2)])
@pytest.mark.parametrize(("form", "option"), zip(FORMS, OPTIONS, strict=True))
def test_memory_trainer_puts_it_in_the_place_of_the_language_loss(form, option, size, accumulation, tmp_path) -> None:
    """One step equals the gradient by hand, auxiliary and answer losses included, in any micro-batches; what was set
    aside for it is back afterwards."""
    settings, extra = OPTIONS[option]
    weights_of = {"answer_loss_weight": 0.5, "lm_loss_weight": 0.7, "score_bias": True}
    model, expected = setup(**weights_of).model, setup(**weights_of).model.train()
    before, own = weights(model), model.loss_function
    batch = Padder(form)(samples_of_four(form))
    items = (batch["labels"][:, 1:] != -100).sum()
    output = expected(**batch, num_items_in_batch=items)
    marked = batch["labels"].masked_fill(~batch["answer_mask"].bool(), -100)
    loss = expected.config.aux_loss_weight * output.aux_loss
    loss = loss + 0.7 * language_loss(option, output.logits, batch["labels"])
    (loss + 0.5 * language_loss(option, output.logits, marked)).backward()

    trainer = MemoryTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **settings,
        ),
        train_dataset=samples_of_four(form),
        data_collator=Padder(form),
        **extra,
    )
    trainer.train()
    found = {name: before[name] - weight for name, weight in weights(model).items()}
    assert_same_gradients(found, {name: weight.grad for name, weight in expected.named_parameters()}, 1e-4)
    assert any(bool(change.any()) for name, change in found.items() if "router_q" in name)
    assert model.loss_function is own and trainer.compute_loss_func is extra.get("compute_loss_func")
    assert (trainer.label_smoother is None) == (option == "function")


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_parts_that_are_logged_make_up_the_loss(every, tmp_path) -> None:
    """Also where the last step of an epoch has fewer batches (here 3 and 2), rows have different numbers of labels, and
    an earlier run of the same trainer ended between two lines of the log."""
    data = rows(10)
    for number, row in enumerate(data):
        further = [50 + number] * (number % 4)
        row["input_ids"], row["labels"] = row["input_ids"] + further, row["labels"] + further
    model = toy(lm_loss_weight=0.7)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    log = {"logging_strategy": "steps", "logging_steps": every}
    trainer = MemoryTrainer(
        model, arguments(tmp_path, learning_rate=0.0, **settings, **log), train_dataset=data, data_collator=collate
    )
    for steps in (3, -1):
        trainer.args.max_steps = steps
        trainer.train()
    assert len(logged(trainer)) == 4 // every
    for row in logged(trainer):
        assert 0.7 * row["lm_loss"] + row["aux_loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_parts_without_labels_are_means_of_batches(tmp_path) -> None:
    """Where nothing counts labels, Trainer divides by the batches of each step, and so does the log."""
    data = [{name: row[name] for name in ("input_ids", "documents")} for row in rows(10)]

    def unlabeled(batch: list[dict[str, Any]]) -> dict[str, Any]:
        made = collate([{**row, "labels": row["input_ids"]} for row in batch])
        return {name: value for name, value in made.items() if name != "labels"}

    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    log = {"logging_strategy": "steps", "logging_steps": 1}
    trainer = MemoryTrainer(
        toy(), arguments(tmp_path, learning_rate=0.0, **settings, **log), train_dataset=data, data_collator=unlabeled
    )
    trainer.train()
    assert [row["aux_loss"] for row in logged(trainer)] == pytest.approx([row["loss"] for row in logged(trainer)])
    assert len(logged(trainer)) == 2 and "lm_loss" not in logged(trainer)[0]


def test_options_that_leave_the_loss_alone(tmp_path) -> None:
    """Noise in embeddings changes the step, evaluation of losses alone does not change them."""
    quiet = one_step(tmp_path, "pool")
    noisy = one_step(tmp_path, "pool", neftune_noise_alpha=5.0)
    assert all(bool(change.isfinite().all()) for change in noisy.values())
    assert any(not torch.equal(noisy[name], quiet[name]) for name in quiet if "router_q" in name)
    model = setup().model
    made = four().pool()
    with torch.no_grad():
        assert torch.equal(model(**made, skip_logits=True).loss, model(**made).loss)


def test_smoothing_without_documents_is_the_bases(tmp_path) -> None:
    """Labels are shifted for a model with a memory as for its base."""
    made = setup()
    losses_found = []
    for model in (made.base, made.model):
        trainer = Trainer(
            model,
            arguments(tmp_path, label_smoothing_factor=0.3),
            eval_dataset=[{"input_ids": row, "labels": row} for row in four().documents[2:3] * 2],
        )
        losses_found.append(trainer.evaluate()["eval_loss"])
    assert losses_found[0] == losses_found[1]
