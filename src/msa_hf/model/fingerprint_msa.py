"""Fingerprints: telling models and tokenizers apart by a sample of what they hold, wherever it lies."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import re
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters_msa import (
    ActiveAdapter,
    PlacedParameter,
    active_adapters,
    adapter_layers,
    adapter_state,
    place_modules,
    place_parameters,
)
from .sampling_msa import SAMPLES, grouped, layout_of, read_samples, sample_of, step_of
from .walking_msa import met_in
from .weights_msa import HALF_STEPS, AdapterRecord, WeightsRecord, only_asks

PLAIN_TENSORS = (Tensor, nn.Parameter)  # exactly these: made of nothing but themselves
KEPT = 8  # of the values per parameter that a fingerprint looks at, as many as a record keeps
REMEMBERED = 4  # states of a model whose weights need not be read again: with an adapter, without it, ...

_records: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, WeightsRecord]] = weakref.WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> str:
    """Tell models with different weights apart: 64 hexadecimal digits.

    Covers names, shapes and 64 evenly strided values of every parameter, rounded to bf16, so that the float32 and the
    bf16 load of a checkpoint agree; a change that misses all of those values goes unseen. Adapters count where they are
    active. Left out is what the memory does not depend on: the output head unless it is the input embedding (the
    headless model makes the same memory), and the score biases, which weigh documents when they are read.

    Args:
        model: a transformers model. Weights that accelerate has offloaded are read where they lie; parameters on the
            meta device without values anywhere count by name and shape, with a warning.
    """
    return fingerprint_of(read_weights(model))


def fingerprint_of(record: WeightsRecord) -> str:
    """The fingerprint of weights with the adapters that are active."""
    if not record.adapters:
        return record.fingerprint
    parts = [record.fingerprint, *(adapter.fingerprint for adapter in record.adapters)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_weights(model: nn.Module) -> WeightsRecord:
    """Read what the origin of a bank keeps of a model's weights.

    They are read again only where a sample of them, or which adapters are active, is not as it was. Offloaded weights
    do not take part in that: whoever writes to them where they lie loads the model anew.
    """
    known = _records.setdefault(model, {})
    state = _state(model)
    if state not in known:
        while len(known) >= REMEMBERED:
            known.pop(next(iter(known), None), None)
        known[state] = _read(model)
    return known[state]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Tell tokenizers that give different ids apart: 64 hexadecimal digits, None for None.

    The state of padding and truncation, which calls change, does not count. A tokenizer without a fast backend counts
    by its vocabulary.
    """
    if tokenizer is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: value for name, value in state.items() if name not in ("padding", "truncation")}
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Samples --------------------------------------------------------------------------------------------------------------


def _kept_places(size: int) -> Tensor:
    """Indices of the values that a record keeps of a parameter with `size` values, [at most 8] int64."""
    step = step_of(size)
    return torch.arange(min(-(-size // step), SAMPLES))[:: SAMPLES // KEPT] * step


def _parts(tensor: Any, whole: bool = True) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a subclass (quantized: numbers and scales).

    A tensor that is spread over processes is put together, for which all of them call; not `whole`, it is what this
    process has of it.
    """
    if hasattr(tensor, "full_tensor"):
        return _parts(tensor.full_tensor() if whole else tensor.to_local())
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    # Two numbers of four bits to a byte have no arithmetic.
    return [tensor.view(torch.uint8) if "float4" in str(tensor.dtype) else tensor]


def _is_quantized(tensor: Tensor) -> bool:
    subclass = hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor")
    return subclass or not tensor.is_floating_point()


def _kind(tensor: Tensor) -> str:
    """The description of a quantized tensor besides its numbers: its class, blocks, how inputs are rounded."""
    if hasattr(tensor, "full_tensor") or not hasattr(tensor, "__tensor_flatten__"):
        return ""
    _, context = tensor.__tensor_flatten__()
    return re.sub(r" at 0x[0-9a-f]+", "", f" {type(tensor).__name__} {context}")


def _as_saved(item: PlacedParameter) -> PlacedParameter:
    """A parameter as its module saves it: quantized numbers may lie in another order once they have been used."""
    if _is_quantized(item.tensor) and not item.tensor.is_meta and not hasattr(item.tensor, "__tensor_flatten__"):
        return replace(item, tensor=_saved_state(item.owner)[item.local])
    return item


def _saved_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module saves, by name.

    Numbers of four bits on the CPU are put in order to be saved, by bitsandbytes, which loses the order of their
    scales: this happens to a copy, and scales count in ascending order; those that are quantized themselves come out
    changed, and do not count.
    """
    own = dict(module.named_parameters(recurse=False))
    packed = any(weight.dtype is torch.uint8 and weight.device.type == "cpu" for weight in own.values())
    saved = (copy.deepcopy(module) if packed else module).state_dict(keep_vars=True)
    state = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    if packed:
        nested = any(".nested_" in name for name in state)
        state = {
            name: value.flatten().sort().values if value.is_floating_point() else value
            for name, value in state.items()
            if name in own or not nested or name.endswith(".quant_map")
        }
    return state


def _on_host(samples: list[Tensor]) -> list[Tensor]:
    """Samples on the CPU, with one transfer for those of one device and dtype."""
    found = list(samples)
    for places in grouped(samples):
        together = torch.cat([samples[place] for place in places]).cpu()
        for place, sample in zip(places, together.split([len(samples[place]) for place in places]), strict=True):
            found[place] = sample
    return found


def _rounded(values: Tensor) -> bytes:
    """Values on the CPU as bfloat16, little-endian."""
    return values.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()


def _exact(values: Tensor) -> bytes:
    """Values on the CPU: floating-point ones as bfloat16, others as int64; little-endian."""
    return _rounded(values) if values.is_floating_point() else values.to(torch.int64).numpy().astype("<i8").tobytes()


@torch.no_grad()
def _state(model: nn.Module) -> Hashable:
    """A value that changes with the weights and with what is active; takes a millisecond for a model of 4B."""
    met = met_in(model)
    tensors = met.tensors()
    plain = all(type(tensor) in PLAIN_TENSORS for tensor in tensors)
    parts = tensors if plain else [part for tensor in tensors for part in _parts(tensor, whole=False)]
    layout, digest = layout_of(parts), hashlib.blake2b(digest_size=16)
    for bits in read_samples(model, parts, layout):
        digest.update(bits.cpu().numpy().tobytes())
    return layout, adapter_state(met), digest.digest()


# Reading --------------------------------------------------------------------------------------------------------------


@contextmanager
def _loaded(owner: nn.Module) -> Iterator[None]:
    """A time in which a module has its weights on the CPU, also where accelerate has offloaded them."""
    hook = vars(owner).get("_hf_hook")
    if hook is None:
        yield
        return
    hooks = importlib.import_module("accelerate.hooks")
    with ExitStack() as stack:
        for part in hook.hooks if isinstance(hook, hooks.SequentialHook) else [hook]:
            if isinstance(part, hooks.AlignDevicesHook) and part.offload:
                stack.callback(setattr, part, "execution_device", part.execution_device)
                part.execution_device = torch.device("cpu")
                stack.callback(part.post_forward, owner, None)
                part.pre_forward(owner)
        yield


def _read_samples(placed: Iterable[PlacedParameter]) -> dict[str, list[Tensor]]:
    """Samples of parameters on the CPU, by name; without those that have no values anywhere."""
    owners: dict[nn.Module, list[PlacedParameter]] = {}
    for item in placed:
        owners.setdefault(item.owner, []).append(item)
    found: dict[str, list[Tensor]] = {}
    for owner, items in owners.items():
        with _loaded(owner) if any(item.tensor.is_meta for item in items) else nullcontext():
            for item in items:
                if not (tensor := item.current() if item.tensor.is_meta else item.tensor).is_meta:
                    # Copies, so that no whole tensor that was loaded or put together is kept.
                    found[item.name] = [sample_of(part.detach()).clone() for part in _parts(tensor)]
    samples = iter(_on_host([sample for parts in found.values() for sample in parts]))
    return {name: [next(samples) for _ in parts] for name, parts in found.items()}


def _digest(placed: list[PlacedParameter], samples: Mapping[str, list[Tensor]]) -> str:
    """Digest of names, shapes and samples, in the order of `placed`."""
    digest = hashlib.sha256()
    for item in placed:
        kind = _kind(item.tensor)
        digest.update(f"{item.name} {tuple(item.tensor.shape)}{kind}\n".encode())
    for item in placed:
        for values in samples.get(item.name, []):
            digest.update(_rounded(values))
    return digest.hexdigest()


@torch.no_grad()
def _read(model: PreTrainedModel) -> WeightsRecord:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    backbone = f"{model.base_model_prefix}."

    def counted(parameters: Iterable[PlacedParameter], ignored: set[int]) -> list[PlacedParameter]:
        kept = (item for item in parameters if id(item.tensor) not in ignored)
        kept = (item for item in kept if ".router_score_bias." not in item.name)
        return sorted(
            (replace(item, name=item.name.removeprefix(backbone)) for item in kept), key=lambda item: item.name
        )

    def only_of_head(parameters: Callable[[nn.Module], Iterable[Tensor]]) -> set[int]:
        inside = set() if head is None else {id(tensor) for tensor in parameters(head)}
        return inside - {id(tensor) for tensor in parameters(embedding)}

    placed = counted(
        place_parameters(model), only_of_head(lambda part: (item.tensor for item in place_parameters(part)))
    )
    placed = [_as_saved(item) for item in placed]
    samples = _read_samples(placed)
    if missing := len(placed) - len(samples):
        warnings.warn(
            f"{missing} parameters lie on the meta device (offloaded?): the fingerprint covers only their names and "
            "shapes, and does not match one that was taken with all weights present.",
            stacklevel=4,
        )
    older = None
    if adapter_layers(met_in(model)):
        raw = (PlacedParameter(name, model, name, tensor) for name, tensor in model.named_parameters())
        everything = counted(raw, only_of_head(lambda part: part.parameters()))
        older = _digest(everything, _read_samples(item for item in everything if not item.tensor.is_meta))

    values = {item.name: _kept_values(item.tensor, samples.get(item.name, [])) for item in placed}
    dtypes = tuple(str(item.tensor.dtype).removeprefix("torch.") for item in placed)
    active = [
        replace(adapter, path=adapter.path.removeprefix(backbone))
        for adapter in active_adapters(model, skip=head)
        if not only_asks(adapter.path)
    ]
    adapted, adapter_dtype = _adapted(active, {item.name: item.tensor.numel() for item in placed}, values)
    names = "\n".join(f"{item.name} {tuple(item.tensor.shape)}" for item in placed)
    return WeightsRecord(
        fingerprint=_digest(placed, samples),
        parameters=hashlib.sha256(names.encode()).hexdigest(),
        dtypes=dtypes[:1] if len(set(dtypes)) == 1 else dtypes,
        values=_little_endian(values),
        quantized=tuple(sorted({type(item.tensor).__name__ for item in placed if _is_quantized(item.tensor)})),
        buffers=_buffers(model, backbone, head),
        frequencies=_frequencies(model),
        adapters=_adapter_records(active),
        adapted=None if adapted is None else _little_endian(adapted),
        adapter_dtype=adapter_dtype,
        states=_digest([item for item in placed if not only_asks(item.name)], samples),
        names=tuple((name, len(kept)) for name, kept in values.items()),
        older=older,
    )


def _kept_values(tensor: Tensor, samples: list[Tensor]) -> Tensor:
    """The values that a record keeps of a parameter, [at most 8] float64; none where it is quantized."""
    if _is_quantized(tensor) or not samples:
        return torch.empty(0, dtype=torch.float64)
    return samples[0][:: SAMPLES // KEPT].double()


def _little_endian(values: Mapping[str, Tensor]) -> bytes:
    return torch.cat([torch.empty(0), *(part.float() for part in values.values())]).numpy().astype("<f4").tobytes()


def _buffers(model: nn.Module, backbone: str, head: nn.Module | None) -> str | None:
    """Digest of what a model saves besides its parameters, None where that is nothing.

    Buffers that are not saved (the frequencies of positions) follow from the configuration.
    """
    digest, found = hashlib.sha256(), False
    outside = set() if head is None else set(head.modules())
    for path, module in place_modules(model):
        parameters = dict(module.named_parameters(recurse=False))
        inside = next(module.children(), None) is not None
        own = {name for name, _ in module.named_buffers(recurse=False)}
        if module in outside or not (own or any(map(_is_quantized, parameters.values()))):
            continue
        for name, value in sorted(_saved_state(module).items()):
            if name in parameters or (inside and name not in own) or value.is_meta:
                continue
            found = True
            digest.update(f"{path.removeprefix(backbone)}{name} {tuple(value.shape)}\n".encode())
            for part in _parts(value.detach()):
                digest.update(_exact(sample_of(part).cpu()))
    return digest.hexdigest() if found else None


def _frequencies(model: nn.Module) -> bytes | None:
    """A sample of the frequencies that rotary positions begin with: some schemes change them while they run."""
    found = {
        name: sample_of(buffer).float().cpu()
        for name, buffer in sorted(model.named_buffers())
        if name.endswith("original_inv_freq") and not buffer.is_meta
    }
    return _little_endian(found) if found else None


# Adapters -------------------------------------------------------------------------------------------------------------


def _adapter_records(active: Iterable[ActiveAdapter]) -> tuple[AdapterRecord, ...]:
    by_name: dict[str, list[ActiveAdapter]] = {}
    for adapter in active:
        by_name.setdefault(adapter.name if adapter.sign > 0 else f"{adapter.name} (merged)", []).append(adapter)
    records = []
    for name, parts in by_name.items():
        digest = hashlib.sha256()
        for part in sorted(parts, key=lambda item: item.path):
            digest.update(f"{part.path} {part.sign} {' '.join(part.settings())}\n".encode())
            tensors = part.tensors()
            digest.update(_digest(tensors, _read_samples(tensors)).encode())
        scalings = sorted({part.scaling for part in parts if part.scaling is not None})
        records.append(AdapterRecord(name, digest.hexdigest(), tuple(scalings)))
    return tuple(sorted(records, key=lambda record: record.fingerprint))


def _adapted(
    active: list[ActiveAdapter], sizes: Mapping[str, int], values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor] | None, str]:
    """The values that a record keeps, with what adapters add, and the least precise dtype of these.

    None where no adapter is active, or where one does more than to add `scaling * B @ A` or to replace a parameter.
    """
    whole, dtypes = dict(values), ["float32"]
    for adapter in active:
        if replaced := adapter.replaced():
            for name, tensor in replaced.items():
                if tensor.is_meta or name not in whole:
                    return None, "float32"
                whole[name] = _kept_values(tensor, [sample_of(tensor.detach()).cpu()])
            continue
        name = f"{adapter.path}.weight"
        if not adapter.is_plain_lora or name not in whole or not len(whole[name]):
            return None, "float32"
        added, dtype = adapter.added(_kept_places(sizes[name]))
        whole[name] = whole[name] + added
        dtypes.append(str(dtype).removeprefix("torch."))
    return (whole if active else None), max(dtypes, key=lambda kind: HALF_STEPS.get(kind, 1.0))
