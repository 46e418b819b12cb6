"""Training spread over processes: what waits for every parameter's gradient, and what cuts parameters in parts."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import logging_processes
import pytest
import torch
import torch.distributed as dist
import two_processes
from forking import ended, forked
from peft import get_peft_model
from servers import free_port
from setups import batch_of, setup, tokens
from steps import assert_same_gradients, gradients, step
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from msa_hf.model.gradients_msa import ROUTER_MODULES
from msa_hf.training import peft_config

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# What a loss may leave out: the routers, those of layers without auxiliary loss, the scalars of the score bias, ...
BATCHES = ("plain", "unlabeled positives", "no positives", "pool", "packed", "bank")
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "bias": {"score_bias": True},
    "one aux layer": {"memory_layers": [0, 2, 3], "aux_layers": [2], "score_bias": True},
    "shared": {"shared_router": True, "score_bias": True},
}


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone, in which the wrappers check as they do among many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch(kind: str, model: Any) -> dict[str, Any]:
    """Arguments of a training step."""
    made = step().pool()
    questions = {name: made[name] for name in ("input_ids", "attention_mask", "labels")}
    if kind == "plain":
        return questions
    if kind == "bank":
        return {**questions, "memory": model.encode_documents(step().documents, show_progress=False)}
    if kind == "packed":
        return step().packed()
    absent = {"unlabeled positives": ("labels", "answer_mask"), "no positives": ("positive_docs",)}.get(kind, ())
    return {name: value for name, value in made.items() if name not in absent}


def router_layers(found: dict[str, Tensor], model: Any) -> dict[str, list[bool]]:
    """Layer -> whether each of its trained router parameters has a gradient."""
    layers: dict[str, list[bool]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad and any(part in name for part in ROUTER_MODULES):
            layers.setdefault(name.partition("router_")[0], []).append(name in found)
    return layers


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("kind", BATCHES)
def test_all_router_parameters_of_a_layer_get_a_gradient_or_none(kind, options) -> None:
    """None only in layers above all that the loss looks at; where nothing is asked of the routers it is zero."""
    model = setup(answer_loss_weight=0.5, **MODELS[options]).model.train()
    inputs = batch(kind, model)
    found = gradients(model, model(**inputs).loss)
    layers = router_layers(found, model)
    assert layers and all(len(set(got)) == 1 for got in layers.values())
    if "labels" in inputs:
        assert all(all(got) for got in layers.values())
    if kind == "plain":
        assert not any(bool(gradient.any()) for name, gradient in found.items() if "router_" in name)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("options", MODELS)
def test_ddp_trains_on_any_batches(options, adapters, one_process) -> None:
    """In turn with and without documents, positives and labels: no step waits for a gradient that never comes."""
    model = setup(answer_loss_weight=0.5, **MODELS[options]).model.train()
    if adapters:
        model = get_peft_model(model, peft_config(model, target_modules=["q_proj"]))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for kind in BATCHES:
        if kind == "unlabeled positives":
            continue  # without a loss of the language, weights of the base get no gradient either
        optimizer.zero_grad()
        wrapped(**batch(kind, model)).loss.backward()
        optimizer.step()


# FSDP -----------------------------------------------------------------------------------------------------------------


def sharded(model: Any, checkpointing: bool = False) -> Any:
    """The model, each layer and the rest of it cut in parts."""
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients put together from their parts."""
    return {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in found.items()}


@pytest.mark.parametrize("checkpointing", [True], ids=["checkpointing"])
@pytest.mark.parametrize("options", MODELS)
def test_fsdp_has_the_gradients_of_one_process(options, checkpointing, one_process) -> None:
    """Of every kind of batch, also of losses that no layer's output leads to."""
    model = setup(answer_loss_weight=0.5, **MODELS[options]).model.train()
    inputs = {kind: batch(kind, model) for kind in BATCHES}
    expected = {kind: gradients(model, model(**arguments).loss) for kind, arguments in inputs.items()}
    scored = {name: inputs["bank"][name] for name in ("input_ids", "attention_mask", "memory")}
    scored["output_document_scores"] = True
    by_scores = gradients(model, model(**scored).routing[3].document_scores.square().sum())
    model = sharded(model, checkpointing)
    for kind, arguments in inputs.items():
        found = whole(gradients(model, model(**arguments).loss))
        if kind == "unlabeled positives":  # FSDP makes zeros of what one process leaves out
            found = {name: gradient for name, gradient in found.items() if name in expected[kind]}
        assert_same_gradients(found, expected[kind])
    found = whole(gradients(model, model(**scored).routing[3].document_scores.square().sum()))
    assert_same_gradients({name: found[name] for name in by_scores}, by_scores)


def test_fsdp_encodes_and_generates(one_process) -> None:
    """A sharded model that has not run yet makes the whole model's bank, generates its tokens, and trains on."""
    made = setup(score_bias=True)
    model = sharded(copy.deepcopy(made.model))
    bank = model.encode_documents(made.documents, show_progress=False)
    for layer in made.model.config.memory_layers:
        assert torch.equal(bank.layer(layer).pooled_kv, made.bank.layer(layer).pooled_kv)
    questions = batch_of(tokens(6, 3, 9, seed=5))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = made.model.generate(**questions, memory=made.bank, **options)
    for memory in (bank, made.bank):
        assert torch.equal(model.generate(**questions, memory=memory, **options), expected)
    inputs = batch("pool", model)
    found = whole(gradients(model.train(), model(**inputs).loss))
    assert_same_gradients(found, gradients(made.model.train(), made.model(**inputs).loss))


# Two processes --------------------------------------------------------------------------------------------------------


def test_two_processes_step_as_one_does(tmp_path) -> None:
    """Under DDP and FSDP, each with its half of the questions, one of them with a half that asks nothing of routers."""
    both = [forked(partial(two_processes.main, str(tmp_path / "store"), rank)) for rank in range(2)]
    assert ended(*both) == [0, 0]


@pytest.mark.parametrize("average", [True, False], ids=["all-labels", "own-labels"])
def test_parts_logged_by_two_processes_make_up_the_loss(average, tmp_path) -> None:
    """Whether a process divides by the labels of all of them or by its own, also in a shorter step."""
    port = free_port()
    both = [forked(partial(logging_processes.main, tmp_path, port, average, rank)) for rank in range(2)]
    assert ended(*both) == [0, 0]
