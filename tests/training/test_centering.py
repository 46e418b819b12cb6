"""Routers in closed form: the mean is left out, and variance is equal in every direction."""

import pytest
import torch
from families import base_model

from msa_hf import MSAForCausalLM
from msa_hf.training.centering import center_routers
from msa_hf.training.contrastive import TokenRows, encode_rows


def sample() -> list[TokenRows]:
    torch.manual_seed(0)
    return [TokenRows(torch.randint(3, 128, (40, 12)), torch.randint(5, 13, (40,))) for _ in range(3)]


def keys_of(model: MSAForCausalLM) -> torch.Tensor:
    """Routing keys before they are normalized, [C, G, D]."""
    model.config.similarity = "dot"
    with torch.no_grad():
        keys = torch.cat([encode_rows(model, rows)[2].routing_keys for rows in sample()])
    model.config.similarity = "cosine"
    return keys.unflatten(1, (2, -1))


@pytest.mark.parametrize("how", ["center", "whiten"])
def test_keys_lie_around_zero(how: str) -> None:
    model = MSAForCausalLM.from_base(base_model("llama"), memory_layers=[2], chunk_size=4)
    before = keys_of(model)
    center_routers(model, sample(), how)
    after = keys_of(model)
    assert before.mean(0).norm() / before.std(0).norm() > 0.2
    assert after.mean(0).norm() / after.std(0).norm() < 0.02


def test_whitened_keys_have_equal_variance_and_queries_share_them() -> None:
    model = MSAForCausalLM.from_base(base_model("llama"), memory_layers=[2], chunk_size=4)
    center_routers(model, sample(), "whiten", smallest=0.0)
    keys = keys_of(model).flatten(1)
    torch.testing.assert_close(keys.T @ keys / len(keys), torch.eye(16), atol=0.01, rtol=0)
    attention = model.model.layers[2].self_attn
    query, key = attention.router_q_proj.weight, attention.router_k_proj.weight
    torch.testing.assert_close(query.unflatten(0, (2, 2, 8))[:, 1], key.unflatten(0, (2, 8)))


def test_what_cannot_be_centered_is_refused() -> None:
    model = MSAForCausalLM.from_base(base_model("llama"), memory_layers=[2])
    with pytest.raises(ValueError, match="`how` must be one of"):
        center_routers(model, sample(), "rotate")
    shared = MSAForCausalLM.from_base(base_model("llama"), memory_layers=[2], shared_router=True)
    with pytest.raises(ValueError, match="shared_router"):
        center_routers(shared, sample())
