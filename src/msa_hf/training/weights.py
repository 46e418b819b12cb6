"""Weights that a training loop of one's own changes, at the speed of plain dense layers.

A model in bfloat16 runs as it is; beside it lie float32 masters of what is trained. Low-rank updates are merged into
the weights before every step instead of being computed beside them: two thin matrix products per layer and batch less,
which in small models cost more than the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
        self.low_rank: dict[str, LowRank] = {}
        for name, rank in ranks.items():
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{name!r} is no linear layer of the model.")
            if rank < 1:
                raise ValueError(f"The rank of {name!r} must be at least 1, got {rank}.")
            weight = module.weight
            down = torch.empty(rank, weight.shape[1], device=weight.device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as PEFT starts
            up = torch.zeros(weight.shape[0], rank, device=weight.device)
            base = weight.detach().float().clone()  # a copy, also of a weight in float32
            self.low_rank[name] = LowRank(
                weight.requires_grad_(), base, nn.Parameter(down), nn.Parameter(up), alpha_per_rank
            )
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
        for item in self.low_rank.values():
            item.weight.copy_(torch.addmm(item.base, item.up, item.down, alpha=item.scale))
        for weight, master in self.whole.values():
            weight.copy_(master)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the model's gradients to the masters; those of a weight become those of its update's two factors."""
        for item in self.low_rank.values():
            if item.weight.grad is None:
                item.up.grad, item.down.grad = torch.zeros_like(item.up), torch.zeros_like(item.down)
                continue
            gradient = item.weight.grad.float()
            item.up.grad = item.scale * (gradient @ item.down.T)
            item.down.grad = item.scale * (item.up.T @ gradient)
            item.weight.grad = None
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
