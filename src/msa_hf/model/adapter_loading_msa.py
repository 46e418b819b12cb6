"""The routers of adapters that PEFT or transformers loads, compared with those of the model.

PEFT asks the file of an adapter for every router that the model has, and leaves out what else is there; transformers
leaves out both. So an adapter of other memory layers would end in a KeyError, or would route with routers that nobody
has trained.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from .compat_msa import adapter_weights
from .gradients_msa import ROUTER_MODULES
from .types_msa import ModelMixin

_ROUTER = re.compile(rf"\.(\d+)\.(?:\w+\.)*?({'|'.join(ROUTER_MODULES)})(?:\.|$)")
Routers = set[tuple[int, str]]  # layer and module


class LoadedKeys(Protocol):
    """The report on a loaded adapter, as far as it is read."""

    missing_keys: Collection[str]
    unexpected_keys: Collection[str]


def routers_in(names: Iterable[str]) -> Routers:
    """The routers that names of parameters belong to, by their layers."""
    found = (_ROUTER.findall(name) for name in names)
    return {(int(layer), module) for (layer, module), *_ in filter(None, found)}


def refuse_other_routers(adapter: Routers, model: Routers, name: str) -> None:
    """Compare the routers that an adapter has with those that a model has for it.

    Args:
        adapter, model: their routers.
        name: of the adapter, for the message.

    Raises:
        ValueError: where they differ, naming what to load it onto.
    """
    if adapter == model:
        return
    (their_layers, theirs), (our_layers, ours) = _parts(adapter), _parts(model)
    if their_layers != our_layers:
        cause = f"has routers for memory layers {their_layers}, but the model has memory layers {our_layers}"
        made = f"`memory_layers={their_layers}`"
    else:
        cause = f"has {theirs} in its memory layers, but the model has {ours}"
        made = "the same `score_bias`"
    raise ValueError(
        f"The adapter {name!r} {cause}. Load it onto a model that is made with {made} (MSAForCausalLM.from_base or "
        "from_pretrained), or train one for this model."
    )


def _parts(routers: Routers) -> tuple[list[int], list[str]]:
    return sorted({layer for layer, _ in routers}), sorted({module for _, module in routers})


class ComparedAdapters(ModelMixin):
    """In front of a class of PEFT's for a whole model: loading an adapter compares its fields with the model's."""

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> LoadedKeys:
        """PEFT's.

        Raises:
            ValueError: for an adapter that was trained for other fields of the memory, which is not loaded.
        """
        # The code of an earlier release that a checkpoint carries has no such method.
        if check := getattr(self.get_base_model(), "check_adapter", None):
            check(model_id, kwargs)
        loaded: LoadedKeys = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        return loaded


class CheckedAdapters(ComparedAdapters):
    """In front of a class of PEFT's for a whole model: loading an adapter refuses one with other routers as well."""

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> LoadedKeys:
        """PEFT's.

        Raises:
            ValueError: for an adapter of other memory layers, which is taken out again where there are others; for one
                that was trained for other fields of the memory, which is not loaded.
        """
        try:
            loaded = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        except KeyError as error:
            if not routers_in(map(str, error.args)):
                raise
            options, _ = self._split_kwargs(dict(kwargs))
            saved = importlib.import_module("peft").load_peft_weights(model_id, device="cpu", **options)
            self._refuse(routers_in(saved), str(model_id), adapter_name, error)
            raise
        if further := routers_in(loaded.unexpected_keys):
            self._refuse(routers_of_adapter(self, adapter_name) | further, str(model_id), adapter_name, None)
        return loaded

    def _refuse(self, adapter: Routers, name: str, adapter_name: str, cause: Exception | None) -> None:
        try:
            refuse_other_routers(adapter, routers_of_adapter(self, adapter_name), name)
        except ValueError as error:
            if len(self.peft_config) > 1:
                self.delete_adapter(adapter_name)
            raise error from cause


def routers_of_adapter(model: Any, adapter_name: str) -> Routers:
    """The routers of a model that an adapter replaces."""
    return routers_in(name for name, _ in model.named_parameters() if f"modules_to_save.{adapter_name}." in name)


class AdapterMixin(ModelMixin):
    """In front of a base's own class: transformers' way to load an adapter refuses one with other routers."""

    _keys_to_ignore_on_load_unexpected: Any
    check_adapter: Any

    def load_adapter(
        self,
        peft_model_id: Any = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Transformers' `load_adapter`, with whole modules in every version.

        Raises:
            ValueError: for an adapter of other memory layers, after which the model is of no use; for one that was
                trained for other fields of the memory, which is not loaded.
        """
        if peft_model_id is not None:
            self.check_adapter(peft_model_id, {**kwargs, **(kwargs.get("adapter_kwargs") or {})})
        name = "default" if adapter_name is None else adapter_name
        weights = adapter_weights(peft_model_id, name, peft_config, adapter_state_dict, kwargs)
        ignored = self._keys_to_ignore_on_load_unexpected
        # The patterns of routers are for layers of a checkpoint that have no memory any more.
        self._keys_to_ignore_on_load_unexpected = {
            pattern for pattern in ignored or () if not any(router in pattern for router in ROUTER_MODULES)
        }
        try:
            loaded = super().load_adapter(peft_model_id, adapter_name, peft_config, weights, *args, **kwargs)
        finally:
            self._keys_to_ignore_on_load_unexpected = ignored
        here = routers_of_adapter(self, name)
        missing, further = routers_in(loaded.missing_keys), routers_in(loaded.unexpected_keys)
        refuse_other_routers((here - missing) | further, here, str(peft_model_id or name))
        return loaded
