"""Projections of 8-bit floats while documents are encoded: twice the rate of bfloat16 on GPUs that have them.

Each row of a product has a scale of its own: a token's on the left, an output's on the right. Routers are left as they
are, and so is all that reads a memory: questions are asked in the dtype of the model.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .retrofit_msa import attention_layers
from .wrapping_msa import input_device, is_entered_by_its_call

FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # of both sizes of a matrix; others stay as they are
LEAST_CAPABILITY = (8, 9)  # of a CUDA device
_exchange = threading.Lock()  # held while projections take the place of others


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, D] as e4m3 and their scales [N, 1] float32, by which these are to be multiplied."""
    rows = rows.float()
    scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return (rows / scales).to(FP8), scales


class Fp8Linear(nn.Module):
    """A linear layer whose products are of 8-bit floats, summed in about float32, for the threads that encode.

    Args:
        linear: what it stands for, and what all other threads compute.

    Attributes:
        threads: identifiers of those that encode with it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.__dict__["linear"] = linear  # not one of its modules: it is the model's
        self.threads: set[int] = set()
        weight, scales = to_fp8(linear.weight.detach())
        self.register_buffer("weight", weight.t())
        self.register_buffer("scales", scales.t())
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """States [..., in] -> [..., out] in their dtype."""
        # Compiled layers run for documents alone.
        if not torch.compiler.is_compiling() and threading.get_ident() not in self.threads:
            return self.linear(states)
        return self.product(states)

    def product(self, states: Tensor) -> Tensor:
        """The same, whichever thread asks."""
        rows, scales = to_fp8(states.flatten(0, -2))
        # The operation itself: torch.compile of torch 2.11 breaks its graph at `torch.nn.functional.scaled_mm`.
        # Sums are not rounded to float32 after every step: a tenth quicker, and far below what 8 bits round off.
        product = torch.ops.aten._scaled_mm(
            rows, self.weight, scales, self.scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        product = product.to(states.dtype).unflatten(0, states.shape[:-1])
        return product if self.bias is None else product + self.bias


class Fp8Projections:
    """The projections of a model's decoder layers, up to the last one with a memory, in 8-bit floats.

    They are made once, and the model's while it is given documents, which other threads do not notice.

    Args:
        model: whose weights are taken as they are now.

    Raises:
        ValueError: where weights come and go around the calls of modules, or the device has no such products.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if is_entered_by_its_call(model):
            raise ValueError(
                "`fp8_projections` is for models whose weights stay where they are: this one is offloaded, cut in "
                "parts or has hooks on the whole model. Leave it out."
            )
        device = input_device(model)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            raise ValueError(
                f"`fp8_projections` needs a GPU with products of 8-bit floats (compute capability 8.9 or newer), but "
                f"{torch.cuda.get_device_name(device)} has {found}. Leave it out."
            )
        names = {module: name for name, module in model.named_modules()}
        self._made: list[tuple[nn.Module, str, nn.Module, Fp8Linear]] = []  # parent, name, its own, that in its place
        with torch.no_grad():
            for number, attention in attention_layers(model).items():
                if number <= max(model.config.memory_layers):
                    layer = model.get_submodule(names[attention].rpartition(".")[0])
                    for parent in layer.modules():
                        for name, child in parent.named_children():
                            if type(child) is nn.Linear and not name.startswith("router_") and _fits(child):
                                self._made.append((parent, name, child, Fp8Linear(child)))

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """A block in which this thread projects with them; where another's are in their place, with those."""
        thread, joined = threading.get_ident(), list[tuple[nn.Module, str, Fp8Linear]]()
        try:
            with _exchange:
                for parent, name, own, narrow in self._made:
                    current = getattr(parent, name)
                    if current is own:
                        setattr(parent, name, current := narrow)
                    if isinstance(current, Fp8Linear) and thread not in current.threads:
                        current.threads.add(thread)
                        joined.append((parent, name, current))
            yield
        finally:
            with _exchange:
                for parent, name, current in joined:
                    current.threads.discard(thread)
                    if not current.threads:
                        setattr(parent, name, current.linear)


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % MULTIPLE == 0 == linear.out_features % MULTIPLE
