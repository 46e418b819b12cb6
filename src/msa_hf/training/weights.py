"""Weights that a training loop of one's own changes, at the speed of plain dense layers.

A model in bfloat16 runs as it is; beside it lie float32 masters of what is trained. Low-rank updates are merged into
the weights before every step instead of being computed beside them: two thin matrix products per layer and batch less,
which in small models cost more than the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HELD = 1 << 26  # numbers of weights that are computed together at most: 256 MB in float32


@dataclass(frozen=True)
class LowRank:
    """The update `scale * up @ down` of one linear layer's weight [out, in].

    Attributes:
        weight: of the model, written by `TrainedWeights.write`.
        base: [out, in] float32, the weight before training.
        down: [rank, in] float32. `up`: [out, rank] float32, zero at first.
        scale: of the product.
    """

    weight: Tensor
    base: Tensor
    down: nn.Parameter
    up: nn.Parameter
    scale: float


class AlikeUpdates:
    """The low-rank updates of weights of one shape, of one rank and scale, computed in a few operations.

    Args:
        weights: n of the model, each [out, in].
        rank, scale: as of `LowRank`.

    Attributes:
        items: those of `weights`; their tensors are parts of those that this holds. `down` is not set yet.
    """

    def __init__(self, weights: Sequence[Tensor], rank: int, scale: float) -> None:
        self.scale = scale
        (rows, columns), device = weights[0].shape, weights[0].device
        self._base = torch.empty(len(weights), rows, columns, device=device)
        self._down = torch.empty(len(weights), rank, columns, device=device)
        self._up = torch.zeros(len(weights), rows, rank, device=device)
        self.items: list[LowRank] = []
        for weight, base, down, up in zip(weights, self._base, self._down, self._up, strict=True):
            base.copy_(weight.detach())
            self.items.append(LowRank(weight.requires_grad_(), base, nn.Parameter(down), nn.Parameter(up), scale))

    def write(self) -> None:
        """Put the weights as they are now into the model."""
        written = torch.baddbmm(self._base, self._up, self._down, alpha=self.scale)
        torch._foreach_copy_([item.weight for item in self.items], list(written))

    def take_gradients(self) -> None:
        """Move the gradients of the weights to the factors; zeros where a weight has none."""
        found = [item.weight.grad for item in self.items]
        for item in self.items:
            item.weight.grad = None
        if all(gradient is None for gradient in found):
            up, down = torch.zeros_like(self._up), torch.zeros_like(self._down)
        else:
            gradients = torch.stack(
                [
                    torch.zeros_like(item.weight) if gradient is None else gradient
                    for item, gradient in zip(self.items, found, strict=True)
                ]
            ).float()
            up = torch.bmm(gradients, self._down.mT).mul_(self.scale)
            down = torch.bmm(self._up.mT, gradients).mul_(self.scale)
        for item, of_up, of_down in zip(self.items, up, down, strict=True):
            item.up.grad, item.down.grad = of_up, of_down


class TrainedWeights:
    """Low-rank updates of linear layers, and other weights trained whole.

    A step is: `write()`, any number of forwards and backwards of the model, `take_gradients()`, a step of an optimizer
    over `low_rank_parameters()` and `whole_parameters()`.

    Args:
        model: all of its parameters are frozen but those named here.
        ranks: name of a linear layer -> rank of its update.
        whole: names of parameters that are trained whole.
        alpha: scale of an update, times its rank (LoRA's alpha over rank is `alpha_per_rank`).

    Raises:
        ValueError: for a name that the model does not have, or a rank below 1.
    """

    def __init__(
        self, model: nn.Module, ranks: Mapping[str, int], whole: Iterable[str] = (), alpha_per_rank: float = 2.0
    ) -> None:
        self.alpha_per_rank = alpha_per_rank
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        alike: dict[tuple[torch.Size, torch.dtype, torch.device, int], dict[str, Tensor]] = {}
        for name, rank in ranks.items():
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{name!r} is no linear layer of the model.")
            if rank < 1:
                raise ValueError(f"The rank of {name!r} must be at least 1, got {rank}.")
            weight = module.weight
            alike.setdefault((weight.shape, weight.dtype, weight.device, rank), {})[name] = weight
        self._alike: list[AlikeUpdates] = []
        found: dict[str, LowRank] = {}
        for (shape, *_, rank), named in alike.items():
            names, step = list(named), max(HELD // max(shape.numel(), 1), 1)
            for start in range(0, len(names), step):
                some = names[start : start + step]
                updates = AlikeUpdates([named[name] for name in some], rank, alpha_per_rank)
                self._alike.append(updates)
                found.update(zip(some, updates.items, strict=True))
        self.low_rank = {name: found[name] for name in ranks}
        for item in self.low_rank.values():
            nn.init.kaiming_uniform_(item.down, a=math.sqrt(5))  # as PEFT starts
        self.whole: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name in whole:
            if name not in parameters:
                raise ValueError(f"{name!r} is no parameter of the model.")
            weight = parameters[name].requires_grad_()
            self.whole[name] = (weight, nn.Parameter(weight.detach().float().clone()))

    def low_rank_parameters(self) -> list[nn.Parameter]:
        return [part for item in self.low_rank.values() for part in (item.down, item.up)]

    def whole_parameters(self) -> list[nn.Parameter]:
        return [master for _, master in self.whole.values()]

    @torch.no_grad()
    def write(self) -> None:
        """Put the weights as they are now into the model."""
        for updates in self._alike:
            updates.write()
        for weight, master in self.whole.values():
            weight.copy_(master)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the model's gradients to the masters; those of a weight become those of its update's two factors."""
        for updates in self._alike:
            updates.take_gradients()
        for weight, master in self.whole.values():
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by name: `NAME.up`, `NAME.down` and whole parameters."""
        state = {name: master.detach() for name, (_, master) in self.whole.items()}
        for name, item in self.low_rank.items():
            state |= {f"{name}.up": item.up.detach(), f"{name}.down": item.down.detach()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, and write it.

        Raises:
            ValueError: for other names.
        """
        mine = self.state_dict()
        if mine.keys() != state.keys():
            raise ValueError(f"The weights differ: {sorted(mine.keys() ^ state.keys())[:4]}.")
        for name, value in mine.items():
            value.copy_(state[name])
        self.write()


def add_gradients(
    parameters: Iterable[Tensor], outputs: Sequence[Tensor], gradients: Sequence[Tensor | None] | None = None
) -> None:
    """`torch.autograd.backward` that adds to the gradients of all parameters together, not of one after the other.

    Args:
        parameters: the leaves that get gradients; those that need none, and others, stay as they are.
        outputs, gradients: as `torch.autograd.backward` takes them; outputs are scalars where there are no gradients.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    sums: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, gradient in zip(wanted, found, strict=True):
        if gradient is not None and parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None and parameter.grad is not None:
            sums.append(parameter.grad)
            added.append(gradient)
    if sums:
        torch._foreach_add_(sums, added)


def linear_ranks(model: nn.Module, layers: Mapping[int, int], prefix: str = "layers.") -> dict[str, int]:
    """Name of every linear layer inside decoder layer i -> `layers[i]`, routers left out.

    Args:
        layers: decoder layer -> rank; other layers get none.
        prefix: of decoder layers in the names of modules, behind which the number stands.
    """
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and prefix in name and "router_" not in name:
            number = name.rpartition(prefix)[2].partition(".")[0] if name.count(prefix) == 1 else ""
            if number.isdigit() and int(number) in layers:
                ranks[name] = layers[int(number)]
    return ranks
