"""What commands say of a model they have loaded."""

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.config import PromptLearningConfig
from setups import setup

from msa_hf.cli.adapters import LEARNED_PROMPTS
from msa_hf.cli.loading import slow_dtype


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [
        ("AVX2", torch.bfloat16, "no instructions for bfloat16"),
        ("DEFAULT", torch.float16, "no instructions for float16"),
        ("AVX2", torch.float32, ""),
        ("AVX512", torch.bfloat16, ""),
        ("SVE256", torch.bfloat16, ""),
    ],
)
def test_a_dtype_that_is_slow_here_is_named(
    capability: str, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the option that is faster; results are those of the checkpoint's dtype all the same."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    note = slow_dtype(setup().model.to(dtype))
    assert said in note and bool(note) == bool(said) == ("--dtype float32" in note)


def test_the_learned_prompts_are_those_of_peft() -> None:
    known = {kind.value for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(made, PromptLearningConfig)}
    assert known <= set(LEARNED_PROMPTS)
