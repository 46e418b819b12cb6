"""Routing at the 4B shape over a million tokens: the right documents, in bounded memory."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msa_hf.model.routing_msa import score_documents, select_documents

CHUNKS, GROUPS, HEADS, DIM, LAYERS = 15_625, 8, 32, 128, 18
MOST_ELEMENTS = 1 << 24


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for item in output if isinstance(output, tuple | list) else (output,):
            # An expanded or transposed view holds no memory of its own; what counts is its storage.
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // max(item.element_size(), 1))
        return output


def bank_layer(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing keys [C, G * D] in bfloat16 and offsets of documents of 1 to 40 chunks."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(CHUNKS, GROUPS, DIM, generator=generator), dim=-1)
    lengths = torch.randint(1, 41, (CHUNKS,), generator=generator)
    ends = lengths.cumsum(0)
    ends = torch.cat([ends[ends < CHUNKS], torch.tensor([CHUNKS])])
    return keys.flatten(1).bfloat16(), torch.nn.functional.pad(ends, (1, 0))


@torch.no_grad()
def test_a_million_tokens_through_all_layers() -> None:
    """A question made of a document's own routing keys finds that document in each of 18 layers."""
    keys, offsets = bank_layer(0)
    wanted = [7 * layer + 3 for layer in range(LAYERS)]
    for layer in range(LAYERS):
        chunk = int(offsets[wanted[layer]])
        query = keys[chunk].float().view(GROUPS, DIM).repeat_interleave(HEADS // GROUPS, 0)
        noise = torch.randn(1, 48, HEADS, DIM, generator=torch.Generator().manual_seed(layer))
        noise[0, layer] = query
        scores = score_documents(noise, torch.ones(1, 48, dtype=torch.bool), keys, offsets)
        documents, best = select_documents(scores, 16)
        assert documents[0, 0] == wanted[layer]
        assert best[0, 0] == pytest.approx(1.0, abs=1e-3)
        assert bool((best[0].diff() <= 0).all())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [48, 4096])
def test_no_tensor_of_tokens_times_chunks(tokens: int) -> None:
    """Nothing larger than a tile of keys or the prompt's own queries is ever made."""
    keys, offsets = bank_layer(1)
    query = torch.randn(1, tokens, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    with LargestTensor() as largest:
        score_documents(query, torch.ones(1, tokens, dtype=torch.bool), keys, offsets)
    assert keys.numel() <= MOST_ELEMENTS < 4096 * CHUNKS
    assert largest.elements <= MOST_ELEMENTS
