"""PEFT's tests of decoders over a tiny model: the plain base, ours without a memory, and ours with one bound.

Run by scripts/peer_suites.sh, which puts the `tests` of PEFT's source distribution on the path. Models that the tests
name on the hub are replaced by the tiny one.
"""

import atexit
import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import families
import memory_bound
import placeholders
import pytest
import torch
import transformers

import msa_hf

placeholders.fill_in()

from tests import test_decoder_models as suite  # noqa: E402

FAMILY = "Llama"
DIRECTORY = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, DIRECTORY, ignore_errors=True)
# PEFT's tests look for the family in the path.
MODELS = {form: str(DIRECTORY / form / f"tiny-random-{FAMILY}ForCausalLM") for form in ("plain", "made", "memory")}


def _save_models() -> None:
    torch.manual_seed(0)
    plain = families.classes(FAMILY, "plain")[1](families.config(FAMILY, "plain"))
    plain.save_pretrained(MODELS["plain"])
    fields = {"chunk_size": 2, "top_k": 2, "router_init": "random"}
    ours = msa_hf.MSAForCausalLM.from_base(MODELS["plain"], **fields)
    for form in ("made", "memory"):
        ours.save_pretrained(MODELS[form])


_save_models()


class Loader:
    """Loads the tiny model of a form, whatever the name on the hub."""

    form = "plain"

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        path = name if os.path.isdir(name) else MODELS[cls.form]
        kind = memory_bound.MSAForCausalLM if cls.form == "memory" else transformers.AutoModelForCausalLM
        return kind.from_pretrained(path, *args, **kwargs)


def _on(mark: pytest.Mark, form: str) -> pytest.MarkDecorator:
    """The mark, with the tiny model where it names models."""
    arguments = (mark.args[0], [MODELS[form]]) if mark.args[:1] == ("model_id",) else mark.args
    return getattr(pytest.mark, mark.name)(*arguments, **mark.kwargs)


def _tests_on(form: str) -> type:
    """The tests of one form."""
    loader = type(f"Loader_{form}", (Loader,), {"form": form})

    @pytest.fixture(autouse=True)
    def load_the_tiny_model(self: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(suite, "AutoModelForCausalLM", loader)

    members: dict[str, Any] = {"transformers_class": loader, "load_the_tiny_model": load_the_tiny_model}
    for name in dir(suite.TestDecoderModels):
        test = getattr(suite.TestDecoderModels, name)
        if name.startswith("test_"):

            def renewed(*args: Any, _test: Any = test, **kwargs: Any) -> Any:
                return _test(*args, **kwargs)

            renewed.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
            renewed.pytestmark = [_on(mark, form).mark for mark in getattr(test, "pytestmark", [])]  # type: ignore[attr-defined]
            members[name] = renewed
    return type(f"Test{FAMILY}_{form}", (suite.TestDecoderModels,), members)


for form in MODELS:
    globals()[f"Test{FAMILY}_{form}"] = _tests_on(form)
