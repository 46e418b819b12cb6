"""`torch.compile` with its default backend, which alone turns what it traces into machine code.

The compiler takes most of the time of these tests, of which there are therefore few, on the smallest model.
"""

import shutil
from typing import Any

import pytest
import torch
from setups import assert_same, batch_of, setup, tokens

from msa_hf.model.compat_msa import cache_of

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which the backend needs")


def test_forward_and_generate() -> None:
    """A compiled forward chooses the same documents, and generate() through it gives the same tokens."""
    made = setup("qwen3", "sdpa", base={"num_hidden_layers": 1}, memory_layers=[0])
    options: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_logits": True}
    options |= {"memory": made.bank, "return_dict_in_generate": True}
    batch = batch_of(tokens(9, 5, seed=3))
    expected = made.model.generate(**batch, **options)
    torch.compiler.reset()
    made.model.forward = torch.compile(made.model.forward)
    try:
        found = made.model.generate(**batch, **options)
    finally:
        del made.model.forward
        torch.compiler.reset()
    ours, theirs = (cache_of(answer).contexts[0].documents for answer in (found, expected))
    assert torch.equal(ours, theirs)
    assert torch.equal(found.sequences, expected.sequences)
    for step in range(2):
        assert_same(found.logits[step], expected.logits[step])
