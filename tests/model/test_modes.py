"""Evaluation mode is lent: every entry leaves each module's mode as it found it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from setups import setup, tokens

from msa_hf.model.modes_msa import evaluating


def modes(model: Any) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.fixture
def model() -> Any:
    """In training mode, but for a frozen layer in evaluation mode and a single module inside it in training mode."""
    model = setup().model.train()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.train()
    return model


def test_modules_get_their_own_mode_back(model: Any) -> None:
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model).values()) and not torch.is_grad_enabled()
    assert modes(model) == before and torch.is_grad_enabled()
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert modes(model) == before


def test_overridden_train_is_left_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.model.layers[0]), "train", lambda *_: pytest.fail("has effects that nothing undoes"))
    with evaluating(model):
        pass


def test_threads_at_work_on_one_model(model: Any) -> None:
    """While one is still at work the model stays in evaluation mode; the last to leave gives the modes back."""
    before = modes(model)
    inside, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def work() -> None:
        with evaluating(model):
            inside.set()
            assert leave.wait(10)
            seen.append(any(modes(model).values()))

    thread = threading.Thread(target=work)
    with evaluating(model.model):
        thread.start()
        assert inside.wait(10)
    leave.set()
    thread.join()
    assert seen == [False] and modes(model) == before


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "encode": lambda model: model.encode_documents(tokens(4, 5), show_progress=False),
    "encode rows": lambda model: model.encode_rows(
        ["a"], [torch.tensor([5, 6])], bank_device="cpu", counted=len
    ).layers(),
    "encode that fails": lambda model: model.encode_documents([[1], []], show_progress=False),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_encoding(entry: str, model: Any) -> None:
    before, training = modes(model), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda *_: training.append(torch.is_grad_enabled() or any(module.training for module in model.modules()))
    )
    try:
        ENTRIES[entry](model)
    except ValueError:
        assert "fails" in entry
    assert modes(model) == before and training and not any(training)
