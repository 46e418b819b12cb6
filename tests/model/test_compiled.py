"""`torch.compile` with its default backend, which alone turns what it traces into machine code.

The compiler takes most of the time of these tests, of which there are therefore few, on the smallest model.
"""

import shutil

import pytest
import torch
from setups import assert_same, batch_of, samples_of, setup, tokens

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which the backend needs")
QUESTIONS = tokens(9, 5, seed=3)


@torch.no_grad()
def test_a_forward() -> None:
    """A compiled forward over padded questions chooses the same documents and has the same logits."""
    made, batch = setup("qwen3", "sdpa", base={"num_hidden_layers": 1}, memory_layers=[0]), batch_of(QUESTIONS)
    expected = made.model(**batch, memory=made.bank)
    torch.compiler.reset()
    try:
        found = torch.compile(made.model)(**batch, memory=made.bank)
    finally:
        torch.compiler.reset()
    assert torch.equal(found.routing[0].documents, expected.routing[0].documents)
    for ours, theirs in zip(samples_of(found.logits, batch), samples_of(expected.logits, batch), strict=True):
        assert_same(ours, theirs)
