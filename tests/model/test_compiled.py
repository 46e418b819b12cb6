"""`torch.compile` with its default backend, which alone turns what it traces into machine code.

The compiler takes most of the time of these tests, of which there are therefore few, on the smallest model.
"""

import shutil
from typing import Any

import pytest
import torch
from setups import assert_same, batch_of, setup, tokens

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which the backend needs")


def test_forward_and_generate() -> None:
    """A compiled forward chooses the same documents, and generate() through it gives the same tokens."""
    made = setup("qwen3", "sdpa", base={"num_hidden_layers": 1}, memory_layers=[0])
    options: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    batch = batch_of(tokens(9, 5, seed=3))
    expected = made.model.generate(**batch, memory=made.bank, **options)
    with torch.no_grad():
        eager = made.model(**batch, memory=made.bank)
    torch.compiler.reset()
    made.model.forward = torch.compile(made.model.forward)
    try:
        with torch.no_grad():
            compiled = made.model(**batch, memory=made.bank)
        found = made.model.generate(**batch, memory=made.bank, **options)
    finally:
        del made.model.forward
        torch.compiler.reset()
    real = batch["attention_mask"].bool()
    assert_same(compiled.logits[real], eager.logits[real])
    assert torch.equal(compiled.routing[0].documents, eager.routing[0].documents)
    assert torch.equal(found, expected)
