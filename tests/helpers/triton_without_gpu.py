"""Compiles the kernels that a call would launch, for a GPU that need not be there. Run as a program, because whether
Triton interprets kernels is settled when it is imported:

    python tests/helpers/triton_without_gpu.py [capability, such as 90]
"""

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages")
compiled: dict[str, dict[str, str]] = {}  # kernel and what it was compiled for -> its forms, such as "ptx"
capability = 90


def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In the place of `JITFunction.run`."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
    signature, constants, known = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = known[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    name = f"{kernel.__name__} {list(signature.values())} {known}"
    if name not in compiled:
        source = ASTSource(kernel, signature, constexprs=constants)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        compiled[name] = {form: result.asm[form] for form in ("ttgir", "ptx")}


def calls() -> None:
    """Every operation, in all dtypes that it takes."""
    from msa_hf.ops import quantize_keys
    from msa_hf.ops.attend_token.triton import attend_token
    from msa_hf.ops.gather_documents.triton import gather_documents
    from msa_hf.ops.pool_chunks.triton import pool_chunks, pool_chunks_backward
    from msa_hf.ops.route_documents.triton import route_documents
    from msa_hf.ops.row_products.triton import launch

    floating, narrow = (torch.float32, torch.bfloat16, torch.float16), (torch.int8, torch.float8_e4m3fn)
    offsets = torch.tensor([0, 3, 5])
    for dtype in floating:
        for width in (100, 5000):
            one, three = torch.zeros(1, width, dtype=dtype), torch.zeros(3, width, dtype=dtype)
            for gated in (False, True):
                launch(one, [three] * 2)
                launch(one, [three] * 2, one[0], 1e-6, one[:, : 3 if gated else 6], gated)
        rows, one = torch.zeros(1, 2, 300, 40, dtype=dtype), torch.ones(1, 300, dtype=torch.bool)
        for mask, bias in ((None, None), (one, None), (one, one.float())):
            attend_token(rows[:, :, 0], rows, rows, mask, rows, rows, one, bias, 1.0)
            few = rows[:, :, :9]  # one part
            attend_token(rows[:, :, 0], few, few, None, rows[:, :, :0], rows[:, :, :0], one[:, :0], None, 1.0)
        states = torch.zeros(10, 2, 16, dtype=dtype)
        for routing in (None, *narrow):
            for normalize in (True, False):
                pool_chunks(states, states, states, torch.tensor([0, 4, 10]), 2, 5, normalize, routing)
        for normalize in (True, False):
            pool_chunks_backward(
                states.new_zeros(5, 2, 2, 16), states.new_zeros(5, 32), states, torch.tensor([0, 4, 10]), 2, normalize
            )
        content = torch.zeros(5, 2, 2, 16, dtype=dtype)
        for wanted in floating:
            gather_documents(torch.tensor([[0, 1]]), offsets, content, None, 5, wanted)
            eight_bits = content.to(torch.float8_e4m3fn)
            gather_documents(torch.tensor([[0, 1]]), offsets, eight_bits, torch.ones(5, 2), 5, wanted)
        for batch, tokens, width in ((1, 200, 64), (3, 5, 100)):
            queries, keys = torch.zeros(batch, tokens, width, dtype=dtype), torch.ones(5, width)
            mask = torch.ones(batch, tokens, dtype=torch.bool)
            for kind in floating:
                route_documents(queries, mask, keys.to(kind), None, offsets, None, 1)
            for kind in narrow:
                route_documents(queries, mask, *quantize_keys(keys, kind), offsets, None, 1)


def main() -> None:
    global capability
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else capability
    triton.runtime.jit.JITFunction.run = compile_launch
    calls()
    for name, forms in compiled.items():
        if "'WIDE': False" in name and "arith.addf" not in forms["ttgir"]:
            raise SystemExit(f"tensor cores sum whole rows in {name}")
    print(f"{len(compiled)} kernels compile for sm_{capability}")


if __name__ == "__main__":
    main()
