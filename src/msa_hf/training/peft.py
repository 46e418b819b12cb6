"""LoRA on the attention layers, with the routers trained whole beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..retrofit_msa import ROUTER_MODULES, attention_layers

if TYPE_CHECKING:
    from peft import LoraConfig


def peft_config(
    model: nn.Module,
    r: int = 16,
    lora_alpha: int = 32,
    target_modules: Iterable[str] | str | None = None,
    train_routers: bool = True,
    **kwargs: Any,
) -> LoraConfig:
    """The configuration with which `peft.get_peft_model` trains `model`: LoRA on its layers, its routers whole.

    PEFT ignores names that match nothing as long as one of them does. Here every name must match.

    Args:
        model: a model with a memory, before `get_peft_model`.
        r: rank of the adapters.
        lora_alpha: their scale, times `r`.
        target_modules: what gets adapters, as PEFT takes it: last parts of the names of modules, or one regular
            expression for whole names, or `"all-linear"`. Default: the linear projections of the attention layers.
        train_routers: train the routers, and the score bias where the model has one, and save them with the adapter.
        kwargs: further fields of `LoraConfig`; its `modules_to_save` are added to the routers.

    Raises:
        ImportError: where PEFT is not installed.
        ValueError: for a model without a memory or with adapters, and for a name that matches nothing or a router.
    """
    try:
        from peft import LoraConfig, PeftModel
    except ImportError as error:
        raise ImportError("peft_config() needs PEFT: pip install msa-hf[train]") from error
    if isinstance(model, PeftModel):
        raise ValueError("The model has adapters already; make the configuration before get_peft_model().")
    if not hasattr(getattr(model, "config", None), "memory_layers"):
        raise ValueError(f"{type(model).__name__} has no memory; give it one with MSAForCausalLM.from_base() first.")
    modules = dict(model.named_modules())
    routers = {name for name in modules if _last(name) in ROUTER_MODULES}
    adaptable = {name for name, module in modules.items() if name not in routers and _is_adaptable(module)}

    if target_modules is None:
        target_modules = _attention_targets(model, adaptable)
    elif target_modules == "all-linear":
        not_layers = {model.get_input_embeddings(), model.get_output_embeddings()}  # type: ignore[operator]
        target_modules = sorted({_last(name) for name in adaptable if modules[name] not in not_layers})
    elif isinstance(target_modules, str):
        if not any(re.fullmatch(target_modules, name) for name in adaptable):
            raise ValueError(f"`target_modules` {target_modules!r} matches nothing; there are {_names(adaptable)}.")
        if any(re.fullmatch(target_modules, name) for name in routers):
            raise ValueError(
                f"`target_modules` {target_modules!r} also matches the routers, which are trained whole; "
                "make it narrower."
            )
    else:
        target_modules = sorted(set(target_modules))
        if taken := [name for name in target_modules if _matches(name, routers)]:
            raise ValueError(f"`target_modules` names {taken}: routers are trained whole, see `train_routers`.")
        if missing := [name for name in target_modules if not _matches(name, adaptable)]:
            raise ValueError(f"`target_modules` names {missing}, which match nothing; there are {_names(adaptable)}.")

    whole = set(kwargs.pop("modules_to_save", None) or ())
    if missing := sorted(name for name in whole if not _matches(name, set(modules))):
        raise ValueError(f"`modules_to_save` names {missing}, which match nothing; there are {_names(set(modules))}.")
    if train_routers:
        whole |= {_last(name) for name in routers}
    kwargs.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(
        r=r, lora_alpha=lora_alpha, target_modules=target_modules, modules_to_save=sorted(whole) or None, **kwargs
    )


def _attention_targets(model: nn.Module, adaptable: set[str]) -> list[str]:
    """The shortest names that match the projections of the attention layers and nothing else."""
    inside = {part for layer in attention_layers(model).values() for part in layer.modules()}
    wanted = {name for name in adaptable if model.get_submodule(name) in inside}
    parts = 1
    while True:  # whole names match nothing else
        names = sorted({".".join(name.split(".")[-parts:]) for name in wanted})
        if set().union(*(_matches(name, adaptable) for name in names)) == wanted:
            return names
        parts += 1


def _is_adaptable(module: nn.Module) -> bool:
    # Quantised layers are no nn.Linear, but say what they map as it does.
    return isinstance(module, nn.Embedding) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _matches(name: str, modules: set[str]) -> set[str]:
    """The modules that PEFT takes `name` for."""
    return {module for module in modules if module == name or module.endswith(f".{name}")}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _names(modules: set[str]) -> list[str]:
    return sorted({_last(name) for name in modules if name and not _last(name).isdigit()})
