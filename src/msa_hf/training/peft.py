"""The methods of PEFT on a model with a memory, with the routers trained whole beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from ..model.retrofit_msa import FUSED_PROJECTIONS, ROUTER_MODULES, attention_layers

if TYPE_CHECKING:
    from peft import PeftConfig

LORA = "LORA"
IA3 = "IA3"
# Methods that adapt other modules than the projections of attention; which ones, PEFT says for each base that it knows.
ELSEWHERE = ("LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "XLORA", "SHADOW")
FREEZES_THE_REST = "SUPERTUNING"  # at its first step, modules to be trained whole included


def peft_config(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: int | None = None,
    target_modules: Iterable[str] | str | None = None,
    train_routers: bool = True,
    *,
    method: str | type[PeftConfig] = LORA,
    **kwargs: Any,
) -> PeftConfig:
    """The configuration with which `peft.get_peft_model` trains `model`: a method of PEFT, and the routers whole.

    PEFT ignores names that match nothing as long as one of them does. Here every name must match.

    Args:
        model: a model with a memory, before `get_peft_model`.
        r: rank of the adapters, of methods that have one; default 16 for LoRA, else the method's own.
        lora_alpha: their scale, times `r`, of LoRA and AdaLoRA; default 32 for LoRA.
        target_modules: what gets adapters, as PEFT takes it: last parts of the names of modules, or one regular
            expression for whole names, or `"all-linear"`. Default: the linear projections of the attention layers; for
            IA3 those of keys and values, and what leads out of the feed-forward layers; for methods that adapt
            something else PEFT's choice for the base.
        train_routers: train the routers, and the score bias where the model has one, and save them with the adapter.
        method: as PEFT names it (`"lora"`, `"ia3"`, `"adalora"`, `"vera"`, `"prompt_tuning"`, ...), or the class of its
            configuration. DoRA is LoRA with `use_dora=True`.
        kwargs: further fields of the method's configuration; its `modules_to_save` are added to the routers.

    Raises:
        ImportError: where PEFT is not installed.
        ValueError: for a model without a memory or with adapters, a method that PEFT does not have or that cannot train
            routers, and for a name that matches nothing or a router.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PromptLearningConfig
    except ImportError as error:
        raise ImportError("peft_config() needs PEFT: pip install msa-hf[train]") from error
    if isinstance(model, PeftModel):
        raise ValueError("The model has adapters already; make the configuration before get_peft_model().")
    if not hasattr(getattr(model, "config", None), "memory_layers"):
        raise ValueError(f"{type(model).__name__} has no memory; give it one with MSAForCausalLM.from_base() first.")
    classes = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config_class = classes.get(method.upper()) if isinstance(method, str) else method
    if config_class is None:
        raise ValueError(f"`method` is {method!r}; this PEFT has {sorted(name.lower() for name in classes)}.")
    kind = next((name for name, made in classes.items() if made is config_class), "")
    known = {field.name for field in fields(config_class)}

    modules = dict(model.named_modules())
    routers = {name for name in modules if _last(name) in ROUTER_MODULES}
    if "target_modules" in known:
        kwargs["target_modules"] = _checked_targets(model, kind, target_modules, modules, routers)
        if kind == IA3 and kwargs.get("feedforward_modules") is None:
            outputs = {_last(name) for name in _feedforward_outputs(model, modules)}
            names = kwargs["target_modules"]
            kwargs["feedforward_modules"] = sorted(outputs & set(names)) if not isinstance(names, str) else names
    elif target_modules is not None:
        raise ValueError(f"{config_class.__name__} adapts no modules; leave `target_modules` out.")

    whole = set(kwargs.pop("modules_to_save", None) or ())
    if missing := sorted(name for name in whole if not _matches(name, set(modules))):
        raise ValueError(f"`modules_to_save` names {missing}, which match nothing; there are {_names(set(modules))}.")
    if train_routers:
        whole |= {_last(name) for name in routers}
    if whole and "modules_to_save" not in known:
        raise ValueError(f"{config_class.__name__} trains no module whole; pass train_routers=False.")
    if whole and (issubclass(config_class, PromptLearningConfig) or kind == FREEZES_THE_REST):
        raise ValueError(f"{config_class.__name__} freezes all but its own weights; pass train_routers=False.")
    if whole:
        kwargs["modules_to_save"] = sorted(whole)
    for name, value, default in (("r", r, 16), ("lora_alpha", lora_alpha, 32)):
        if value is not None and name not in known:
            raise ValueError(f"{config_class.__name__} has no `{name}`; leave it out.")
        if value is not None or kind == LORA:
            kwargs[name] = default if value is None else value
    kwargs.setdefault("task_type", "CAUSAL_LM")
    return config_class(**kwargs)


def _checked_targets(
    model: nn.Module,
    method: str,
    target_modules: Iterable[str] | str | None,
    modules: dict[str, nn.Module],
    routers: set[str],
) -> list[str] | str | None:
    """`target_modules` or their default, each of which matches something that is no router; None leaves it to PEFT."""
    adaptable = {name for name, module in modules.items() if name not in routers and _is_adaptable(module)}
    if target_modules is None:
        if method in ELSEWHERE:
            return None
        return _ia3_targets(model, modules) if method == IA3 else _attention_targets(model, adaptable)
    if target_modules == "all-linear":
        not_layers = {model.get_input_embeddings(), model.get_output_embeddings()}  # type: ignore[operator]
        return sorted({_last(name) for name in adaptable if modules[name] not in not_layers})
    candidates = set(modules) - routers if method in ELSEWHERE else adaptable
    if isinstance(target_modules, str):
        if not any(re.fullmatch(target_modules, name) for name in candidates):
            raise ValueError(f"`target_modules` {target_modules!r} matches nothing; there are {_names(candidates)}.")
        if any(re.fullmatch(target_modules, name) for name in routers):
            raise ValueError(
                f"`target_modules` {target_modules!r} also matches the routers, which are trained whole; "
                "make it narrower."
            )
        return target_modules
    names = sorted(set(target_modules))
    if taken := [name for name in names if _matches(name, routers)]:
        raise ValueError(f"`target_modules` names {taken}: routers are trained whole, see `train_routers`.")
    if missing := [name for name in names if not _matches(name, candidates)]:
        raise ValueError(f"`target_modules` names {missing}, which match nothing; there are {_names(candidates)}.")
    return names


def _ia3_targets(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Projections of keys and values, or fused ones, and the outputs of the feed-forward layers."""
    inside = {part for layer in attention_layers(model).values() for part in layer.modules()}
    projections = ("k_proj", "v_proj", *FUSED_PROJECTIONS)
    scaled = {name for name, module in modules.items() if module in inside and _last(name) in projections}
    return sorted({_last(name) for name in scaled | _feedforward_outputs(model, modules)})


def _feedforward_outputs(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The linear layers outside attention that lead from a wider state back to the hidden one."""
    inside = {part for layer in attention_layers(model).values() for part in layer.modules()}
    hidden = model.config.hidden_size  # type: ignore[union-attr]
    return {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and module not in inside
        and module.out_features == hidden != module.in_features
    }


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
    # Quantized layers are no nn.Linear, but say what they map as it does.
    return isinstance(module, nn.Embedding) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _matches(name: str, modules: set[str]) -> set[str]:
    """The modules that PEFT takes `name` for."""
    return {module for module in modules if module == name or module.endswith(f".{name}")}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _names(modules: set[str]) -> list[str]:
    return sorted({_last(name) for name in modules if name and not _last(name).isdigit()})
