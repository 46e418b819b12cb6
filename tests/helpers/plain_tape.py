"""Stands for CUDA graphs on the CPU."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import CompileConfig

from msa_hf.model import compiled_msa, recalling_msa, recording_msa
from msa_hf.model.document_rows_msa import ChunkLayout

HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")  # what no graph can hold


@dataclass
class Block:
    """Memory that a part took.

    Attributes:
        whole: all of it.
        users: tensors that lie in it.
    """

    whole: Tensor
    users: list[weakref.ref[Tensor]] = field(default_factory=list)

    def is_free(self) -> bool:
        return all(user() is None for user in self.users)

    def spoil(self) -> None:
        self.whole.fill_(float("nan") if self.whole.is_floating_point() else 1)


class PlainTape(TorchDispatchMode):
    """A tape of operations: played again they read the same tensors, and write to those that they gave before.

    What a CUDA graph does not see, as a number that Python computed, is as lost here as it is there. So is what lies in
    memory that was free when a part was recorded: where the part is played, it may be overwritten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] | None = None
        self.parts = 0
        self.blocks: dict[int, Block] = {}
        self.free: list[Block] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self:
            yield

    def begin(self) -> None:
        self.part, self.free = [], [block for block in self.blocks.values() if block.is_free()]

    def end(self) -> Callable[[], None]:
        part, self.part, done, free = self.part, None, [], self.free
        assert part is not None
        self.parts += 1

        def step() -> None:
            if not done:  # it ran while it was recorded, as a graph does not
                done.append(True)
                return
            for block in free:
                block.spoil()
            for operation, args, kwargs, result in part:
                again = operation(*args, **kwargs)
                for place, item in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != item.data_ptr():
                        place.copy_(item)
                    elif operation.namespace == "c10d" and not isinstance(place, Tensor):
                        dist.Work.unbox(item).wait()  # a device would wait for an exchange

        return step

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.part is not None and func.namespace != recalling_msa.NAMESPACE:
            assert str(func).split(".")[1] not in HOST, f"{func} within a recording"
            self._note(result, [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)])
            # Other tensors over the same memory: that this holds some keeps nothing from being free.
            self.part.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs, result)))
        return result

    def _note(self, result: Any, given: list[Tensor]) -> None:
        """Note which memory is new, and who lies in which."""
        known = {item.untyped_storage()._cdata for item in given}
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                memory = item.untyped_storage()
                if memory._cdata not in known and memory._cdata not in self.blocks:
                    whole = torch.empty(0, dtype=item.dtype).set_(memory)
                    self.blocks[memory._cdata] = Block(whole)
                if memory._cdata in self.blocks:
                    self.blocks[memory._cdata].users.append(weakref.ref(item))


def use_tapes(monkeypatch: pytest.MonkeyPatch) -> list[PlainTape]:
    """Have runs with a static cache recorded on the CPU; the tapes in use."""
    made: list[PlainTape] = []

    def tape_for(device: torch.device) -> PlainTape:
        made.append(PlainTape())
        return made[-1]

    monkeypatch.setattr(recording_msa, "tape_for", tape_for)
    monkeypatch.setattr(compiled_msa, "is_recordable", lambda model: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    # As on a GPU.
    monkeypatch.setattr(ChunkLayout, "width_for", lambda layout, chosen: layout.known_width(*chosen.shape))
    return made


def recorded() -> dict[str, Any]:
    """Options of `generate` with which its runs are recorded."""
    config = CompileConfig()
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}
