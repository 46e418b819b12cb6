"""Decoder layers compiled while documents are encoded: torch.compile of each, for batches of any size.

All layers share their graphs. Lengths and numbers of documents are symbols of these, so that no batch asks for new
ones, but for one of a single document or token. What a memory layer keeps is taken down outside of the graphs.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention_msa import AttentionFunction, AttentionOutput, MemoryPass
from .retrofit_msa import attention_layers
from .wrapping_msa import is_entered_by_its_call


class SeparatePass:
    """A pass that no graph sees: what a graph writes is lost where the pass ends the run.

    Args:
        whole: the pass, which computes everything.
    """

    def __init__(self, whole: MemoryPass) -> None:
        self.whole = whole

    @torch.compiler.disable
    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        self.whole.enter(module, hidden_states)

    @torch.compiler.disable
    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> AttentionOutput:
        return self.whole.attend(base, module, query, key, value, attention_mask, **kwargs)


class CompiledLayers:
    """The decoder layers of a model, up to the last one with a memory, compiled; for a `SeparatePass` alone.

    They are made once, and the model's while it is given documents.

    Raises:
        ValueError: where weights come and go around the calls of modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if is_entered_by_its_call(model):
            raise ValueError(
                "`compile_layers` is for models whose weights stay where they are: this one is offloaded, cut in parts "
                "or has hooks on the whole model. Leave it out."
            )
        memory_layers, names = set(model.config.memory_layers), {module: name for name, module in model.named_modules()}
        self._made: list[tuple[nn.Module, Callable[..., object]]] = []
        for number, attention in sorted(attention_layers(model).items()):
            layer = model.get_submodule(names[attention].rpartition(".")[0])
            if number <= max(memory_layers):
                self._made.append((layer, _calling(layer, number in memory_layers)))

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """A block in which they run compiled. Layers that were compiled before stay as they are."""
        compiled: list[nn.Module] = []
        try:
            for layer, call in self._made:
                if layer._compiled_call_impl is None:
                    layer._compiled_call_impl = call
                    compiled.append(layer)
            yield
        finally:
            for layer in compiled:
                layer._compiled_call_impl = None


def _calling(layer: nn.Module, has_memory: bool) -> Callable[..., object]:
    """Wrap the call of a layer for documents; what other threads ask the model meanwhile goes through the layer itself.

    A layer without a memory does not see the pass, which does nothing there: documents are encoded without a prefix.
    """
    run = torch.compile(layer._call_impl, dynamic=True)

    def call(*args: object, **kwargs: object) -> object:
        if not isinstance(kwargs.get("memory_pass"), SeparatePass):
            return layer._call_impl(*args, **kwargs)
        if not has_memory:
            del kwargs["memory_pass"]
        return run(*args, **kwargs)

    return call
