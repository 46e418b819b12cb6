"""The shipped checkpoint, which reads what it was trained on, for all tests of benchmarks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.generation import PromptProtocol

TINY = Path(__file__).parents[2] / "model_cards" / "msa-hf-tiny"


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any, PromptProtocol]:
    model = MSAForCausalLM.from_pretrained(str(TINY), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(str(TINY)), PromptProtocol.from_pretrained(TINY)
