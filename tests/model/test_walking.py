"""The modules and tensors of a model are those that `nn.Module` names, whatever changed since the last walk."""

import gc
import weakref

import torch
from torch import nn

from msa_hf.model.walking_msa import Met, met_in


def same(model: nn.Module) -> Met:
    """What is met: modules and tensors of now."""
    met, kinds = met_in(model), (nn.Linear, nn.ModuleList)
    assert [id(item) for item in met.modules] == [id(item) for item in model.modules()]
    tensors = {id(item) for item in met.tensors()}
    assert tensors == {id(item) for item in (*model.parameters(), *model.buffers())}
    assert met.of(kinds) == [item for item in model.modules() if isinstance(item, kinds)]
    return met


def test_what_changed_is_met() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, nn.ReLU(), nn.ModuleList([second, nn.BatchNorm1d(2)]))
    model.again = second  # held twice
    same(model)
    first.weight = nn.Parameter(torch.ones(2, 2))
    same(model)
    first.register_buffer("more", torch.ones(1))
    same(model)
    del first.bias
    same(model)
    model[2][0] = nn.Linear(2, 2)
    same(model)
    for _ in range(20):  # one that may lie where the last one lay
        model[1] = nn.ReLU()
        same(model)
    model[1].inner = nn.Linear(2, 2)
    same(model)
    model.none = None
    same(model)
    model[1].__class__ = nn.Linear
    same(model)
    model[1].inner._modules = {"deep": nn.ModuleList()}
    same(model)
    del model.again
    same(model)


def test_a_walk_keeps_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    last = weakref.ref(model[1])
    met_in(model)
    del model[1]
    assert last() is None
    whole = weakref.ref(model)
    model[0].owner = [model]  # a cycle
    met_in(model)
    del model
    gc.collect()
    assert whole() is None
