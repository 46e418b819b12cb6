"""Calls of the native operations with wrong arguments: `main(namespace, first, count)` makes so many.

Call number n has arguments that depend on n alone: right ones, of which up to three were spoilt. It returns, or raises
an error of Python. The output is a file: the first line says which call was the last that began, also of a process that
died; the second, how many calls returned and raised.
"""

from __future__ import annotations

import os
import random
import resource
from typing import Any

import torch
from torch import Tensor

MEMORY = 8 * 2**30  # bytes of addresses: what asks for more raises
HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), -1, 0, 1)
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
)  # fmt: skip
RAISED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, MemoryError, ArithmeticError)


def offsets_of(pick: random.Random, documents: int, least: int) -> Tensor:
    counts = [pick.randint(least, 5) for _ in range(documents)]
    return torch.tensor([0, *counts]).cumsum(0)


def floats(*shape: int, kind: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(kind)


def right(pick: random.Random, name: str) -> dict[str, Any]:
    """Arguments that an operation takes."""
    kind = pick.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64))
    documents, samples, tokens = pick.randint(0, 9), pick.randint(0, 3), pick.randint(0, 4)
    groups, dim, k = pick.randint(1, 3), pick.choice((1, 4, 8, 33)), pick.randint(0, 6)
    if name.startswith("pool_chunks"):
        offsets, size = offsets_of(pick, documents, 0), pick.randint(1, 4)
        chunks = int((-(-offsets.diff() // size)).sum())
        states = [floats(int(offsets[-1]), groups, dim, kind=kind) for _ in range(3)]
        if name == "pool_chunks":
            routing = pick.choice((None, None, torch.int8, torch.float8_e4m3fn))
            values = dict(zip(("keys", "values", "router_keys"), states, strict=True))
            counts = {"token_offsets": offsets, "chunk_size": size, "chunks": chunks}
            return {**values, **counts, "normalize": pick.random() < 0.5, "routing_dtype": routing}
        gradients = floats(chunks, 2, groups, dim, kind=kind), floats(chunks, groups * dim, kind=kind)
        return {"grad_content": gradients[0], "grad_routing_keys": gradients[1], "router_keys": states[0],
                "token_offsets": offsets, "chunk_size": size, "normalize": pick.random() < 0.5}  # fmt: skip
    offsets = offsets_of(pick, documents, 1)
    chunks, width = int(offsets[-1]), groups * dim
    chosen = torch.randint(-1, max(documents, 1), (samples, k)) if documents else torch.full((samples, k), -1)
    if name == "gather_documents":
        scaled = pick.random() < 0.3
        content = floats(chunks, 2, groups, dim, kind=torch.float8_e4m3fn if scaled else kind)
        return {"documents": chosen, "offsets": offsets, "content": content,
                "scales": torch.rand(chunks, 2) if scaled else None, "width": 5 * k, "dtype": None,
                "first": pick.choice((None, None, 0, 2, chunks + 1))}  # fmt: skip
    call = {"queries": floats(samples, tokens, width, kind=kind), "routing_mask": torch.rand(samples, tokens) < 0.7}
    if name == "rescore_documents":
        exact = floats(chunks, width, kind=kind)
        return {**call, "exact_keys": exact, "offsets": offsets, "candidates": chosen, "k": k}
    quantized = pick.choice((None, None, torch.int8, torch.float8_e4m3fn))
    keys = (10 * torch.randn(chunks, width)).to(quantized or kind)
    call |= {"keys": keys, "scales": None if quantized is None else torch.rand(chunks), "offsets": offsets}
    call |= {"alive": pick.choice((None, torch.rand(documents) < 0.5)), "k": k}
    if name == "_route_documents_at":
        call["level"] = pick.choice(("generic", "avx2", "avx512", "amx"))
    return call


def spoilt(pick: random.Random, value: Any) -> Any:
    """A value in the place of a right one."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or value is None:
            return pick.choice((True, None, 3, torch.int8, torch.float64, torch.ones(2)))
        if isinstance(value, int):
            return pick.choice((*HUGE, value + pick.choice((-1, 1)), 1.5, None))
        return pick.choice(("", "none", None, 1, *DTYPES))
    try:
        # What takes no memory takes much where it is copied, or time where it is read.
        return pick.choice(SPOILERS if value.numel() < 2**20 else (resized, without_room))(pick, value)
    except (RuntimeError, ValueError, TypeError, MemoryError, NotImplementedError):  # PyTorch has no such tensor
        return value


def retyped(pick: random.Random, value: Tensor) -> Tensor:
    return value.to(pick.choice(DTYPES))


def resized(pick: random.Random, value: Tensor) -> Tensor:
    shape = list(value.shape)
    if shape:
        place = pick.randrange(len(shape))
        shape[place] = max(0, pick.choice((0, 1, shape[place] - 1, shape[place] + 1, 2 * shape[place])))
    fresh = torch.zeros(shape, dtype=value.dtype)
    return fresh


def reshaped(pick: random.Random, value: Tensor) -> Tensor:
    return pick.choice((value[None], value.flatten(), value.sum() if value.is_floating_point() else value[..., None]))


def without_room(pick: random.Random, value: Tensor) -> Tensor:
    """Sizes beyond all bounds that take no memory: of no numbers, or all of them in one place."""
    shape = [pick.choice((0, 1, 3, 2**34, 2**40)) for _ in value.shape]
    if 0 in shape:
        return torch.empty(shape, dtype=value.dtype)
    return torch.zeros([1] * len(shape), dtype=value.dtype).expand(shape)


def strided(pick: random.Random, value: Tensor) -> Tensor:
    """The same numbers, laid out otherwise."""
    if not value.dim() or not value.numel():
        return value
    place = pick.randrange(value.dim())
    if pick.random() < 0.5:
        return value.movedim(place, 0).contiguous().movedim(0, place)
    return value.repeat_interleave(2, place).index_select(place, torch.arange(2 * value.shape[place]))[
        (slice(None),) * place + (slice(None, None, 2),)
    ]


def misaligned(pick: random.Random, value: Tensor) -> Tensor:
    """The same numbers, at an address that is no multiple of their size."""
    size = value.numel() * value.element_size()
    if not 0 < size < 2**20:
        return value
    memory = bytearray(size + 8)
    shift = pick.randint(1, 7)
    memory[shift : shift + size] = value.contiguous().view(torch.uint8).numpy().tobytes()
    found = torch.frombuffer(memory, dtype=torch.uint8)[shift : shift + size]
    try:
        return torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=shift).view(value.shape)
    except (ValueError, RuntimeError):
        return found.clone().view(value.dtype).view(value.shape)


def numbered(pick: random.Random, value: Tensor) -> Tensor:
    """Some numbers that do not belong there."""
    if not 0 < value.numel() < 2**20:
        return value
    value = value.clone(memory_format=torch.contiguous_format)
    flat = value.view(-1)
    for _ in range(pick.randint(1, 3)):
        place = pick.randrange(len(flat))
        if value.dtype == torch.bool:
            flat.view(torch.uint8)[place] = pick.randrange(256)
        elif value.dtype == torch.int64:
            flat[place] = pick.choice((*HUGE, int(flat[place]) + 1, int(flat[place]) - 1))
        elif value.is_floating_point():
            flat[place] = pick.choice((float("nan"), float("inf"), float("-inf"), -1.0, 1e38))
    return value


def elsewhere(pick: random.Random, value: Tensor) -> Any:
    return pick.choice((value.to("meta"), value.to_sparse(), None, value.tolist() if value.numel() < 9 else 1))


SPOILERS = (retyped, resized, reshaped, without_room, strided, misaligned, numbered, numbered, elsewhere)
NAMES = ("route_documents", "_route_documents_at", "pool_chunks", "pool_chunks_backward", "gather_documents")
REFERENCES = ("route_documents", "pool_chunks", "pool_chunks_backward", "gather_documents", "rescore_documents")


def call_number(number: int, namespace: str) -> tuple[str, dict[str, Any]]:
    pick = random.Random(number)
    torch.manual_seed(number)
    name = pick.choice(NAMES if namespace == "msa_hf" else REFERENCES)
    arguments = right(pick, name)
    for _ in range(pick.choice((0, 1, 1, 1, 2, 3))):
        place = pick.choice(list(arguments))
        arguments[place] = spoilt(pick, arguments[place])
    return name, arguments


def described(arguments: dict[str, Any]) -> str:
    def about(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        numbers = value.tolist() if value.device.type == "cpu" and 0 < value.numel() < 12 else ""
        return f"{list(value.shape)} {value.dtype} {list(value.stride())} {value.device} {numbers}"

    return ", ".join(f"{name}={about(value)}" for name, value in arguments.items())


def main(namespace: str, first: int, count: int) -> None:
    from msa_hf.ops import BACKENDS
    from msa_hf.ops.dispatch import OPERATIONS, load_extension

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if namespace == "msa_hf":
        assert load_extension() is None
    else:
        assert all(BACKENDS["pytorch"].probe(name) is None for name in OPERATIONS)
    returned = raised = 0
    for number in range(first, first + count):
        name, arguments = call_number(number, namespace)
        os.pwrite(1, f"{number:<20}\n".encode(), 0)
        try:
            result = getattr(getattr(torch.ops, namespace), name)(*arguments.values())
            for part in result:  # whatever was returned can be read
                if part.device.type == "cpu" and part.numel() < 2**20:
                    part.contiguous().view(-1).tolist() if part.numel() else None
            returned += 1
        except RAISED as error:
            if "INTERNAL ASSERT" in str(error):
                raise
            raised += 1
    os.pwrite(1, f"{number:<20}\nreturned {returned} raised {raised}\n".encode(), 0)
