"""Masks that the host knows: documents are given to a model without a look at what lies on its device."""

import pytest
import torch
from families import FAMILIES
from sums import Sums
from test_encoding import model_of, random_documents
from torch import Tensor

from msa_hf.model.known_masks_msa import Ones, ones_like


def test_what_a_mask_says() -> None:
    """What is known is there without a look; the rest is as of any tensor, and of no kind that claims to be ones."""
    ids = torch.arange(6).view(2, 3)
    mask = ones_like(ids)
    with Sums() as sums:
        for known in (mask, mask.to(torch.bool), mask.bool().long(), mask.to(device="cpu", dtype=torch.bool)):
            assert type(known) is Ones
            assert known.sum() == torch.sum(known) == known.numel() == 6 and known.all() and torch.all(known)
    assert not sums.shapes
    assert mask.shape == (2, 3) and mask.dtype == torch.int64 and torch.equal(mask.as_subclass(Tensor), ids // 9 + 1)
    for other in (mask - 1, mask.eq(0), mask[:, 1:], ~mask.bool(), mask.cumsum(1), mask.clone().mul_(0)):
        assert type(other) is Tensor
    assert (
        mask.sum(1).tolist() == [3, 3] and not (mask == 0).any() and all(type(part) is Tensor for part in mask.max(1))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_launched_without_a_look(family: str) -> None:
    """Of a mask on a GPU it would wait for all batches before."""
    model, rows = model_of(family), random_documents([5, 9, 3])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    with torch.no_grad(), Sums() as sums:
        found = model.encode_batch(ids, torch.tensor([5, 9, 3]))
    assert ids.shape not in sums.shapes
    assert all(type(part) is Tensor for item in found.values() for part in (item.routing_keys, item.pooled_kv))
